from __future__ import annotations

from typing import Any

import pytest
import torch

from fibopolicy.encoders import SpatialSoftmax
from fibopolicy.errors import UserError
from fibopolicy.policies import PolicyConfig, Shapes
from fibopolicy.policies.observations import ObservationEncoder

OPTIONS = {"patch_size": 12, "width": 24, "depth": 1, "num_heads": 2, "keypoints": 4}
SIZES = {"front_image": (24, 24), "wrist_image": (24, 24)}


def encoder_of(
    name: str,
    sizes: dict[str, tuple[int, int]] = SIZES,
    views: str = "separate",
    vectors: dict[str, int] | None = None,
    **options: Any,
) -> ObservationEncoder:
    changes = {} if name == "resnet18" else {**OPTIONS, **options}
    config = PolicyConfig(encoder=name, encoder_options=changes, views=views)
    return ObservationEncoder(config, Shapes(sizes, vectors or {}, action_dim=1))


def frames(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 1, 24, 24, 3), dtype=torch.uint8)


@pytest.mark.parametrize("views", ["separate", "shared", "joint"])
def test_cameras_and_vectors_are_joined(views: str) -> None:
    encoder = encoder_of("fibottention_vit_tiny", views=views, vectors={"hand": 2, "gripper": 1})
    hand, gripper = torch.rand(5, 1, 2), torch.rand(5, 1, 1)
    features = encoder({**{key: frames(5) for key in SIZES}, "gripper": gripper, "hand": hand})
    assert features.shape == (5, encoder.output_dim)
    torch.testing.assert_close(features[:, -3:], torch.cat([hand, gripper], dim=-1)[:, 0])
    assert len(encoder.encoders) == (2 if views == "separate" else 1)


def test_shared_views_use_one_encoder_and_separate_views_do_not() -> None:
    image = frames(2)
    for views, alike in (("shared", True), ("separate", False)):
        encoder = encoder_of("vit_tiny", views=views)
        first, second = encoder(dict.fromkeys(SIZES, image)).chunk(2, dim=-1)
        assert torch.allclose(first, second) == alike


def test_joint_tokens_let_cameras_see_each_other() -> None:
    encoder = encoder_of("vit_tiny", views="joint", pool="cls+keypoints", depth=2).eval()
    images = {key: frames(1) for key in SIZES}
    before = encoder(images)
    images["wrist_image"] = frames(1)
    after = encoder(images)
    front_keypoints = slice(24, 24 + 8)
    assert not torch.allclose(before[:, front_keypoints], after[:, front_keypoints])


def test_no_cameras_leaves_the_vectors() -> None:
    encoder = encoder_of("vit_tiny", {}, vectors={"hand": 4})
    assert encoder({"hand": torch.ones(2, 1, 4)}).shape == (2, 4)


def test_a_keypoint_is_where_its_heatmap_peaks() -> None:
    pool = SpatialSoftmax(1, (5, 9), 1)
    torch.nn.init.constant_(pool.heatmaps.weight, 100.0)
    features = torch.zeros(1, 1, 5, 9)
    features[0, 0, 1, 8] = 1.0  # row 1 of 5, last column
    torch.testing.assert_close(pool(features), torch.tensor([[1.0, -0.5]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("encoder", "sizes", "views", "message"),
    [
        ("vit_tiny", SIZES, "seperate", "did you mean 'separate'"),
        ("resnet18", SIZES, "joint", "one token sequence for all cameras"),
        ("vit_tiny", {"a": (24, 24), "b": (36, 36)}, "shared", "cameras of one size"),
    ],
)
def test_views_that_do_not_fit_are_named(
    encoder: str, sizes: dict[str, tuple[int, int]], views: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        encoder_of(encoder, sizes, views)


def augmenting(**settings: int) -> ObservationEncoder:
    config = PolicyConfig(encoder_options=OPTIONS, **settings)  # type: ignore[arg-type]
    return ObservationEncoder(config, Shapes({"front_image": (24, 24)}, {}, action_dim=1))


def test_random_crops_are_the_same_for_all_frames_of_a_window_and_differ_between_samples() -> None:
    features = augmenting(crop=12, n_obs_steps=2)
    ramp = (
        torch.arange(24 * 24 * 3, dtype=torch.int64)
        .reshape(1, 1, 24, 24, 3)
        .expand(16, 2, -1, -1, -1)
    )
    frames = features._frames(ramp % 256, (12, 12)).view(16, 2, 3, 12, 12)
    torch.testing.assert_close(frames[:, 0], frames[:, 1])
    assert len({f.numpy().tobytes() for f in frames[:, 0]}) > 1


def test_the_central_crop_is_used_to_act() -> None:
    features = augmenting(crop=12).eval()
    frames = torch.randint(0, 256, (2, 1, 24, 24, 3), dtype=torch.uint8)
    expected = frames[:, 0, 6:18, 6:18].permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(features._frames(frames, (12, 12)), expected)


def test_shifts_repeat_the_edge_and_stop_when_acting() -> None:
    features = augmenting(shift=3)
    constant = torch.full((4, 1, 24, 24, 3), 7, dtype=torch.uint8)
    torch.testing.assert_close(
        features._frames(constant, (24, 24)), torch.full((4, 3, 24, 24), 7 / 255)
    )
    noise = torch.randint(0, 256, (4, 1, 24, 24, 3), dtype=torch.uint8)
    plain = noise[:, 0].permute(0, 3, 1, 2).float() / 255
    assert not torch.allclose(features._frames(noise, (24, 24)), plain)
    torch.testing.assert_close(features.eval()._frames(noise, (24, 24)), plain)
