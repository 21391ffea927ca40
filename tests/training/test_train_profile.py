from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fibopolicy.policies import PolicyConfig
from fibopolicy.training import TrainConfig
from fibopolicy.training.profile import _Clock, profile_train, train_table


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
    assert 0 < profile.data_share < 1
    assert "| backward |" in train_table(profile)
    assert not (tmp_path / "run").exists()


class FakeEvent:
    """A CUDA event of a GPU that works for 2 ms before each one."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.ms = math.nan

    def record(self) -> None:
        FakeEvent.now += 2.0
        self.ms = FakeEvent.now

    def elapsed_time(self, other: FakeEvent) -> float:
        return other.ms - self.ms


def test_events_limit_the_parts_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    clock = _Clock(torch.device("cuda"))
    clock.start()
    clock.lap("data")
    clock._timed(lambda: None, "encoder, front")()
    clock.lap("forward")
    assert not waits
    assert clock.laps() == pytest.approx({"data": 2e-3, "encoder, front": 2e-3, "policy": 4e-3})
    assert waits == [torch.device("cuda")]
