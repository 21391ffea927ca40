"""Linear normalisation that travels with the weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fibopolicy.errors import unknown

KINDS = ("minmax", "gaussian", "none")
#: A dimension that varies less than this is constant: it is shifted, not scaled.
CONSTANT = 1e-4


class Normalizer(nn.Module):
    """x -> (x - offset) / scale per dimension, `(..., D)`, in the module's dtype; the
    identity until it is fitted.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        if kind not in KINDS:
            raise unknown("normalisation", kind, KINDS)
        self.kind = kind
        self.register_buffer("offset", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))

    def fit(self, statistics: Mapping[str, NDArray[np.float64]]) -> None:
        """From arrays min, max, mean and std `(D,)`: "minmax" maps to [-1, 1],
        "gaussian" to mean 0 and variance 1.
        """
        if self.kind == "none":
            return
        if self.kind == "minmax":
            offset = (statistics["max"] + statistics["min"]) / 2
            scale = (statistics["max"] - statistics["min"]) / 2
        else:
            offset, scale = statistics["mean"], statistics["std"]
        self.offset.copy_(torch.as_tensor(offset))
        self.scale.copy_(torch.as_tensor(np.where(scale < CONSTANT, 1.0, scale)))

    def forward(self, x: Tensor) -> Tensor:
        return ((x - self.offset) / self.scale).to(self.offset.dtype)

    def invert(self, x: Tensor) -> Tensor:
        """In float32 at least: numpy, which executes actions, has no bfloat16."""
        return x.to(torch.promote_types(x.dtype, torch.float32)) * self.scale + self.offset
