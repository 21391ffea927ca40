"""Baseline patterns for Fibottention. `like` builds one with the density of a given
pattern.

Fibottention without its layer permutation is `FibottentionPattern(...,
permuted=False)`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fibopolicy.attention.patterns import (
    AttentionPattern,
    FibottentionPattern,
    OffsetPattern,
    diagonal_pairs,
    get_fibonacci,
)
from fibopolicy.errors import UserError, unknown


@dataclass(frozen=True, kw_only=True)
class DensePattern(AttentionPattern):
    """Every pair: plain attention."""

    @property
    def keeps_all(self) -> bool:
        return True

    @functools.cached_property
    def density(self) -> float:
        return 1.0

    def patch_pairs(self, head: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        row, key = np.divmod(np.arange(self.num_tokens**2, dtype=np.int64), self.num_tokens)
        return row.astype(np.int32), key.astype(np.int32)


@dataclass(frozen=True, kw_only=True)
class _TargetPattern(AttentionPattern):
    """A pattern with a target density.

    Args:
        target: kept patch pairs over N^2, met as closely as whole diagonals or pairs
            allow.
    """

    target: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.target <= 1:
            raise UserError(
                f"target, the share of patch pairs to keep, must be in (0, 1], got {self.target}"
            )


@dataclass(frozen=True, kw_only=True)
class LocalPattern(_TargetPattern, OffsetPattern):
    """A window around each token in the flattened raster: |j - k| <= w. w differs by at
    most one between heads.
    """

    @functools.cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        return _fill(self, range(self.num_tokens))


@dataclass(frozen=True, kw_only=True)
class DilatedPattern(_TargetPattern, OffsetPattern):
    """A window with gaps: |j - k| in {0, s, 2s, ...}, with the same spacing s in every
    head.

    Args:
        dilation: s; 4 by default. It is reduced if the sequence is too short for the
            target.
    """

    dilation: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dilation < 1:
            raise UserError(f"dilation must be at least 1, got {self.dilation}")

    @functools.cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        for dilation in range(self.dilation, 1, -1):
            steps = range(0, self.num_tokens, dilation)
            if (
                sum(diagonal_pairs(self.num_tokens, o) for o in steps)
                >= self.target * self.num_tokens**2
            ):
                return _fill(self, steps)
        return _fill(self, range(self.num_tokens))


@dataclass(frozen=True, kw_only=True)
class SharedPattern(_TargetPattern, OffsetPattern):
    """One set of Fibonacci offsets for all heads of all layers; the last offset is set
    so that the density fits.
    """

    @functools.cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        n = self.num_tokens
        kept: list[int] = []
        missing = self.target * n * n
        for offset in (*get_fibonacci(1, 2, n - 1), *range(1, n)):
            if offset < n and offset not in kept and diagonal_pairs(n, offset) <= missing:
                kept.append(offset)
                missing -= diagonal_pairs(n, offset)
        free = [o for o in range(1, n) if o not in kept]
        nearest = min(free, key=lambda o: abs(missing - diagonal_pairs(n, o)), default=None)
        if nearest is not None and abs(missing - diagonal_pairs(n, nearest)) < missing:
            kept.append(nearest)
        return (tuple(sorted(kept or [0])),) * self.num_heads


@dataclass(frozen=True, kw_only=True)
class RandomPattern(_TargetPattern):
    """Pairs drawn uniformly without replacement, different in each head and layer, kept
    in both directions.

    Args:
        seed: seed of the random draw; two patterns with different seeds differ.
    """

    seed: int = 0

    @functools.cached_property
    def density(self) -> float:
        return self._num_random_pairs / self.num_tokens**2

    @property
    def _num_random_pairs(self) -> int:
        n = self.num_tokens
        return max(2 * min(round(self.target * n * n / 2), n * (n - 1) // 2), 0)

    def patch_pairs(self, head: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return _symmetric(
            self.num_tokens,
            _draw(self.num_tokens, self._num_random_pairs // 2, (self.seed, self.layer, head)),
        )


@dataclass(frozen=True, kw_only=True)
class BigBirdPattern(_TargetPattern):
    """As in BigBird (Zaheer et al. 2020): a window, random pairs, and global tokens.

    The global tokens are the prefix tokens (CLS), or the first patch if there are none.
    The window takes half of the other pairs, in whole diagonals. Random pairs outside
    it make up the rest of the target.

    Args:
        seed: seed of the random pairs; two patterns with different seeds differ.
    """

    seed: int = 0

    @functools.cached_property
    def density(self) -> float:
        return (2 * self._upper_pairs[0] + self.num_tokens) / self.num_tokens**2

    @functools.cached_property
    def _upper_pairs(self) -> tuple[int, int]:
        """Number of pairs j < k that a head keeps, and the width of its window."""
        n = self.num_tokens
        first = 0 if self.num_prefix else n - 1
        budget, window, near = (self.target * n * n - n - 2 * first) / 2, 0, 0
        while window + 1 < n and near + n - window - 1 <= budget / 2:
            window += 1
            near += n - window
        # the first patch's pairs, those in the window counted once
        fixed = near + max(first - window, 0)
        return min(max(round((self.target * n * n - n) / 2), fixed), n * (n - 1) // 2), window

    def patch_pairs(self, head: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        n = self.num_tokens
        # pairs of the first patch
        upper = np.empty(0, dtype=np.int64) if self.num_prefix else np.arange(1, n, dtype=np.int64)
        count, window = self._upper_pairs
        rows = np.arange(n, dtype=np.int64)
        near = np.concatenate(
            [(rows[: n - o] * n + rows[o:]) for o in range(1, window + 1)]
            or [np.empty(0, dtype=np.int64)]
        )
        upper = np.union1d(upper, near)
        # Random pairs may repeat kept ones, so draw more than needed.
        drawn = _draw(n, min(count + len(upper), n * (n - 1) // 2), (self.seed, self.layer, head))
        fresh = drawn[~np.isin(drawn, upper)][: count - len(upper)]
        diagonal = rows * n + rows
        return _symmetric(n, np.concatenate([upper, fresh]), diagonal)


def _fill(pattern: _TargetPattern, family: range) -> tuple[tuple[int, ...], ...]:
    """Give each head the first offsets of `family`, as many as bring the heads together
    nearest to the target.
    """
    n = pattern.num_tokens
    sizes = np.cumsum([diagonal_pairs(n, o) for o in family])
    kept, heads = 0.0, []
    for head in range(1, pattern.num_heads + 1):
        wanted = head * pattern.target * n * n - kept
        count = int(np.abs(sizes - wanted).argmin()) + 1
        kept += float(sizes[count - 1])
        heads.append(tuple(family[:count]))
    return tuple(heads)


def _draw(n: int, count: int, seed: tuple[int, ...]) -> NDArray[np.int64]:
    """`count` different pairs j < k as j * n + k, in random order."""
    numbers = np.random.default_rng(seed).choice(n * (n - 1) // 2, size=count, replace=False)
    # Number the pairs by k: pair (j, k) is k (k - 1) / 2 + j. The root may be off by
    # one from rounding.
    k = ((1 + np.sqrt(1 + 8 * numbers.astype(np.float64))) / 2).astype(np.int64)
    k -= (k * (k - 1) // 2 > numbers).astype(np.int64)
    k += (k * (k + 1) // 2 <= numbers).astype(np.int64)
    return np.asarray((numbers - k * (k - 1) // 2) * n + k, dtype=np.int64)


def _symmetric(
    n: int, upper: NDArray[np.int64], diagonal: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Both directions of pairs j * n + k, in ascending order."""
    row, key = np.divmod(upper, n)
    both = np.concatenate([upper, key * n + row, *([] if diagonal is None else [diagonal])])
    row, key = np.divmod(np.sort(both), n)
    return row.astype(np.int32), key.astype(np.int32)


_BASELINES: dict[str, Callable[..., AttentionPattern]] = {
    "local": LocalPattern,
    "dilated": DilatedPattern,
    "shared": SharedPattern,
    "random": RandomPattern,
    "bigbird": BigBirdPattern,
}

#: The names that `like` accepts.
BASELINES = ("dense", "unpermuted", *_BASELINES)


def like(pattern: FibottentionPattern, baseline: str) -> AttentionPattern:
    """The baseline of this name for the same tokens, heads and layer, with the density
    of `pattern`.

    >>> like(FibottentionPattern(196, 6), "local").offsets[0]
    (0, 1, 2, 3)
    """
    if baseline == "unpermuted":
        return dataclasses.replace(pattern, permuted=False)
    size = {"layer": pattern.layer, "cls_token": pattern.cls_token}
    if baseline == "dense":
        return DensePattern(pattern.num_tokens, pattern.num_heads, **size)
    if baseline not in _BASELINES:
        raise unknown("baseline pattern", baseline, BASELINES)
    return _BASELINES[baseline](
        pattern.num_tokens, pattern.num_heads, target=pattern.density, **size
    )
