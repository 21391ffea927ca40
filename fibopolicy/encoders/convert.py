"""Fibottention in a timm vision transformer that exists already, weights and all."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from torch import Tensor, nn

from fibopolicy.attention import FibottentionPattern, fibottention, fibottention_qkvpacked
from fibopolicy.encoders.vit import PRESETS, FibottentionPreset
from fibopolicy.errors import UserError, unknown
from fibopolicy.utils.imports import make_torchvision_importable

M = TypeVar("M", bound=nn.Module)


class FibottentionOfTimm(nn.Module):
    """Takes the place of a `timm.layers.Attention`, with its projections under their
    names, so that state dicts stay valid.

    `(B, T, D)` -> `(B, T, D)`. T is usually what the model was built for; another T, as
    of a model with dynamic image size, gets the same preset's pattern for its own
    number of patches.
    """

    def __init__(
        self,
        attention: nn.Module,
        preset: FibottentionPreset,
        num_tokens: int,
        num_prefix: int,
        layer: int,
    ) -> None:
        super().__init__()
        source: Any = attention
        self.num_heads, self.scale = int(source.num_heads), float(source.scale)
        self.qkv, self.q_norm, self.k_norm = source.qkv, source.q_norm, source.k_norm
        self.norm, self.gate = source.norm, getattr(source, "gate", None)
        self.proj, self.proj_drop = source.proj, source.proj_drop
        self.preset, self.num_prefix, self.layer = preset, num_prefix, layer
        self.pattern = _pattern(preset, num_tokens, self.num_heads, layer, num_prefix)
        self.train(attention.training)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UserError(
                "Fibottention takes no attention mask beside its own; call the model without one"
            )
        b, t, _ = x.shape
        pattern = self.pattern
        if t != pattern.sequence_length:
            pattern = _pattern(
                self.preset, t - self.num_prefix, self.num_heads, self.layer, self.num_prefix
            )
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, -1)  # (B, T, 3, h, d)
        if isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity):
            # (B, T, h, d)
            y = fibottention_qkvpacked(qkv, pattern, masking=self.preset.masking, scale=self.scale)
        else:
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, h, T, d) each, views of qkv
            q, k = self.q_norm(q), self.k_norm(k)
            y = fibottention(
                q, k, v, pattern, masking=self.preset.masking, scale=self.scale
            ).transpose(1, 2)
        y = self.norm(y.reshape(b, t, -1))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        z: Tensor = self.proj_drop(self.proj(y))
        return z


@functools.lru_cache(maxsize=256)
def _pattern(
    preset: FibottentionPreset, num_tokens: int, heads: int, layer: int, num_prefix: int
) -> FibottentionPattern:
    return preset.pattern(num_tokens, heads, layer, num_prefix)


def convert(model: M, preset: str = "paper") -> M:
    """Swaps dense attention for Fibottention in every block of a timm vision
    transformer, in place, weights kept.

    CLS and register tokens attend to all tokens and are attended to by all.

    Args:
        model: a `vit_*`, `deit*` or DINO-style model of timm, on any device, pretrained
            or not.
        preset: "paper" or "released_robot", see `fibopolicy.encoders.vit.PRESETS`.

    Returns:
        The same model.

    Raises:
        UserError: an unknown preset; a model whose blocks hold no plain timm attention,
            or drop attention weights at random, which sparse kernels cannot.
    """
    if preset not in PRESETS:
        raise unknown("Fibottention preset", preset, PRESETS)
    make_torchvision_importable()
    try:
        from timm.layers import Attention
    except ImportError as error:
        raise UserError("convert needs timm: pip install 'fibopolicy[timm]'") from error
    name = type(model).__name__
    parts: Any = model
    blocks = list(getattr(model, "blocks", []))
    for block in blocks:
        attention: Any = getattr(block, "attn", None)
        if type(attention) is not Attention:
            raise UserError(
                f"convert takes timm vision transformers with plain attention, {name} has"
                f" {type(attention).__name__}"
            )
        if attention.attn_drop.p > 0:
            raise UserError(
                f"{name} drops attention weights (attn_drop_rate {attention.attn_drop.p}); build it"
                " with 0 to convert it"
            )
    if (
        not blocks
        or not hasattr(model, "num_prefix_tokens")
        or not hasattr(getattr(model, "patch_embed", None), "num_patches")
    ):
        raise UserError(
            f"convert takes timm vision transformers (vit_*, deit*), {name} lacks blocks, prefix"
            " tokens or a grid of patches"
        )
    if not isinstance(getattr(parts, "patch_drop", None), nn.Identity | None):
        raise UserError(
            f"{name} drops patches while it trains, after which offsets mean nothing; build it with"
            " patch_drop_rate=0"
        )
    for layer, block in enumerate(blocks):
        block.attn = FibottentionOfTimm(
            block.attn,
            PRESETS[preset],
            parts.patch_embed.num_patches,
            parts.num_prefix_tokens,
            layer,
        )
    return model
