"""Rotations as axis-angle vectors, which datasets hold, and as 6-D, which networks
learn better.

An axis-angle vector jumps where the angle passes pi, and near by two vectors far apart
are almost the same rotation. The first two columns of the rotation matrix are
continuous instead: 6-D, after Zhou et al. 2019, "On the Continuity of Rotation
Representations in Neural Networks".
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def axis_angle_to_6d(vectors: Tensor) -> Tensor:
    """Axis times angle in radians `(..., 3)` to the matrix's first column, then its
    second, `(..., 6)` in [-1, 1].
    """
    angle = vectors.norm(dim=-1, keepdim=True)  # (..., 1)
    half_sinc = 0.5 * torch.sinc(angle / (2 * torch.pi))  # sin(angle / 2) / angle, also at 0
    x, y, z = (vectors * half_sinc).unbind(-1)  # with w, the unit quaternion
    w = (angle / 2).cos().squeeze(-1)
    first = [1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)]
    second = [2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)]
    return torch.stack([*first, *second], dim=-1)


def axis_angle_from_6d(columns: Tensor) -> Tensor:
    """The nearest rotation to any two vectors `(..., 6)` by Gram-Schmidt, as axis times
    angle `(..., 3)`, angle in [0, pi].
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
    """Of the rotation matrix with these columns, `(..., 4)` as w, x, y, z.

    Four times the products of its entries with each other are sums of the matrix's
    entries; the row of its largest entry, divided by that entry, is the best
    conditioned way to it.
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
