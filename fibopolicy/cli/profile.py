"""The command that times the parts of this library on your machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from fibopolicy.errors import UserError
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.training.config import OptimizerConfig, TrainConfig
from fibopolicy.utils.files import check_output
from fibopolicy.utils.system import resolve_device


@dataclass(frozen=True)
class _Timed:
    turns: int = 10
    """Timed turns."""
    device: str = "cpu"
    """Where to run."""
    out: Path | None = None
    """JSON file to write."""
    overwrite: bool = False
    """Replace an existing file."""

    def check(self) -> None:
        if self.turns < 1:
            raise UserError(f"turns must be at least 1, got {self.turns}")
        resolve_device(self.device)
        if self.out is not None:
            check_output(self.out, self.overwrite)

    def keep(self, theme: str, timings: Sequence[Any]) -> None:
        from fibopolicy.attention.profile import Report

        if self.out is not None:
            Report(theme, timings).write(self.out)


@dataclass(frozen=True)
class ProfileAttention(_Timed):
    """Sparse attention against dense, side by side in turns; with --out, a picture of
    the crossover over N as well.

    Example: fibopolicy profile attention --out attention.json
    """

    flex: bool = False
    """Also time FlexAttention, which torch compiles first: minutes, and a C++ compiler on CPUs, where it has no backward."""  # noqa: E501

    def run(self) -> None:
        from fibopolicy.attention.plot import draw_crossover
        from fibopolicy.attention.profile import profile_attention, table

        self.check()
        report = profile_attention(turns=self.turns, device=self.device, flex=self.flex)
        print(table(report))
        if self.out is not None:
            report.write(self.out)
            draw_crossover(report, self.out.with_suffix(".png"))


@dataclass(frozen=True)
class ProfileEncoder(_Timed):
    """A whole ViT-S: dense, with Fibottention, and without attention.

    Example: fibopolicy profile encoder
    """

    def run(self) -> None:
        from fibopolicy.encoders.profile import profile_encoder, table

        self.check()
        report = profile_encoder(turns=self.turns, device=self.device)
        print(table(report))
        if self.out is not None:
            report.write(self.out)


@dataclass(frozen=True)
class _OnData(_Timed):
    dataset: tuple[Path, ...] = ()
    """Robomimic HDF5 file, or several."""
    dataset_weights: tuple[float, ...] | None = None
    """With several files: the share of each in every batch."""
    cameras: tuple[str, ...] | None = None
    """Image keys; all of the file's by default."""
    vectors: tuple[str, ...] | None = None
    """Vector keys; the proprioception by default."""
    filter_key: str | None = None
    """Which demos; by default "train" where a file has it, else all."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Decides the form of windows, and for `profile train` the network."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Decides the size of batches."""

    def config(self) -> TrainConfig:
        self.check()
        if not self.dataset:
            raise UserError("name a file to profile with --dataset")
        return TrainConfig(
            self.dataset,
            Path(),  # nothing is written there
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
    """Ready batches: samples/s, MB/s, what each part of a batch takes, and the building
    of the frame cache.

    Example: fibopolicy profile data --dataset lift.hdf5 --batch-size 64
    """

    turns: int = 200
    """Timed batches."""

    def run(self) -> None:
        from fibopolicy.datasets.profile import profile_data, table
        from fibopolicy.training.data import open_dataset

        config = self.config()
        profile = profile_data(
            open_dataset(config), batch_size=config.optimizer.batch_size, turns=self.turns
        )
        print(table(profile))
        self.keep("data", [profile])


@dataclass(frozen=True)
class ProfileTrain(_OnData):
    """The parts of a training step and their shares: data, every camera's encoder, the
    rest of the policy, backward, optimizer, average of the weights.

    Example: fibopolicy profile train --dataset lift.hdf5 --encoder resnet18
    """

    def run(self) -> None:
        from fibopolicy.training.profile import profile_train, table

        profile = profile_train(self.config(), turns=self.turns)
        print(table(profile))
        self.keep("train", [profile])


@dataclass(frozen=True)
class Profile:
    """Time attention, an encoder, batches of data or training steps on this machine.

    Example: fibopolicy profile train --dataset lift.hdf5
    """

    what: Annotated[
        tyro.conf.OmitSubcommandPrefixes[
            Annotated[ProfileAttention, tyro.conf.subcommand("attention")]
            | Annotated[ProfileEncoder, tyro.conf.subcommand("encoder")]
            | Annotated[tyro.conf.OmitArgPrefixes[ProfileData], tyro.conf.subcommand("data")]
            | Annotated[tyro.conf.OmitArgPrefixes[ProfileTrain], tyro.conf.subcommand("train")]
        ],
        tyro.conf.arg(name=""),
    ]
    """What to time."""

    def run(self) -> None:
        self.what.run()
