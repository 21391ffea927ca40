"""Reads robomimic HDF5 demonstrations.

The format:

    data/                 attrs: total (int), env_args (JSON: env_name, env_version, type, env_kwargs)
      demo_<k>/           attrs: num_samples (int), model_file (MJCF), ep_meta (JSON)
        actions (N, A)    rewards (N,)    dones (N,)    states (N, S)
        obs/<key> (N, ...)    next_obs/<key> (N, ...)
    mask/<filter_key>     names of demos

Images are uint8 `(N, H, W, 3)`, upright; `obs[t]` is what was seen before `actions[t]`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np

from fibopolicy.errors import UserError, unknown
from fibopolicy.files import StrPath, expanded
from fibopolicy.own_code import is_own

_DEMO_NAME = re.compile(r"demo_(\d+)")


class DemoFile:
    """A robomimic HDF5 file, opened read-only; a context manager.

    Opening checks the structure and reads no frames: use `validate` for the content. What real files get wrong without harm
    (a false `total`, gaps in the numbering, no mask, ...) is read, and told in `warnings`, one line each.

    Attributes:
        path: the file.
        env_args: the task: `env_name`, `type`, `env_kwargs`, and maybe `env_version`.
        demos: the names of the demos in numeric order.
        filter_keys: named subsets of the demos, as the file gives them; read them through `select`.
        obs: shape without the time axis and dtype of every observation key, taken from the first demo.
        warnings: harmless oddities.
        damaged: demos that are left out because they cannot be read, with the reason; only where `skip_damaged` allows it.

    Args:
        path: the file.
        skip_damaged: leave out demos that cannot be read instead of refusing the file.

    Raises:
        UserError: the file is missing, damaged or of another format; a demo's `num_samples` disagrees with its actions.
    """

    def __init__(self, path: StrPath, *, skip_damaged: bool = False) -> None:
        self.path = expanded(path)
        self.damaged: dict[str, str] = {}
        self.warnings: tuple[str, ...] = ()
        self._file = _open(self.path)
        try:
            with self._damage_told():
                self._scan(skip_damaged)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; reading after this fails."""
        self._file.close()

    # what the file holds

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Observation keys that hold uint8 `(N, H, W, 3)` images."""
        return tuple(k for k, (shape, dtype) in self.obs.items() if len(shape) == 3 and shape[2] == 3 and dtype == np.uint8)

    @property
    def vector_keys(self) -> tuple[str, ...]:
        """Observation keys that hold floating-point `(N, D)` vectors."""
        return tuple(k for k, (shape, dtype) in self.obs.items() if len(shape) == 1 and np.issubdtype(dtype, np.floating))

    def image_shape(self, key: str) -> tuple[int, int, int]:
        """(H, W, 3) of a camera's images, in the first demo."""
        if key not in self.image_keys:
            raise self.error(str(unknown("camera", key, self.image_keys)))
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
        return self._lengths[demo]

    @property
    def num_steps(self) -> int:
        """The steps of all demos."""
        return sum(self._lengths.values())

    def select(self, filter_key: str | None) -> tuple[str, ...]:
        """The demos of a filter key, in numeric order; of the whole file for `None`.

        Raises:
            UserError: the filter key is unknown or empty, or names demos that the file does not hold.
        """
        if filter_key is None:
            return self.demos
        if filter_key not in self.filter_keys:
            raise self.error(str(unknown("filter key", filter_key, self.filter_keys)))
        named = set(self.filter_keys[filter_key])
        if not named:
            raise self.error(f"filter key {filter_key!r} names no demos; choose another or make one with split")
        missing = sorted(named.difference(self.demos, self.damaged))
        if missing:
            raise self.error(f"filter key {filter_key!r} names {missing[0]!r}, which is not in data ({len(missing)} such names)")
        return tuple(demo for demo in self.demos if demo in named)

    def attrs(self, demo: str) -> dict[str, Any]:
        """The attributes of a demo: `num_samples`, and where recorded `model_file`, `ep_meta` and provenance."""
        with self._damage_told(demo):
            return _attributes(self._demo(demo))

    @property
    def file_attrs(self) -> dict[str, Any]:
        """The attributes of the file and of its data group, other than `env_args` and `total`: where the data came from."""
        with self._damage_told():
            merged = _attributes(self._file) | _attributes(self._file["data"])
        return {name: value for name, value in merged.items() if name not in ("env_args", "total")}

    def has(self, demo: str, key: str) -> bool:
        """Whether a demo holds an array, say "states" or "obs/agentview_image"."""
        with self._damage_told(demo):
            return isinstance(self._demo(demo).get(key), h5py.Dataset)

    def group(self, demo: str) -> h5py.Group:
        """A demo as HDF5 keeps it, for whoever copies it."""
        return self._demo(demo)

    def keys(self, demo: str) -> tuple[str, ...]:
        """The arrays of a demo other than observations: "actions", "states", ..."""
        with self._damage_told(demo):
            return tuple(name for name, item in self._demo(demo).items() if isinstance(item, h5py.Dataset))

    def layout(self, demo: str, key: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Shape, time axis included, and dtype of an array, without reading it."""
        with self._damage_told(demo):
            dataset = self._array(demo, key)
            return tuple(dataset.shape), dataset.dtype

    def read(self, demo: str, key: str, start: int | None = None, stop: int | None = None) -> np.ndarray[Any, np.dtype[Any]]:
        """Steps `start:stop` of an array, say "actions", "states" or "obs/agentview_image", in the stored dtype."""
        with self._damage_told(demo):
            return np.asarray(self._array(demo, key)[start:stop])

    def error(self, message: str) -> UserError:
        """A `UserError` that names this file."""
        return UserError(f"{self.path}: {message}")

    @contextmanager
    def named(self, what: str = "") -> Iterator[None]:
        """Has a `UserError` of the block name this file, and `what` of it."""
        try:
            yield
        except UserError as error:
            raise self.error(f"{what}{error}") from error

    # how it is found out

    def _demo(self, demo: str) -> h5py.Group:
        if demo not in self._lengths:
            raise self.error(str(unknown("demo", demo, self.demos)))
        return self._file["data"][demo]

    def _array(self, demo: str, key: str) -> h5py.Dataset:
        dataset = self._demo(demo).get(key)
        if isinstance(dataset, h5py.Dataset):
            return dataset
        group, _, name = key.rpartition("/")
        if group == "obs" and not self.obs:
            raise self.error(f"{demo} holds no observations, states and actions alone: render them before training")
        parent = self._demo(demo).get(group) if group else self._demo(demo)
        raise self.error(f"{demo}: " + str(unknown(f"array of {group}" if group else "array", name, parent or ())))

    def _scan(self, skip_damaged: bool) -> None:
        data = self._file.get("data")
        if not isinstance(data, h5py.Group):
            raise self.error(f"no group 'data', found {list(self._file) or 'nothing'}: not a robomimic dataset")
        self.env_args = self._read_env_args(data)
        numbers = {name: int(match[1]) for name in data if (match := _DEMO_NAME.fullmatch(name))}
        if not numbers:
            raise self.error("no demos: expected groups data/demo_0, data/demo_1, ...; record some before reading")
        self.demos = tuple(sorted(numbers, key=numbers.__getitem__))
        self._lengths: dict[str, int] = {}
        for demo in self.demos:
            try:
                self._lengths[demo] = self._read_length(data, demo)
            except UserError as error:
                if not skip_damaged:
                    raise
                self.damaged[demo] = str(error)
        self.demos = tuple(self._lengths)
        if not self.demos:
            raise self.error(f"all {len(numbers)} demos are damaged; {next(iter(self.damaged.values()))}")
        missing_count = [demo for demo in self.demos if "num_samples" not in data[demo].attrs]
        self.filter_keys = self._read_filter_keys()
        first = data[self.demos[0]]
        obs = first.get("obs")
        found = {key: item for key, item in obs.items() if isinstance(item, h5py.Dataset)} if isinstance(obs, h5py.Group) else {}
        self.obs: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            key: (tuple(item.shape[1:]), item.dtype) for key, item in found.items()
        }

        def notes() -> Iterator[str]:
            if "total" in data.attrs and int(data.attrs["total"]) != self.num_steps:
                yield f"attribute total says {int(data.attrs['total'])}, the demos hold {self.num_steps} steps"
            span = sorted(numbers.values())
            if span[0] != 0:
                yield f"the numbering of the demos starts at {span[0]}"
            if span[-1] - span[0] + 1 != len(span):
                yield f"gaps in the numbering of the demos: {len(span)} demos between demo_{span[0]} and demo_{span[-1]}"
            if len(numbers) != len(data):
                yield f"ignored in data: {', '.join(sorted(set(data) - set(numbers)))}"
            if missing_count:
                yield f"{len(missing_count)} demos without num_samples: the length of their actions is taken"
            if not self.filter_keys:
                yield "no filter keys (group mask): train and valid have to be split off"
            if "dones" in first and first["dones"].dtype == np.bool_:
                yield "dones are stored as bool, integers are usual"
            if "env_version" not in self.env_args and not is_own(self.env_args["env_name"]):
                yield "env_args names no env_version: the simulator's version is unknown"
            if not self.obs:
                yield "no observations are stored, states and actions alone: render them before training"

        self.warnings = tuple(notes())

    def _read_env_args(self, data: h5py.Group) -> dict[str, Any]:
        text = data.attrs.get("env_args")
        if text is None:
            raise self.error("data has no attribute env_args, the JSON that names the task; convert the file with robomimic")
        try:
            env_args = json.loads(text)
        except (ValueError, TypeError) as error:
            raise self.error(f"data's attribute env_args is not valid JSON ({error}); write it anew with json.dumps") from error
        if not isinstance(env_args, dict) or not isinstance(env_args.get("env_name"), str):
            raise self.error('data\'s attribute env_args must be a JSON object with "env_name", "type" and "env_kwargs"')
        if not isinstance(env_args.get("env_kwargs", {}), dict):
            raise self.error("env_kwargs of data's attribute env_args must be a JSON object of keyword arguments")
        return env_args

    def _read_length(self, data: h5py.Group, demo: str) -> int:
        with self._damage_told(demo):
            group = data[demo]
            actions = group.get("actions") if isinstance(group, h5py.Group) else None
            told = group.attrs.get("num_samples")
        if not isinstance(actions, h5py.Dataset) or actions.ndim != 2:
            found = f"shape {actions.shape}" if isinstance(actions, h5py.Dataset) else "none"
            raise self.error(f"{demo}: expected actions of shape (N, A), found {found}")
        steps = int(actions.shape[0])
        if told is not None and told != steps:
            raise self.error(f"{demo}: num_samples says {told}, actions hold {steps} steps; mend the attribute or the arrays")
        if steps == 0:
            raise self.error(f"{demo}: holds no steps; delete it from the file")
        return steps

    def _read_filter_keys(self) -> dict[str, tuple[str, ...]]:
        mask = self._file.get("mask")
        if not isinstance(mask, h5py.Group):
            return {}
        arrays = {name: item[()] for name, item in mask.items() if isinstance(item, h5py.Dataset)}
        return {name: tuple(_text(item) for item in np.atleast_1d(array).tolist()) for name, array in arrays.items()}

    @contextmanager
    def _damage_told(self, what: str = "the file") -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # what h5py and broken metadata give
            raise self.error(f"{what} is damaged ({_one_line(error)}); fetch or record it again") from error


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise UserError(f"{path}: no such file; give the path of a robomimic HDF5 dataset")
    if path.is_dir():
        inside = sorted(item.name for item in path.glob("*.hdf5"))
        raise UserError(f"{path}: is a folder, expected an HDF5 file" + (f"; it holds {', '.join(inside[:5])}" if inside else ""))
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = _one_line(error)
        if "signature not found" in reason:
            raise UserError(f"{path}: not an HDF5 file; give the path of a robomimic HDF5 dataset") from error
        if "truncated" in reason:
            raise UserError(f"{path}: the file is truncated ({reason}); copy or download it again") from error
        raise UserError(f"{path}: cannot be opened as HDF5: {reason}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _attributes(item: h5py.Group) -> dict[str, Any]:
    return {name: _plain(value) for name, value in item.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return _text(value)
    return value.item() if isinstance(value, np.generic) else value


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
