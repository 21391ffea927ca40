"""A 1-D U-Net over time, modulated by observations: the CNN of Diffusion Policy."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fibopolicy.errors import UserError
from fibopolicy.policies.denoisers.base import Denoiser, TimeEmbedding

GROUPS = 8
KERNEL = 5
TIME_DIM = 128


class UNetDenoiser(Denoiser):
    """Convolutions over the chunk's steps at `layers` resolutions, after Janner et al.
    2022 and Chi et al. 2023.

    Each level halves the number of steps and doubles the channels, from `width` on; the
    way back up sees the way down. The time and all observations, as one vector, scale
    and shift the channels of every residual block (FiLM). Diffusion Policy's has width
    256 and 3 layers. Any chunk will do: an odd number of steps is halved upwards.
    """

    def __init__(
        self,
        *,
        action_dim: int,
        horizon: int,
        n_obs_steps: int,
        feature_dim: int,
        width: int,
        layers: int,
    ) -> None:
        super().__init__()
        if width % GROUPS:
            raise UserError(f"a U-Net's hidden must be divisible by {GROUPS}, got {width}")
        channels = [width << level for level in range(layers)]
        condition = TIME_DIM + n_obs_steps * feature_dim
        self.time = TimeEmbedding(TIME_DIM)
        ins = [action_dim, *channels[:-1]]
        self.down = nn.ModuleList(
            _two_blocks(a, b, condition) for a, b in zip(ins, channels, strict=True)
        )
        self.shrink = nn.ModuleList(nn.Conv1d(c, c, 3, stride=2, padding=1) for c in channels[:-1])
        self.middle = _two_blocks(channels[-1], channels[-1], condition)
        self.up = nn.ModuleList(
            _two_blocks(2 * c, a, condition)
            for c, a in zip(channels[1:], channels[:-1], strict=True)
        )
        self.grow = nn.ModuleList(nn.Conv1d(c, c, 3, padding=1) for c in channels[:-1])
        self.out = nn.Sequential(_convolution(width, width), nn.Conv1d(width, action_dim, 1))

    def forward(self, actions: Tensor, time: Tensor, features: Tensor) -> Tensor:
        # No activation on the features: one over a number of them that fills no whole
        # vector registers gives a row other last bits in another place of the batch.
        # (B, condition)
        condition = torch.cat([F.mish(self.time(time)), features.flatten(1)], dim=-1)
        x = actions.transpose(1, 2)  # (B, D, T)
        seen = []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, condition)  # (B, C, T / 2^level)
            seen.append(x)
            if level < len(self.shrink):
                x = self.shrink[level](x)
        for block in self.middle:
            x = block(x, condition)
        for level in reversed(range(len(self.up))):
            x = torch.cat([x, seen[level + 1]], dim=1)
            for block in self.up[level]:  # type: ignore[attr-defined]
                x = block(x, condition)
            x = self.grow[level](F.interpolate(x, size=seen[level].shape[-1], mode="nearest"))
        y: Tensor = self.out(x)
        return y.transpose(1, 2)  # (B, T, D)


class ResidualBlock(nn.Module):
    """Two convolutions, the first one's channels scaled and shifted by the condition:
    `(B, C, T)` -> `(B, C', T)`.
    """

    def __init__(self, channels: int, out: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(channels, out), _convolution(out, out)
        self.film = nn.Linear(condition, 2 * out)
        self.skip = nn.Identity() if channels == out else nn.Conv1d(channels, out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition).unsqueeze(-1).chunk(2, dim=1)  # (B, C', 1) each
        y = self.second(self.first(x) * (1 + scale) + shift)
        z: Tensor = y + self.skip(x)
        return z


def _two_blocks(channels: int, out: int, condition: int) -> nn.ModuleList:
    return nn.ModuleList(
        [ResidualBlock(channels, out, condition), ResidualBlock(out, out, condition)]
    )


def _convolution(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(channels, out, KERNEL, padding=KERNEL // 2), nn.GroupNorm(GROUPS, out), nn.Mish()
    )
