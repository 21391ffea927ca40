from __future__ import annotations

import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fibopolicy.policies import PolicyConfig
from fibopolicy.training import TrainConfig
from fibopolicy.training.profile import profile_train, train_table


@pytest.mark.parametrize(
    ("policy", "encoders"),
    [
        ({}, ["encoder, workspace_image", "encoder, wrist_image"]),
        ({"views": "shared"}, ["encoder, all cameras"]),
        ({"views": "joint"}, ["encoder, all cameras"]),
        ({"policy": "bc_gmm"}, ["encoder, workspace_image", "encoder, wrist_image"]),
    ],
)
def test_every_part_of_a_step_is_timed(
    tiny_config: TrainConfig,
    tmp_path: Path,
    policy: dict[str, str],
    encoders: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A clock that ticks when it is read: what it shows does not depend on the machine's load.
    monkeypatch.setattr(time, "perf_counter", map(float, itertools.count()).__next__)
    if "policy" in policy:
        pytest.importorskip("robomimic", exc_type=ImportError)
    small = PolicyConfig(encoder_options=tiny_config.policy.encoder_options, hidden=16, **policy)  # type: ignore[arg-type]
    profile = profile_train(replace(tiny_config, policy=small, out=tmp_path / "run"), turns=3)
    parts = {part.name: part.seconds for part in profile.parts}
    assert [name for name in parts if name.startswith("encoder")] in (encoders, encoders[::-1])
    rest = [
        "data",
        "to the device",
        "preparing frames",
        "policy",
        "backward",
        "optimizer",
        "average of the weights",
        "step",
    ]
    assert [name for name in parts if not name.startswith("encoder")] == rest
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) - parts["step"] == pytest.approx(parts["step"], rel=1e-6)
    assert "| backward |" in train_table(profile)
    assert not (tmp_path / "run").exists()
