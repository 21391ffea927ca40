from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fibopolicy.encoders import build_encoder
from fibopolicy.encoders.pooling import SpatialSoftmax
from fibopolicy.errors import UserError
from fibopolicy.evaluation.video import draw_overlay, keypoints, sensitivity
from fibopolicy.policies import PolicyConfig, build_policy
from fibopolicy.policies.base import Shapes

SMALL = {
    "released_robot": {"width": 24, "depth": 1, "num_heads": 2},
    "vit_tiny": {"depth": 1, "pool": "mean"},
}


@pytest.mark.parametrize(
    "encoder", ["fibottention_vit_tiny", "resnet18", "released_robot", "vit_tiny"]
)
def test_every_built_in_encoder_has_an_overlay(encoder: str) -> None:
    config = PolicyConfig(encoder=encoder, encoder_options=SMALL.get(encoder, {}), crop=72)
    policy = build_policy(config, Shapes({"front_image": (84, 84)}, {}, 4)).eval()
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 256, (2, 84, 84, 3), dtype=np.uint8)
    shown = rng.integers(0, 256, (2, 252, 252, 3), dtype=np.uint8)
    kept = shown.copy()
    drawn = draw_overlay(policy, "front_image", seen, shown)
    assert np.array_equal(shown, kept)
    assert drawn.shape == shown.shape
    for before, after in zip(shown, drawn, strict=True):
        changed = np.argwhere((after != before).any(axis=-1))
        assert len(changed)
        # what the crop cuts off was not seen; a dot may reach a few pixels beyond
        assert changed.min() >= 3 * 6 - 4
        assert changed.max() < 3 * 78 + 4


def test_a_keypoint_is_where_its_softmax_peaks() -> None:
    encoder = build_encoder("vit_tiny", image_size=(84, 84), keypoints=1)
    pool = next(m for m in encoder.modules() if isinstance(m, SpatialSoftmax))
    pool.heatmaps = nn.Identity()  # type: ignore[assignment]
    peaked = torch.full((1, 1, 7, 7), -50.0)
    peaked[0, 0, 2, 5] = 50.0

    class Peaked(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return pool(peaked)

    assert keypoints(Peaked(), pool, torch.zeros(1, 3, 84, 84))[0, 0] == pytest.approx(
        [5.5 * 12, 2.5 * 12]
    )


def test_the_heat_is_where_the_feature_reads() -> None:
    class Corner(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images, images[:, :, 6:12, 12:18].flatten(1)

    heat = sensitivity(Corner(), torch.rand(1, 3, 84, 84))
    assert np.argwhere(heat[0] > 0.3).tolist() == [[1, 2]]


def test_policies_without_an_encoder_of_the_camera_are_refused() -> None:
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="without --overlay"):
        draw_overlay(object(), "front_image", frames, frames)
