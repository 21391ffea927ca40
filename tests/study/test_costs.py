"""The costs of encoders."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch import Tensor, nn

from fibopolicy.attention import FibottentionPattern, fibottention
from fibopolicy.encoders import Encoder
from fibopolicy.encoders.base import ENCODERS
from fibopolicy.policies import PolicyConfig, Shapes
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.study import StudyConfig, StudyPolicy
from fibopolicy.study.costs import count_macs, encoder_costs
from fibopolicy.study.directory import StudyDirectory
from fibopolicy.study.grid import conditions
from fibopolicy.study.preflight import model_sizes

N, D, LAYERS, HEADS, PATCH, KEYPOINTS = 49, 96, 3, 6, 12, 16
#: Of one ViT over one image: patches, projections and MLPs of all tokens, keypoints.
DENSE_PARTS = (
    N * 3 * PATCH**2 * D
    + LAYERS * (N + 1) * (3 * D * D + D * D + 2 * D * 4 * D)
    + N * D * KEYPOINTS
    + KEYPOINTS * N * 2
)


def encoder_of(name: str, cameras: int = 1, views: str = "separate") -> ObservationEncoder:
    config = PolicyConfig(encoder=name, views=views)
    images = {f"camera_{i}": (84, 84) for i in range(cameras)}
    return ObservationEncoder(config, Shapes(images, {}, action_dim=1))


@pytest.mark.parametrize(("cameras", "views"), [(1, "separate"), (2, "separate"), (2, "shared")])
def test_multiply_accumulates_are_those_counted_by_hand(cameras: int, views: str) -> None:
    macs, share = count_macs(encoder_of("vit_tiny", cameras, views))
    assert macs == cameras * (DENSE_PARTS + LAYERS * 2 * (N + 1) ** 2 * D)
    assert share == 1.0
    macs, share = count_macs(encoder_of("fibottention_vit_tiny", cameras, views))
    pattern = FibottentionPattern(N, HEADS)
    kept = int(pattern.mask().sum())  # over heads, CLS included
    assert macs == cameras * (DENSE_PARTS + LAYERS * kept * 2 * D // HEADS)
    assert share == pytest.approx(pattern.density)


def test_joint_views_are_one_sequence() -> None:
    macs, _ = count_macs(encoder_of("vit_tiny", 2, "joint"))
    separate, _ = count_macs(encoder_of("vit_tiny", 2))
    one_cls_less = LAYERS * 12 * D * D
    assert macs == separate - one_cls_less + LAYERS * 2 * D * ((2 * N + 1) ** 2 - 2 * (N + 1) ** 2)


class OwnAttention(Encoder):
    """A user's encoder that calls the function, with one head of 12 numbers."""

    def __init__(self, *, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.patches, self.output_dim = nn.Conv2d(3, 12, PATCH, PATCH), 12
        self.kept = FibottentionPattern(N, 1, cls_token=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patches(images).flatten(2).mT
        q = x[:, None]
        y = fibottention(q, q, q, self.kept, backend="reference")[:, 0]
        return y, y.mean(1)


def test_attention_of_custom_encoders_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENCODERS._entries, "own", OwnAttention)
    macs, share = count_macs(encoder_of("own"))
    pattern = FibottentionPattern(N, 1, cls_token=False)
    assert macs == N * 3 * PATCH**2 * 12 + int(pattern.mask().sum()) * 2 * 12
    assert share == pytest.approx(pattern.density)


def test_convolutions_keep_no_pairs() -> None:
    macs, share = count_macs(encoder_of("resnet18").eval())
    assert share is None
    assert 250e6 < macs < 350e6


def test_policies_that_see_the_cameras_differently_have_other_costs(config: StudyConfig) -> None:
    policies = ("bc", "bc_gmm", StudyPolicy("bc", {"views": "joint"}, name="joint"))
    built = model_sizes(replace(config, encoders=config.encoders[1:], policies=policies))
    bc, gmm, joint = (cost["encoder_macs"] for cost in encoder_costs(built, "cpu"))
    assert bc == gmm != joint


def test_every_condition_has_the_costs_of_its_encoder(finished: StudyDirectory) -> None:
    costs = {
        one.encoder.name: json.loads(finished.cost(one).read_text())
        for one in conditions(finished.config)
    }
    ours, dense = costs["fibottention_vit_tiny"], costs["vit_tiny"]
    assert (
        ours["parameters"]
        == dense["parameters"]
        > ours["encoder_parameters"]
        == dense["encoder_parameters"]
    )
    assert ours["encoder_macs"] < dense["encoder_macs"]
    assert 0 < ours["attention_pairs"] < dense["attention_pairs"] == 1
    for cost in (ours, dense):
        for batch in (1, 64):
            timing = cost[f"encoder_ms_batch_{batch}"]
            assert 0 < timing["p25"] <= timing["median"] <= timing["p75"]
