"""Several cameras and proprioception to one feature vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fibopolicy.encoders.base import build_encoder, encoder_options
from fibopolicy.errors import UserError, unknown

VIEWS = ("separate", "shared", "joint")


class ObservationEncoder(nn.Module):
    """Encode every camera, then join the vectors.

    Args:
        encoder, options: name and options for `build_encoder`.
        image_sizes: (H, W) per camera, after any crop; in the order in which features
            are joined.
        vector_dim: the summed size of the vectors that are appended.
        views: "separate", one encoder per camera; "shared", one for all, applied to
            each; "joint", one encoder whose token sequence holds the patches of all
            cameras (attention then crosses cameras).
    """

    def __init__(
        self,
        encoder: str,
        options: Mapping[str, Any],
        image_sizes: Mapping[str, tuple[int, int]],
        vector_dim: int,
        views: str = "separate",
    ) -> None:
        super().__init__()
        if views not in VIEWS:
            raise unknown("views", views, VIEWS)
        self.cameras, self.views = tuple(image_sizes), views
        sizes = set(image_sizes.values())
        if views != "separate" and len(sizes) > 1:
            raise UserError(
                f"views={views!r} needs cameras of one size, got {dict(image_sizes)}; use"
                " views='separate'"
            )
        if views == "separate":
            encoders = [
                build_encoder(encoder, image_size=size, **options) for size in image_sizes.values()
            ]
        elif views == "shared":
            encoders = [build_encoder(encoder, image_size=size, **options) for size in sizes]
        else:
            if "num_views" not in encoder_options(encoder):
                raise UserError(
                    "views='joint' needs an encoder with one token sequence for all cameras;"
                    f" {encoder} has none"
                )
            encoders = [
                build_encoder(encoder, image_size=size, num_views=len(self.cameras), **options)
                for size in sizes
            ]
        self.encoders = nn.ModuleList(encoders)
        times = len(self.cameras) if views == "shared" else 1
        self.output_dim = times * sum(e.output_dim for e in encoders) + vector_dim

    def of(self, camera: str) -> nn.Module:
        """The encoder that sees this camera's frames; with joint views, the one that sees all."""
        return self.encoders[self.cameras.index(camera) if self.views == "separate" else 0]

    def forward(self, images: Mapping[str, Tensor], vectors: Tensor) -> Tensor:
        """Camera -> `(B, C, H, W)` float in [0, 1], and vectors `(B, V)`, to features `(B, F)`."""
        frames = [images[camera] for camera in self.cameras]
        features: list[Tensor]
        if not frames:
            features = []
        elif self.views == "separate":
            features = [
                encoder(frame)[1] for encoder, frame in zip(self.encoders, frames, strict=True)
            ]
        elif self.views == "joint":
            features = [self.encoders[0](torch.stack(frames, dim=1))[1]]
        else:
            pooled = self.encoders[0](torch.cat(frames))[1]  # (V * B, F)
            features = list(pooled.chunk(len(frames)))
        # Without vectors, their empty tensor must not decide the dtype.
        return torch.cat(
            [*features, vectors] if vectors.shape[-1] or not features else features, dim=-1
        )
