"""Normalisation: actions of a dataset or simulator to the numbers that a policy
predicts, and back; vectors of an observation to the numbers that it reads.

Absolute actions hold rotations as axis-angle vectors. Such a vector jumps where the
angle passes pi, and close to there two distant vectors are almost the same rotation.
Policies predict the first two columns of the rotation matrix instead, which are
continuous: the 6-D representation of Zhou et al. 2019, "On the Continuity of Rotation
Representations in Neural Networks".
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fibopolicy.errors import unknown
from fibopolicy.policies.base import PolicyConfig, Shapes

KINDS = ("minmax", "gaussian", "none")
#: A number that varies less than this is constant: it is shifted, but not scaled.
CONSTANT = 1e-4


class Normalizer(nn.Module):
    """(x - offset) / scale for each of D numbers, in the module's dtype.

    Args:
        dim: D.
        kind: "minmax" maps the data to [-1, 1], "gaussian" to mean 0 and variance 1,
            "none" leaves them. Until `fit`, every kind is the identity.
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


class ActionNormalizer(Normalizer):
    """Actions `(..., A)` to `(..., dim)`: rotations become 6-D, other numbers are
    normalised.

    A 6-D rotation takes the place of its axis-angle vector. It lies in [-1, 1] already
    and is not normalised. `invert` gives actions to execute: in [-1, 1], unless they
    are absolute (metres and radians).

    Attributes:
        dim: D, what a policy predicts per action: A, and 3 more per 6-D rotation.
        bounded: normalised actions of the training data lie in [-1, 1].
    """

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        rotations = shapes.rotations if config.rotation == "6d" else ()
        dim = shapes.action_dim + 3 * len(rotations)
        super().__init__(dim, config.action_normalization)
        self.rotations, self.dim = rotations, dim
        self.absolute = shapes.absolute
        self.bounded = self.kind == "minmax" or (self.kind == "none" and not shapes.absolute)

    def fit(self, statistics: Mapping[str, NDArray[np.float64]]) -> None:
        # With these statistics, either kind of normalisation leaves a rotation as it
        # is.
        rotation = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0}
        super().fit({name: self._expand(x, rotation[name]) for name, x in statistics.items()})

    def largest(self, values: NDArray[np.float64]) -> float:
        """The largest magnitude in `values` `(A,)`, without 6-D rotations."""
        return float(np.abs(self._expand(values, 0.0)).max(initial=0.0))

    def forward(self, x: Tensor) -> Tensor:
        parts, end = [], 0
        for start in self.rotations:
            parts += [x[..., end:start], axis_angle_to_6d(x[..., start : start + 3])]
            end = start + 3
        return super().forward(torch.cat([*parts, x[..., end:]], dim=-1))

    def invert(self, x: Tensor) -> Tensor:
        x = super().invert(x)
        parts, end = [], 0
        for number, start in enumerate(self.rotations):
            start += 3 * number  # the rotations before it are 3 wider here
            parts += [x[..., end:start], axis_angle_from_6d(x[..., start : start + 6])]
            end = start + 6
        actions = torch.cat([*parts, x[..., end:]], dim=-1)
        return actions if self.absolute else actions.clamp(-1, 1)

    def _expand(self, values: NDArray[np.float64], rotation: float) -> NDArray[np.float64]:
        """`values` `(A,)` to `(dim,)`, with the number `rotation` for 6-D rotations."""
        parts, end = [], 0
        for start in self.rotations:
            parts += [values[end:start], np.full(6, rotation)]
            end = start + 3
        return np.concatenate([*parts, values[end:]])


def axis_angle_to_6d(vectors: Tensor) -> Tensor:
    """Axis times angle in radians `(..., 3)` to the first two columns of the rotation
    matrix, `(..., 6)` in [-1, 1].
    """
    angle = vectors.norm(dim=-1, keepdim=True)  # (..., 1)
    half_sinc = 0.5 * torch.sinc(angle / (2 * torch.pi))  # sin(angle / 2) / angle, also at 0
    x, y, z = (vectors * half_sinc).unbind(-1)  # with w, the unit quaternion
    w = (angle / 2).cos().squeeze(-1)
    first = [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)]
    second = [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)]
    return torch.stack([*first, *second], dim=-1)


def axis_angle_from_6d(columns: Tensor) -> Tensor:
    """Any two vectors `(..., 6)` to the rotation that Gram-Schmidt makes of them, as
    axis times angle `(..., 3)`, angle in [0, pi].
    """
    a, b = columns[..., :3], columns[..., 3:]
    a = F.normalize(a, dim=-1)
    b = F.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1)
    c = torch.linalg.cross(a, b)
    quaternion = _quaternion(a, b, c)  # (..., 4)
    w, v = quaternion[..., :1], quaternion[..., 1:]
    v = torch.where(w < 0, -v, v)
    sine = v.norm(dim=-1, keepdim=True)  # of half the angle
    angle = 2 * torch.atan2(sine, w.abs())
    return torch.where(sine > 1e-8, v * angle / sine.clamp(min=1e-8), 2 * v)


def _quaternion(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The quaternion `(..., 4)`, as w, x, y, z, of the rotation matrix with these
    columns.

    Sums of the matrix's entries give four times each product of two of the quaternion's
    entries. The row of the largest entry, divided by that entry, is best conditioned.
    """
    (xx, yx, zx), (xy, yy, zy), (xz, yz, zz) = a.unbind(-1), b.unbind(-1), c.unbind(-1)
    rows = [
        [1 + xx + yy + zz, zy - yz, xz - zx, yx - xy],
        [zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx],
        [xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy],
        [yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz],
    ]
    products = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)  # (..., 4, 4)
    largest = products.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)  # (...)
    row = products.gather(-2, largest[..., None, None].expand(*largest.shape, 1, 4)).squeeze(-2)
    return F.normalize(row, dim=-1)
