"""The command that stores initial states."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fibopolicy.utils.files import check_output


@dataclass(frozen=True)
class InitStates:
    """Store initial states of a task: what `evaluate --init-states FILE` restores, so
    that everyone runs the same episodes.

    Example: fibopolicy init-states Lift-v0 --episodes 200 --seed 1 --out
    lift_init_states.npz
    """

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")]
    """Task id, or the dataset whose task, cameras and rendering are meant."""
    episodes: int
    """How many."""
    out: Path
    """File to write."""
    seed: int = 0
    """Of the whole set; episode i depends on it and on i alone."""
    cameras: tuple[str, ...] | None = None
    """Cameras whose first frames are to be verified; all by default."""
    image_size: int | None = None
    """Height and width of the images, pixels; the dataset's, or 84, by default."""
    quality: Literal["fast", "full"] | None = None
    """Render quality; the dataset's, or fast, by default."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.envs import from_env_args, make
        from fibopolicy.evaluation.init_states import make_init_states, save_init_states

        check_output(self.out, self.overwrite)
        options = {"cameras": self.cameras, "image_size": self.image_size, "quality": self.quality}
        options = {name: value for name, value in options.items() if value is not None}
        if Path(self.task).suffix in (".hdf5", ".h5"):
            from fibopolicy.datasets import DemoFile

            with DemoFile(Path(self.task)) as file:
                env_args = file.env_args
            env = from_env_args(env_args, **options)
        else:
            env = make(self.task, **options)
        with env:
            save_init_states(
                make_init_states(env, self.episodes, self.seed), self.out, overwrite=self.overwrite
            )
            print(
                f"{self.out}: {self.episodes} initial states of {env.task_id},"
                f" {self.out.stat().st_size / 1000:.0f} kB"
            )
