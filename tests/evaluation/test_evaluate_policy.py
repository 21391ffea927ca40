"""Policies of other libraries are evaluated in a few lines."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fibopolicy import envs
from fibopolicy.errors import UserError
from fibopolicy.evaluation import evaluate_policy
from fibopolicy.evaluation.episodes import Episode, EpisodeResult, success_rate
from fibopolicy.evaluation.init_states import (
    make_init_states,
    save_init_states,
    shipped_init_states,
)
from fibopolicy.evaluation.policy_runner import PolicyRunner


class OutsideReach(nn.Module):
    """A recurrent torch policy from outside this library: it reads the position of the end
    effector, and counts its calls.
    """

    n_obs_steps = 2
    config = {"hidden": 8}  # noqa: RUF012  (of its own kind, without n_obs_steps)

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.GRUCell(3, 8)
        self.out = nn.Linear(8, 4)

    def act(self, obs, state):
        assert obs["hand_position"].shape[1:] == (2, 3)
        assert obs["workspace_image"].dtype == torch.uint8
        state = self.core(obs["hand_position"][:, -1], state)
        return self.out(state).tanh()[:, None].expand(-1, 3, -1), state


def test_an_outside_torch_policy_gives_the_same_rows_with_any_number_of_workers(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    policy, seen = OutsideReach().eval(), []
    options = {"cameras": ("workspace",), "image_size": 16, "horizon": 9}
    one = evaluate_policy(policy, "reach", 4, workers=1, on_result=seen.append, **options)
    assert sorted(seen, key=lambda row: row.index) == one
    assert [row.index for row in one] == [0, 1, 2, 3]
    assert {(row.task, row.steps, row.batch_size, row.threads, row.error) for row in one} == {
        ("fibopolicy/Reach-v0", 9, 1, 1, "")
    }
    with envs.make("reach", **options) as env:
        save_init_states(make_init_states(env, 4, seed=0), tmp_path / "init_states.npz")
    others = evaluate_policy(
        policy, partial(envs.make, "reach", **options), tmp_path / "init_states.npz", workers=2
    )
    assert [row.repeatable() for row in others] == [row.repeatable() for row in one]
    batched = evaluate_policy(policy, "reach", 4, workers=2, batch_size=3, **options)
    assert {row.batch_size for row in batched} == {3}


def towards(obs: dict[str, np.ndarray]) -> np.ndarray:
    """A chunk of two actions: down, and close the gripper."""
    assert set(obs) == {"hand_position", "gripper_opening"}
    return np.tile(np.array([0, 0, -1, 1], dtype=np.float64), (2, 1))


def test_a_function_is_a_policy(capfd: pytest.CaptureFixture[str]) -> None:
    rows = evaluate_policy(
        towards, envs.make("Lift-v0").env_args, 2, workers=1, cameras=(), horizon=4
    )
    assert [(row.success, row.steps) for row in rows] == [(False, 4)] * 2
    assert "Traceback" not in capfd.readouterr().err


class Returns:
    """A policy whose `act` returns a given value."""

    def __init__(self, value: object) -> None:
        self.value = value

    def act(self, obs: object, state: object) -> object:
        return self.value


WEIGHT = torch.zeros(4, requires_grad=True)


@pytest.mark.parametrize(
    "policy",
    [
        lambda obs: (WEIGHT + 0.5).requires_grad_(),
        lambda obs: WEIGHT.bfloat16() + 0.5,
        lambda obs: [0.5] * 4,
        lambda obs: ((0.5,) * 4, [0.5] * 4),
        lambda obs: np.full((3, 4), 0.5),
        Returns(((WEIGHT + 0.5).view(1, 1, 4), None)),
        Returns([np.full((1, 2, 4), 0.5), "any state"]),
        Returns(([[[0.5] * 4]], None)),
    ],
)
def test_actions_may_be_anything_that_numpy_reads(policy: object) -> None:
    actions = PolicyRunner(policy).act_batch(
        [Episode(0, {"hand_position": np.zeros((1, 3), np.float32)})]
    )[0]
    assert actions.dtype == np.float32
    assert actions.shape[1:] == (4,)
    assert (actions == 0.5).all()


def test_the_callers_random_numbers_stay_as_they_were() -> None:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    evaluate_policy(towards, "Lift-v0", 1, workers=1, cameras=(), horizon=2)
    assert (torch.rand(1), np.random.rand()) == expected  # noqa: NPY002


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        (lambda obs: np.full(4, np.nan), {}, "not finite in episode 0"),
        (lambda obs: np.zeros(3), {}, "takes an action of 4 finite numbers"),
        (lambda obs: np.zeros((1, 1, 4)), {}, r"actions of shape \(1, 1, 4\)"),
        (lambda obs: np.zeros(4), {"batch_size": 2}, "so batch_size is 1"),
        (lambda obs: np.zeros(4), {"qualty": "fast"}, "qualty"),
        (OutsideReach(), {}, "training mode"),
        (
            lambda obs: None,
            {},
            r"the policy returned None, expected an action \(A,\) or a chunk of them",
        ),
        (lambda obs: {"action": np.zeros(4)}, {}, "the policy returned a dict, expected an action"),
        (lambda obs: "0 0 0 0", {}, "the policy returned '0 0 0 0'"),
        (lambda obs: [[0, 0, 0, 0], [0, 0]], {}, "the policy returned a list, expected an action"),
        (
            lambda obs: torch.zeros(4, dtype=torch.complex64).numpy(),
            {},
            r"a ndarray of shape \(4,\), expected an action",
        ),
        (
            Returns(torch.zeros(1, 2, 4)),
            {},
            r"returned a Tensor of shape \(1, 2, 4\), expected a pair: actions \(1, T_a, A\)",
        ),
        (Returns(None), {}, "act returned None, expected a pair"),
        (
            Returns((None, None)),
            {},
            r"act returned None, expected actions \(1, T_a, A\) and a state as numbers",
        ),
        (
            Returns((torch.zeros(4), None)),
            {},
            r"returned actions \(4,\), expected actions \(1, T_a, A\)",
        ),
        (None, {}, "a policy has a method act"),
        (Returns, {}, "a policy has a method act"),
    ],
)
def test_errors_about_a_policy_are_one_line(
    policy: object, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        evaluate_policy(
            policy, "Lift-v0", 1, **{"workers": 1, "cameras": (), "horizon": 4, **options}
        )
    assert "\n" not in str(raised.value)


def test_init_states_may_be_any_whole_number_and_mistakes_are_one_line() -> None:
    options: dict[str, Any] = {"workers": 1, "cameras": (), "horizon": 2}
    assert len(evaluate_policy(towards, "Lift-v0", np.int64(1), **options)) == 1
    for init_states in (2.5, None):
        with pytest.raises(UserError, match="init_states must be initial states"):
            evaluate_policy(towards, "Lift-v0", init_states, **options)
    for task in (None, 3):
        with pytest.raises(UserError, match="task must be a task's id"):
            evaluate_policy(towards, task, 1)


def test_shipped_initial_states_are_those_that_the_tasks_draw() -> None:
    for task in envs.registry.BUILT_IN:
        with envs.make(task) as env:
            shipped, fresh = shipped_init_states(task, 0), make_init_states(env, 3, seed=0)
        assert shipped is not None
        assert len(shipped) == 100
        assert shipped.env_args["env_name"] == task
        assert [shipped.identity(i) for i in range(3)] == [fresh.identity(i) for i in range(3)]
        assert shipped.seeds[:3] == fresh.seeds


def test_errors_count_in_no_rate_and_are_stated() -> None:
    row = EpisodeResult("t", 0, 0, True, 5, 1.0, 0.1, 0, "", 0, 9, "fast", "x")
    reason = "its process was killed by SIGKILL"
    failed = replace(row, index=1, success=False, steps=0, error=reason, attempts=3)
    rate = success_rate([row, failed])
    assert (rate.successes, rate.episodes, rate.errors) == (1, 1, 1)
    assert str(rate).endswith(", 1 errors")
    with pytest.raises(UserError, match="none of 1 episodes could be completed"):
        success_rate([failed])
