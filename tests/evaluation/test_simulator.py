from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fibopolicy import envs
from fibopolicy.errors import UserError
from fibopolicy.evaluation.simulator import EpisodeRunner, Viewer, check_display


def test_without_a_display_the_viewer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    with pytest.raises(UserError, match="there is no display"):
        check_display()


def test_the_viewer_follows_every_control_step_in_real_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[Any] = []
    times: list[float] = []

    def launch_passive(model: object, data: Any) -> SimpleNamespace:
        opened.append((model, data))
        return SimpleNamespace(
            is_running=lambda: True, sync=lambda: times.append(data.time), close=lambda: None
        )

    env = envs.make("Lift-v0", cameras=(), horizon=5)
    monkeypatch.setitem(
        sys.modules, "mujoco.viewer", SimpleNamespace(launch_passive=launch_passive)
    )
    monkeypatch.setattr("mujoco.viewer", sys.modules["mujoco.viewer"], raising=False)
    obs, _ = env.reset(seed=0)
    episode, began = EpisodeRunner(env, obs, 1, on_step=Viewer(env).show), time.perf_counter()
    episode.execute(np.zeros((5, 4)))
    assert opened == [env.simulation()]
    np.testing.assert_allclose(times, np.arange(1, 6) / env.control_hz)
    assert time.perf_counter() - began >= 4 / env.control_hz
    env.close()
