"""Commands that time parts of this library and draw attention patterns."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from fibopolicy.cli.options import RUN_DIRECTORY, OptionalOutput
from fibopolicy.errors import UserError
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.training.config import OptimizerConfig, TrainConfig
from fibopolicy.utils.files import check_output
from fibopolicy.utils.system import resolve_device

if TYPE_CHECKING:
    from fibopolicy.attention.profile import Report


@dataclass(frozen=True, kw_only=True)
class _Timed(OptionalOutput):
    turns: int = 10
    """Timed turns."""
    device: str = "cpu"
    """Device to run on: "cpu", "cuda", ..."""

    def check(self) -> None:
        if self.turns < 1:
            raise UserError(f"turns must be at least 1, got {self.turns}")
        resolve_device(self.device)
        if self.out is not None:
            check_output(self.out, self.overwrite)

    def save(self, report: Report) -> None:
        if self.out is not None:
            report.write(self.out)


@dataclass(frozen=True)
class ProfileAttention(_Timed):
    """Time sparse and dense attention, interleaved; with --out, also plot the speed-up
    against N.

    Example: fibopolicy profile attention --out attention.json
    """

    flex: bool = False
    """Also time FlexAttention. Its compilation takes minutes. On CPUs it needs a C++
    compiler and has no backward pass."""

    def run(self) -> None:
        from fibopolicy.attention.plot import plot_crossover
        from fibopolicy.attention.profile import attention_table, profile_attention

        self.check()
        plot = None if self.out is None else self.out.with_suffix(".png")
        if plot is not None:
            if plot == self.out:
                raise UserError(f"{self.out}: is to hold results as JSON; choose another ending")
            check_output(plot, self.overwrite)
        report = profile_attention(turns=self.turns, device=self.device, flex=self.flex)
        print(attention_table(report))
        self.save(report)
        if plot is not None:
            plot_crossover(report, plot)


@dataclass(frozen=True)
class ProfileEncoder(_Timed):
    """Time a ViT-S: dense, with Fibottention, and without attention.

    Example: fibopolicy profile encoder
    """

    def run(self) -> None:
        from fibopolicy.encoders.profile import encoder_table, profile_encoder

        self.check()
        report = profile_encoder(turns=self.turns, device=self.device)
        print(encoder_table(report))
        self.save(report)


@dataclass(frozen=True)
class _OnData(_Timed):
    dataset: tuple[Path, ...] = ()
    """Robomimic HDF5 file, or several."""
    dataset_weights: tuple[float, ...] | None = None
    """Share of each file in every batch, if there are several."""
    cameras: tuple[str, ...] | None = None
    """Image keys; all of the file's by default."""
    vectors: tuple[str, ...] | None = None
    """Vector keys; the proprioception by default."""
    filter_key: str | None = None
    """Demos to use; by default "train" if a file has it, else all."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """The shape of windows, and for `profile train` the network."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The size of batches."""

    def config(self) -> TrainConfig:
        self.check()
        if not self.dataset:
            raise UserError("name a file to profile with --dataset")
        return TrainConfig(
            self.dataset,
            Path(),  # nothing is written
            dataset_weights=self.dataset_weights,
            cameras=self.cameras,
            vectors=self.vectors,
            filter_key=self.filter_key,
            policy=self.policy,
            optimizer=self.optimizer,
            device=self.device,
        )


@dataclass(frozen=True)
class ProfileData(_OnData):
    """Time batches of data: samples/s, MB/s, each part of a batch, and the building of
    the frame cache.

    Example: fibopolicy profile data --dataset lift.hdf5 --batch-size 64
    """

    turns: int = 200
    """Timed batches."""

    def run(self) -> None:
        from fibopolicy.attention.profile import Report
        from fibopolicy.datasets.profile import data_table, profile_data
        from fibopolicy.training.data import open_dataset

        config = self.config()
        profile = profile_data(
            open_dataset(config), batch_size=config.optimizer.batch_size, turns=self.turns
        )
        print(data_table(profile))
        self.save(Report("data", [profile]))


@dataclass(frozen=True)
class ProfileTrain(_OnData):
    """Time a training step and its parts: data, the encoder of each camera, the rest of
    the policy, backward pass, optimizer, and moving average of the weights.

    Example: fibopolicy profile train --dataset lift.hdf5 --encoder resnet18
    """

    def run(self) -> None:
        from fibopolicy.attention.profile import Report
        from fibopolicy.training.profile import profile_train, train_table

        profile = profile_train(self.config(), turns=self.turns)
        print(train_table(profile))
        self.save(Report("train", [profile]))


@dataclass(frozen=True, kw_only=True)
class ProfileAct(OptionalOutput):
    """Time the actions of a trained policy on a robot, one observation at a time, and print
    the control frequency that it sustains.

    Example: fibopolicy profile act runs/lift
    """

    path: RUN_DIRECTORY
    """Run directory of the policy, or a robomimic checkpoint (.pth)."""
    checkpoint: str = "ema"
    """"ema", "model", or one of the best, such as best/step_001000."""
    turns: int = 500
    """Timed calls of the policy."""
    device: str | None = None
    """Device to run on, "cpu", "cuda", ...; by default a GPU if there is one."""
    threads: int = 1
    """Torch threads during a call."""

    def run(self) -> None:
        from fibopolicy.attention.profile import Report
        from fibopolicy.evaluation.profile import profile_act, summary

        if self.turns < 1:
            raise UserError(f"turns must be at least 1, got {self.turns}")
        if self.out is not None:
            check_output(self.out, self.overwrite)
        profile = profile_act(
            self.path,
            checkpoint=self.checkpoint,
            device=self.device,
            threads=self.threads,
            turns=self.turns,
        )
        print(summary(profile))
        if self.out is not None:
            Report("act", [profile]).write(self.out)


@dataclass(frozen=True)
class Profile:
    """Time attention, an encoder, batches of data, training steps or a policy's actions on
    this machine.

    Example: fibopolicy profile train --dataset lift.hdf5
    """

    what: Annotated[
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[ProfileAttention, tyro.conf.subcommand("attention")]
            | Annotated[ProfileEncoder, tyro.conf.subcommand("encoder")]
            | Annotated[tyro.conf.OmitArgPrefixes[ProfileData], tyro.conf.subcommand("data")]
            | Annotated[tyro.conf.OmitArgPrefixes[ProfileTrain], tyro.conf.subcommand("train")]
            | Annotated[ProfileAct, tyro.conf.subcommand("act")]
        ],
        tyro.conf.arg(name=""),
    ]

    def run(self) -> None:
        self.what.run()


@dataclass(frozen=True)
class PlotPattern:
    """Draw the token pairs that each head keeps.

    Example: fibopolicy plot-pattern --tokens 196 --heads 6 --out pattern.png
    """

    tokens: int = 196
    """Patch tokens."""
    heads: int = 6
    """Attention heads."""
    layer: int = 0
    """Layer, from 0; each permutes the heads differently."""
    modified: bool = False
    """Draw the variant with two more offsets per head."""
    out: Path = Path("pattern.png")
    """PNG file to write."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.attention import FibottentionPattern
        from fibopolicy.attention.plot import plot_pattern

        check_output(self.out, self.overwrite)
        # a larger picture would fill the memory and show nothing
        if self.tokens > 4096 or self.heads > 256:
            raise UserError(
                f"at most 4096 tokens and 256 heads can be drawn, got {self.tokens} and"
                f" {self.heads}"
            )
        pattern = FibottentionPattern(
            self.tokens, self.heads, modified=self.modified, layer=self.layer
        )
        plot_pattern(pattern, self.out)
        print(
            f"{self.out}: {self.heads} heads keep {100 * pattern.density:.2f} % of the patch pairs"
        )
