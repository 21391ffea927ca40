"""A transformer over the chunk's actions with cross-attention to observations: the
transformer of Diffusion Policy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fibopolicy.errors import UserError
from fibopolicy.policies.denoisers.base import Denoiser, TimeEmbedding

HEAD_DIM = 32


class TransformerDenoiser(Denoiser):
    """One token per action; each block attends to the actions up to its own, then to
    the time and the observations.

    After Chi et al. 2023, whose decoder is 256 wide with 8 blocks and 4 heads; here a
    head has 32 numbers at least.
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
        if width % HEAD_DIM:
            raise UserError(f"a transformer's hidden must be divisible by {HEAD_DIM}, got {width}")
        self.actions = nn.Linear(action_dim, width)
        self.observations = nn.Linear(feature_dim, width)
        self.time = TimeEmbedding(width)
        self.positions = nn.Parameter(torch.randn(1, horizon, width) * 0.02)
        self.memory_positions = nn.Parameter(torch.randn(1, 1 + n_obs_steps, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width,
                width // HEAD_DIM,
                4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, action_dim)
        self.register_buffer(
            "later", nn.Transformer.generate_square_subsequent_mask(horizon), persistent=False
        )

    def forward(self, actions: Tensor, time: Tensor, features: Tensor) -> Tensor:
        memory = torch.cat([self.time(time).unsqueeze(1), self.observations(features)], dim=1)
        memory = memory + self.memory_positions  # (B, 1 + T_o, width)
        x = self.actions(actions) + self.positions  # (B, T, width)
        for block in self.blocks:
            x = block(x, memory, tgt_mask=self.later, tgt_is_causal=True)
        y: Tensor = self.out(self.norm(x))
        return y
