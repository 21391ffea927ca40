"""Writes robomimic HDF5 demonstrations; `hdf5.py` describes the format."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, NamedTuple, Self

import h5py
import numpy as np
from numpy.typing import ArrayLike

from fibopolicy.datasets.links import copy_whole
from fibopolicy.errors import UserError
from fibopolicy.utils.files import StrPath, atomic_write, check_output, expanded, wrap_os_error

Attribute = str | int | float | bool


class Blocks(NamedTuple):
    """An array that is written block by block, to save memory.

    Args:
        shape: shape of the whole, with its N steps.
        parts: arrays whose concatenation it is.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parts: Iterable[np.ndarray[Any, Any]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class DemoWriter:
    """Writes a new file, which appears at the end of the `with` block, or not at all on
    an error.

    Arrays are stored contiguously, uncompressed and without timestamps, so that
    the same content gives the same bytes. Every observation also gets its `next_obs`,
    which robomimic's `SequenceDataset` requires; it is an HDF5 virtual dataset over
    `obs`, so that images are not stored twice.

    Args:
        path: the file to write.
        env_args: the task: `env_name`, `env_version`, `type` (1 is robosuite) and
            `env_kwargs`; stored as JSON.
        attrs: attributes of the data group: where the demos came from, how they were
            rendered.
        overwrite: replace an existing file.

    Raises:
        UserError: `path` exists and `overwrite` is false, or it cannot be written.
    """

    def __init__(
        self,
        path: StrPath,
        env_args: Mapping[str, Any],
        *,
        attrs: Mapping[str, Attribute] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = expanded(path)
        self.env_args = dict(env_args)
        self.lengths: dict[str, int] = {}
        self._attrs = dict(attrs or {})
        check_output(self.path, overwrite)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            partial = stack.enter_context(atomic_write(self.path))
            with wrap_os_error(self.path):
                self._file = stack.enter_context(h5py.File(partial, "w", locking=False))
            self._data = self._file.create_group("data")
            self._data.attrs["env_args"] = json.dumps(self.env_args, indent=4)
            for name, value in self._attrs.items():
                self._data.attrs[name] = value
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The first error is the one to report: h5py raises another when it closes the file.
        guard = suppress(OSError, RuntimeError) if error else wrap_os_error(self.path)
        with guard, self._stack:  # leaving it with an exception removes the temporary file
            if error is not None:
                raise error
            if not self.lengths:
                raise UserError(f"{self.path}: no demos were recorded, nothing is written")
            self._data.attrs["total"] = sum(self.lengths.values())
            self._file.close()

    def add(
        self,
        obs: Mapping[str, ArrayLike | Blocks],
        actions: ArrayLike,
        states: ArrayLike | None,
        rewards: ArrayLike | None,
        dones: ArrayLike | None,
        *,
        next_obs: Mapping[str, ArrayLike] | None = None,
        model_file: str | None = None,
        extra: Mapping[str, ArrayLike] | None = None,
        attrs: Mapping[str, Attribute] | None = None,
        name: str | None = None,
    ) -> str:
        """Append a demo of N steps and return its name.

        Args:
            obs: per key `(N, ...)`; images uint8 `(N, H, W, 3)`, upright; `obs[t]` is
                seen before `actions[t]`.
            actions: `(N, A)` in [-1, 1], or absolute.
            states: `(N, S)`, the simulator's state before each action; `None` for data
                of a real robot.
            rewards, dones: `(N,)`, after each action; `None` where there are none.
            next_obs: per key `(N, ...)`, what is seen after each action. Of `obs`
                shifted by one step, only the last row is stored, and `(1, ...)` is that
                row alone. `None` repeats the last observation.
            model_file: the MJCF of the scene.
            extra: further arrays `(N, ...)`, e.g. the noisy actions that were executed.
            attrs: the demo's provenance.
            name: `demo_<k>`; by default the next k.

        Raises:
            ValueError: the arrays differ in length.
        """
        main = {"actions": actions, "states": states, "rewards": rewards}
        main["dones"] = None if dones is None else np.asarray(dones, dtype=np.int64)
        arrays = {
            key: np.asarray(value)
            for key, value in {**main, **(extra or {})}.items()
            if value is not None
        }
        seen = {
            key: value if isinstance(value, Blocks) else np.asarray(value)
            for key, value in obs.items()
        }
        then = {key: np.asarray(value) for key, value in (next_obs or {}).items()}
        steps = len(arrays["actions"])
        for key, value in [*arrays.items(), *seen.items(), *then.items()]:
            if value.shape[0] != steps and not (value is then.get(key) and len(value) == 1):
                raise ValueError(f"{key} has {value.shape[0]} steps, actions have {steps}")

        name = f"demo_{len(self.lengths)}" if name is None else name
        with wrap_os_error(self.path):
            group = self._data.create_group(name)
            group.attrs["num_samples"] = steps
            if model_file is not None:
                group.attrs["model_file"] = model_file
            for attribute, setting in (attrs or {}).items():
                group.attrs[attribute] = setting
            for key, value in arrays.items():
                group.create_dataset(key, data=value)
            for key, value in seen.items():
                stored = _write_obs(group, key, value)
                seen_again = stored if isinstance(value, Blocks) else value
                _write_next(group, key, stored, seen_again, then.get(key))
        self.lengths[name] = steps
        return name

    def set_attrs(self, attrs: Mapping[str, Attribute]) -> None:
        """Store further attributes of the data group."""
        for name, value in attrs.items():
            self._data.attrs[name] = value

    def copy(self, demo: str, source: h5py.Group, key: str) -> None:
        """Copy `key`, an array or a group of them, from another file's demo.

        Linked content is copied too, see `links.copy_whole`.
        """
        with wrap_os_error(self.path):
            copy_whole(source, self._data[demo], key)

    def add_filter_key(self, name: str, demos: Iterable[str]) -> None:
        """Store a named subset of the demos, under mask/<name>."""
        write_filter_key(self._file, name, demos)


def write_filter_key(file: h5py.File, name: str, demos: Iterable[str]) -> None:
    """Store or replace a named subset of the demos of an open file."""
    names = list(demos)
    if not names:
        raise ValueError(f"filter key {name!r} names no demos")
    data = file.get("data", file)
    if missing := [demo for demo in names if demo not in data]:
        raise ValueError(f"filter key {name!r} names {missing[0]!r}, which is not in data")
    if not isinstance(file.get("mask"), h5py.Group | None):
        del file["mask"]
    mask = file.require_group("mask")
    if name in mask:
        del mask[name]
    mask.create_dataset(name, data=np.array([entry.encode() for entry in names]))


def _write_obs(group: h5py.Group, key: str, value: np.ndarray[Any, Any] | Blocks) -> h5py.Dataset:
    if not isinstance(value, Blocks):
        return group.create_dataset(f"obs/{key}", data=value)
    stored = group.create_dataset(f"obs/{key}", value.shape, value.dtype)
    steps = 0
    for block in value.parts:
        stored[steps : steps + len(block)] = block
        steps += len(block)
    if steps != value.shape[0]:
        raise ValueError(f"{key} has {steps} steps of {value.shape[0]}")
    return stored


def _write_next(
    group: h5py.Group,
    key: str,
    stored: h5py.Dataset,
    seen: h5py.Dataset | np.ndarray[Any, Any],
    then: np.ndarray[Any, Any] | None,
) -> None:
    """Write `next_obs/<key>`: rows 1.. of `obs/<key>` and a last row.

    The last row is stored as `last_obs/<key>`, if it is known.
    """
    if then is not None and len(then) > 1 and not np.array_equal(then[:-1], seen[1:]):
        group.create_dataset(f"next_obs/{key}", data=then)
        return
    steps = len(stored)
    layout = h5py.VirtualLayout(shape=stored.shape, dtype=stored.dtype)
    if steps > 1:
        layout[:-1] = _source(stored)[1:]
    layout.dcpl.set_obj_track_times(False)
    if then is not None:
        stored = group.create_dataset(f"last_obs/{key}", data=then[-1:])
    layout[-1:] = _source(stored)[-1:]
    group.create_virtual_dataset(f"next_obs/{key}", layout)


def _source(dataset: h5py.Dataset) -> h5py.VirtualSource:
    # "." is HDF5's name for the same file, so that the file may be renamed and copied.
    return h5py.VirtualSource(".", dataset.name, shape=dataset.shape, dtype=dataset.dtype)
