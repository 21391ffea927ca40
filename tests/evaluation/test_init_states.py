"""Initial states are stored once and restored exactly; different frames are an error."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fibopolicy import cli, envs
from fibopolicy.errors import UserError
from fibopolicy.evaluation import evaluate_policy
from fibopolicy.evaluation.init_states import (
    default_init_states,
    load_init_states,
    make_init_states,
    save_init_states,
    shipped_init_states,
)


def still(obs: dict[str, np.ndarray]) -> np.ndarray:
    return np.zeros(4)


def test_initial_states_are_held_out_stored_and_restored(tmp_path: Path) -> None:
    from fibopolicy.envs.base import episode_seed

    env = envs.make("Push-v0", image_size=16)
    init_states = make_init_states(env, 3, seed=1)
    save_init_states(init_states, tmp_path / "init_states.npz")
    loaded = load_init_states(tmp_path / "init_states.npz")
    for a, b in zip(init_states.states, loaded.states, strict=True):
        np.testing.assert_array_equal(a.state, b.state)
        assert a.model == b.model
    assert (loaded.seeds, loaded.hashes, loaded.env_args) == (
        init_states.seeds,
        init_states.hashes,
        env.env_args,
    )
    assert make_init_states(env, 2, seed=1).hashes == init_states.hashes[:2]
    assert not {episode_seed("collect", s, i) for s in range(3) for i in range(500)} & set(
        init_states.seeds
    )
    env.close()


def test_the_command_stores_them_for_any_cameras_and_evaluation_verifies_those_it_renders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "lift.npz"
    options = ["--episodes", "2", "--seed", "3", "--image-size", "16", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["fibopolicy", "init-states", "lift", *options])
    cli.main()
    assert "2 initial states of fibopolicy/Lift-v0" in capsys.readouterr().out
    stored = load_init_states(out)
    assert stored.hashes[0].keys() == {"workspace_image", "wrist_image"}
    assert stored.versions["mujoco"] == stored.env_args["env_version"]
    rows = evaluate_policy(
        still, "Lift-v0", out, workers=1, cameras=("wrist",), image_size=16, horizon=2
    )
    assert [row.init_state for row in rows] == [stored.identity(0), stored.identity(1)]
    assert {row.init_seed for row in rows} == {3}
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert "exists already" in capsys.readouterr().err


def test_different_frames_are_an_error_that_names_settings_and_versions_unless_allowed(
    tmp_path: Path,
) -> None:
    with envs.make("Lift-v0", image_size=16) as env:
        init_states = replace(make_init_states(env, 2, seed=0), versions={"mujoco": "3.1.0"})
    options = {"workers": 1, "cameras": ("wrist",), "horizon": 2}
    with pytest.raises(
        UserError,
        match=(
            r"does not look as it did .*\(wrist_image\).*image_size 16 then, 24 now.*mujoco 3.1.0"
            r" then"
        ),
    ):
        evaluate_policy(still, "Lift-v0", init_states, image_size=24, **options)
    allowed = evaluate_policy(
        still, "Lift-v0", init_states, image_size=24, allow_mismatch=True, **options
    )
    assert [row.mismatch for row in allowed] == ["wrist_image"] * 2
    assert [
        row.mismatch
        for row in evaluate_policy(still, "Lift-v0", init_states, image_size=16, **options)
    ] == [""] * 2
    moved = [replace(state, state=state.state.copy()) for state in init_states.states]
    moved[1].state[1] += 0.01  # after the time, the hand's position
    with pytest.raises(UserError, match=r"initial state 1 .*does not look as it did"):
        evaluate_policy(
            still, "Lift-v0", replace(init_states, states=tuple(moved)), image_size=16, **options
        )


def test_the_settings_compared_are_those_of_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    with envs.make("Lift-v0", image_size=16) as env:
        init_states = make_init_states(env, 1, seed=0)
    init_states = replace(init_states, versions={**init_states.versions, "MUJOCO_GL": "osmesa"})
    monkeypatch.delenv("MUJOCO_GL")  # as in a process that has made no environment
    with pytest.raises(UserError, match=r"MUJOCO_GL osmesa then, egl now"):
        evaluate_policy(still, "Lift-v0", init_states, image_size=24, workers=1, horizon=2)


def test_shipped_initial_states_are_used_where_there_are_enough() -> None:
    shipped = shipped_init_states("fibopolicy/Reach-v0", 0)
    assert shipped is not None
    with envs.make("Reach-v0", image_size=16, cameras=("wrist",)) as env:
        taken, drawn = default_init_states(env, 3, 0), default_init_states(env, 1, 5)
        assert [taken.identity(i) for i in range(3)] == [shipped.identity(i) for i in range(3)]
        assert taken.hashes == make_init_states(env, 3, 0).hashes
        assert drawn.seed == 5
        assert drawn.seeds[0] != taken.seeds[0]
