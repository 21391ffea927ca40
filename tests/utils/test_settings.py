from __future__ import annotations

from typing import Any

import pytest

from fibopolicy.utils.settings import first_difference

ENCODERS = [{"name": "vit_tiny", "options": {"depth": 2}}, {"name": "resnet18", "options": {}}]
DEEPER = [{"name": "vit_tiny", "options": {"depth": 3}}, {"name": "resnet18", "options": {}}]


@pytest.mark.parametrize(
    ("there", "now", "expected"),
    [
        ({"steps": 6, "seed": 0}, {"steps": 7, "seed": 1}, "steps = 6 there, 7 now"),
        (
            {"optimizer": {"grad_clip_norm": 1.0}},
            {"optimizer": {"grad_clip_norm": 2.0}},
            "optimizer.grad_clip_norm = 1.0 there, 2.0 now",
        ),
        (
            {"encoders": ENCODERS},
            {"encoders": DEEPER},
            "encoders[0].options.depth = 2 there, 3 now",
        ),
        (
            {"encoders": ENCODERS},
            {"encoders": ENCODERS[:1]},
            "encoders = [vit_tiny, resnet18] there, [vit_tiny] now",
        ),
        ({"ema": 0.99}, {}, "ema = 0.99 there, None now"),
        ({"ema": None, "policy": {"crop": None}}, {"policy": {}}, ""),
        ({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}, ""),
    ],
)
def test_the_first_setting_that_differs_is_named(
    there: dict[str, Any], now: dict[str, Any], expected: str
) -> None:
    assert first_difference(there, now) == expected


def test_the_difference_starts_with_the_name_of_the_document() -> None:
    assert first_difference(6, 7, "train.steps") == "train.steps = 6 there, 7 now"
    assert (
        first_difference({"betas": [0.9]}, {"betas": [0.8]}, "train")
        == "train.betas[0] = 0.9 there, 0.8 now"
    )
