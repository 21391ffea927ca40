"""Reads robomimic HDF5 demonstrations.

The format:

    data/                 attrs: total (int), env_args (JSON: env_name, env_version,
                                 type, env_kwargs)
      demo_<k>/           attrs: num_samples (int), model_file (MJCF), ep_meta (JSON)
        actions (N, A)    rewards (N,)    dones (N,)    states (N, S)
        obs/<key> (N, ...)    next_obs/<key> (N, ...)
    mask/<filter_key>     names of demos

Images are uint8 `(N, H, W, 3)`, upright; `obs[t]` is what was seen before `actions[t]`.

`layout.py` recognises other layouts, which are read as if they were this one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
from h5py import h5g, h5o

from fibopolicy.datasets.conversions import ConversionError
from fibopolicy.datasets.layout import (
    DEMO_NAME,
    DOWNLOAD_SHA256,
    IMAGE_CONVENTION,
    OBS_GROUPS,
    DemoLayout,
    attributes_of,
    count_of,
    in_numeric_order,
    text_of,
)
from fibopolicy.datasets.links import identity
from fibopolicy.errors import unknown
from fibopolicy.utils.files import StrPath

_BLOCK_BYTES = 32 * 2**20


class DemoFile(DemoLayout):
    """An HDF5 file of demonstrations, opened read-only; a context manager.

    Opening checks the structure and reads at most a few frames: use `validate` for the
    content.
    Harmless deviations of real files (a wrong `total`, gaps in the numbering, no mask,
    ...) are accepted, and reported in `warnings`.

    Args:
        path: the file.
        skip_corrupt: leave out demos that cannot be read instead of rejecting the file.
        mapped: the path of an array in each demo -> the observation key to read it by,
            or "actions". A path that the file lacks is an error, unless the key is
            found under another one.

    Attributes:
        path: the file.
        env_args: the task: `env_name`, `type`, `env_kwargs`, and maybe `env_version`;
            empty where the file names none.
        demos: the names of the demos in numeric order: demo_2 before demo_10.
        filter_keys: named subsets of the demos, as the file gives them; read them
            through `select`.
        obs: shape without the time axis and dtype of every observation key as it is
            read, from the first demo.
        stored: the same as it is stored.
        converted: what is done to actions and observations that are not read as they
            are stored, by key.
        unreadable: observation keys that training cannot read, each with its content
            and the reason.
        warnings: harmless deviations, one line each.
        corrupt: demos that are left out because they cannot be read, with the reason;
            only with `skip_corrupt`.

    Raises:
        UserError: the file is missing, corrupt or of another format; a demo's
            `num_samples` disagrees with its actions.
    """

    def __init__(
        self,
        path: StrPath,
        *,
        skip_corrupt: bool = False,
        mapped: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, skip_corrupt=skip_corrupt, mapped=mapped)
        try:
            with self._wrap_errors():
                self.warnings = tuple(self._find_warnings())
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Observation keys that are read as uint8 `(N, H, W, 3)` images by default."""
        return tuple(key for key in self.camera_keys if self._conversions[f"obs/{key}"].automatic)

    @property
    def camera_keys(self) -> tuple[str, ...]:
        """`image_keys`, and those of one channel, which are read as grey."""
        return self._keys("camera")

    @property
    def vector_keys(self) -> tuple[str, ...]:
        """Observation keys that are read as floating-point `(N, D)` vectors."""
        return self._keys("vector")

    def _keys(self, kind: str) -> tuple[str, ...]:
        found = {key: self._conversions.get(f"obs/{key}") for key in self.obs}
        return tuple(key for key, how in found.items() if how is not None and how.kind == kind)

    def image_shape(self, key: str) -> tuple[int, int, int]:
        """(H, W, 3) of a camera's images, in the first demo."""
        if key not in self.camera_keys:
            raise self.error(str(unknown("camera", key, self.camera_keys)))
        height, width, channels = self.obs[key][0]
        return height, width, channels

    def vector_dim(self, key: str) -> int:
        """D of a vector observation, in the first demo."""
        if key not in self.vector_keys:
            raise self.error(str(unknown("vector observation", key, self.vector_keys)))
        return self.obs[key][0][0]

    @property
    def action_dim(self) -> int:
        """A, in the first demo."""
        return self.layout(self.demos[0], "actions")[0][1]

    def length(self, demo: str) -> int:
        """N: the steps of a demo."""
        self._check_demo(demo)
        return self._lengths[demo]

    @property
    def num_steps(self) -> int:
        """The steps of all demos."""
        return sum(self._lengths.values())

    def select(self, filter_key: str | None) -> tuple[str, ...]:
        """The demos of a filter key, in numeric order; of the whole file for `None`.

        Raises:
            UserError: the filter key is unknown or empty, or names demos that the file
                does not hold.
        """
        if filter_key is None:
            return self.demos
        if filter_key not in self.filter_keys:
            raise self.error(str(unknown("filter key", filter_key, self.filter_keys)))
        named = set(self.filter_keys[filter_key])
        if not named:
            raise self.error(
                f"filter key {filter_key!r} names no demos; choose another or make one with split"
            )
        missing = sorted(named.difference(self.demos, self.corrupt))
        if missing:
            raise self.error(
                f"filter key {filter_key!r} names {missing[0]!r}, which is not in data"
                f" ({len(missing)} such names)"
            )
        return tuple(demo for demo in self.demos if demo in named)

    def training_key(self, asked: str | None) -> str | None:
        """The filter key, for `select`, of the demos to train on or to make others from:
        the one asked for, by default "train" if the file has it. "all" asks for every
        demo.
        """
        if asked is None:
            return "train" if "train" in self.filter_keys else None
        return None if asked == "all" and asked not in self.filter_keys else asked

    def is_in_place(self, key: str) -> bool:
        """Whether an array, e.g. "obs/front_image", lies where robomimic looks for it."""
        return self._data == "data" and self.array_path(key) == key

    def attrs(self, demo: str) -> dict[str, Any]:
        """The attributes of a demo: `num_samples`, maybe `model_file`, `ep_meta`, provenance."""
        with self._wrap_errors(demo):
            return attributes_of(self._demo(demo))

    @property
    def file_attrs(self) -> dict[str, Any]:
        """The provenance: attributes of the file and its data group that do not
        describe the task, the layout or this very file.
        """
        with self._wrap_errors():
            merged = attributes_of(self._file) | attributes_of(self._file[self._data or "/"])
        return {
            name: value
            for name, value in merged.items()
            if name not in ("env_args", "env_info", "total", IMAGE_CONVENTION, DOWNLOAD_SHA256)
        }

    @property
    def control_hz(self) -> float | None:
        """Control steps a second, where the file says it: attribute `fps`, or
        `control_freq` in `env_args`.
        """
        settings = self.env_args.get("env_kwargs", {})
        found = self.file_attrs.get("fps") or settings.get("control_freq")
        return float(found) if isinstance(found, int | float) and found > 0 else None

    def has(self, demo: str, key: str) -> bool:
        """Whether a demo holds an array, e.g. "states" or "obs/agentview_image"."""
        if (demo, key) in self._layouts:
            return True
        self._check_demo(demo)
        with self._wrap_errors(demo):
            return self._find(demo, key) is not None

    def group(self, demo: str) -> h5py.Group:
        """A demo's HDF5 group, to copy from."""
        return self._demo(demo)

    def layout(self, demo: str, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape, time axis included, and dtype of an array as it is read."""
        if (demo, key) not in self._layouts:
            with self._wrap_errors(demo):
                self._array(demo, key)
        known = self._layouts[demo, key]
        conversion = self._conversions.get(key.removeprefix("next_"))
        if conversion is None or not conversion.steps:
            return known.shape, known.dtype
        try:
            return conversion.layout(known.shape, known.dtype)
        except (IndexError, ValueError):  # of other dimensions than in the first demo
            return known.shape, known.dtype

    def read(
        self, demo: str, key: str, start: int | None = None, stop: int | None = None
    ) -> np.ndarray[Any, np.dtype[Any]]:
        """Steps `start:stop` of an array, converted if necessary; see `has` for its key."""
        stored = self._read_stored(demo, key, start, stop)
        if (conversion := self._conversions.get(key.removeprefix("next_"))) is None:
            return stored
        try:
            return conversion(stored)
        except ConversionError as error:
            step = (start or 0) + error.row
            raise self.error(f"{demo}: {key} at step {step} {error}") from error

    def blocks(self, demo: str, key: str) -> Iterator[np.ndarray[Any, np.dtype[Any]]]:
        """An array in blocks of steps that take little memory, as `read` gives them."""
        shape, dtype = self.layout(demo, key)
        stored = self._layouts[demo, key]
        row = max(
            math.prod(found[1:]) * kind.itemsize
            for found, kind in ((shape, dtype), (stored.shape, stored.dtype))
        )
        steps = max(1, _BLOCK_BYTES // max(1, row))
        for start in range(0, shape[0], steps):
            yield self.read(demo, key, start, start + steps)

    def identity(self, demos: Iterable[str], keys: Iterable[str]) -> dict[str, Any]:
        """Path, size and modification time of this file and of the files that it links
        to.

        The others are listed under "linked", if any of the arrays come from them.
        """
        keys = tuple(keys)
        files: set[str] = set()
        for demo in demos:
            for key in keys:
                if self.has(demo, key):  # which stores the layout
                    files |= self._layouts[demo, key].files
        (own,) = identity([self.path])
        others = [item for item in identity(files) if item["path"] != own["path"]]
        return {**own, "linked": others} if others else own

    # Deviations from the format

    def _find_warnings(self) -> Iterator[str]:
        """One line for each harmless deviation of the file from the format."""
        data = self._file[self._data or "/"]
        named = sorted((*self.demos, *self.corrupt), key=in_numeric_order)
        first = self._demo(self.demos[0])
        obs = first.get(self._obs_group)
        if "total" in data.attrs and (total := count_of(data.attrs["total"])) != self.num_steps:
            yield f"attribute total says {total}, the demos hold {self.num_steps} steps"
        numbers = sorted(int(match[1]) for name in named if (match := DEMO_NAME.fullmatch(name)))
        if len(numbers) < len(named):
            other = next(name for name in named if not DEMO_NAME.fullmatch(name))
            yield (
                f"demos are not named demo_<number>, e.g. {other}: robomimic itself does not read"
                " them"
            )
        elif numbers[0] != 0:
            yield f"the numbering of the demos starts at {numbers[0]}"
        if numbers and numbers[-1] - numbers[0] + 1 != len(numbers):
            yield (
                f"gaps in the numbering of the demos: {len(numbers)} demos between"
                f" demo_{numbers[0]} and demo_{numbers[-1]}"
            )
        others = set() if self._is_episode else set(data) - set(named) - {"mask"}
        if others:
            yield f"ignored in data: {', '.join(sorted(others))} (no actions)"
        groups = [name for name in OBS_GROUPS if isinstance(first.get(name), h5py.Group)]
        if groups[1:]:
            yield (
                f"not read: group {groups[1]}, beside {groups[0]}; read an array of it with --map"
                f" {groups[1]}/KEY=KEY"
            )
        if self._obs_group != "obs" or not self._data:
            yield (
                f"observations lie in {self._path(self.demos[0], 'obs/')}: robomimic itself does"
                " not read them"
            )
        if without := [demo for demo in self._without_count if demo in self._lengths]:
            yield f"{len(without)} demos without num_samples: the length of their actions is used"
        if not self.filter_keys:
            yield "no filter keys (group mask): split off train and valid"
        if "dones" in first and first["dones"].dtype == np.bool_:
            yield "dones are stored as bool, integers are usual"
        if "env_name" not in self.env_args:
            yield "no task is named (attribute env_args): replays and rollouts do not work"
        elif "env_version" not in self.env_args and self.env_args.get("type") == 1:
            yield "env_args names no env_version: the simulator's version is unknown"
        if self._ignored:
            yield (
                f"ignored in {self._obs_group}: {', '.join(self._ignored)} (expected arrays, in"
                " groups of at most one level; read others with --map PATH=KEY)"
            )
        yield from self._keys_missing_first(obs)
        if not self.obs:
            yield f"only states and actions are stored, no observations; {self.frames_advice}"

    def _keys_missing_first(self, obs: object) -> Iterator[str]:
        """A line on the first demo with observations that the first demo of all lacks."""
        names = {name.encode() for name in obs} if isinstance(obs, h5py.Group) else set()
        for demo in self.demos[1:]:
            try:
                found = h5o.open(self._file.id, f"{self._path(demo)}/{self._obs_group}".encode())
            except KeyError:  # reported when it is read
                continue
            if isinstance(found, h5g.GroupID) and (other := set(found) - names):
                keys = ", ".join(sorted(map(text_of, other)))
                yield f"not read, since {self.demos[0]} lacks what {demo} holds in obs: {keys}"
                return
