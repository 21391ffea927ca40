"""A moving average of the weights."""

from __future__ import annotations

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """Keeps `average`, a copy of a module whose parameters follow it: a <- d a + (1 -
    d) w.

    The decay grows from 0.1 at the first step to its full value, so that the random
    start is forgotten. Buffers (normalisation, batch-norm statistics) are copied.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.average: M = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """After gradient step number `step`, from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours = [p.detach() for p in self.average.parameters()]
        theirs = [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for mine, other in zip(self.average.buffers(), module.buffers(), strict=True):
            mine.copy_(other)
