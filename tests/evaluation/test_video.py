from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch import nn

from fibopolicy.encoders import build_encoder
from fibopolicy.encoders.pooling import SpatialSoftmax
from fibopolicy.errors import UserError
from fibopolicy.evaluation.video import HEADING, draw_overlay, keypoints, sensitivity, write_grid
from fibopolicy.policies import PolicyConfig, build_policy
from fibopolicy.policies.base import Shapes

SMALL = {
    "released_robot": {"width": 24, "depth": 1, "heads": 2},
    "vit_tiny": {"depth": 1, "pool": "mean"},
}


@pytest.mark.parametrize(
    "encoder", ["fibottention_vit_tiny", "resnet18", "released_robot", "vit_tiny"]
)
def test_every_built_in_encoder_has_an_overlay(encoder: str) -> None:
    config = PolicyConfig(encoder=encoder, encoder_options=SMALL.get(encoder, {}), crop=72)
    policy = build_policy(config, Shapes({"front_image": (84, 84)}, {}, 4)).eval()
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (84, 84, 3), dtype=np.uint8) for _ in range(2)]
    kept = [frame.copy() for frame in frames]
    drawn = draw_overlay(policy, "front_image", frames)
    for frame, before, after in zip(frames, kept, drawn, strict=True):
        assert np.array_equal(frame, before)
        assert after.shape == frame.shape
        changed = np.argwhere((after != frame).any(axis=-1))
        assert len(changed)
        # what the crop cuts off was not seen; a dot may reach a pixel beyond
        assert changed.min() >= 6 - 1
        assert changed.max() < 78 + 1


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
    with pytest.raises(UserError, match="without --overlay"):
        draw_overlay(object(), "front_image", [np.zeros((8, 8, 3), np.uint8)])


def test_columns_of_a_video_carry_headings(tmp_path: Path) -> None:
    clip = ([np.full((20, 20, 3), 90, np.uint8)] * 2, True)
    headings = ["left", "a/very/long/name/of/a/run"]
    path = tmp_path / "two.mp4"
    write_grid(path, [clip, clip], fps=2, columns=2, scale=2, headings=headings)
    frames = iio.imread(path)
    assert frames.shape[1:] == (40 + 6 + HEADING, 2 * 46, 3)
    assert frames[0, :HEADING].min() < 128 < frames[0, :HEADING].mean()
