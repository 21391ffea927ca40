"""The denoiser contract, and how a denoiser is told the time."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn


class Denoiser(nn.Module):
    """`(B, T, D)` noisy actions to `(B, T, D)`. Made by keyword:

    Args:
        action_dim: D.
        horizon: T.
        n_obs_steps: T_o, observations that it is conditioned on.
        feature_dim: F, numbers per observation.
        width, layers: of the network, at least 1.

    Raises:
        UserError: a width or number of layers that the network cannot have.
    """

    @abstractmethod
    def forward(self, actions: Tensor, time: Tensor, features: Tensor) -> Tensor:
        """Noisy actions `(B, T, D)`, the time `(B,)` of each between 0 and 100,
        observations `(B, T_o, F)`, to `(B, T, D)`.
        """


class TimeEmbedding(nn.Module):
    """Times `(B,)` between 0 and 100 to `(B, dim)`: sines and cosines of many
    wavelengths, then an MLP.
    """

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        frequencies = torch.exp(-math.log(1e4) * torch.arange(half) / max(1, half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * half, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))

    def forward(self, time: Tensor) -> Tensor:
        angles = time.float()[:, None] * self.frequencies  # (B, dim / 2)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.frequencies.dtype)
        embedded: Tensor = self.mlp(waves)
        return embedded
