"""Pooling that keeps positions: for a policy, where an object is matters more than
whether it is there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SpatialSoftmax(nn.Module):
    """K keypoints: for each, a softmax over the grid and the expected (x, y) under it,
    in [-1, 1].

    `(B, D, H, W)` -> `(B, 2 K)`. Source: Finn et al., Deep Spatial Autoencoders;
    robomimic's default pooling.
    """

    positions: Tensor

    def __init__(self, channels: int, grid: tuple[int, int], keypoints: int) -> None:
        super().__init__()
        self.heatmaps = nn.Conv2d(channels, keypoints, 1)
        y, x = torch.meshgrid(
            torch.linspace(-1, 1, grid[0]), torch.linspace(-1, 1, grid[1]), indexing="ij"
        )
        # (HW, 2)
        self.register_buffer(
            "positions", torch.stack([x.flatten(), y.flatten()], dim=-1), persistent=False
        )

    def forward(self, features: Tensor) -> Tensor:
        attention = torch.softmax(self.heatmaps(features).flatten(2), dim=-1)  # (B, K, HW)
        # bfloat16 would round positions to a third of a pixel
        with torch.autocast(features.device.type, enabled=False):
            wide = torch.promote_types(attention.dtype, torch.float32)
            keypoints = (attention.to(wide) @ self.positions.to(wide)).flatten(1)  # (B, 2K)
        # In a half-precision module, the next layer is half precision too; under
        # autocast it is not.
        return keypoints.to(torch.promote_types(attention.dtype, self.positions.dtype))
