"""The verb that trains."""

from __future__ import annotations

from dataclasses import dataclass

import tyro

from fibopolicy.training.config import TrainConfig


@dataclass(frozen=True)
class Train:
    """Train a policy on demonstrations.

    Example: fibopolicy train --dataset lift.hdf5 --out runs/lift --encoder vit_tiny --encoder-options depth 4 pool mean
    """

    config: tyro.conf.OmitArgPrefixes[TrainConfig]
    resume: bool = False
    """Go on with a run that was stopped; it ends with the same weights as one that was not."""
    overwrite: bool = False
    """Replace an existing run."""

    def run(self) -> None:
        from fibopolicy.training.loop import train

        done = train(self.config, resume=self.resume, overwrite=self.overwrite)
        print(f"{self.config.out}: trained to step {done.step}\n{done.summary.table()}")
        print(f"next: fibopolicy evaluate {self.config.out} --episodes 50")
