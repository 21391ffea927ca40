"""Several cameras and proprioception to one feature vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fibopolicy.encoders.base import build_encoder, encoder_options
from fibopolicy.errors import UserError, unknown

Views = Literal["separate", "shared", "joint"]


class ObservationEncoder(nn.Module):
    """Encode every camera, then join the vectors.

    Args:
        encoder, options: name and options for `build_encoder`.
        image_sizes: (H, W) per camera, after any crop; in the order in which features are joined.
        vector_dim: the summed size of the vectors that are appended.
        views: "separate", one encoder per camera; "shared", one for all, applied to each; "joint", one encoder whose
            token sequence holds the patches of all cameras (attention then crosses cameras).
    """

    def __init__(
        self,
        encoder: str,
        options: Mapping[str, Any],
        image_sizes: Mapping[str, tuple[int, int]],
        vector_dim: int,
        views: Views = "separate",
    ) -> None:
        super().__init__()
        if views not in ("separate", "shared", "joint"):
            raise unknown("views", views, ("separate", "shared", "joint"))
        self.cameras, self.views = tuple(image_sizes), views
        sizes = set(image_sizes.values())
        if views != "separate" and len(sizes) > 1:
            raise UserError(f"views={views!r} needs cameras of one size, got {dict(image_sizes)}; use views='separate'")
        if not self.cameras:
            self.encoders = nn.ModuleList()
        elif views == "separate":
            self.encoders = nn.ModuleList(build_encoder(encoder, image_size=s, **options) for s in image_sizes.values())
        else:
            if views == "joint" and "num_views" not in encoder_options(encoder):
                raise UserError(f"views='joint' needs an encoder with one token sequence for all cameras; {encoder} has none")
            extra = {"num_views": len(self.cameras)} if views == "joint" else {}
            self.encoders = nn.ModuleList([build_encoder(encoder, image_size=sizes.pop(), **options, **extra)])
        times = len(self.cameras) if views == "shared" else 1
        self.output_dim = times * sum(int(e.output_dim) for e in self.encoders) + vector_dim

    def forward(self, images: Mapping[str, Tensor], vectors: Tensor) -> Tensor:
        """Camera -> `(B, C, H, W)` float in [0, 1], and vectors `(B, V)`, to features `(B, F)`."""
        frames = [images[camera] for camera in self.cameras]
        if self.views == "separate":
            features = [encoder(frame)[1] for encoder, frame in zip(self.encoders, frames, strict=True)]
        elif self.views == "joint":
            features = [self.encoders[0](torch.stack(frames, dim=1))[1]]
        else:
            pooled = self.encoders[0](torch.cat(frames))[1]  # (V * B, F)
            features = list(pooled.chunk(len(frames)))
        return torch.cat([*features, vectors], dim=-1)
