"""Commands that train with robomimic and write its checkpoints."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fibopolicy.cli.options import RUN_DIRECTORY, Output
from fibopolicy.errors import quoted


@dataclass(frozen=True)
class RobomimicTrain:
    """Run robomimic's own training with encoders of this library.

    Example: fibopolicy robomimic train --config bc_rnn_gmm_vit.json --dataset lift.hdf5
    """

    config: Path
    """JSON configuration of robomimic."""
    dataset: Path | None = None
    """HDF5 file; replaces train.data of the configuration."""
    name: str | None = None
    """Name of the experiment; replaces experiment.name."""
    out: Path | None = None
    """Folder of experiments; replaces train.output_dir."""
    overwrite: bool = False
    """Replace the runs of an experiment of the same name."""

    def run(self) -> None:
        from fibopolicy.robomimic.train import TrainingError, train_robomimic

        warnings.filterwarnings("ignore", category=UserWarning, module="robomimic|torch")
        try:
            done = train_robomimic(
                self.config,
                dataset=self.dataset,
                name=self.name,
                out=self.out,
                overwrite=self.overwrite,
            )
        except TrainingError as error:
            print(f"fibopolicy: training failed: {error}", file=sys.stderr)
            sys.exit(1)
        print(f"{done.folder}: trained, {len(done.checkpoints)} checkpoints")
        if done.checkpoints:
            print(f"next: fibopolicy evaluate {quoted(done.checkpoints[-1])}")


@dataclass(frozen=True, kw_only=True)
class RobomimicExport(Output):
    """Write the policy of a run as a robomimic checkpoint. It must be one of
    bc_gaussian, bc_gmm, bc_rnn_gmm and bc_transformer_gmm.

    Example: fibopolicy robomimic export runs/lift_rnn --out lift_rnn.pth
    """

    directory: RUN_DIRECTORY
    """Run directory."""
    checkpoint: Literal["ema", "model"] = "ema"
    """Weights to export: the moving average or the last ones."""

    def run(self) -> None:
        from fibopolicy.robomimic.export import export

        path = export(
            self.directory, self.out, checkpoint=self.checkpoint, overwrite=self.overwrite
        )
        print(f"{path}: a robomimic checkpoint")
        print("import fibopolicy.robomimic.encoder_core before robomimic loads it")


@dataclass(frozen=True)
class RobomimicCommand:
    """Train with robomimic, or export a policy to it.

    Example: fibopolicy robomimic export runs/lift_rnn --out lift_rnn.pth
    """

    what: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[RobomimicTrain, tyro.conf.subcommand("train")]
            | Annotated[RobomimicExport, tyro.conf.subcommand("export")]
        ]
    ]

    def run(self) -> None:
        self.what.run()
