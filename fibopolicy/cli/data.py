"""The verbs that make and look at demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Collect:
    """Record demonstrations of a task's scripted expert in a robomimic HDF5 file.

    Example: fibopolicy collect Lift-v0 --episodes 400 --out lift.hdf5
    """

    task: tyro.conf.Positional[str]
    """Task id, e.g. fibopolicy/Lift-v0, or short: Lift-v0."""
    episodes: int
    """Successful episodes to record."""
    out: Path
    """File to write."""
    cameras: tuple[str, ...] | None = None
    """Cameras to render; all of the task's by default, and none at all after a bare --cameras."""
    image_size: int = 84
    """Height and width of the images, pixels."""
    quality: Literal["fast", "full"] = "fast"
    """Render quality; evaluation uses the one stored here."""
    noise: float | None = None
    """Standard deviation of noise on executed actions, action units (0.2 in built-in tasks, 0.1 in robosuite's by default);
    recorded actions stay clean."""
    seed: int = 0
    """Decides layouts and noise."""
    workers: int | None = None
    """Processes; as many as cores by default. The file does not depend on it."""
    resume: bool = False
    """Go on with a collection that was stopped."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets.collect import Plan, collect

        plan = Plan(self.task, self.cameras, self.image_size, self.quality, self.seed, self.noise)
        done = collect(plan, self.episodes, self.out, workers=self.workers, overwrite=self.overwrite, resume=self.resume)
        print(
            f"{done.path}: {done.demos} demos, {done.steps} steps; the expert succeeded in {done.demos} of {done.tried} episodes"
        )


@dataclass(frozen=True)
class Fetch:
    """Download real demonstrations and verify them.

    Example: fibopolicy fetch lift-human
    """

    name: tyro.conf.Positional[str]
    """What to fetch: lift-human."""
    out: Path | None = None
    """File to write; in the cache folder by default."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets import SOURCES, fetch

        path = fetch(self.name, self.out, overwrite=self.overwrite)
        print(f"{path}: {SOURCES[self.name].summary}")


@dataclass(frozen=True)
class Inspect:
    """Print what a robomimic HDF5 file holds, and warn of what is odd.

    Example: fibopolicy inspect lift.hdf5
    """

    file: tyro.conf.Positional[Path]
    """The file."""

    def run(self) -> None:
        from fibopolicy.datasets import inspect

        print(inspect(self.file))


@dataclass(frozen=True)
class Split:
    """Copy a file, adding the filter keys "train" and "valid".

    Example: fibopolicy split mine.hdf5 --out mine_split.hdf5 --valid 0.1
    """

    file: tyro.conf.Positional[Path]
    """The file to copy; it is not changed."""
    out: Path
    """File to write."""
    valid: float = 0.1
    """Share of the demos that are held out."""
    seed: int = 0
    """Decides which."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets import split

        keys = split(self.file, self.out, self.valid, self.seed, overwrite=self.overwrite)
        print(f"{self.out}: " + ", ".join(f"{name} {len(demos)} demos" for name, demos in keys.items()))
