"""Robosuite's scripted experts: they succeed, depend on the present state alone, and recover."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from fibopolicy.envs.robosuite.arm import Arm
from fibopolicy.envs.robosuite.environment import RobosuiteEnv
from fibopolicy.envs.robosuite.experts import CUBE_SEEN, EXPERTS
from fibopolicy.errors import UserError

pytest.importorskip("robosuite", reason="robosuite is not installed")


@pytest.fixture(scope="module", params=EXPERTS)
def env(request: pytest.FixtureRequest) -> Iterator[RobosuiteEnv]:
    env = RobosuiteEnv(request.param, cameras=())
    yield env
    env.close()


def run(env: RobosuiteEnv, steps: int = 400) -> list[np.ndarray]:
    """The expert's actions until it succeeds, `steps` at most; the last one is NaN
    where it does not.
    """
    actions = []
    for _ in range(steps):
        actions.append(env.expert_action())
        _, succeeded, _, _ = env.advance(actions[-1])
        if succeeded:
            return actions
    return [*actions, np.full(7, np.nan)]


@pytest.mark.slow
def test_an_expert_succeeds_and_depends_on_the_state_alone(env: RobosuiteEnv) -> None:
    env.reset(seed=11)
    states, seen = [], []
    for step in range(400):
        states += [env.get_state()] if step % 15 == 5 else []
        seen.append(env.expert_action())
        if env.advance(seen[-1])[1]:
            break
    else:
        pytest.fail("no success")
    first = np.array(seen)
    assert first.shape[1:] == env.action_space.shape
    assert np.abs(first).max() <= 1
    for state, action in reversed(list(zip(states, first[5::15], strict=True))):
        env.set_state(state)
        np.testing.assert_allclose(env.expert_action(), action, atol=1e-5)
    env.set_state(states[len(states) // 2])
    assert np.isfinite(run(env)[-1]).all()
    env.reset(seed=11)
    np.testing.assert_array_equal(run(env, 20)[:20], first[:20])


@pytest.mark.slow
def test_an_expert_recovers_from_a_push(env: RobosuiteEnv) -> None:
    env.reset(seed=13)
    for step in range(30):
        # In its middle, half a second of something else, the hand open.
        push = np.array([0.6, -0.6, 0.8, 0.2, -0.2, 0.3, -1.0])
        env.advance(push if 18 <= step < 28 else env.expert_action())
    assert np.isfinite(run(env)[-1]).all()


@pytest.mark.slow
def test_the_gripper_aligns_with_a_cube_only_from_above() -> None:
    env = RobosuiteEnv("robosuite/Stack", cameras=())
    turned, sideways = [], []
    for seed in range(5):
        env.reset(seed=seed)
        first = Arm(env._env).yaw
        while (action := env.expert_action())[6] < 0:
            arm = Arm(env._env)
            sideways.append(float(np.linalg.norm((arm.position - arm.body("cubeA_main")[0])[:2])))
            turned.append(abs(arm.yaw - first))
            env.advance(action)
    env.close()
    assert max(turn for turn, off in zip(turned, sideways, strict=True) if off > CUBE_SEEN) < 0.1
    assert max(turned) > 0.3


def test_tasks_without_an_expert_name_those_that_have_one() -> None:
    env = RobosuiteEnv("robosuite/NutAssemblyRound", cameras=())
    with pytest.raises(
        UserError,
        match="Round has no scripted expert; these have one: robosuite/Door, robosuite/Lift",
    ):
        env.expert_action()
    env.close()


def test_other_robots_are_rejected() -> None:
    env = RobosuiteEnv("robosuite/Lift", cameras=(), robots="Sawyer")
    with pytest.raises(UserError, match="one Panda with robosuite's default controller"):
        env.expert_action()
    env.close()
