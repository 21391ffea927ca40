"""Recognises the layout of an HDF5 file of demonstrations: where its demos and their
arrays lie, and how they are read.

Other layouts are read as if they were this one. Any group with actions counts as a
demo, in `data` or at the root, and so does a file with actions at its root (an episode
of ALOHA). Actions may be called `action`, observations may lie in `observation` or
`observations` and in groups, one level deep: `obs/images/front` has the key
"images/front". Arrays of other shapes and dtypes are converted, see `conversions.py`.
Robosuite's own recordings have `env_info` instead of `env_args`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5o, h5s

from fibopolicy.datasets.conventions import recorded_env_args
from fibopolicy.datasets.conversions import (
    Conversion,
    action_conversion,
    find_conversion,
    is_frame,
)
from fibopolicy.datasets.links import Sources, read_array
from fibopolicy.errors import UserError, message_of, quoted, unknown
from fibopolicy.utils.files import StrPath, expanded

with suppress(ImportError):
    import hdf5plugin  # noqa: F401  (its import registers compression filters)

DEMO_NAME = re.compile(r"demo_(\d+)")
OBS_GROUPS = ("obs", "observation", "observations")
#: LIBERO's attribute of the data group, "opengl" where frames are stored upside down.
IMAGE_CONVENTION = "macros_image_convention"
#: Attribute of the data group of an unchanged download: the sha256 that it came with.
DOWNLOAD_SHA256 = "download_sha256"
_ACTIONS = ("actions", "action")
_OTHER_OBS = ("next_obs/", "last_obs/")
_SAMPLES = 8  # steps that are read to recognise what an array holds


class _Layout(NamedTuple):
    """An opened array: its shape, its dtype and the other files that it comes from."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    files: frozenset[str]


def parse_map(entries: Sequence[str]) -> dict[str, str]:
    """The argument `mapped` of a `DemoFile` from texts PATH=KEY.

    Raises:
        UserError: an entry has another form.
    """
    pairs = [entry.rpartition("=") for entry in entries]
    for entry, (path, _, key) in zip(entries, pairs, strict=True):
        if not path or not key:
            raise UserError(
                f"--map {entry}: expected PATH=KEY, e.g. obs/images/cam_high=front: an array of"
                " each demo and the name to read it by"
            )
    return {path.strip("/"): key for path, _, key in pairs}


class DemoLayout:
    """An opened file of demonstrations and its layout; `DemoFile` gives what it holds."""

    def __init__(
        self,
        path: StrPath,
        *,
        skip_corrupt: bool = False,
        mapped: Mapping[str, str] | None = None,
    ) -> None:
        self.path = expanded(path)
        self._mapped = dict(mapped or {})
        self._conversions: dict[str, Conversion] = {}
        self._paths: dict[str, str] = {}  # of arrays that lie elsewhere in a demo
        self.corrupt: dict[str, str] = {}
        self._layouts: dict[tuple[str, str], _Layout] = {}
        # a demo and those of its arrays that are open
        self._current: tuple[str, dict[str, h5d.DatasetID]] = ("", {})
        self._sources = Sources()
        self._file = _open(self.path)
        try:
            with self._wrap_errors():
                self._scan(skip_corrupt)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the file; reading after this fails."""
        self._current = ("", {})
        self._sources.close()
        self._file.close()

    def error(self, message: str) -> UserError:
        """A `UserError` that names this file."""
        return UserError(f"{self.path}: {message}")

    @contextmanager
    def named(self, what: str = "") -> Iterator[None]:
        """Make a `UserError` in the block name this file, and `what` of it."""
        try:
            yield
        except UserError as error:
            raise self.error(f"{what}{error}") from error

    @contextmanager
    def _wrap_errors(self, what: str = "the file") -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            # h5py and broken metadata raise these.
            raise self.error(
                f"{what} is corrupt ({message_of(error)}); download or record it again"
            ) from error

    # Recognise the layout

    def _scan(self, skip_corrupt: bool) -> None:
        self._name = h5f.get_name(self._file.id)
        data = self._find_data()
        self.env_args = self._read_env_args(data)
        self._flipped = _plain(data.attrs.get(IMAGE_CONVENTION)) == "opengl"
        named = self._find_demos(data)
        self.demos = tuple(named)
        self._lengths: dict[str, int] = {}
        self._without_count: list[str] = []
        self._rank = 0  # of the first demo's actions
        for demo in self.demos:
            try:
                self._lengths[demo] = self._read_length(demo)
            except UserError as error:
                if not skip_corrupt:
                    raise
                self.corrupt[demo] = str(error)
        self.demos = tuple(self._lengths)
        if not self.demos:
            raise self.error(
                f"all {len(named)} demos are corrupt; {next(iter(self.corrupt.values()))}"
            )
        self.filter_keys = self._read_filter_keys()
        self._ignored = self._find_observations()

    def _find_data(self) -> h5py.Group:
        """The group that holds the demos, or the one demo of an episode file."""
        self._data, self._is_episode = "data", False
        self._obs_group = "obs"
        data = self._file.get("data")
        if data is None:
            self._check_links("data")
        if isinstance(data, h5py.Group):
            return data
        self._data = ""
        self._is_episode = any(name in self._file for name in self._action_paths())
        if not self._is_episode and not self._demos_in(self._file):
            raise self.error(
                f"no group 'data', found {list(self._file) or 'nothing'}: not a robomimic dataset"
            )
        return self._file

    def _action_paths(self) -> list[str]:
        """Where a demo may hold its actions."""
        return [*(path for path, key in self._mapped.items() if key == "actions"), *_ACTIONS]

    def _demos_in(self, data: h5py.Group) -> list[str]:
        return [
            name
            for name in data
            # without opening demo_<k>: a broken one is an error, not skipped
            if DEMO_NAME.fullmatch(name)
            or (
                data.get(name, getclass=True) is h5py.Group
                and any(path in data[name] for path in self._action_paths())
            )
        ]

    def _find_demos(self, data: h5py.Group) -> list[str]:
        """The names of the demos, in numeric order; notes where their actions lie."""
        if self._is_episode:
            named = [self.path.stem]
        else:
            named = sorted(self._demos_in(data), key=in_numeric_order)
        if not named:
            found = f"found {', '.join(sorted(data)[:5])}" if len(data) else "found nothing"
            raise self.error(
                f"no demos: expected groups with actions, data/demo_0, data/demo_1, ..., {found}"
            )
        paths = self._action_paths()
        with suppress(KeyError, RuntimeError, OSError):  # reported when the demo is read
            first = self._file[self._path(named[0]) or "/"]
            self._paths["actions"] = next((path for path in paths if path in first), paths[0])
        return named

    def _read_length(self, demo: str) -> int:
        with self._wrap_errors(demo):
            actions = self._find(demo, "actions")
            stored = None
            if actions is not None:
                group = h5o.open(self._file.id, (self._path(demo) or "/").encode())
                if h5a.exists(group, b"num_samples"):
                    stored = count_of(h5py.Group(group).attrs["num_samples"])
                else:
                    self._without_count.append(demo)
        if (
            actions is None
            or actions.shape is None
            or actions.rank != (self._rank or actions.rank or 2)
        ):
            found = f"shape {actions.shape}" if actions is not None else "none"
            raise self.error(f"{demo}: expected actions of shape (N, A), found {found}")
        if "actions" not in self._conversions:  # those of the first demo decide
            conversion = action_conversion(actions.shape[1:], actions.dtype)
            if isinstance(conversion, str):
                raise self.error(
                    f"{demo}: actions are {actions.dtype} {actions.shape}, {conversion}"
                )
            self._conversions["actions"], self._rank = conversion, actions.rank
        steps = int(actions.shape[0])
        if stored is not None and stored != steps:
            raise self.error(
                f"{demo}: num_samples says {stored}, actions hold {steps} steps; fix the attribute"
                " or the arrays"
            )
        if steps == 0:
            raise self.error(f"{demo}: holds no steps; delete it from the file")
        return steps

    def _read_filter_keys(self) -> dict[str, tuple[str, ...]]:
        mask = self._file.get("mask")
        if not isinstance(mask, h5py.Group):
            self._check_links("mask")
            return {}
        keys: dict[str, tuple[str, ...]] = {}
        for name, item in mask.items():
            # Without its filter key, a policy would be trained on all demos, including
            # those for validation.
            self._check_links(f"mask/{name}")
            if isinstance(item, h5py.Dataset):
                with self.named():
                    names = [] if item.shape is None else np.ravel(read_array(mask, name)).tolist()
                keys[name] = tuple(text_of(entry) for entry in names)
        return keys

    def _read_env_args(self, data: h5py.Group) -> dict[str, Any]:
        name = (
            "env_args" if "env_args" in data.attrs or "env_info" not in data.attrs else "env_info"
        )
        text = data.attrs.get(name)
        try:
            env_args = {} if text is None else json.loads(text)
        except (ValueError, TypeError) as error:
            raise self.error(
                f"data's attribute {name} is not valid JSON ({error}); write it again with"
                " json.dumps"
            ) from error
        if name == "env_info":
            env_args = self._recorded_env_args(env_args, data)
        if not isinstance(env_args, dict) or not isinstance(env_args.get("env_name"), str | None):
            raise self.error(
                'data\'s attribute env_args must be a JSON object with "env_name", "type" and'
                ' "env_kwargs"'
            )
        if not isinstance(env_args.get("env_kwargs"), dict | None):
            raise self.error(
                "env_kwargs of data's attribute env_args must be a JSON object of keyword arguments"
            )
        if not isinstance(env_args.get("type"), int | str | None):
            raise self.error("type of data's attribute env_args must be a number, 1 for robosuite")
        # null means the same as a missing entry.
        env_args = {
            key: value
            for key, value in env_args.items()
            if value is not None or key not in ("env_name", "env_kwargs")
        }
        return {**env_args, "env_kwargs": env_args.get("env_kwargs", {})} if env_args else {}

    def _recorded_env_args(self, info: Any, data: h5py.Group) -> dict[str, Any]:
        version = _plain(data.attrs.get("repository_version"))
        if str(version).startswith("1.0."):
            raise self.error(
                "is a recording of robosuite 1.0, whose rotations have the opposite sign; convert"
                " it in Python: fibopolicy.datasets.download.convert_recording"
            )
        if not isinstance(info, dict) or not {"env_name", "robots"} <= info.keys():
            raise self.error(
                'data\'s attribute env_info must be a JSON object with "env_name" and "robots"'
            )
        return recorded_env_args(info, version)

    def _find_observations(self) -> list[str]:
        """Find the first demo's observations and how to read them; returns the items
        that are not arrays.
        """
        first = self._demo(self.demos[0])
        groups = [name for name in OBS_GROUPS if isinstance(first.get(name), h5py.Group)]
        self._obs_group = groups[0] if groups else "obs"
        obs = first.get(self._obs_group)
        for path in [self._path(self.demos[0], f"obs/{key}") for key in obs or ("",)]:
            self._check_links(path)
        items = dict(_items(obs)) if isinstance(obs, h5py.Group) else {}
        for path, key in self._mapped.items():
            if key != "actions" and _is_array(first.get(path)):
                items.pop(path.removeprefix(f"{self._obs_group}/"), None)
                items[key] = first[path]
                self._paths[f"obs/{key}"] = path
        for path, key in self._mapped.items():  # one of several files may have other paths
            if key not in items and (key != "actions" or path != self._paths.get("actions")):
                known = [name for name, _ in _arrays(first)]
                raise self.error(f"--map: {unknown(f'array of {self.demos[0]}', path, known)}")
        self.stored: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            key: (tuple(item.shape[1:]), item.dtype)
            for key, item in items.items()
            if _is_array(item)
        }
        self.unreadable: dict[str, str] = {}
        self.obs = dict(self.stored)
        for key, (shape, dtype) in self.stored.items():
            self._find_conversion(key)
            if (conversion := self._conversions.get(f"obs/{key}")) is not None:
                (_, *read_shape), read_dtype = conversion.layout((0, *shape), dtype)
                self.obs[key] = tuple(read_shape), read_dtype
        self.converted = {
            key.removeprefix("obs/"): conversion.description
            for key, conversion in self._conversions.items()
            if conversion.steps
        }
        return sorted(key for key, item in items.items() if not _is_array(item))

    def _find_conversion(self, key: str) -> None:
        shape, dtype = self.stored[key]
        demo = self.demos[0]

        def sample() -> np.ndarray[Any, np.dtype[Any]]:
            steps = self._lengths[demo]
            places = np.unique(np.linspace(0, steps - 1, _SAMPLES).astype(int))
            rows = [self._read_stored(demo, f"obs/{key}", i, i + 1) for i in places]
            return np.concatenate(rows)

        found = find_conversion(shape, dtype, sample, flipped=self._flipped)
        content = f"{dtype} ({', '.join(['N', *map(str, shape)])})"
        if isinstance(found, str):
            self.unreadable[key] = f"{content}: {found}"
            return
        self._conversions[f"obs/{key}"] = found
        if not found.automatic:
            self.unreadable[key] = f"{content}: one channel; --cameras {key} reads it as grey"

    # Find arrays

    def _check_demo(self, demo: str) -> None:
        if demo not in self._lengths:
            raise self.error(str(unknown("demo", demo, self.demos)))

    def _demo(self, demo: str) -> h5py.Group:
        self._check_demo(demo)
        return self._file[self._path(demo) or "/"]

    def _path(self, demo: str, key: str = "") -> str:
        """Where a demo, or an array of it, lies in the file."""
        parts = (self._data, "" if self._is_episode else demo, self.array_path(key))
        return "/".join(part for part in parts if part)

    def array_path(self, key: str) -> str:
        """Where in a demo an array lies, e.g. "observations/qpos" for "obs/qpos"."""
        if key in self._paths:
            return self._paths[key]
        group, slash, name = key.partition("/")
        return f"{self._obs_group}/{name}" if group == "obs" and slash else key

    def _array(self, demo: str, key: str) -> h5d.DatasetID:
        """An array whose sources have been checked.

        It is low-level, since an `h5py.Dataset` costs more than reading a small array.
        """
        self._check_demo(demo)
        if (dataset := self._find(demo, key)) is not None:
            return dataset
        group, _, name = key.rpartition("/")
        if group == "obs" and not self.obs:
            raise self.error(
                f"{demo} holds no observations, states and actions alone; {self.frames_advice}"
            )
        parent = self._demo(demo).get(group) if group else self._demo(demo)
        raise self.error(
            f"{demo}: "
            + str(unknown(f"array of {group}" if group else "array", name, parent or ()))
        )

    @property
    def frames_advice(self) -> str:
        """How to add images: name those that lie elsewhere, render, or record them."""
        from fibopolicy.envs.registry import is_known  # here, since it imports gymnasium

        if others := self._frames_elsewhere():
            name = others[0].rpartition("/")[2]
            return f"name what to read, e.g. --map {quoted(f'{others[0]}={name}')}"
        if is_known(self.env_args) and self._find(self.demos[0], "states") is not None:
            return (
                f"render them before training: fibopolicy render {quoted(self.path)} --out NEW.hdf5"
            )
        return "store frames as obs/<camera>_image, uint8 (N, H, W, 3)"

    def _frames_elsewhere(self) -> list[str]:
        """Paths of arrays in the first demo that may be frames but are not observations."""
        read = {self.array_path(f"obs/{key}") for key in self.obs}
        return [
            path
            for path, item in _arrays(self._demo(self.demos[0]))
            if is_frame(item.shape[1:]) and path not in read and not path.startswith(_OTHER_OBS)
        ]

    def _find(self, demo: str, key: str) -> h5d.DatasetID | None:
        """An array of a demo, its sources checked; `None` where there is none."""
        if self._current[0] != demo:
            self._current = (demo, {})
        if key in self._current[1]:
            return self._current[1][key]
        path = self._path(demo, key)
        try:
            dataset = h5o.open(self._file.id, path.encode())
        except KeyError:
            self._check_links(path)
            return None
        if not isinstance(dataset, h5d.DatasetID):
            return None
        if (demo, key) not in self._layouts:
            try:
                files = self._sources.of(dataset)
                if h5f.get_name(dataset) != self._name:
                    files |= self._sources.follow(self._file, path)
            except UserError as error:
                raise self.error(f"{demo}/{key} {error}") from error
            self._layouts[demo, key] = _Layout(tuple(dataset.shape or ()), dataset.dtype, files)
        self._current[1][key] = dataset
        return dataset

    def _check_links(self, path: str) -> None:
        """Raise `UserError` if a link on the way to `path` leads nowhere."""
        with self.named(f"{path.removeprefix('data/')} "):
            self._sources.follow(self._file, path)

    def _read_stored(
        self, demo: str, key: str, start: int | None = None, stop: int | None = None
    ) -> np.ndarray[Any, np.dtype[Any]]:
        with self._wrap_errors(demo):
            dataset = self._array(demo, key)
            known = self._layouts[demo, key]
            whole = not start and (stop is None or stop >= (known.shape or (0,))[0])
            if not whole or known.dtype.kind not in "biuf" or not known.shape:
                return np.asarray(h5py.Dataset(dataset)[start:stop])
            # as h5py.Dataset does, at a fifth of its cost for small arrays
            values = np.empty(known.shape, known.dtype)
            if values.size:
                dataset.read(h5s.ALL, h5s.ALL, values)
            return values


#: Messages of the HDF5 library for a file that it cannot open -> their meaning.
_OPENING_ERRORS = {
    "signature not found": "not an HDF5 file; give the path of a robomimic HDF5 dataset",
    "unable to lock file": (
        "another process has the file open for writing; wait until it has finished, or set"
        " HDF5_USE_FILE_LOCKING=FALSE if the file system does not support locks"
    ),
    "already open for write": (
        "a process has the file open for writing, or was interrupted while it wrote; wait for it,"
        " or clear the mark with `h5clear -s FILE` and check the content"
    ),
    "truncated": "the file is truncated ({reason}); copy or download it again",
    "": "cannot be opened as HDF5: {reason}",
}


def _open(path: Path) -> h5py.File:
    if not path.exists():
        raise UserError(f"{path}: no such file; give the path of a robomimic HDF5 dataset")
    if path.is_dir():
        inside = ", ".join(sorted(item.name for item in path.glob("*.hdf5"))[:5])
        holds = f"; it holds {inside}; `fibopolicy import` makes one file" if inside else ""
        raise UserError(f"{path}: is a folder, expected an HDF5 file{holds}")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = message_of(error)
        known = reason.replace("consistency flags", "already open for write")
        meaning = next(text for part, text in _OPENING_ERRORS.items() if part in known)
        raise UserError(f"{path}: {meaning.format(reason=reason)}") from error


def in_numeric_order(name: str) -> tuple[list[str | int], str]:
    """A key to sort names by: demo_2 before demo_10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def _items(obs: h5py.Group) -> Iterator[tuple[str, Any]]:
    """The items of a group and of its groups, by path."""
    for key, item in obs.items():
        if isinstance(item, h5py.Group):
            yield from ((f"{key}/{name}", found) for name, found in item.items())
        else:
            yield key, item


def _arrays(group: h5py.Group) -> list[tuple[str, h5py.Dataset]]:
    """All arrays in a group at any depth, by path."""
    found: list[tuple[str, h5py.Dataset]] = []
    group.visititems(lambda path, item: found.append((path, item)) if _is_array(item) else None)
    return found


def _is_array(item: object) -> bool:
    return isinstance(item, h5py.Dataset) and item.shape is not None


def attributes_of(item: h5py.Group) -> dict[str, Any]:
    return {name: _plain(value) for name, value in item.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return text_of(value)
    return value.item() if isinstance(value, np.generic) else value


def count_of(value: Any) -> int | str:
    """A whole number, also from text or an array of one; the text of anything else."""
    try:
        return int(str(np.asarray(value).astype(str).item()))
    except ValueError:
        return str(_plain(value))


def text_of(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
