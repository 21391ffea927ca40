"""A policy acts on a robot: one observation after the other, as in an evaluation."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import call
from rollout import rollout

from fibopolicy import envs, load
from fibopolicy.envs import SimState, TaskEnv
from fibopolicy.errors import UserError
from fibopolicy.evaluation import PolicyRunner
from fibopolicy.evaluation.init_states import shipped_init_states
from fibopolicy.policies import PolicyConfig, Shapes, build_policy

RUN = Path(__file__).parent.parent / "golden" / "policies" / "reach"
TINY = {"patch_size": 12, "width": 12, "depth": 1, "num_heads": 2, "keypoints": 4}
SHAPES = Shapes({"wrist_image": (24, 24)}, {"hand_position": 3}, 4)
CHUNKS = {"n_obs_steps": 2, "horizon": 5, "n_action_steps": 3, "hidden": 16}
POLICIES: dict[str, dict[str, Any]] = {
    "bc": {"policy": "bc", **CHUNKS},
    "ensembling": {
        "policy": "bc",
        **CHUNKS,
        "n_action_steps": 1,
        "temporal_ensemble_coeff": 0.01,
    },
    "diffusion": {"policy": "diffusion", **CHUNKS, "policy_options": {"num_inference_steps": 2}},
    "flow": {"policy": "flow", **CHUNKS, "policy_options": {"num_inference_steps": 2}},
    "bc_gmm": {"policy": "bc_gmm", "hidden": 16},
    "bc_rnn_gmm": {"policy": "bc_rnn_gmm", "horizon": 4, "policy_options": {"hidden_dim": 16}},
    "bc_transformer_gmm": {
        "policy": "bc_transformer_gmm",
        "policy_options": {"embed_dim": 16, "num_layers": 1, "num_heads": 2},
    },
}
NEEDS = {"diffusion": "diffusers", "bc_gmm": "robomimic"}


@pytest.fixture(scope="module")
def env() -> Iterator[TaskEnv]:
    with envs.make("Reach-v0", image_size=24, horizon=13) as env:
        yield env


def start(env: TaskEnv) -> SimState:
    env.reset(seed=0)
    return env.get_state()


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_acts_on_a_robot_as_in_an_evaluation(
    name: str, env: TaskEnv, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = "robomimic" if name.endswith("gmm") else NEEDS.get(name, "torch")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    policy = build_policy(PolicyConfig(encoder_options=TINY, **POLICIES[name]), SHAPES).eval()
    executed: list[np.ndarray] = []
    advance = env.advance
    monkeypatch.setattr(
        env, "advance", lambda action: (executed.append(np.array(action)), advance(action))[1]
    )
    state = start(env)
    episode = rollout(policy, env, env.set_state(state))
    evaluated, executed[:] = list(executed), []
    assert len(evaluated) == episode.steps == 13

    runner = PolicyRunner(policy)
    for _ in range(2):  # the second time after `reset`
        runner.reset()
        obs, executed[:] = env.set_state(state), []
        for _ in range(episode.steps):
            action = runner.act(obs)
            assert action.dtype == np.float32
            obs, *_ = env.step(action)
        np.testing.assert_array_equal(executed, evaluated)


def test_a_run_is_loaded_in_one_line_and_solves_its_task() -> None:
    runner = load(RUN)
    assert runner.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert runner.dtype == torch.float32
    assert runner.layout == {
        "workspace_image": ((24, 24, 3), np.uint8),
        "wrist_image": ((24, 24, 3), np.uint8),
        "hand_position": ((3,), np.float32),
        "gripper_opening": ((1,), np.float32),
    }
    with envs.make("Reach-v0", image_size=24) as env:
        states = shipped_init_states(env.task_id, 0)
        assert states is not None
        obs, success, steps = env.set_state(states.states[0]), False, 0
        while not success and steps < 20:
            obs, _, _, _, info = env.step(runner.act(obs))
            success, steps = info["success"], steps + 1
    assert success


@pytest.fixture
def seen() -> dict[str, Any]:
    return {
        "workspace_image": np.full((24, 24, 3), 90, np.uint8),
        "wrist_image": np.full((24, 24, 3), 40, np.uint8),
        "hand_position": np.zeros(3, np.float32),
        "gripper_opening": np.zeros(1, np.float32),
    }


def test_the_package_and_its_datasets_import_neither_torch_nor_a_simulator() -> None:
    for package, others in (("fibopolicy", "h5py"), ("fibopolicy.datasets", "gymnasium")):
        code = f"import sys, {package}; print({{'torch', 'mujoco', {others!r}}} & set(sys.modules))"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout == "set()\n", package


def test_arrays_of_any_layout_are_copied_and_other_keys_ignored(seen: dict[str, Any]) -> None:
    seen["wrist_image"][:] = np.arange(24 * 24 * 3, dtype=np.uint8).reshape(24, 24, 3)
    expected = PolicyRunner(load(RUN).policy).act(seen)
    runner = load(RUN, device="cpu")
    bgr = np.asfortranarray(seen["wrist_image"][..., ::-1])
    given = {**seen, "wrist_image": bgr[..., ::-1], "camera_time": "12:00"}
    given["hand_position"] = given["hand_position"].astype(np.float64)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    np.testing.assert_array_equal(runner.act(given), expected)
    assert torch.equal(torch.get_rng_state(), before)
    bgr[:] = 0  # a driver that reuses its buffer
    assert runner._window[-1]["wrist_image"].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrist_image": ...}, "'wrist_image' is missing; the policy reads workspace_image, wrist"),
        (
            {"wrist_image": np.zeros((3, 24, 24), np.uint8)},
            r"'wrist_image' is uint8 \(3, 24, 24\), expected a numpy array uint8 \(24, 24, 3\)",
        ),
        (
            {"wrist_image": np.zeros((1, 24, 24, 3), np.uint8)},
            r"\(24, 24, 3\): height x width x RGB of one instant, without a batch dimension",
        ),
        ({"wrist_image": np.zeros((24, 24, 3))}, "is float64"),
        ({"wrist_image": [[0]]}, "'wrist_image' is a list, expected a numpy array"),
        (
            {"hand_position": np.zeros(2, np.float32)},
            r"'hand_position' is float32 \(2,\), expected a numpy array float32 \(3,\): a vector",
        ),
        ({"hand_position": np.zeros(3, np.int64)}, r"is int64 \(3,\), expected a numpy array"),
        ({"hand_position": np.array([0, np.nan, 0])}, r"is not finite: \[0.0, nan, 0.0\]"),
    ],
)
def test_a_wrong_observation_is_one_clear_line_and_the_episode_can_continue(
    changes: dict[str, Any], message: str, seen: dict[str, Any]
) -> None:
    policy = load(RUN).policy
    undisturbed, runner = PolicyRunner(policy), PolicyRunner(policy)
    wrong = {key: value for key, value in (seen | changes).items() if value is not ...}
    for step in range(6):
        if step in (0, 3, 4):
            with pytest.raises(UserError, match=message) as error:
                runner.act(wrong)
            assert "\n" not in str(error.value)
        np.testing.assert_array_equal(runner.act(seen), undisturbed.act(seen))
    with pytest.raises(UserError, match="an observation is a dict of arrays, got a ndarray"):
        runner.act(np.zeros(3))  # type: ignore[arg-type]


def test_the_latency_of_actions_is_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "act.json"
    options = ["--turns", "5", "--device", "cpu", "--out", str(out)]
    code, printed, _ = call(monkeypatch, capsys, "profile", "act", str(RUN), *options)
    assert code == 0
    assert printed.startswith("bc with fibottention_vit_tiny on cpu in float32, 1 CPU thread\n")
    (timing,) = json.loads(out.read_text())["timings"]
    assert (timing["calls"], timing["n_action_steps"], timing["device"]) == (5, 4, "cpu")
    assert 0 < timing["median_s"] <= timing["p99_s"]
    assert timing["on_time_hz"] == pytest.approx(1 / timing["p99_s"])
    assert timing["sustained_hz"] == pytest.approx(4 / timing["median_s"])
    assert f"{timing['median_s'] * 1e3:.2f} ms" in printed
