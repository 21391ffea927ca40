"""Fibottention in the vision transformers of timm and of Hugging Face transformers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from fibopolicy.attention import FibottentionPattern, fibottention, fibottention_qkvpacked
from fibopolicy.encoders.vit import PRESETS, FibottentionPreset
from fibopolicy.errors import UserError, unknown
from fibopolicy.utils.imports import make_torchvision_importable

M = TypeVar("M", bound=nn.Module)


def convert(model: M, preset: str = "paper") -> M:
    """Replace dense attention by Fibottention in every layer of a vision transformer of
    timm or transformers, in place, and keep the weights.

    CLS, distillation and register tokens attend to all tokens and are attended to by
    all. The patches of a video's frames form one sequence, so offsets cross from one
    frame to the next, except in TimeSformer: its spatial attention becomes sparse in
    each frame, and its temporal attention stays dense.

    Args:
        model: a `vit_*`, `deit*` or DINO-style model of timm, or a ViT, DeiT, DINOv2
            (with registers, too), DINOv3, SigLIP, VideoMAE or TimeSformer of
            transformers, with any head; of a model of images and text only the vision
            transformer is converted. On any device, pretrained or not.
        preset: "paper" or "released_robot", see `fibopolicy.encoders.vit.PRESETS`.

    Returns:
        The same model.

    Raises:
        UserError: an unknown preset; a model without the plain attention that is
            expected; or one that uses attention dropout, which sparse kernels do not
            support, or drops patches, which makes offsets meaningless.
    """
    if preset not in PRESETS:
        raise unknown("Fibottention preset", preset, PRESETS)
    if any(base.__module__.startswith("transformers.") for base in type(model).__mro__):
        _convert_transformers(model, PRESETS[preset])
    else:
        _convert_timm(model, PRESETS[preset])
    return model


@functools.lru_cache(maxsize=256)
def _pattern(
    preset: FibottentionPreset, num_tokens: int, heads: int, layer: int, num_prefix: int
) -> FibottentionPattern:
    return preset.pattern(num_tokens, heads, layer, num_prefix)


# timm


class TimmFibottention(nn.Module):
    """Replaces a `timm.layers.Attention` and keeps the names of its projections, so
    that state dicts stay valid.

    `(B, T, D)` -> `(B, T, D)`. If T differs from what the model was built for (dynamic
    image size), the preset's pattern is built for that number of patches.
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
                "Fibottention takes no other attention mask; call the model without one"
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


def _convert_timm(model: nn.Module, preset: FibottentionPreset) -> None:
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
                f"{name} uses attention dropout (attn_drop_rate {attention.attn_drop.p}); build it"
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
            f"{name} drops patches in training, which makes offsets meaningless; build it with"
            " patch_drop_rate=0"
        )
    for layer, block in enumerate(blocks):
        block.attn = TimmFibottention(
            block.attn,
            preset,
            parts.patch_embed.num_patches,
            parts.num_prefix_tokens,
            layer,
        )


# transformers

#: Name under which transformers looks up our attention.
_NAME = "fibottention"


@dataclass(frozen=True)
class _Layer:
    """What an attention module of transformers needs to know of Fibottention.

    Args:
        index: index of the layer, from 0.
        num_prefix: tokens before the patches.
        num_tokens: the only number of patches that the model may see; `None` for any.
    """

    preset: FibottentionPreset
    index: int
    num_prefix: int
    num_tokens: int | None = None

    def pattern(self, length: int, heads: int) -> FibottentionPattern:
        """For T = `length` tokens, the prefix included.

        Raises:
            UserError: patches are missing.
        """
        found = length - self.num_prefix
        if self.num_tokens not in (None, found):
            raise UserError(
                f"Fibottention expects all {self.num_tokens} patches, got {found}; call the model"
                " without bool_masked_pos"
            )
        return _pattern(self.preset, found, heads, self.index, self.num_prefix)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copied or unpickled model: another process may not have called `convert`."""
        self.__dict__.update(state)
        _register()


#: Number of tokens before the patches, by the `model_type` of a vision transformer
#: whose attention goes through the attention interface of transformers.
_PREFIX: Mapping[str, Callable[[Any], int]] = {
    "vit": lambda config: 1,
    "deit": lambda config: 2,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
    "dinov3_vit": lambda config: 1 + config.num_register_tokens,
    "siglip_vision_model": lambda config: 0,
    "videomae": lambda config: 0,
}


class TimesformerFibottention(nn.Module):
    """Replaces the spatial attention of transformers' TimeSformer, which does not use
    the attention interface; `(B, T, D)` -> `((B, T, D),)`.
    """

    def __init__(self, attention: Any, layer: _Layer) -> None:
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.layer = attention.qkv, layer
        self.train(attention.training)

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
        b, t, d = x.shape
        if output_attentions:
            raise UserError("Fibottention returns no attention weights; call without them")
        qkv = self.qkv(x).reshape(b, t, 3, self.num_heads, -1)  # (B, T, 3, h, d)
        pattern, masking = self.layer.pattern(t, self.num_heads), self.layer.preset.masking
        y = fibottention_qkvpacked(qkv, pattern, masking=masking, scale=self.scale)  # (B, T, h, d)
        return (y.reshape(b, t, d),)


def _convert_transformers(model: nn.Module, preset: FibottentionPreset) -> None:
    name = type(model).__name__
    if name == "VideoMAEForPreTraining":
        raise UserError(
            f"{name} removes patches, which makes offsets meaningless; convert VideoMAEModel or"
            " VideoMAEForVideoClassification"
        )
    modules: list[Any] = list(model.modules())
    attentions = [m for m in modules if _is_supported(m)]
    timesformer = [m for m in modules if type(m).__name__ == "TimesformerLayer"]
    patches = [m.num_patches for m in modules if type(m).__name__ == "VideoMAEEmbeddings"]
    if not attentions and not timesformer:
        raise UserError(
            f"convert takes transformers' ViT, DeiT, DINOv2, DINOv3, SigLIP, VideoMAE and"
            f" TimeSformer, {name} has no attention of theirs"
        )
    for module in (*attentions, *timesformer):
        config = module.config
        dropout = getattr(config, "attention_probs_dropout_prob", 0.0) or getattr(
            config, "attention_dropout", 0.0
        )
        if dropout > 0:
            raise UserError(
                f"{name} uses attention dropout ({dropout}); build it with 0 to convert it"
            )
        if getattr(config, "attention_type", "") == "joint_space_time":
            raise UserError(
                f"{name} has attention_type joint_space_time; convert takes TimeSformer's spatial"
                " attention, divided_space_time or space_only"
            )
    _register()
    for index, module in enumerate(attentions):
        num_prefix = _PREFIX[module.config.model_type](module.config)
        module.fibottention = _Layer(preset, index, num_prefix, next(iter(patches), None))
        # A copy, since other models may have been built from the same configuration.
        module.config = copy.copy(module.config)
        module.config._attn_implementation = _NAME
    for index, module in enumerate(timesformer):
        layer = _Layer(preset, index, num_prefix=1)
        module.attention.attention = TimesformerFibottention(module.attention.attention, layer)


def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _attention)


def _is_supported(module: nn.Module) -> bool:
    model_type = getattr(getattr(module, "config", None), "model_type", "")
    return hasattr(module, "is_causal") and model_type in _PREFIX


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Of transformers' attention interface: q, k and v `(B, h, T, d)` to `(B, T, h, d)`."""
    if attention_mask is not None:
        raise UserError(
            "Fibottention takes no other attention mask; call the model without one, and not under"
            " torch.export, for which transformers always makes one"
        )
    layer: _Layer = module.fibottention
    pattern = layer.pattern(query.shape[2], query.shape[1])
    y = fibottention(query, key, value, pattern, masking=layer.preset.masking, scale=scaling)
    return y.transpose(1, 2), None
