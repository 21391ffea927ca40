from __future__ import annotations

import pytest
import torch

from fibopolicy.encoders import ObservationEncoder, SpatialSoftmax
from fibopolicy.errors import UserError

OPTIONS = {"patch_size": 12, "width": 24, "depth": 1, "heads": 2, "keypoints": 4}
SIZES = {"front_image": (24, 24), "wrist_image": (24, 24)}


@pytest.mark.parametrize("views", ["separate", "shared", "joint"])
def test_cameras_and_vectors_are_joined(views: str) -> None:
    encoder = ObservationEncoder("fibottention_vit_tiny", OPTIONS, SIZES, 3, views)
    images = {key: torch.rand(5, 3, 24, 24) for key in SIZES}
    vectors = torch.rand(5, 3)
    features = encoder(images, vectors)
    assert features.shape == (5, encoder.output_dim)
    torch.testing.assert_close(features[:, -3:], vectors)
    assert len(encoder.encoders) == (2 if views == "separate" else 1)


def test_shared_views_are_encoded_alike_and_separate_ones_are_not() -> None:
    image = torch.rand(2, 3, 24, 24)
    for views, alike in (("shared", True), ("separate", False)):
        encoder = ObservationEncoder("vit_tiny", OPTIONS, SIZES, 0, views)
        first, second = encoder(dict.fromkeys(SIZES, image), torch.zeros(2, 0)).chunk(2, dim=-1)
        assert torch.allclose(first, second) == alike


def test_joint_tokens_let_cameras_see_each_other() -> None:
    encoder = ObservationEncoder(
        "vit_tiny", {**OPTIONS, "pool": "cls+keypoints", "depth": 2}, SIZES, 0, "joint"
    ).eval()
    images = {key: torch.rand(1, 3, 24, 24) for key in SIZES}
    before = encoder(images, torch.zeros(1, 0))
    images["wrist_image"] = torch.rand(1, 3, 24, 24)
    after = encoder(images, torch.zeros(1, 0))
    front_keypoints = slice(24, 24 + 8)
    assert not torch.allclose(before[:, front_keypoints], after[:, front_keypoints])


def test_no_cameras_leaves_the_vectors() -> None:
    encoder = ObservationEncoder("vit_tiny", {}, {}, 4)
    assert encoder({}, torch.ones(2, 4)).shape == (2, 4)


def test_a_keypoint_lies_where_its_heatmap_peaks() -> None:
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
    options = {} if encoder == "resnet18" else OPTIONS
    with pytest.raises(UserError, match=message):
        ObservationEncoder(encoder, options, sizes, 0, views)
