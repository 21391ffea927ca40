from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fibopolicy
from fibopolicy.attention import FibottentionPattern
from fibopolicy.encoders import build_encoder
from fibopolicy.errors import UserError
from fibopolicy.torchvision_shim import make_torchvision_importable

make_torchvision_importable()
timm = pytest.importorskip("timm")


def masked_by_hand(model, images: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """timm's own unconverted forward, with each block's attention recomputed under a dense mask."""
    prefix = model.num_prefix_tokens
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    for layer, block in enumerate(model.blocks):
        y = block.norm1(x)
        b, t, d = y.shape
        heads = block.attn.num_heads
        q, k, v = block.attn.qkv(y).reshape(b, t, 3, heads, d // heads).permute(2, 0, 3, 1, 4)
        mask = FibottentionPattern(t - prefix, heads, layer=layer, cls_token=prefix).mask()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(b, t, d)
        x = x + block.ls1(block.attn.proj(y))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    out: Tensor = model.forward_head(model.norm(x))
    return out


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224"]
)
def test_a_converted_model_is_the_masked_original_with_its_weights(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, img_size=112, depth=2).eval()
    for block in model.blocks:
        if hasattr(block.ls1, "gamma"):
            block.ls1.gamma.data.fill_(1)  # the untrained 1e-5 would hide what attention does
    if hasattr(model, "head_dist"):
        model.head_dist = None
        model.head = torch.nn.Linear(model.num_features, 10)
        model.forward_head = lambda x: model.head(x[:, 0])
    images = torch.randn(2, 3, 112, 112)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        expected, dense = masked_by_hand(model, images), model(images)
        converted = fibopolicy.convert(model)
        got = converted(images)
    assert converted is model
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, dense, atol=1e-3)


def test_a_converted_model_trains_and_takes_other_image_sizes() -> None:
    model = fibopolicy.convert(timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, dynamic_img_size=True))
    for size in (224, 128):
        assert model(torch.randn(1, 3, size, size)).shape == (1, 192)
    model(torch.randn(1, 3, 96, 96)).sum().backward()
    assert all(block.attn.qkv.weight.grad.isfinite().all() for block in model.blocks)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {}, "has no blocks"),
        ("vit_tiny_patch16_224", {"attn_drop_rate": 0.1}, "drops attention weights"),
    ],
)
def test_what_cannot_be_converted_is_left_alone(name: str, options: dict[str, float], message: str) -> None:
    model = timm.create_model(name, **options)
    before = str(model)
    with pytest.raises(UserError, match=message):
        fibopolicy.convert(model)
    assert str(model) == before


def test_unknown_preset_is_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'paper'"):
        fibopolicy.convert(timm.create_model("vit_tiny_patch16_224", depth=1), preset="papre")


@pytest.mark.parametrize(
    ("name", "options", "tokens", "dim"),
    [
        ("timm:vit_tiny_patch16_224", {}, 36, 192),
        ("timm:vit_tiny_patch16_224", {"attention": "fibottention"}, 36, 192),
        ("timm:resnet18", {}, 9, 512),
    ],
)
def test_timm_models_are_encoders(name: str, options: dict[str, str], tokens: int, dim: int) -> None:
    encoder = build_encoder(name, image_size=(96, 96), **options)
    found, pooled = encoder(torch.rand(2, 3, 96, 96))
    assert found.shape == (2, tokens, dim)
    assert pooled.shape == (2, encoder.output_dim) == (2, dim)


def test_images_are_normalised_as_the_model_was_trained() -> None:
    encoder = build_encoder("timm:deit_tiny_patch16_224", image_size=(32, 32)).eval()
    images = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)[1], encoder.model((images - mean) / std))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:vit_tinny_patch16_224", {}, "unknown timm model.*did you mean"),
        ("timm:resnet18", {"attention": "fibottention"}, "convert takes timm vision transformers"),
        ("timm:resnet18", {"atention": "dense"}, "did you mean 'attention'"),
        ("tim:resnet18", {}, r"no module tim \(did you mean 'timm:resnet18'"),
    ],
)
def test_bad_names_and_options(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(name, image_size=(64, 64), **options)


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"fibopolicy\[timm\]"):
        build_encoder("timm:resnet18", image_size=(64, 64))
