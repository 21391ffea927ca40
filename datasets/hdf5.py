"""Reads robomimic HDF5 demonstrations.

The format:

    data/                 attrs: total (int), env_args (JSON: env_name, env_version,
                                 type, env_kwargs)
      demo_<k>/           attrs: num_samples (int), model_file (MJCF), ep_meta (JSON)
        actions (N, A)    rewards (N,)    dones (N,)    states (N, S)
        obs/<key> (N, ...)    next_obs/<key> (N, ...)
    mask/<filter_key>     names of demos

Any group with actions counts as a demo. Images are uint8 `(N, H, W, 3)`, upright;
`obs[t]` is what was seen before `actions[t]`. Observations may lie in groups, one level
deep: `obs/images/front` has the key "images/front". Robosuite's own recordings, which
have `env_info` instead of `env_args`, are read as well.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5g, h5o, h5s

from fibopolicy.datasets.conventions import recorded_env_args
from fibopolicy.datasets.links import Sources, identity, read_array
from fibopolicy.errors import UserError, quoted, unknown
from fibopolicy.utils.files import StrPath, expanded

_DEMO_NAME = re.compile(r"demo_(\d+)")


class _Layout(NamedTuple):
    """An opened array: its shape, its dtype and the other files that it comes from."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    files: frozenset[str]


class DemoFile:
    """A robomimic HDF5 file, opened read-only; a context manager.

    Opening checks the structure and reads no frames: use `validate` for the content.
    Harmless deviations of real files (a wrong `total`, gaps in the numbering, no mask,
    ...) are accepted, and reported in `warnings`.

    Args:
        path: the file.
        skip_corrupt: leave out demos that cannot be read instead of rejecting the file.

    Attributes:
        path: the file.
        env_args: the task: `env_name`, `type`, `env_kwargs`, and maybe `env_version`;
            empty where the file names none.
        demos: the names of the demos in numeric order: demo_2 before demo_10.
        filter_keys: named subsets of the demos, as the file gives them; read them
            through `select`.
        obs: shape without the time axis and dtype of every observation key, from the
            first demo.
        warnings: harmless deviations, one line each.
        corrupt: demos that are left out because they cannot be read, with the reason;
            only with `skip_corrupt`.

    Raises:
        UserError: the file is missing, corrupt or of another format; a demo's
            `num_samples` disagrees with its actions.
    """

    def __init__(self, path: StrPath, *, skip_corrupt: bool = False) -> None:
        self.path = expanded(path)
        self.corrupt: dict[str, str] = {}
        self.warnings: tuple[str, ...] = ()
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; reading after this fails."""
        self._current = ("", {})
        self._sources.close()
        self._file.close()

    # what the file holds

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Observation keys that hold uint8 `(N, H, W, 3)` images."""
        return tuple(
            k for k, (shape, dtype) in self.obs.items() if _is_frame(shape) and dtype == np.uint8
        )

    @property
    def vector_keys(self) -> tuple[str, ...]:
        """Observation keys that hold floating-point `(N, D)` vectors."""
        return tuple(
            k
            for k, (shape, dtype) in self.obs.items()
            if len(shape) == 1 and shape[0] and dtype.kind == "f"
        )

    @property
    def unreadable(self) -> dict[str, str]:
        """Observation keys that training cannot read, each with its content."""
        readable = {*self.image_keys, *self.vector_keys}
        return {
            key: _unreadable(*layout) for key, layout in self.obs.items() if key not in readable
        }

    @property
    def frames_advice(self) -> str:
        """How to add images: by rendering if the task can be simulated, else in a recording."""
        from fibopolicy.envs.registry import is_known  # here, since it imports gymnasium

        if is_known(self.env_args) and self.has(self.demos[0], "states"):
            return (
                f"render them before training: fibopolicy render {quoted(self.path)} --out NEW.hdf5"
            )
        return "store frames as obs/<camera>_image, uint8 (N, H, W, 3)"

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

    def attrs(self, demo: str) -> dict[str, Any]:
        """The attributes of a demo: `num_samples`, maybe `model_file`, `ep_meta`, provenance."""
        with self._wrap_errors(demo):
            return _attributes(self._demo(demo))

    @property
    def file_attrs(self) -> dict[str, Any]:
        """The provenance: attributes of the file and its data group but `env_args`, `total`."""
        with self._wrap_errors():
            merged = _attributes(self._file) | _attributes(self._file["data"])
        return {
            name: value
            for name, value in merged.items()
            if name not in ("env_args", "env_info", "total")
        }

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
        """Shape, time axis included, and dtype of an array, without reading it."""
        if (demo, key) not in self._layouts:
            with self._wrap_errors(demo):
                self._array(demo, key)
        known = self._layouts[demo, key]
        return known.shape, known.dtype

    def read(
        self, demo: str, key: str, start: int | None = None, stop: int | None = None
    ) -> np.ndarray[Any, np.dtype[Any]]:
        """Steps `start:stop` of an array in the stored dtype; see `has` for its key."""
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

    # how it is read

    def _check_demo(self, demo: str) -> None:
        if demo not in self._lengths:
            raise self.error(str(unknown("demo", demo, self.demos)))

    def _demo(self, demo: str) -> h5py.Group:
        self._check_demo(demo)
        return self._file["data"][demo]

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

    def _find(self, demo: str, key: str) -> h5d.DatasetID | None:
        """An array of a demo, its sources checked; `None` where there is none."""
        if self._current[0] != demo:
            self._current = (demo, {})
        if key in self._current[1]:
            return self._current[1][key]
        path = f"data/{demo}/{key}"
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

    def _scan(self, skip_corrupt: bool) -> None:
        self._name = h5f.get_name(self._file.id)
        data = self._file.get("data")
        if data is None:
            self._check_links("data")
        if not isinstance(data, h5py.Group):
            raise self.error(
                f"no group 'data', found {list(self._file) or 'nothing'}: not a robomimic dataset"
            )
        self.env_args = self._read_env_args(data)
        named = sorted((name for name in data if _is_demo(data, name)), key=_in_numeric_order)
        if not named:
            found = f"found {', '.join(sorted(data)[:5])}" if len(data) else "found nothing"
            raise self.error(
                f"no demos: expected groups with actions, data/demo_0, data/demo_1, ..., {found}"
            )
        self.demos = tuple(named)
        self._lengths: dict[str, int] = {}
        self._without_count: list[str] = []
        for demo in self.demos:
            try:
                self._lengths[demo] = self._read_length(data, demo)
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
        first = data[self.demos[0]]
        obs = first.get("obs")
        for path in [f"data/{self.demos[0]}/obs/{key}" for key in obs or ("",)]:
            self._check_links(path)
        items = dict(_items(obs)) if isinstance(obs, h5py.Group) else {}
        self.obs: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {
            key: (tuple(item.shape[1:]), item.dtype)
            for key, item in items.items()
            if _is_array(item)
        }
        ignored = sorted(key for key, item in items.items() if not _is_array(item))
        self.warnings = tuple(self._find_warnings(data, named, ignored))

    def _find_warnings(
        self, data: h5py.Group, named: list[str], ignored: list[str]
    ) -> Iterator[str]:
        """One line for each harmless deviation of the file from the format.

        Args:
            named: all demos, whether or not they can be read.
            ignored: items in `obs` of the first demo that are not arrays.
        """
        first = data[self.demos[0]]
        obs = first.get("obs")
        if "total" in data.attrs and (total := _count(data.attrs["total"])) != self.num_steps:
            yield f"attribute total says {total}, the demos hold {self.num_steps} steps"
        numbers = sorted(int(match[1]) for name in named if (match := _DEMO_NAME.fullmatch(name)))
        if len(numbers) < len(named):
            other = next(name for name in named if not _DEMO_NAME.fullmatch(name))
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
        if len(named) != len(data):
            yield f"ignored in data: {', '.join(sorted(set(data) - set(named)))} (no actions)"
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
        if ignored:
            yield (
                f"ignored in obs: {', '.join(ignored)} (expected arrays, in groups of at most one"
                " level)"
            )
        yield from self._keys_missing_first(obs)
        if not self.obs:
            yield f"only states and actions are stored, no observations; {self.frames_advice}"

    def _keys_missing_first(self, obs: object) -> Iterator[str]:
        """A line on the first demo with observations that the first demo of all lacks."""
        names = {name.encode() for name in obs} if isinstance(obs, h5py.Group) else set()
        for demo in self.demos[1:]:
            try:
                found = h5o.open(self._file.id, f"data/{demo}/obs".encode())
            except KeyError:  # reported when it is read
                continue
            if isinstance(found, h5g.GroupID) and (other := set(found) - names):
                keys = ", ".join(sorted(map(_text, other)))
                yield f"not read, since {self.demos[0]} lacks what {demo} holds in obs: {keys}"
                return

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

    def _read_length(self, data: h5py.Group, demo: str) -> int:
        with self._wrap_errors(demo):
            actions = self._find(demo, "actions")
            stored = None
            if actions is not None:
                group = h5o.open(data.id, demo.encode())
                if h5a.exists(group, b"num_samples"):
                    stored = _count(h5py.Group(group).attrs["num_samples"])
                else:
                    self._without_count.append(demo)
        if actions is None or actions.rank != 2:
            found = f"shape {actions.shape}" if actions is not None else "none"
            raise self.error(f"{demo}: expected actions of shape (N, A), found {found}")
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
                keys[name] = tuple(_text(entry) for entry in names)
        return keys

    @contextmanager
    def _wrap_errors(self, what: str = "the file") -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
            # h5py and broken metadata raise these.
            raise self.error(
                f"{what} is corrupt ({_one_line(error)}); download or record it again"
            ) from error


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
        holds = f"; it holds {inside}" if inside else ""
        raise UserError(f"{path}: is a folder, expected an HDF5 file{holds}")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = _one_line(error)
        known = reason.replace("consistency flags", "already open for write")
        meaning = next(text for part, text in _OPENING_ERRORS.items() if part in known)
        raise UserError(f"{path}: {meaning.format(reason=reason)}") from error


def _is_demo(data: h5py.Group, name: str) -> bool:
    if _DEMO_NAME.fullmatch(name):  # without opening it: a broken one is an error, not skipped
        return True
    return data.get(name, getclass=True) is h5py.Group and "actions" in data[name]


def _in_numeric_order(name: str) -> tuple[list[str | int], str]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)], name


def _items(obs: h5py.Group) -> Iterator[tuple[str, Any]]:
    """The items of a group and of its groups, by path."""
    for key, item in obs.items():
        if isinstance(item, h5py.Group):
            yield from ((f"{key}/{name}", found) for name, found in item.items())
        else:
            yield key, item


def _is_array(item: object) -> bool:
    return isinstance(item, h5py.Dataset) and item.shape is not None


def _is_frame(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[2] == 3 and 0 not in shape


def _unreadable(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """The content of an observation that training cannot read, and what was expected."""
    frames = "frames must be uint8 (N, H, W, 3)"
    if 0 in shape:
        reason = "holds no values"
    elif dtype.kind in "OSV" or (dtype == np.uint8 and len(shape) == 1):
        reason = "encoded frames or text; frames must be decoded, uint8 (N, H, W, 3)"
    elif len(shape) == 3 and shape[-1] == 3:
        reason = "frames must be uint8, 0 to 255"
    elif len(shape) == 3 and shape[0] in (3, 4):
        reason = f"channels first; {frames}"
    elif len(shape) == 3 and shape[-1] == 4:
        reason = f"four channels; {frames}"
    elif len(shape) >= 2:
        reason = f"{frames}, vectors float (N, D)"
    else:
        reason = "vectors must be float (N, D)"
    return f"{dtype} ({', '.join(['N', *map(str, shape)])}): {reason}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _attributes(item: h5py.Group) -> dict[str, Any]:
    return {name: _plain(value) for name, value in item.attrs.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return _text(value)
    return value.item() if isinstance(value, np.generic) else value


def _count(value: Any) -> int | str:
    """A whole number, also from text or an array of one; the text of anything else."""
    try:
        return int(str(np.asarray(value).astype(str).item()))
    except ValueError:
        return str(_plain(value))


def _text(value: bytes | str) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
