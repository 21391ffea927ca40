"""`convert` on small transformers models with random weights, built from configurations."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fibopolicy
from fibopolicy.encoders.vit import PRESETS
from fibopolicy.errors import UserError
from fibopolicy.utils.imports import make_torchvision_importable

make_torchvision_importable()
transformers = pytest.importorskip("transformers")

SMALL = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 4,
}
VIDEO = {**SMALL, "image_size": 16, "num_frames": 4}
IMAGES, CLIPS = (2, 3, 32, 32), (2, 4, 3, 16, 16)
#: Name of the model and its configuration, shape of its input, tokens before the
#: patches.
MODELS: dict[str, tuple[str, str, dict[str, Any], tuple[int, ...], int]] = {
    "vit": ("ViTModel", "ViTConfig", SMALL, IMAGES, 1),
    "deit": ("DeiTModel", "DeiTConfig", SMALL, IMAGES, 2),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**SMALL, "layerscale_value": 1.0}, IMAGES, 1),
    "registers": (
        *("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
        *({**SMALL, "layerscale_value": 1.0, "num_register_tokens": 3}, IMAGES, 4),
    ),
    "dinov3": (
        *("DINOv3ViTModel", "DINOv3ViTConfig"),
        *({**SMALL, "num_register_tokens": 2, "layerscale_value": 1.0}, IMAGES, 3),
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SMALL, IMAGES, 0),
    "videomae": ("VideoMAEModel", "VideoMAEConfig", VIDEO, CLIPS, 0),
    "timesformer": ("TimesformerModel", "TimesformerConfig", VIDEO, CLIPS, 1),
    "space_only": (
        *("TimesformerModel", "TimesformerConfig"),
        *({**VIDEO, "attention_type": "space_only"}, CLIPS, 1),
    ),
}


def build(key: str, **options: Any) -> Any:
    name, config, sizes, *_ = MODELS[key]
    torch.manual_seed(0)
    return with_clear_attention(
        getattr(transformers, name)(getattr(transformers, config)(**{**sizes, **options}))
    )


def with_clear_attention(model: Any) -> Any:
    """Larger weights than at the start of a training, so that it matters which pairs are kept."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(10)
    return model.eval()


def by_hand(q: Tensor, k: Tensor, v: Tensor, layer: int, num_prefix: int, preset: str) -> Tensor:
    """Dense attention `(B, h, T, d)` under the mask of Fibottention."""
    t, heads = q.shape[2], q.shape[1]
    mask = PRESETS[preset].pattern(t - num_prefix, heads, layer, num_prefix).mask()
    logits = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    dropped = 0.0 if PRESETS[preset].masking == "zero_logit" else -torch.inf
    return logits.masked_fill(~mask, dropped).softmax(-1) @ v


def masked_by_hand(model: Any, num_prefix: int, preset: str) -> None:
    """Give a dense model masked attention, by its own means: through the function that
    its modules look up for `eager`, or TimeSformer's module.
    """
    layers: dict[int, int] = {}

    def attention(
        module: object, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **_: object
    ) -> tuple[Tensor, None]:
        layer = layers.setdefault(id(module), len(layers))
        return by_hand(q, k, v, layer, num_prefix, preset).transpose(1, 2), None

    for layer, block in enumerate(getattr(getattr(model, "encoder", None), "layer", [])):
        if type(block).__name__ == "TimesformerLayer":
            spatial = block.attention.attention
            spatial.forward = timesformer(spatial, layer, preset)
    if "Timesformer" not in type(model).__name__:
        transformers.AttentionInterface.register("by_hand", attention)
        model.set_attn_implementation("by_hand")


def timesformer(module: Any, layer: int, preset: str) -> Callable[..., tuple[Tensor]]:
    def forward(x: Tensor, output_attentions: bool = False) -> tuple[Tensor]:
        b, t, d = x.shape
        q, k, v = module.qkv(x).view(b, t, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
        return (by_hand(q, k, v, layer, 1, preset).transpose(1, 2).reshape(b, t, d),)

    return forward


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("key", MODELS)
def test_a_converted_model_is_the_masked_original_with_its_weights(key: str, preset: str) -> None:
    shape, num_prefix = MODELS[key][3:]
    model, hand = build(key).double(), build(key).double()
    pixels = torch.randn(shape, dtype=torch.float64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    masked_by_hand(hand, num_prefix, preset)
    with torch.no_grad():
        dense = model(pixels).last_hidden_state
        assert fibopolicy.convert(model, preset) is model
        found = model(pixels).last_hidden_state
        expected = hand(pixels).last_hidden_state
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert not torch.allclose(found, dense, atol=1e-3)


def test_other_models_of_the_same_configuration_stay_dense() -> None:
    config = transformers.ViTConfig(**SMALL, attn_implementation="eager")
    converted, other = transformers.ViTModel(config).eval(), transformers.ViTModel(config).eval()
    pixels = torch.randn(IMAGES)
    with torch.no_grad():
        before = other(pixels).last_hidden_state
        fibopolicy.convert(converted)(pixels)
        assert torch.equal(other(pixels).last_hidden_state, before)


def test_a_pickled_model_works_in_a_process_that_has_not_converted_any(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, pixels = fibopolicy.convert(build("vit")), torch.randn(IMAGES)
    with torch.no_grad():
        expected = model(pixels).last_hidden_state
        pickled = pickle.dumps(model)
        monkeypatch.delitem(transformers.AttentionInterface._global_mapping, "fibottention")
        assert torch.equal(pickle.loads(pickled)(pixels).last_hidden_state, expected)


def test_only_the_images_of_a_model_of_images_and_text_are_converted() -> None:
    shared = {k: v for k, v in SMALL.items() if k not in ("image_size", "patch_size")}
    model = with_clear_attention(
        transformers.SiglipModel(
            transformers.SiglipConfig(
                text_config={**shared, "vocab_size": 30, "projection_size": 24},
                vision_config=SMALL,
            )
        )
    )
    inputs = {"input_ids": torch.arange(8).view(2, 4), "pixel_values": torch.randn(IMAGES)}
    with torch.no_grad():
        before = model(**inputs)
        after = fibopolicy.convert(model)(**inputs)
    assert torch.equal(after.text_embeds, before.text_embeds)
    assert not torch.allclose(after.image_embeds, before.image_embeds, atol=1e-3)


@pytest.mark.parametrize("key", ["vit", "videomae", "timesformer"])
def test_a_converted_model_trains(key: str) -> None:
    model = fibopolicy.convert(build(key).train())
    model(torch.randn(MODELS[key][3])).last_hidden_state.sum().backward()
    moved = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("q_proj" in name or "query" in name or "qkv" in name for name in moved)


def test_a_converted_model_takes_other_image_sizes() -> None:
    model = fibopolicy.convert(build("vit"))
    pixels = torch.randn(1, 3, 48, 40)
    found = model(pixels, interpolate_pos_encoding=True).last_hidden_state
    assert found.shape == (1, 121, 24)


def test_removed_patches_and_attention_masks_are_rejected() -> None:
    video, images = fibopolicy.convert(build("videomae")), fibopolicy.convert(build("dinov2"))
    removed = torch.zeros(2, 32, dtype=torch.bool)
    removed[:, ::2] = True
    with pytest.raises(UserError, match="all 32 patches, got 16; call the model without bool_mask"):
        video(torch.randn(CLIPS), bool_masked_pos=removed)
    with pytest.raises(UserError, match="no other attention mask"):
        images(torch.randn(IMAGES), attention_mask=torch.arange(65).ge(3).expand(2, -1))


def unsupported(key: str) -> Any:
    if key == "swin":
        return transformers.SwinModel(
            transformers.SwinConfig(image_size=32, depths=[1], num_heads=[2], embed_dim=16)
        )
    if key == "pretraining":
        return transformers.VideoMAEForPreTraining(
            transformers.VideoMAEConfig(**VIDEO, decoder_num_hidden_layers=1)
        )
    if key == "joint":
        return build("timesformer", attention_type="joint_space_time")
    return build("vit", attention_probs_dropout_prob=0.1)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("swin", "convert takes transformers' ViT, .*, SwinModel has no attention of theirs"),
        ("pretraining", "VideoMAEForPreTraining removes patches"),
        ("joint", "attention_type joint_space_time; convert takes TimeSformer's spatial"),
        ("dropout", r"ViTModel uses attention dropout \(0.1\); build it with 0"),
    ],
)
def test_what_cannot_be_converted_is_left_alone(key: str, message: str) -> None:
    model = unsupported(key)
    before = str(model)
    with pytest.raises(UserError, match=message) as error:
        fibopolicy.convert(model)
    assert "\n" not in str(error.value)
    assert str(model) == before
    assert not any(hasattr(module, "fibottention") for module in model.modules())
