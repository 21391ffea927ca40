"""Linear normalisation, stored with the weights."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fibopolicy.errors import unknown

KINDS = ("minmax", "gaussian", "none")
#: A number that varies less than this is constant: it is shifted, but not scaled.
CONSTANT = 1e-4


class Normalizer(nn.Module):
    """(x - offset) / scale for each of D numbers, in the module's dtype.

    Args:
        dim: D.
        kind: "minmax" maps the data to [-1, 1], "gaussian" to mean 0 and variance 1, "none"
            leaves them. Until `fit`, every kind is the identity.
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
        """Fit to data with the statistics min, max, mean and std, `(D,)` each."""
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
        """Undo `forward`, in float32 or better: numpy has no bfloat16."""
        return x.to(torch.promote_types(x.dtype, torch.float32)) * self.scale + self.offset
