"""Several demonstration files as one source of training windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.datasets.cache import Buffers
from fibopolicy.datasets.windows import Batch, WindowDataset, batch_indices, mixed_indices
from fibopolicy.errors import UserError

_MAX_DIFFERENCES = 6


class Mixture:
    """The concatenated samples of several files, drawn in given shares.

    It is used like a `WindowDataset`.

    Args:
        parts: the files' windows. They must agree in keys, shapes, the width of actions
            and the form of windows.
        dataset_weights: the share of each file in every batch, positive, of any sum: 1 and 1
            give half and half, however long the files are. `None` draws every sample
            equally often, as if the files were one.

    Attributes:
        env_args: the task of the first file, which evaluation uses.
        warnings: of the files, and how their `env_args` differ, one line each.
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
        self.env_args = first.env_args
        differences = (line for part in parts[1:] for line in _differences(first, part))
        self.warnings = (*(line for part in parts for line in part.warnings), *differences)
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

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The samples of `indices` `(B,)`, each in 0 .. len - 1."""
        source = np.searchsorted(self._ends, indices, side="right")  # (B,)
        rows, batches = [], []
        for i, part in enumerate(self.parts):
            if len(mine := np.flatnonzero(source == i)):
                rows.append(mine)
                batches.append(part.batch(indices[mine] - (self._ends[i] - len(part))))
        if len(batches) == 1:
            return batches[0]
        return {
            "obs": {
                key: self._joined(rows, [b["obs"][key] for b in batches])
                for key in (*self.cameras, *self.vectors)
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
    ours, theirs = dict(_flat(part.env_args)), dict(_flat(first.env_args))
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


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


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
