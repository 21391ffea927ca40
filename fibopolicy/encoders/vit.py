"""Vision transformer with dense attention, Fibottention, or a baseline of the same
density.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fibopolicy.attention import (
    BASELINES,
    AttentionPattern,
    FibottentionPattern,
    fibottention_qkvpacked,
    like,
)
from fibopolicy.attention.functional import Masking
from fibopolicy.encoders.base import Encoder, check_image_size, register_encoder
from fibopolicy.encoders.pooling import SpatialSoftmax
from fibopolicy.errors import UserError, unknown

POOLS = ("cls", "mean", "keypoints", "cls+keypoints")
#: The patterns of `fibopolicy.attention.like`, each with the density of Fibottention
#: for the same tokens and heads.
SPARSE_BASELINES = tuple(name for name in BASELINES if name != "dense")
ATTENTIONS = ("dense", "fibottention", *SPARSE_BASELINES)


@dataclass(frozen=True)
class FibottentionPreset:
    """How the pattern of each layer is built."""

    masking: Masking
    modified: bool
    whole_window: bool
    """Every head's window is the whole sequence, instead of growing from 5 to N // 3."""

    def pattern(
        self, num_tokens: int, num_heads: int, layer: int, cls_token: bool | int
    ) -> FibottentionPattern:
        window = max(num_tokens, 1) if self.whole_window else None
        return FibottentionPattern(
            num_tokens,
            num_heads,
            w_min=window or 5,
            w_max=window,
            modified=self.modified,
            layer=layer,
            cls_token=cls_token,
        )


PRESETS = {
    "paper": FibottentionPreset(masking="neg_inf", modified=False, whole_window=False),
    "released_robot": FibottentionPreset(masking="zero_logit", modified=True, whole_window=True),
}


class Attention(nn.Module):
    """Multi-head self-attention, `(B, T, D)` -> `(B, T, D)`; dense without a pattern."""

    def __init__(
        self, width: int, num_heads: int, pattern: AttentionPattern | None, masking: Masking
    ) -> None:
        super().__init__()
        self.num_heads, self.pattern, self.masking = num_heads, pattern, masking
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.num_heads, d // self.num_heads)  # (B, T, 3, h, d)
        if self.pattern is None:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, T, d) each, views of qkv
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            y = fibottention_qkvpacked(qkv, self.pattern, masking=self.masking)  # (B, T, h, d)
        z: Tensor = self.out(y.reshape(b, t, d))
        return z


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, mlp_ratio: float, attention: Attention) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), attention
        self.norm2 = nn.LayerNorm(width)
        hidden = int(width * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class ViT(Encoder):
    """Vision transformer over the patches of one image, or of several views in one
    sequence.

    Args:
        image_size: (H, W), pixels; both divisible by `patch_size`.
        patch_size: P, pixels.
        width, depth, num_heads, mlp_ratio: D, layers, attention heads (D divisible by it),
            MLP expansion.
        stem: "patch", one P x P projection; "conv", overlapping 3 x 3 convolutions of
            stride 2 before a smaller projection (P divisible by 4).
        cls_token: put a learned token before the patches.
        pool: the feature: "cls", "mean" of the patches, "keypoints" (softmax keypoints
            over the patch grid), or "cls+keypoints".
        keypoints: K per view, for the pools that have them.
        attention: "dense", "fibottention", or a baseline as dense as that: "local",
            "random", "dilated", "bigbird", "shared" (one set of offsets for all heads
            and layers), "unpermuted" (the same order of heads in every layer).
        preset: variant of Fibottention, one of `PRESETS`; a baseline takes its density
            and masking.
        num_views: V simultaneous images that share the sequence; offsets then cross
            from one view into the next.
        drop_remainder: drop pixels at the right and bottom that fill no patch, as the
            released robot code does.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        patch_size: int = 12,
        width: int = 96,
        depth: int = 3,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        stem: Literal["patch", "conv"] = "patch",
        cls_token: bool = True,
        pool: str = "cls+keypoints",
        keypoints: int = 16,
        attention: str = "dense",
        preset: str = "paper",
        num_views: int = 1,
        drop_remainder: bool = False,
    ) -> None:
        super().__init__()
        self._check(
            image_size,
            patch_size,
            width,
            num_heads,
            depth,
            mlp_ratio,
            keypoints,
            stem,
            drop_remainder,
        )
        if pool not in POOLS:
            raise unknown("pool", pool, POOLS)
        if "cls" in pool and not cls_token:
            raise UserError(
                f"pool={pool!r} reads the CLS token; set cls_token=True or choose 'mean' or"
                " 'keypoints'"
            )
        if attention not in ATTENTIONS:
            raise unknown("attention", attention, ATTENTIONS)
        if preset not in PRESETS:
            raise unknown("Fibottention preset", preset, PRESETS)
        self.grid = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.cropped = (self.grid[0] * patch_size, self.grid[1] * patch_size)
        self.image_size, self.num_views, self.pool = image_size, num_views, pool
        tokens = num_views * self.grid[0] * self.grid[1]
        self.patches = _stem(stem, patch_size, width)
        self.cls = nn.Parameter(torch.zeros(1, 1, width)) if cls_token else None
        self.positions = nn.Parameter(torch.empty(1, tokens, width))
        nn.init.trunc_normal_(self.positions, std=0.02)
        chosen = PRESETS[preset]
        self.blocks = nn.ModuleList(
            Block(
                width,
                mlp_ratio,
                Attention(
                    width,
                    num_heads,
                    _pattern(attention, chosen.pattern(tokens, num_heads, layer, cls_token)),
                    chosen.masking,
                ),
            )
            for layer in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.recomputes = False
        self.keypoints = (
            SpatialSoftmax(width, self.grid, keypoints) if "keypoints" in pool else None
        )
        if self.keypoints is not None:
            # Tokens are normalised, so with torch's default weights the softmaxes would
            # be almost flat: every keypoint would start in the middle, and tiny
            # gradients would keep it there.
            nn.init.normal_(self.keypoints.heatmaps.weight, std=3 / width**0.5)
        self.output_dim = ("cls" in pool or pool == "mean") * width + (
            "keypoints" in pool
        ) * num_views * 2 * keypoints

    @staticmethod
    def _check(
        image_size: tuple[int, int],
        patch_size: int,
        width: int,
        num_heads: int,
        depth: int,
        mlp_ratio: float,
        keypoints: int,
        stem: str,
        drop_remainder: bool,
    ) -> None:
        check_image_size(image_size)
        if stem not in ("patch", "conv"):
            raise unknown("stem", stem, ("patch", "conv"))
        if (
            patch_size < 1
            or min(image_size) < patch_size
            or (any(s % patch_size for s in image_size) and not drop_remainder)
        ):
            fits = [p for p in range(2, min(image_size) + 1) if all(s % p == 0 for s in image_size)]
            raise UserError(
                f"patch_size {patch_size} does not divide the image of {image_size[0]} x"
                f" {image_size[1]} pixels; "
                + (f"these do: {fits}" if fits else "none but 1 does: crop or resize the images")
            )
        if stem == "conv" and patch_size % 4:
            raise UserError(f"stem='conv' needs a patch_size divisible by 4, got {patch_size}")
        if num_heads < 1 or width % num_heads:
            raise UserError(f"width {width} is not divisible by num_heads {num_heads}")
        if depth < 1:
            raise UserError(f"depth must be at least 1, got {depth}")
        if keypoints < 1 or not width * mlp_ratio >= 1:
            raise UserError(
                f"expected keypoints >= 1 and width * mlp_ratio >= 1, got {keypoints} and {width} *"
                f" {mlp_ratio}"
            )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        b = images.shape[0]
        # (B, C, H, W) or (B, V, C, H, W) -> (B * V, C, H, W)
        views = images.flatten(0, 1) if images.ndim == 5 else images
        views = views[..., : self.cropped[0], : self.cropped[1]].to(self.positions.dtype) * 2 - 1
        x = self.patches(views).flatten(2).transpose(1, 2)  # (B * V, N / V, D)
        x = x.reshape(b, -1, x.shape[-1]) + self.positions  # (B, N, D)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(b, -1, -1), x], dim=1)  # (B, T, D)
        for block in self.blocks:
            x = (
                checkpoint(block, x, use_reentrant=False)
                if self.recomputes and self.training
                else block(x)
            )
        x = self.norm(x)
        patches = x if self.cls is None else x[:, 1:]  # (B, N, D)
        return patches, self._pool(x, patches)

    def checkpoint_gradients(self) -> None:
        """Store only the input of each block, and recompute the block in the backward pass."""
        self.recomputes = True

    def _pool(self, x: Tensor, patches: Tensor) -> Tensor:
        if self.pool == "mean":
            return patches.mean(dim=1)
        parts = [x[:, 0]] if "cls" in self.pool else []
        if self.keypoints is not None:
            b, _, d = patches.shape
            # (B * V, D, H/P, W/P)
            grids = patches.reshape(b * self.num_views, *self.grid, d).permute(0, 3, 1, 2)
            parts.append(self.keypoints(grids).reshape(b, -1))  # (B, V * 2K)
        return torch.cat(parts, dim=-1)


def _pattern(attention: str, fibottention: FibottentionPattern) -> AttentionPattern | None:
    if attention == "dense":
        return None
    return fibottention if attention == "fibottention" else like(fibottention, attention)


def _stem(kind: str, patch_size: int, width: int) -> nn.Module:
    if kind == "patch":
        return nn.Conv2d(3, width, patch_size, patch_size)
    return nn.Sequential(
        nn.Conv2d(3, width // 4, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(width // 4, width // 2, 3, 2, 1),
        nn.GELU(),
        nn.Conv2d(width // 2, width, patch_size // 4, patch_size // 4),
    )


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"width": 96, "depth": 3, "num_heads": 6, "patch_size": 12},
    "small": {"width": 384, "depth": 12, "num_heads": 6, "patch_size": 6},
    "base": {"width": 768, "depth": 12, "num_heads": 12, "patch_size": 6},
}


for _size, _options in _SIZES.items():
    register_encoder(f"vit_{_size}", attention="dense", **_options)(ViT)
    for _attention in ("fibottention", *SPARSE_BASELINES):
        register_encoder(f"{_attention}_vit_{_size}", attention=_attention, **_options)(ViT)
# The authors' configuration for robots: ViT-B, 8 x 8 patches, on crops of 76 x 76 (9 x
# 9 patches, 4 pixels dropped).
register_encoder(
    "released_robot",
    attention="fibottention",
    preset="released_robot",
    width=768,
    depth=12,
    num_heads=12,
    patch_size=8,
    pool="mean",
    drop_remainder=True,
)(ViT)
