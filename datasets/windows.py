"""Training samples: windows of observations and the actions that follow, from one file
or a mixture of several, and their order.

The samples of a step depend on the seed and the step alone, so that resuming needs only
the step.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from fractions import Fraction
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from fibopolicy.datasets.cache import Buffers, FrameCache
from fibopolicy.datasets.conventions import instruction_in
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.validate import clipped, read_valid
from fibopolicy.errors import UserError, unknown
from fibopolicy.utils.files import StrPath
from fibopolicy.utils.settings import flatten

Floats = NDArray[np.float32]
#: Differences between the `env_args` of two files that a warning lists.
_MAX_DIFFERENCES = 6


class Batch(TypedDict):
    """B windows, as numpy arrays that own their memory.

    Attributes:
        obs: per camera uint8 `(B, T_o, H, W, 3)`, per vector float32 `(B, T_o, D)`,
            oldest first; and `task_index` int64 `(B,)` if tasks are given.
        actions: float32 `(B, horizon, A)`.
        action_mask: bool `(B, horizon)`, false where an action is padding after the end
            of the demo.
    """

    obs: dict[str, NDArray[Any]]
    actions: Floats
    action_mask: NDArray[np.bool_]


class WindowDataset:
    """One sample for every step t of every selected demo.

    Its observations are those of steps t-n_obs_steps+1 .. t, where steps before the
    first repeat the first; its actions are those of t .. t+horizon-1, where steps after
    the last repeat the last. A window never reaches into another demo. Sample i is step
    i of the concatenated demos.

    Frames are read from a memory-mapped cache, so memory use does not grow with them;
    vectors and actions are held in memory.

    Args:
        path: a robomimic HDF5 file, or an open one, which stays open; it is validated
            first.
        cameras, vectors: observation keys, in the order in which `batch` gives them.
        filter_key: which demos, `None` for all.
        horizon: actions per sample, at least 1.
        n_obs_steps: observations per sample up to t, at least 1.
        sequence: continue with the observations of the actions after t, so that T_o is
            n_obs_steps + horizon - 1 instead of n_obs_steps; those after the demo's
            last step repeat it.
        image_size: frames higher or wider than this (H, W) are resized to it, once.
        cache_dir: the folder of the frame cache, see `FrameCache`.
        tasks: the vector `(V,)` that stands for each task, for a policy that is
            conditioned on the task; see `task_of`.

    Attributes:
        env_args: the task, as the file gives it.
        control_hz: control steps a second, where the file says it.
        task_env_args: the same for each task of the demos; empty without `tasks`.
        warnings: the file's harmless deviations, one line each, which names the file.
        demos: the selected demos.
        left_out: observation keys of the file that are neither cameras nor vectors
            here.
        converted: what was done to actions and observations that are not read as they
            are stored, by key.
        image_shapes: (H, W, 3) per camera.
        vector_dims: D per vector key.
        action_dim: A.
        actions: actions of all steps of the selected demos, float32 `(len, A)`; clipped
            to [-1, 1] where the task's simulator does so.
        stats: per vector key and for "actions": `min`, `max`, `mean` and (population)
            `std`, float64 `(D,)`, over all steps of the selected demos.

    Raises:
        UserError: the file, a key or an option is invalid, see `DemoFile` and
            `validate`.
    """

    def __init__(
        self,
        path: StrPath | DemoFile,
        *,
        cameras: Sequence[str],
        vectors: Sequence[str],
        filter_key: str | None = None,
        horizon: int,
        n_obs_steps: int = 1,
        sequence: bool = False,
        image_size: tuple[int, int] | None = None,
        cache_dir: StrPath | None = None,
        tasks: Mapping[str, Floats] | None = None,
    ) -> None:
        for name, value in (("horizon", horizon), ("n_obs_steps", n_obs_steps)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.path = path.path if isinstance(path, DemoFile) else Path(path)
        self.cameras, self.vectors = tuple(cameras), tuple(vectors)
        self.horizon, self.n_obs_steps, self.sequence = horizon, n_obs_steps, sequence
        self.tasks = dict(tasks or {})
        with nullcontext(path) if isinstance(path, DemoFile) else DemoFile(path) as file:
            self.env_args: dict[str, Any] = file.env_args
            self.control_hz = file.control_hz
            self.warnings = tuple(f"{self.path}: {warning}" for warning in file.warnings)
            self.left_out = tuple(key for key in file.obs if key not in (*cameras, *vectors))
            self.demos = file.select(filter_key)
            names = [task_of(file, demo) for demo in self.demos] if tasks else []
            for name in names:
                if name not in self.tasks:
                    raise file.error(str(unknown("task", name, self.tasks)))
            self.task_env_args = dict.fromkeys(names, self.env_args)
            # (demos,)
            self._task_index = np.array([list(self.tasks).index(name) for name in names], np.int64)
            arrays: dict[str, list[Floats]] = {key: [] for key in (*vectors, "actions")}
            for values in read_valid(file, cameras, vectors, self.demos):
                for key, array in values.items():
                    arrays[key].append(array.astype(np.float32))
            self.vector_dims = {key: file.vector_dim(key) for key in vectors}
            self.action_dim = file.action_dim
            self._vectors = {key: np.concatenate(arrays[key]) for key in vectors}  # (F, D) each
            with file.named():
                # (F, A)
                self.actions, warning = clipped(np.concatenate(arrays["actions"]), file.env_args)
            if warning is not None:
                self.warnings = (*self.warnings, f"{self.path}: {warning}")
            # (demos,) one past each demo's last step
            self._ends = np.cumsum([file.length(demo) for demo in self.demos])
            self._starts = np.concatenate([[0], self._ends[:-1]])
            self._frames = FrameCache(file, self.demos, cameras, cache_dir, image_size=image_size)
            self.image_shapes = self._frames.shapes
            self.converted = {
                key: how
                for key, how in file.converted.items()
                if key in (*cameras, *vectors, "actions")
            }
            for camera, (height, width, _) in self.image_shapes.items():
                if (found := file.image_shape(camera)[:2]) != (height, width):
                    size = f"{found[0]} x {found[1]} resized to {height} x {width} pixels"
                    self.converted[camera] = ", ".join(
                        filter(None, [file.converted.get(camera), size])
                    )
        self.stats = {
            key: _stats(values)
            for key, values in {**self._vectors, "actions": self.actions}.items()
        }

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def num_demos(self) -> int:
        """How many demos are selected."""
        return len(self.demos)

    def indices(self, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
        """The `(batch_size,)` samples of global step `step >= 0`: a function of these
        numbers alone.
        """
        return batch_indices(len(self), batch_size, seed, step)

    def batch(self, indices: NDArray[np.int64], *, frames: bool = True) -> Batch:
        """The samples of `indices` `(B,)`, each in 0 .. len - 1.

        Args:
            frames: false for the numbers of the frames, int64 `(B, T_o)`, instead of
                them. Frame i is that of sample i's own step.
        """
        demo = np.searchsorted(self._ends, indices, side="right")  # (B,)
        last = self.horizon if self.sequence else 1
        start, end = self._starts[demo][:, None], self._ends[demo][:, None]
        obs_index = indices[:, None] + np.arange(1 - self.n_obs_steps, last)  # (B, T_o)
        obs_index = np.clip(obs_index, start, end - 1)
        action_index = indices[:, None] + np.arange(self.horizon)  # (B, horizon)
        mask = action_index < end
        action_index = np.minimum(action_index, end - 1)
        images = {
            camera: self._frames.gather(camera, obs_index) if frames else obs_index
            for camera in self.cameras
        }
        vectors = {key: values[obs_index] for key, values in self._vectors.items()}
        task = {"task_index": self._task_index[demo]} if self.tasks else {}
        return {
            "obs": {**images, **vectors, **task},
            "actions": self.actions[action_index],
            "action_mask": mask,
        }


def task_of(file: DemoFile, demo: str) -> str:
    """The name of a demo's task: its id, if fibopolicy simulates it; else the language
    instruction of the demo or the file, or the name in `env_args`.

    Raises:
        UserError: there is none of these.
    """
    from fibopolicy.envs.registry import is_known, task_id_of  # here: it imports gymnasium

    if is_known(file.env_args):
        return task_id_of(file.env_args)
    name = instruction_in({**file.file_attrs, **file.attrs(demo)}) or file.env_args.get("env_name")
    if name is None:
        raise file.error(
            f"{demo} names no task; give it, or the group of all demos, the attribute"
            " language_instruction"
        )
    return str(name)


def share_at_limits(actions: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """The share of actions `(n, A)` that equal the minimum or maximum of their
    dimension, `(A,)`; 1 if a dimension has only two values.
    """
    at_a_limit = (actions == actions.min(axis=0)) | (actions == actions.max(axis=0))
    return np.asarray(at_a_limit.mean(axis=0), dtype=np.float64)


def _stats(values: Floats) -> dict[str, NDArray[np.float64]]:
    exact = values.astype(np.float64)
    return {
        "min": exact.min(axis=0),
        "max": exact.max(axis=0),
        "mean": exact.mean(axis=0),
        "std": exact.std(axis=0),
    }


# A mixture of files.


class Mixture:
    """The concatenated samples of several files, drawn in given shares.

    It is used like a `WindowDataset`.

    Args:
        parts: the files' windows. They must agree in keys, shapes, the width of actions
            and the form of windows.
        dataset_weights: the share of each file in every batch, positive, of any sum: 1
            and 1 give half and half, however long the files are. `None` draws every
            sample equally often, as if the files were one.

    Attributes:
        env_args: the task of the first file, which evaluation uses.
        task_env_args: `env_args` of each task that a policy is conditioned on.
        warnings: warnings about the files, and how their `env_args` differ, one line
            each.
        stats: as of `WindowDataset`; mean and standard deviation are those of what is
            drawn, so they follow the weights.

    Raises:
        UserError: the files do not agree, or the weights do not fit them.
    """

    def __init__(
        self, parts: Sequence[WindowDataset], dataset_weights: Sequence[float] | None = None
    ) -> None:
        first = parts[0]
        for part in parts[1:]:
            _check_agreement(first, part)
        if dataset_weights is not None:
            check_weights(dataset_weights, [part.path for part in parts])
        self.parts = tuple(parts)
        self.dataset_weights = tuple(dataset_weights) if dataset_weights is not None else None
        self.cameras, self.vectors = first.cameras, first.vectors
        self.image_shapes, self.vector_dims, self.action_dim = (
            first.image_shapes,
            first.vector_dims,
            first.action_dim,
        )
        self.env_args, self.tasks = first.env_args, first.tasks
        env_args_of = {task: e for part in parts for task, e in part.task_env_args.items()}
        self.task_env_args = {task: env_args_of[task] for task in sorted(env_args_of)}
        alike = (
            part for part in parts[1:] if part.task_env_args.keys() == first.task_env_args.keys()
        )
        differences = (line for part in alike for line in _differences(first, part))
        self.warnings = (
            *(line for part in parts for line in part.warnings),
            *(
                f"{part.path}: has {part.control_hz:g} control steps a second, {first.path}"
                f" {first.control_hz:g}; the policy learns both as if they were one"
                for part in parts[1:]
                if part.control_hz and first.control_hz and part.control_hz != first.control_hz
            ),
            *differences,
        )
        self._buffers = Buffers()
        self._ends = np.cumsum([len(part) for part in parts])
        self.stats = _mixed_stats(
            parts, np.array(dataset_weights or [len(part) for part in parts], dtype=np.float64)
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def num_demos(self) -> int:
        """How many demos are selected, of all files."""
        return sum(part.num_demos for part in self.parts)

    def indices(self, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
        """The `(batch_size,)` samples of global step `step >= 0`: a function of these
        numbers alone.
        """
        if self.dataset_weights is None:
            return batch_indices(len(self), batch_size, seed, step)
        return mixed_indices(
            [len(part) for part in self.parts], self.dataset_weights, batch_size, seed, step
        )

    def batch(self, indices: NDArray[np.int64], *, frames: bool = True) -> Batch:
        """The samples of `indices` `(B,)`, see `WindowDataset.batch`."""
        source = np.searchsorted(self._ends, indices, side="right")  # (B,)
        rows, batches = [], []
        for i, part in enumerate(self.parts):
            if len(selected := np.flatnonzero(source == i)):
                rows.append(selected)
                first = self._ends[i] - len(part)
                batches.append(part.batch(indices[selected] - first, frames=frames))
                if not frames:
                    batches[-1]["obs"] |= {c: first + batches[-1]["obs"][c] for c in self.cameras}
        if len(batches) == 1:
            return batches[0]
        return {
            "obs": {
                key: self._joined(rows, [b["obs"][key] for b in batches])
                for key in batches[0]["obs"]
            },
            "actions": self._joined(rows, [b["actions"] for b in batches]),
            "action_mask": self._joined(rows, [b["action_mask"] for b in batches]),
        }

    def _joined(
        self, rows: Sequence[NDArray[np.int64]], arrays: Sequence[NDArray[Any]]
    ) -> NDArray[Any]:
        """Arrays `(n, ...)` of which each knows its rows of the result `(B, ...)`."""
        shape, dtype = (sum(map(len, rows)), *arrays[0].shape[1:]), arrays[0].dtype
        joined = self._buffers.array(shape) if dtype == np.uint8 else np.empty(shape, dtype)
        for where, array in zip(rows, arrays, strict=True):
            joined[where] = array
        return joined


#: What training reads from.
Windows = WindowDataset | Mixture


def check_weights(dataset_weights: Sequence[float], paths: Sequence[Path]) -> None:
    """Raise `UserError` unless there is one finite, positive weight per file."""
    if len(dataset_weights) != len(paths):
        raise UserError(
            f"dataset_weights: got {len(dataset_weights)} for {len(paths)} files"
            f" ({', '.join(map(str, paths))}); give one per file"
        )
    if not all(0 < weight < float("inf") for weight in dataset_weights):
        raise UserError(
            "dataset_weights must be positive numbers, got"
            f" {' '.join(f'{w:g}' for w in dataset_weights)}; leave a file out instead"
        )


def _check_agreement(first: WindowDataset, part: WindowDataset) -> None:
    for what, one, other in (
        ("cameras", first.cameras, part.cameras),
        ("vectors", first.vectors, part.vectors),
        (
            "horizon, n_obs_steps",
            (first.horizon, first.n_obs_steps, first.sequence),
            (part.horizon, part.n_obs_steps, part.sequence),
        ),
    ):
        if one != other:
            raise UserError(
                f"{part.path}: {what} are {other}, those of {first.path} are {one}; a mixture needs"
                " the same"
            )
    for camera, shape in part.image_shapes.items():
        if shape != (wanted := first.image_shapes[camera]):
            raise UserError(
                f"{part.path}: {camera} is {shape[0]} x {shape[1]}, in {first.path} {wanted[0]} x"
                f" {wanted[1]}; render both alike before mixing them"
            )
    for key, dim in part.vector_dims.items():
        if dim != first.vector_dims[key]:
            raise UserError(
                f"{part.path}: {key} has {dim} numbers, in {first.path} {first.vector_dims[key]};"
                " leave it out of --vectors"
            )
    if part.action_dim != first.action_dim:
        raise UserError(
            f"{part.path}: actions have {part.action_dim} dimensions, those of {first.path}"
            f" {first.action_dim}; files of different robots or controllers cannot be mixed"
        )


def _differences(first: WindowDataset, part: WindowDataset) -> Iterator[str]:
    """One line that says how the task of `part` differs from that of `first`, if it does."""
    ours, theirs = flatten(part.env_args), flatten(first.env_args)
    changed = [key for key in {**theirs, **ours} if ours.get(key) != theirs.get(key)]
    if changed:
        shown = [
            f"{key} is {_short(ours.get(key))}, there {_short(theirs.get(key))}"
            for key in changed[:_MAX_DIFFERENCES]
        ]
        more = f", and {len(changed) - len(shown)} more" if len(changed) > len(shown) else ""
        yield (
            f"{part.path}: env_args differ from those of {first.path}, which evaluation uses:"
            f" {'; '.join(shown)}{more}"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _mixed_stats(
    parts: Sequence[WindowDataset], shares: NDArray[np.float64]
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Moments of a mixture of distributions.

    Its mean is the mean of means; its variance is theirs plus that of the means.
    """
    shares = (shares / shares.sum())[:, None]  # (S, 1)
    mixed = {}
    for key in parts[0].stats:
        low, high, mean, std = (
            np.stack([part.stats[key][name] for part in parts])
            for name in ("min", "max", "mean", "std")
        )
        middle = (shares * mean).sum(axis=0)
        variance = (shares * (std**2 + (mean - middle) ** 2)).sum(axis=0)
        mixed[key] = {
            "min": low.min(axis=0),
            "max": high.max(axis=0),
            "mean": middle,
            "std": np.sqrt(variance),
        }
    return mixed


# Which samples make up the batch of a step


@functools.lru_cache(maxsize=16)
def epoch_order(num_samples: int, seed: int, epoch: int, source: int = 0) -> NDArray[np.int64]:
    """A permutation of `num_samples`, int64 and read-only; the same arguments give the
    same order.
    """
    order = np.random.default_rng((seed, epoch, source)).permutation(num_samples)
    order.flags.writeable = False
    return order


def batch_indices(num_samples: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """The `(batch_size,)` samples of global step `step >= 0`.

    Every epoch is a new permutation whose last, partial batch is dropped. With fewer
    samples than one batch, a batch runs on through as many epochs as it needs.
    """
    if num_samples < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            f"expected num_samples >= 1, batch_size >= 1 and step >= 0, got {num_samples},"
            f" {batch_size} and {step}"
        )
    if batch_size <= num_samples:
        epoch, batch = divmod(step, num_samples // batch_size)
        return epoch_order(num_samples, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    start = step * batch_size
    epochs = range(start // num_samples, (start + batch_size - 1) // num_samples + 1)
    stream = np.concatenate([epoch_order(num_samples, seed, epoch) for epoch in epochs])
    return stream[start - epochs[0] * num_samples :][:batch_size]


def mixed_indices(
    sizes: Sequence[int], weights: Sequence[float], batch_size: int, seed: int, step: int
) -> NDArray[np.int64]:
    """The `(batch_size,)` samples of global step `step >= 0`, of several concatenated
    sources, each in its share.

    The shares hold everywhere, not just on average: of any n samples in a row, a source
    has its share to within a few. Within a source every epoch is a new permutation, as
    in `batch_indices`, and none of its samples is left out.

    Args:
        sizes: samples per source; sample i of source s has the index i +
            sum(sizes[:s]).
        weights: positive, one per source, of any sum.
    """
    if (
        batch_size < 1
        or step < 0
        or len(sizes) != len(weights)
        or min(sizes) < 1
        or min(weights) <= 0
    ):
        raise ValueError(
            f"expected sizes, as many positive weights, batch_size >= 1, step >= 0, got {sizes} and"
            f" {weights}"
        )
    # (B,) positions in the stream of all samples
    position = step * batch_size + np.arange(batch_size, dtype=np.int64)
    chosen = np.empty(batch_size, dtype=np.int64)
    unassigned = np.ones(batch_size, dtype=np.bool_)
    for source, (size, offset) in enumerate(zip(sizes, np.cumsum([0, *sizes[:-1]]), strict=True)):
        # Of the positions that earlier sources have left, this one takes every one at
        # which share * positions reaches a new whole number. Whole numbers alone, so
        # that the same step gives the same samples on every machine.
        share = (
            Fraction(weights[source]) / sum(map(Fraction, weights[source:]))
        ).limit_denominator(1 << 20)
        # samples of this source before and after each position
        num_before = position * share.numerator // share.denominator
        num_after = (position + 1) * share.numerator // share.denominator
        selected = unassigned & (num_after > num_before)
        epochs, places = np.divmod(num_before[selected], size)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            chosen[np.flatnonzero(selected)[at]] = (
                offset + epoch_order(size, seed, int(epoch), source)[places[at]]
            )
        unassigned &= ~selected
        position = position - num_before
    return chosen
