"""Random numbers that belong to samples, so that a batch may be split over processes or
in turns and nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Part:
    generator: torch.Generator
    total: int
    start: int


_PART: ContextVar[_Part | None] = ContextVar("part", default=None)


@contextmanager
def part_of_batch(generator: torch.Generator, *, total: int, start: int) -> Iterator[None]:
    """Within it, the samples of a loss are those from `start` on of a batch of `total`,
    whose draws come from `generator`.

    Every part of a batch needs a generator in the same state.
    """
    token = _PART.set(_Part(generator, total, start))
    try:
        yield
    finally:
        _PART.reset(token)


def per_sample(draw: Callable[[int, torch.Generator | None], Tensor], rows: int) -> Tensor:
    """`(rows, ...)`, drawn for the whole batch and cut to the samples at hand; as it
    comes outside of `part_of_batch`.

    Args:
        draw: from a number of rows n and a generator on the device of the draw (`None`
            is torch's global one) to `(n, ...)`.
        rows: how many samples are at hand, B.
    """
    part = _PART.get()
    if part is None:
        return draw(rows, None)
    return draw(part.total, part.generator)[part.start : part.start + rows]
