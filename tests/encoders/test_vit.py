from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fibopolicy.encoders import build_encoder, encoder_names
from fibopolicy.encoders.base import encoder_settings
from fibopolicy.encoders.vit import PRESETS, SPARSE_BASELINES, ViT
from fibopolicy.errors import UserError


@pytest.mark.parametrize(
    "name", ["vit_tiny", "fibottention_vit_tiny", "vit_small", "fibottention_vit_small", "resnet18"]
)
def test_registered_encoders_keep_the_contract(name: str) -> None:
    encoder = build_encoder(name, image_size=(84, 84)).eval()
    tokens, pooled = encoder(torch.rand(2, 3, 84, 84))
    assert tokens.ndim == 3
    assert tokens.shape[0] == 2
    assert pooled.shape == (2, encoder.output_dim)


@pytest.mark.parametrize("pool", ["cls", "mean", "keypoints", "cls+keypoints"])
@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("num_views", [1, 2])
def test_every_pool_and_stem_gives_the_stated_shapes(pool: str, stem: str, num_views: int) -> None:
    vit = ViT(
        image_size=(24, 36),
        patch_size=12,
        width=24,
        depth=1,
        num_heads=2,
        pool=pool,
        stem=stem,
        num_views=num_views,
    )
    images = torch.rand(3, num_views, 3, 24, 36) if num_views > 1 else torch.rand(3, 3, 24, 36)
    tokens, pooled = vit(images)
    assert tokens.shape == (3, num_views * 6, 24)
    assert pooled.shape == (3, vit.output_dim)


def test_fresh_keypoints_move_with_what_the_image_shows() -> None:
    torch.manual_seed(0)
    vit = build_encoder("vit_tiny", image_size=(84, 84), pool="keypoints")
    images = torch.zeros(7, 3, 84, 84)
    for i in range(7):
        images[i, :, 12 * i : 12 * i + 12, 36:48] = 1  # a square in each row of patches
    # (B, K, 2) in [-1, 1]; a flat softmax would leave all of them within 0.02 of the
    # middle
    assert vit(images)[1].view(7, 16, 2).std(0).mean() > 0.05


def test_fibottention_equals_a_dense_forward_masked_by_hand() -> None:
    torch.manual_seed(0)
    vit = ViT(image_size=(84, 84), depth=2, attention="fibottention")
    attention = vit.blocks[1].attention
    x = torch.randn(2, 50, 96)
    q, k, v = attention.qkv(x).view(2, 50, 3, 6, 16).permute(2, 0, 3, 1, 4)
    logits = q @ k.transpose(-1, -2) / 4
    # Written from the definition: |j - k| in the head's set, CLS row and column whole.
    mask = torch.zeros(6, 50, 50, dtype=torch.bool)
    mask[:, 0, :] = mask[:, :, 0] = True
    for head, offsets in enumerate(attention.pattern.offsets):
        for j in range(49):
            for o in offsets:
                for other in (j - o, j + o):
                    if 0 <= other < 49:
                        mask[head, 1 + j, 1 + other] = True
    y = torch.softmax(logits.masked_fill(~mask, -torch.inf), dim=-1) @ v
    expected = attention.out(y.transpose(1, 2).reshape(2, 50, 96))
    torch.testing.assert_close(attention(x), expected, atol=2e-6, rtol=1e-5)


def test_dense_and_fibottention_have_the_same_parameters_and_differ_in_output() -> None:
    dense, sparse = ViT(image_size=(84, 84)), ViT(image_size=(84, 84), attention="fibottention")
    sparse.load_state_dict(dense.state_dict())
    images = torch.rand(1, 3, 84, 84)
    assert not torch.allclose(dense(images)[1], sparse(images)[1])


def test_every_layer_permutes_the_heads_differently() -> None:
    vit = ViT(image_size=(84, 84), depth=3, attention="fibottention")
    patterns = [block.attention.pattern.offsets for block in vit.blocks]
    assert len(set(patterns)) == 3
    assert len({tuple(sorted(p)) for p in patterns}) == 1


def test_released_robot_preset_is_what_the_authors_ran() -> None:
    encoder = build_encoder("released_robot", image_size=(76, 76), depth=1)
    pattern = encoder.blocks[0].attention.pattern
    assert pattern.num_tokens == 81
    assert pattern.modified
    assert encoder.blocks[0].attention.masking == "zero_logit"
    assert pattern.density == pytest.approx(0.108, abs=5e-4)
    assert encoder(torch.rand(1, 3, 76, 76))[1].shape == (1, 768)
    assert set(PRESETS) == {"paper", "released_robot"}


def test_dense_attention_is_torchs() -> None:
    vit = ViT(image_size=(24, 24), width=24, num_heads=2, depth=1)
    x = torch.randn(2, 5, 24)
    attention = vit.blocks[0].attention
    q, k, v = attention.qkv(x).view(2, 5, 3, 2, 12).permute(2, 0, 3, 1, 4)
    expected = attention.out(
        F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 24)
    )
    torch.testing.assert_close(attention(x), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"patch_size": 10},
            (
                r"patch_size 10 does not divide the image of 84 x 84 pixels; these do: \[2, 3, 4,"
                r" 6, 7, 12"
            ),
        ),
        ({"patch_size": 96}, "does not divide"),
        ({"patch_size": 12, "image_size": (83, 84)}, "none but 1 does: crop or resize the images"),
        ({"num_heads": 5}, "width 96 is not divisible by num_heads 5"),
        ({"depth": 0}, "depth must be at least 1"),
        ({"pool": "max"}, "unknown pool 'max'"),
        ({"pool": "cls", "cls_token": False}, "reads the CLS token"),
        ({"attention": "sparse"}, "unknown attention 'sparse'"),
        ({"preset": "papers"}, "did you mean 'paper'"),
        ({"stem": "conv", "patch_size": 6}, "divisible by 4"),
        ({"stem": "resnet"}, "unknown stem"),
        ({"patchsize": 12}, "did you mean 'patch_size'"),
    ],
)
def test_values_that_do_not_fit_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder("vit_tiny", **{"image_size": (84, 84), **options})


def test_unknown_encoders_get_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean 'fibottention_vit_tiny'"):
        build_encoder("fibottention_vit_tinny", image_size=(84, 84))
    assert "vit_base" in encoder_names()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_whole_encoder_compiles_without_a_break(backend: str) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("fibottention_vit_tiny", image_size=(84, 84), depth=1)
    images = torch.rand(2, 3, 84, 84)
    expected = encoder(images)[1]
    expected.square().mean().backward()
    gradients = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    compiled = torch.compile(encoder, fullgraph=True, backend=backend)(images)[1]
    compiled.square().mean().backward()
    torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)
    for parameter, gradient in zip(encoder.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_an_exported_encoder_does_not_depend_on_our_operators() -> None:
    encoder = build_encoder("fibottention_vit_tiny", image_size=(84, 84), depth=1).eval()
    images = torch.rand(2, 3, 84, 84)
    exported = torch.export.export(encoder, (images,))
    assert not any("fibopolicy" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(
        exported.module()(images)[1], encoder(images)[1], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("baseline", SPARSE_BASELINES)
def test_a_baseline_differs_from_fibottention_in_its_pattern_alone(baseline: str) -> None:
    torch.manual_seed(0)
    ours = build_encoder("fibottention_vit_tiny", image_size=(84, 84))
    torch.manual_seed(0)
    theirs = build_encoder(f"{baseline}_vit_tiny", image_size=(84, 84))
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    for mine, other in zip(ours.blocks, theirs.blocks, strict=True):
        assert mine.attention.masking == other.attention.masking
        # As near as whole diagonals allow.
        assert other.attention.pattern.density == pytest.approx(
            mine.attention.pattern.density, rel=0.05
        )
    assert [b.attention.pattern for b in ours.blocks] != [
        b.attention.pattern for b in theirs.blocks
    ]
    images = torch.rand(2, 3, 84, 84)
    assert not torch.equal(ours(images)[1], theirs(images)[1])
    assert encoder_settings(f"{baseline}_vit_tiny") | {
        "attention": "fibottention"
    } == encoder_settings("fibottention_vit_tiny")
