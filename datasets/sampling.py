"""Which samples make up the batch of a step: a function of seed and step alone, so that
resuming needs no more than the step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


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
    """The `(batch_size,)` samples of global step `step >= 0`, of several sources in a
    row, each in its share.

    The shares hold not on average but everywhere: of any n samples in a row, a source
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
    # (B,) places in the stream of all samples
    rank = step * batch_size + np.arange(batch_size, dtype=np.int64)
    chosen = np.empty(batch_size, dtype=np.int64)
    open_ = np.ones(batch_size, dtype=np.bool_)
    for source, (size, offset) in enumerate(zip(sizes, np.cumsum([0, *sizes[:-1]]), strict=True)):
        # Of the places that earlier sources have left, this one takes every one at
        # which share * places reaches a new whole number. Whole numbers alone, so that
        # the same step gives the same samples on every machine.
        share = (
            Fraction(weights[source]) / sum(map(Fraction, weights[source:]))
        ).limit_denominator(1 << 20)
        # samples of this source before each place
        before = rank * share.numerator // share.denominator
        mine = open_ & ((rank + 1) * share.numerator // share.denominator > before)
        epochs, places = np.divmod(before[mine], size)
        for epoch in np.unique(epochs):
            at = epochs == epoch
            chosen[np.flatnonzero(mine)[at]] = (
                offset + epoch_order(size, seed, int(epoch), source)[places[at]]
            )
        open_ &= ~mine
        rank = rank - before
    return chosen
