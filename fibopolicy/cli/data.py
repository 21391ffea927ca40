"""Commands that make, check and show demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fibopolicy.cli.options import Demos, OptionalOutput, Output, RecordingOptions, Workers
from fibopolicy.errors import UserError, quoted
from fibopolicy.evaluation.config import VIDEO_SIZE, check_video_size
from fibopolicy.utils.files import check_output


@dataclass(frozen=True, kw_only=True)
class Collect(RecordingOptions):
    """Record demonstrations of a task's scripted expert in a robomimic HDF5 file.

    Example: fibopolicy collect Lift-v0 --episodes 400 --out lift.hdf5
    """

    task: Annotated[Positional[str], arg(metavar="TASK")]
    """Task id, e.g. fibopolicy/Lift-v0, or short: Lift-v0; or module:class of a custom
    task."""
    episodes: int
    """Successful episodes to record."""
    cameras: tuple[str, ...] | None = None
    """Cameras to render; by default all of the task's. A bare --cameras renders none."""
    image_size: int = 84
    """Height and width of the images, pixels."""
    quality: Literal["fast", "full"] = "fast"
    """Render quality; it is stored in the file, and evaluation uses it."""
    noise: float | None = None
    """Standard deviation of noise on executed actions, action units; by default 0.2 in
    built-in tasks and 0.1 in robosuite's. Recorded actions have no noise."""
    seed: int = 0
    """Seed of layouts and noise."""

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
            f" {done.demos} of {done.attempts} episodes"
        )


@dataclass(frozen=True, kw_only=True)
class Generate(RecordingOptions, Demos):
    """Generate many demonstrations from a few: transfer them to new scenes of a
    robosuite task, and keep the successes. The output has no images.

    Example: fibopolicy generate lift_human.hdf5 --demos 500 --out lift_500.hdf5
    """

    filter_key: str | None = None
    """Demos to generate from, or "all"; by default "train", else all."""
    demos: int
    """Successful demonstrations to write."""
    task: str | None = None
    """Robosuite's name of the task, if the file may be of several variants, e.g.
    PickPlaceCan of PickPlace."""
    origin: str | None = None
    """Who made the source's demos, if the file does not say, e.g. human."""
    noise: float = 0.05
    """Standard deviation of noise on executed position actions, action units. Recorded
    actions have no noise."""
    seed: int = 0
    """Seed of scenes and noise."""

    def run(self) -> None:
        from fibopolicy.datasets.generate import generate
        from fibopolicy.statistics.rates import wilson

        done = generate(**asdict(self))
        rate = wilson(done.demos, done.attempts)
        print(
            f"{done.path}: {done.demos} demos, {done.steps} steps; generation succeeded in {rate}"
            " attempts"
        )


@dataclass(frozen=True)
class Download:
    """Download demonstrations that others published, verify them and show what they
    are. Run it again to resume.

    Example: fibopolicy download list

    Example: fibopolicy download robomimic/lift/ph --out lift.hdf5
    """

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """robomimic/TASK/ph, mimicgen/SET/TASK, libero/SUITE/TASK, libero/SUITE for all its
    tasks, or others such as lift-human; list shows all names. libero-assets is what
    LIBERO's simulation needs."""
    out: Path | None = None
    """File to write, or folder for several files; in the cache folder by default."""
    type: str | None = None
    """Which file of a dataset of several: low_dim or demo of robomimic's, for example."""
    accept_licence: bool = False
    """Agree to a licence that forbids commercial use, such as MimicGen's."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        from fibopolicy.datasets import download, inspect
        from fibopolicy.datasets.download import (
            LIBERO_ASSETS,
            list_datasets,
            names_of,
            next_command,
        )
        from fibopolicy.datasets.libero_assets import download_libero_assets

        if self.name == "list":
            print(list_datasets())
            return
        if self.name == LIBERO_ASSETS:
            if self.out is not None:
                raise UserError(
                    "libero-assets: goes to the cache folder; leave out --out, and set"
                    " XDG_CACHE_HOME to move that folder"
                )
            home = download_libero_assets(overwrite=self.overwrite)
            print(f"{home}: LIBERO's meshes, and 50 initial states for each of its tasks")
            return
        names = names_of(self.name)
        for name in names:
            out = self.out
            if out is not None and names != [self.name]:
                out /= f"{name.removeprefix(f'{self.name}/').replace('/', '_')}.hdf5"
            path = download(
                name, out, self.overwrite, type=self.type, accept_licence=self.accept_licence
            )
            print(f"{inspect(path)}\nnext    {next_command(path, name)}\n", flush=True)


@dataclass(frozen=True, kw_only=True)
class Import(Output):
    """Import demonstrations of other projects into one robomimic HDF5 file: a folder of
    ALOHA's episode files, a LeRobot dataset of version 3, or any HDF5 file that `inspect`
    reads.

    Example: fibopolicy import aloha_episodes --out aloha.hdf5 --image-size 120 160
    --fps 50

    Example: fibopolicy import hub:lerobot/pusht --out pusht.hdf5
    """

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """A file or folder, or hub:OWNER/NAME for a LeRobot dataset on the Hugging Face Hub, with
    @REVISION for another revision than its newest."""
    format: str | None = None
    """The format of SOURCE, hdf5 or lerobot; by default it is recognised."""
    cameras: tuple[str, ...] | None = None
    """Cameras to import, by their keys in the new file; by default all."""
    image_size: int | tuple[int, int] | None = None
    """Height and width to which larger frames are resized, pixels; by default they keep
    their size."""
    bgr: bool = False
    """Swap red and blue, for frames that OpenCV stored in its own order."""
    fps: float | None = None
    """Control steps a second, to be kept in the file."""
    map: tuple[str, ...] = ()
    """Arrays to read by another key, as PATH=KEY; see `train`."""

    def run(self) -> None:
        from fibopolicy.datasets.importing import import_demos
        from fibopolicy.datasets.layout import parse_map

        size = self.image_size
        done = import_demos(
            self.source,
            self.out,
            format=self.format,
            cameras=self.cameras,
            image_size=(size, size) if isinstance(size, int) else size,
            bgr=self.bgr,
            fps=self.fps,
            mapped=parse_map(self.map),
            overwrite=self.overwrite,
        )
        for key, how in done.converted.items():
            print(f"converted {key}: {how}")
        for key, reason in done.left_out.items():
            print(f"left out {key}: {reason}")
        print(f"{done.path}: {done.demos} demos, {done.steps} steps")
        print(f"next: fibopolicy train --dataset {quoted(done.path)} --out RUN")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Export demonstrations in HDF5 as a LeRobot dataset of version 3. Needs the extra
    lerobot, not lerobot itself.

    Example: fibopolicy export lift.hdf5 --lerobot lift_lerobot
    """

    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE")]
    """One or more files, or folders of ALOHA's episodes, with the same observations, actions
    and control frequency."""
    lerobot: Path
    """Folder to write."""
    filter_key: str | None = None
    """Use only the demos of this filter key."""
    cameras: tuple[str, ...] | None = None
    """Cameras to export; all by default. A bare --cameras exports none."""
    images: bool = False
    """Store frames as PNG, without loss, instead of H.264 videos."""
    instruction: str | None = None
    """What the robot does in words, for demos without a language instruction; the name of the
    task by default."""
    fps: float | None = None
    """Control steps a second; by default as the file or its task has it."""
    map: tuple[str, ...] = ()
    """Arrays to read by another key, as PATH=KEY; see `train`."""

    def run(self) -> None:
        from fibopolicy.datasets.layout import parse_map
        from fibopolicy.datasets.lerobot_export import export_lerobot

        done = export_lerobot(
            self.files,
            self.lerobot,
            fps=self.fps,
            instruction=self.instruction,
            filter_key=self.filter_key,
            cameras=self.cameras,
            images=self.images,
            mapped=parse_map(self.map),
        )
        for feature, keys in done.sources.items():
            print(f"{feature}: {', '.join(keys)}")
        for key, reason in done.left_out.items():
            print(f"left out {key}: {reason}")
        print(
            f"{done.path}: {done.episodes} episodes, {done.steps} steps, {done.fps:g} frames a"
            " second"
        )


@dataclass(frozen=True)
class Inspect:
    """Print the contents of a robomimic HDF5 file, with warnings, and write a page that
    shows the demonstrations, the worst first.

    Example: fibopolicy inspect lift.hdf5

    Example: fibopolicy inspect lift.hdf5 --out lift.html
    """

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """The file."""
    map: tuple[str, ...] = ()
    """Arrays to read by another key, as PATH=KEY; see `train`."""

    out: Path | None = None
    """HTML page to write: videos, lengths, actions, proprioception, and a quality score of
    each demo with its reasons."""
    overwrite: bool = False
    """Replace an existing page."""

    def run(self) -> None:
        from fibopolicy.datasets import inspect
        from fibopolicy.datasets.layout import parse_map

        if self.out is not None:
            check_output(self.out, self.overwrite, [self.file])
        print(inspect(self.file, parse_map(self.map)), flush=True)
        if self.out is not None:
            from fibopolicy.report.dataset import write_dataset_page

            write_dataset_page(self.file, self.out, parse_map(self.map))
            print(f"page    {self.out}")


@dataclass(frozen=True, kw_only=True)
class Split(Output):
    """Copy a file and add the filter keys "train" and "valid".

    Example: fibopolicy split mine.hdf5 --out mine_split.hdf5 --valid-fraction 0.1

    Example: fibopolicy split mine.hdf5 --out best.hdf5 --drop-worst 0.1
    """

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """The file to copy; it is not changed."""
    valid_fraction: float = 0.1
    """Share of the demos that are held out."""
    seed: int = 0
    """Seed of the random split."""
    drop_worst: float = 0
    """Number of demos, or below 1 their share, that neither key names because their
    quality scores are the lowest; the key "worst" names them. `inspect --out` shows the
    scores."""

    def run(self) -> None:
        from fibopolicy.datasets import split

        keys = split(
            self.file,
            self.out,
            self.valid_fraction,
            self.seed,
            drop_worst=self.drop_worst,
            overwrite=self.overwrite,
        )
        counts = ", ".join(f"{name} {len(demos)} demos" for name, demos in keys.items())
        print(f"{self.out}: {counts}")


@dataclass(frozen=True, kw_only=True)
class Render(RecordingOptions, Demos):
    """Render new images for demonstrations: restore each stored state and render it.
    The file needs states, not observations.

    Example: fibopolicy render states_only.hdf5 --out images.hdf5
    """

    cameras: tuple[str, ...] | None = None
    """Cameras to render; those that the file names by default, else the task's."""
    image_size: int | None = None
    """Height and width of the images, pixels; the file's by default, else 84."""
    quality: Literal["fast", "full"] = "fast"
    """Render quality, fast without shadows, reflections and multisampling; it is stored,
    and evaluation uses it."""

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
            print(f"left out, not rendered: {', '.join(done.dropped)}; choose with --cameras")
        cameras = ", ".join(done.cameras) or "no camera"
        print(f"{done.path}: {done.demos} demos, {done.steps} steps, seen by {cameras}")


@dataclass(frozen=True, kw_only=True)
class Replay(Workers, Demos, OptionalOutput):
    """Replay demonstrations open loop from their initial states, to check that data and
    simulator match.

    Example: fibopolicy replay lift_human.hdf5

    Example: fibopolicy replay lift_human.hdf5 --video demos.mp4 --video-demos demo_3
    """

    video: Path | None = None
    """mp4 file to write, in which recorded demos play side by side; each is drawn from
    its states."""
    video_demos: tuple[str, ...] = ()
    """Demos in the video; by default the first six, those whose replay fails before the
    others."""
    video_cameras: tuple[str, ...] | None = None
    """Cameras of the video, shown side by side; those of the stored images by default,
    else the task's."""
    video_size: int = VIDEO_SIZE
    """Height of each view in the video, pixels."""

    def run(self) -> None:
        from fibopolicy.datasets import DemoFile
        from fibopolicy.datasets.replay import replay, replay_table, write_replay
        from fibopolicy.statistics.rates import wilson

        check_video_size(self.video_size)
        if self.video is not None and self.video.suffix != ".mp4":
            raise UserError(f"{self.video}: is to be a video, expected a name that ends in .mp4")
        for path in (self.out, self.video):
            if path is not None:
                check_output(path, self.overwrite, [self.file])
        if self.video is not None and self.video_demos:
            with DemoFile(self.file, skip_corrupt=self.skip_corrupt) as file:
                for demo in self.video_demos:
                    file.length(demo)
        done = replay(
            self.file,
            filter_key=self.filter_key,
            workers=self.workers,
            skip_corrupt=self.skip_corrupt,
        )
        rate = wilson(done.successes, len(done.demos))
        print(f"{replay_table(done)}\nsuccess {rate} (95 % Wilson interval)")
        if self.out is not None:
            interval = {"value": rate.value, "low": rate.low, "high": rate.high, "confidence": 0.95}
            write_replay(self.out, done, interval)
        if self.video is not None:
            self._write_video(
                self.video, [row.demo for row in sorted(done.demos, key=lambda r: r.success)]
            )

    def _write_video(self, path: Path, replayed: Sequence[str]) -> None:
        from fibopolicy.datasets import DemoFile
        from fibopolicy.datasets.draw import draw_demos
        from fibopolicy.report.video import Clip, write_video

        demos = self.video_demos or replayed[:6]
        with DemoFile(self.file, skip_corrupt=self.skip_corrupt) as file:
            drawn = draw_demos(
                file, demos, self.video_size, cameras=self.video_cameras, workers=self.workers
            )
        clips = [
            Clip(one.frames, one.success, demo) for demo, one in zip(demos, drawn, strict=True)
        ]
        write_video(path, clips, drawn[0].fps)
        print(f"video   {path}")
