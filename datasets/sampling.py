"""Which samples make up the batch of a step: a function of seed and step alone, so that resuming needs no more than the step."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray


@functools.lru_cache(maxsize=4)
def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation of `num_samples`, int64 and read-only; the same arguments give the same order."""
    order = np.random.default_rng((seed, epoch)).permutation(num_samples)
    order.flags.writeable = False
    return order


def batch_indices(num_samples: int, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
    """The `(batch_size,)` samples of global step `step >= 0`.

    Every epoch is a new permutation whose last, partial batch is dropped. With fewer samples than one batch, a batch runs on
    through as many epochs as it needs.
    """
    if num_samples < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"expected num_samples >= 1, batch_size >= 1 and step >= 0, got {num_samples}, {batch_size} and {step}")
    if batch_size <= num_samples:
        epoch, batch = divmod(step, num_samples // batch_size)
        return epoch_order(num_samples, seed, epoch)[batch * batch_size : (batch + 1) * batch_size]
    start = step * batch_size
    epochs = range(start // num_samples, (start + batch_size - 1) // num_samples + 1)
    stream = np.concatenate([epoch_order(num_samples, seed, epoch) for epoch in epochs])
    return stream[start - epochs[0] * num_samples :][:batch_size]
