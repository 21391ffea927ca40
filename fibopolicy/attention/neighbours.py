"""A pattern as lists of neighbours: for every head and token, the tokens it attends to.
Linear in the kept pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fibopolicy.attention.patterns import AttentionPattern


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Compressed rows of all heads, one after another.

    Attributes:
        start: int64 `(h, T + 1)`; the keys of token t in head i are `key[start[i, t] :
            start[i, t + 1]]`, ascending.
        key: int32 `(pairs,)`.
        twin: int32 `(pairs,)`; the pair (t, k) at position e of its head has (k, t) at
            position `twin[e]` of the same head. Kept pairs are symmetric, so what would
            be scattered in the backward pass can be gathered instead.
    """

    start: NDArray[np.int64]
    key: NDArray[np.int32]
    twin: NDArray[np.int32]

    @functools.cached_property
    def addresses(self) -> tuple[int, int, int]:
        """Where `start`, `key` and `twin` lie in memory, for compiled code."""
        return self.start.ctypes.data, self.key.ctypes.data, self.twin.ctypes.data

    @functools.cached_property
    def pairs_per_head(self) -> int:
        """The largest number of kept pairs of any head."""
        return int((self.start[:, -1] - self.start[:, 0]).max())


@functools.lru_cache(maxsize=64)
def neighbours(pattern: AttentionPattern) -> Neighbours:
    """The neighbour lists of a pattern; remembered by the pattern's value."""
    length, prefix = pattern.sequence_length, pattern.num_prefix
    starts, keys, twins = [], [], []
    base = 0
    for head in range(pattern.num_heads):
        row, patch_key = pattern.patch_pairs(head)
        counts = np.concatenate(
            [np.full(prefix, length), prefix + np.bincount(row, minlength=pattern.num_tokens)]
        )
        start = np.concatenate([[0], np.cumsum(counts)])
        key = np.empty(start[-1], dtype=np.int32)
        key[: prefix * length] = np.tile(np.arange(length, dtype=np.int32), prefix)
        for i in range(prefix):
            key[start[prefix:-1] + i] = i
        # The n-th patch pair stands behind all earlier ones, the prefix rows, and the
        # prefix keys of its own and earlier rows.
        key[np.arange(len(row)) + prefix * length + (row.astype(np.int64) + 1) * prefix] = (
            patch_key + np.int32(prefix)
        )
        starts.append(start + base)
        keys.append(key)
        # Sorted by (key, row), a symmetric set lists its mirrored pairs in the order in
        # which (row, key) lists the pairs.
        twins.append(np.argsort(key, kind="stable").astype(np.int32))
        base += len(key)
    return Neighbours(np.stack(starts), np.concatenate(keys), np.concatenate(twins))
