"""Imports demonstrations of other projects into one robomimic HDF5 file.

A reader gives episodes one after the other, with frames in blocks, so that memory does
not grow with the data. To add a format, subclass `EpisodeReader`, and register it in
`READERS`.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fibopolicy.datasets.conventions import INSTRUCTION, instruction_in
from fibopolicy.datasets.conversions import resize_larger, resized
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.layout import in_numeric_order
from fibopolicy.datasets.writer import Attribute, Blocks, DemoWriter
from fibopolicy.errors import UserError, unknown
from fibopolicy.utils.files import StrPath, check_output, expanded
from fibopolicy.utils.hub import PREFIX
from fibopolicy.utils.registry import Registry
from fibopolicy.utils.settings import first_difference


@dataclass
class RecordedEpisode:
    """One demonstration of N steps.

    Args:
        name: where it comes from, for messages.
        obs: frames in blocks, uint8 `(N, H, W, 3)`; vectors `(N, D)`.
        actions: float `(N, A)`.
        extra: `states`, `rewards`, `dones` and `executed_actions`, those that there
            are.
        model_file: the MJCF of its scene.
        attrs: attributes of the demo.
        last_obs: `(1, ...)`, what is seen after the last action, where that is known.
    """

    name: str
    obs: dict[str, Blocks | NDArray[Any]]
    actions: NDArray[Any]
    extra: dict[str, NDArray[Any]] = field(default_factory=dict)
    model_file: str | None = None
    attrs: dict[str, Attribute] = field(default_factory=dict)
    last_obs: dict[str, NDArray[Any]] = field(default_factory=dict)


class EpisodeReader(ABC):
    """Reads the episodes of a file or folder; an error is a `UserError`.

    Attributes:
        files: those that are read, or their folder.
        origin: the source's name, kept in the new file.
        env_args: the task, empty where none is named.
        attrs: provenance, for the attributes of the whole file.
        converted: how observations and actions are read, by their new keys, where they
            are not read as they are stored.
        left_out: stored observations that are not read, each with the reason.
        filter_keys: named subsets, as numbers of episodes.
    """

    def __init__(self, path: Path, mapped: Mapping[str, str]) -> None:
        self.path, self.mapped, self.origin = path, mapped, path.name
        self.files = [path]
        self.env_args: dict[str, Any] = {}
        self.attrs: dict[str, Attribute] = {}
        self.converted: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.filter_keys: dict[str, list[int]] = {}

    @classmethod
    @abstractmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a file or folder looks like this format."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of episodes."""

    @abstractmethod
    def episodes(self, cameras: Sequence[str] | None) -> Iterator[RecordedEpisode]:
        """The episodes in order, each valid until the next; of all cameras for `None`."""


READERS = Registry[type[EpisodeReader]](
    "format", {"lerobot": "fibopolicy.datasets.lerobot:LeRobotReader"}
)


@dataclass(frozen=True)
class ImportResult:
    """What was imported, and what was done to it; see `EpisodeReader`."""

    path: Path
    demos: int
    steps: int
    converted: Mapping[str, str]
    left_out: Mapping[str, str]


def import_demos(
    source: StrPath,
    out: StrPath,
    *,
    format: str | None = None,
    cameras: Sequence[str] | None = None,
    image_size: tuple[int, int] | None = None,
    bgr: bool = False,
    fps: float | None = None,
    mapped: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> ImportResult:
    """Write all episodes of `source` to a new file, which appears when it is complete.

    Args:
        source: a file or folder of a format in `READERS`, or "hub:OWNER/NAME" for a
            LeRobot dataset on the Hugging Face Hub.
        format: its name; by default the first that accepts `source`.
        cameras: which cameras, by their keys in the new file; all by default.
        image_size: frames higher or wider than this (H, W) are resized to it.
        bgr: swap red and blue.
        fps: control steps a second, for a format that does not store them.
        mapped: see `DemoFile`.

    Raises:
        UserError: `source` cannot be read, its episodes differ in observations, or
            `out` cannot be written.
    """
    target = expanded(out)
    check_output(target, overwrite, [expanded(source)])
    written: list[str] = []
    first: dict[str, Any] = {}
    stored = {"fps": fps} if fps else {}
    with (
        _opened(source, format, cameras, mapped or {}) as reader,
        DemoWriter(
            target,
            reader.env_args,
            attrs={"imported_from": reader.origin, **reader.attrs, **stored},
            overwrite=overwrite,
        ) as writer,
    ):
        check_output(target, overwrite, reader.files)
        converted = dict(reader.converted)
        episodes = reader.episodes(cameras)
        for episode in tqdm(episodes, total=len(reader), desc="import", unit="demo", disable=None):
            for key, value in episode.obs.items():
                if isinstance(value, Blocks):
                    episode.obs[key], how = _seen(value, image_size, bgr)
                    converted |= {key: ", ".join(filter(None, [reader.converted.get(key), how]))}
                    if key in episode.last_obs:
                        last = episode.last_obs[key]
                        episode.last_obs[key] = _processed(last, image_size, bgr)
            found = {key: (value.shape[1:], value.dtype) for key, value in episode.obs.items()}
            found["actions"] = episode.actions.shape[1:], np.dtype(float)
            if not first:
                first = found
                _check_room(target, episode, len(reader))
            check_same(episode.name, found, first)
            main = [episode.extra.pop(key, None) for key in ("states", "rewards", "dones")]
            written.append(
                writer.add(
                    episode.obs,
                    episode.actions,
                    *main,
                    next_obs=episode.last_obs,
                    extra=episode.extra,
                    model_file=episode.model_file,
                    attrs=episode.attrs,
                )
            )
        for name, numbers in reader.filter_keys.items():
            writer.add_filter_key(name, [written[number] for number in numbers])
    converted = {key: how for key, how in converted.items() if how and key in first}
    return ImportResult(
        target, len(written), sum(writer.lengths.values()), converted, reader.left_out
    )


@contextmanager
def _opened(
    source: StrPath, format: str | None, cameras: Sequence[str] | None, mapped: Mapping[str, str]
) -> Iterator[EpisodeReader]:
    """The reader of a source."""
    if str(source).startswith(PREFIX):
        from fibopolicy.datasets.lerobot import hub_dataset

        with hub_dataset(str(source).removeprefix(PREFIX), cameras, mapped) as reader:
            yield reader
        return
    path = expanded(source)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; give the path of demonstrations")
    names = READERS.names() if format is None else (format,)
    kind = next((READERS[name] for name in names if READERS[name].accepts(path)), None)
    if kind is None:
        raise UserError(f"{path}: holds no demonstrations in a known format: {', '.join(names)}")
    yield kind(path, mapped)


def _seen(frames: Blocks, size: tuple[int, int] | None, bgr: bool) -> tuple[Blocks, str]:
    """Frames as they are written, and what is done to them."""
    old = frames.shape[1:3]
    new = resized((old[0], old[1]), size)
    steps = ["red and blue swapped"] * bgr
    if new != old:
        steps.append(f"{old[0]} x {old[1]} resized to {new[0]} x {new[1]} pixels")
    parts = (_processed(block, size, bgr) for block in frames.parts)
    return Blocks((frames.shape[0], *new, 3), frames.dtype, parts), ", ".join(steps)


def _processed(block: NDArray[Any], size: tuple[int, int] | None, bgr: bool) -> NDArray[Any]:
    return resize_larger(block[..., ::-1] if bgr else block, size)


def _check_room(out: Path, episode: RecordedEpisode, episodes: int) -> None:
    size = episodes * sum(value.nbytes for value in episode.obs.values())
    folder = next(folder for folder in out.absolute().parents if folder.exists())
    if size > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{out}: needs about {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; pass"
            " --image-size or fewer --cameras"
        )


def check_same(name: str, found: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    """Raise `UserError` unless an episode has the layout of the first."""
    for key in (*first, *found):
        if found.get(key) != first.get(key):
            texts = [
                f"{entry[key][1]} {('N', *entry[key][0])}" if key in entry else "none"
                for entry in (found, first)
            ]
            raise UserError(
                f"{name}: {key} is {texts[0]}, in the first episode {texts[1]}; leave"
                " out episodes of another kind"
            )


# For readers


def camera_key(name: str) -> str:
    """The key of a camera's frames: cam_high -> cam_high_image."""
    return name if name.endswith(("image", "rgb")) else f"{name}_image"


def choose_cameras(
    path: Path, cameras: Sequence[str] | None, known: Mapping[str, str]
) -> dict[str, str]:
    """The cameras to read, by either of their names; all for `None`.

    Args:
        known: new key -> stored key.
    """
    new_keys = {stored: new for new, stored in known.items()}
    chosen = {}
    for camera in known if cameras is None else cameras:
        key = new_keys.get(camera, camera)
        if key not in known:
            raise UserError(f"{path}: {unknown('camera', camera, known)}")
        chosen[key] = known[key]
    return chosen


# HDF5: ALOHA's episode files, LIBERO's files, and all others that `DemoFile` reads


@READERS.register("hdf5")
class Hdf5Reader(EpisodeReader):
    """A file that `DemoFile` reads, or a folder of them, for example one per episode.

    Keys get this library's names: images/cam_high becomes cam_high_image.
    """

    SUFFIXES: ClassVar[tuple[str, ...]] = (".hdf5", ".h5")

    def __init__(
        self, path: Path, mapped: Mapping[str, str], filter_key: str | None = None
    ) -> None:
        super().__init__(path, mapped)
        self._filter_key = filter_key
        self.files = self._files(path)
        self._count = 0
        for number, source in enumerate(self.files):
            with DemoFile(source, mapped=mapped) as file:
                if number == 0:
                    self._describe(file)
                elif difference := first_difference(self.env_args, file.env_args):
                    raise file.error(
                        f"is of another task than {self.files[0].name} ({difference}); import one"
                        " task at a time"
                    )
                elif file.control_hz != self.control_hz:
                    raise file.error(
                        f"has {file.control_hz} steps a second, {self.files[0].name} has"
                        f" {self.control_hz}; import one frequency at a time"
                    )
                self._merge(file)
                self._count += len(file.select(filter_key))

    @classmethod
    def accepts(cls, path: Path) -> bool:
        return bool(cls._files(path))

    @classmethod
    def _files(cls, path: Path) -> list[Path]:
        if path.is_file():
            return [path]
        found = [item for item in path.iterdir() if item.suffix in cls.SUFFIXES]
        return sorted(found, key=lambda item: in_numeric_order(item.name))

    def _describe(self, file: DemoFile) -> None:
        self.env_args, self.control_hz = file.env_args, file.control_hz
        self.names = self._new_names(file)
        self.converted = {
            self.names.get(key, key): how
            for key, how in file.converted.items()
            if key in (*self.names, "actions")
        }
        self.left_out = dict(file.unreadable)

    def _merge(self, file: DemoFile) -> None:
        """Keep attributes that are equal in all files so far, and filter keys of all."""
        attrs = file.file_attrs
        if len(self.files) > 1:
            own = file.attrs(file.demos[0])  # each demo keeps these
            attrs = {key: value for key, value in attrs.items() if key == "fps" or key not in own}
        places = {demo: self._count + place for place, demo in enumerate(file.demos)}
        keys = {name: [places[demo] for demo in file.select(name)] for name in file.filter_keys}
        if self._count == 0:
            self.attrs, self.filter_keys = attrs, keys
            return
        for name in {**self.attrs, **attrs}:
            if not np.array_equal(self.attrs.get(name, ""), attrs.get(name, "")):
                self.attrs.pop(name, None)
                self.left_out[f"attribute {name}"] = "not the same in all files"
        for name in {**self.filter_keys, **keys}:
            if name in self.filter_keys and name in keys:
                self.filter_keys[name] += keys[name]
            else:
                self.filter_keys.pop(name, None)
                self.left_out[f"filter key {name}"] = "not in all files"

    def _new_names(self, file: DemoFile) -> dict[str, str]:
        """The new key of every observation that is read."""
        names: dict[str, str] = {}
        for key in (*file.camera_keys, *file.vector_keys):
            name = key.rpartition("/")[2]
            if key in file.camera_keys:
                name = camera_key(name)
            names[key] = key.replace("/", "_") if name in names.values() else name
        return names

    def _chosen(self, file: DemoFile, cameras: Sequence[str] | None) -> dict[str, str]:
        """The cameras to read: new key -> stored key."""
        names = self._new_names(file)
        known = {names[key]: key for key in file.camera_keys}
        chosen = choose_cameras(file.path, cameras, known)
        return {names[key]: key for key in file.image_keys} if cameras is None else chosen

    def layout(self, cameras: Sequence[str] | None) -> dict[str, tuple[int, ...]]:
        """Shape of a step of what will be read, by new keys.

        Raises:
            UserError: there are no frames, though all cameras were asked for.
        """
        with DemoFile(self.files[0], mapped=self.mapped) as file:
            names, chosen = self._new_names(file), self._chosen(file, cameras)
            if cameras is None and not chosen:
                raise file.error(f"holds no frames; {file.frames_advice}")
            keys = {**chosen, **{names[key]: key for key in file.vector_keys}}
            shapes = {new: file.obs[key][0] for new, key in keys.items()}
            return {**shapes, "actions": (file.action_dim,)}

    def __len__(self) -> int:
        return self._count

    def episodes(self, cameras: Sequence[str] | None) -> Iterator[RecordedEpisode]:
        for source in self.files:
            with DemoFile(source, mapped=self.mapped) as file:
                names, chosen = self._new_names(file), self._chosen(file, cameras)
                for demo in file.select(self._filter_key):
                    yield self._episode(file, demo, chosen, names)

    def _episode(
        self, file: DemoFile, demo: str, images: Mapping[str, str], names: Mapping[str, str]
    ) -> RecordedEpisode:
        obs: dict[str, Blocks | NDArray[Any]] = {}
        for name, key in images.items():
            shape, dtype = file.layout(demo, f"obs/{key}")
            obs[name] = Blocks(shape, dtype, file.blocks(demo, f"obs/{key}"))
        obs |= {names[key]: file.read(demo, f"obs/{key}") for key in file.vector_keys}
        attrs = file.attrs(demo)
        model = attrs.pop("model_file", None)
        for name in ("num_samples", "compress"):
            attrs.pop(name, None)
        if instruction := instruction_in({**file.file_attrs, **attrs}):
            attrs[INSTRUCTION] = instruction
        steps = file.length(demo)
        last_obs = {
            name: file.read(demo, f"next_obs/{key}", steps - 1)
            for name, key in {**images, **{names[key]: key for key in file.vector_keys}}.items()
            if file.has(demo, f"next_obs/{key}")
            and file.layout(demo, f"next_obs/{key}") == file.layout(demo, f"obs/{key}")
        }
        extra = {
            key: file.read(demo, key)
            for key in ("states", "rewards", "dones", "executed_actions")
            if file.has(demo, key) and file.layout(demo, key)[0][:1] == (steps,)
        }
        actions = file.read(demo, "actions")
        return RecordedEpisode(f"{file.path}: {demo}", obs, actions, extra, model, attrs, last_obs)
