"""The verb that hands a policy to robomimic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Export:
    """Write a run's policy as a robomimic checkpoint; its head must be one of
    robomimic's.

    Example: fibopolicy export runs/lift_rnn --out lift_rnn.pth
    """

    directory: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Run directory."""
    out: Path
    """File to write, .pth."""
    weights: str = "ema"
    """"ema" or "model"."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.robomimic.export import export

        path = export(self.directory, self.out, weights=self.weights, overwrite=self.overwrite)
        print(
            f"{path}: a robomimic checkpoint; import fibopolicy.robomimic.encoder_core before"
            " robomimic loads it"
        )
