from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fibopolicy
from fibopolicy.attention import FibottentionPattern
from fibopolicy.encoders import build_encoder
from fibopolicy.errors import UserError
from fibopolicy.utils.imports import make_torchvision_importable

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
    "name",
    [
        "vit_tiny_patch16_224",
        "deit_tiny_patch16_224",
        "vit_small_patch14_reg4_dinov2",
        "deit_tiny_distilled_patch16_224",
    ],
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
    model = fibopolicy.convert(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=2, dynamic_img_size=True)
    )
    for size in (224, 128):
        assert model(torch.randn(1, 3, size, size)).shape == (1, 192)
    model(torch.randn(1, 3, 96, 96)).sum().backward()
    assert all(block.attn.qkv.weight.grad.isfinite().all() for block in model.blocks)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {}, "lacks blocks"),
        ("vit_tiny_patch16_224", {"attn_drop_rate": 0.1}, "uses attention dropout"),
    ],
)
def test_what_cannot_be_converted_is_left_alone(
    name: str, options: dict[str, float], message: str
) -> None:
    model = timm.create_model(name, **options)
    before = str(model)
    with pytest.raises(UserError, match=message):
        fibopolicy.convert(model)
    assert str(model) == before


def test_an_unknown_preset_is_rejected() -> None:
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
def test_timm_models_are_encoders(
    name: str, options: dict[str, str], tokens: int, dim: int
) -> None:
    encoder = build_encoder(name, image_size=(96, 96), **options)
    found, pooled = encoder(torch.rand(2, 3, 96, 96))
    assert found.shape == (2, tokens, dim)
    assert pooled.shape == (2, encoder.output_dim) == (2, dim)


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("test_vit", 80, (25, 64)),
        ("test_resnet", 84, (9, 96)),
        ("test_efficientnet", 84, (9, 256)),
        ("mambaout_femto", 84, (9, 288)),  # channels last
        ("swin_tiny_patch4_window7_224", 84, (9, 768)),  # channels last
        ("levit_128s", 224, (16, 384)),
        ("deit_tiny_distilled_patch16_224", 48, (9, 192)),  # two tokens before the patches
        ("eva02_tiny_patch14_224", 84, (36, 192)),
        ("vit_tiny_r_s16_p8_224", 96, (9, 192)),  # patches of a convolutional network's features
        ("pvt_v2_b0", 84, (9, 256)),
    ],
)
def test_a_model_of_any_layout_keeps_the_contract(
    name: str, size: int, tokens: tuple[int, int]
) -> None:
    state = torch.get_rng_state()
    encoder = build_encoder(f"timm:{name}", image_size=(size, size))
    torch.set_rng_state(state)
    untried = timm.create_model(name, num_classes=0).state_dict()
    assert encoder.training
    assert all(
        torch.equal(x, untried[key])
        for key, x in encoder.model.state_dict().items()
        if "running" in key
    )
    found, feature = encoder(torch.rand(2, 3, size, size))
    assert found.shape == (2, *tokens)
    assert feature.shape == (2, encoder.output_dim)
    (found.sum() + feature.sum()).backward()


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "mambaout_femto", "resnet10t"])
def test_tokens_are_the_positions_row_by_row(name: str) -> None:
    encoder = build_encoder(f"timm:{name}", image_size=(96, 64)).eval()
    images = torch.rand(1, 3, 96, 64)
    with torch.no_grad():
        (grid,) = encoder.model.forward_intermediates(  # type: ignore[operator]
            (images - encoder.mean) / encoder.std, 1, norm=True, intermediates_only=True
        )
        tokens = encoder(images)[0]
    assert tokens.shape[1] == grid.shape[2] * grid.shape[3]
    if tokens.shape[2] == grid.shape[1]:
        torch.testing.assert_close(tokens, grid.flatten(2).transpose(1, 2))


def test_a_trial_draws_no_random_numbers() -> None:
    torch.manual_seed(0)
    timm.create_model("test_vit", num_classes=0, img_size=(80, 80))
    expected = torch.rand(3)
    torch.manual_seed(0)
    build_encoder("timm:test_vit", image_size=(80, 80))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("levit_128s", "does not take images of 84 x 84 pixels.* made for 224 x 224"),
        ("hiera_tiny_224", "does not take images of 84 x 84 pixels.* made for 224 x 224"),
        (
            "vit_tiny_patch16_224",
            r"patches of 16 x 16 would leave out pixels.* give it images of 80 x 80 or 96 x 96",
        ),
        ("gmixer_12_224", "images of 80 x 80 or 96 x 96"),
        ("pit_ti_224", "1 tokens do not form a grid over the image; choose another model"),
        ("efficientvim_m1", "its features are a list, not one grid of tokens"),
    ],
)
def test_models_that_break_the_contract_are_rejected_at_once(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_encoder(f"timm:{name}", image_size=(84, 84))
    assert "\n" not in str(error.value)


def test_published_weights_without_a_network_fail_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    constants = pytest.importorskip("huggingface_hub").constants

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no network")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("socket.getaddrinfo", unreachable)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("it tries again"))
    with pytest.raises(
        UserError,
        match=r"weights cannot be downloaded \(huggingface\.co cannot be reached, and the cache",
    ):
        build_encoder("timm:resnet10t", image_size=(64, 64), pretrained=True)
    assert not constants.HF_HUB_OFFLINE


def test_images_are_normalised_as_the_model_was_trained() -> None:
    encoder = build_encoder("timm:deit_tiny_patch16_224", image_size=(32, 32)).eval()
    images = torch.rand(1, 3, 32, 32)
    mean, std = (
        torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        torch.testing.assert_close(encoder(images)[1], encoder.model((images - mean) / std))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("timm:vit_tinny_patch16_224", {}, "unknown timm model.*did you mean"),
        ("timm:zzz", {}, r"unknown timm model .zzz.: for example .* \(\d+ are known\)"),
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
