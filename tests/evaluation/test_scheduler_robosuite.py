"""Episodes of robosuite do not depend on the process or the order either."""

from __future__ import annotations

import importlib.util
from functools import partial

import numpy as np
import pytest
from rollout import rollout

from fibopolicy import envs
from fibopolicy.evaluation.init_states import camera_hashes, make_init_states
from fibopolicy.evaluation.policy_runner import PolicyRunner
from fibopolicy.evaluation.scheduler import Scheduler

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("robosuite") is None, reason="robosuite is not installed"
)


def reaching(obs: dict[str, np.ndarray]) -> np.ndarray:
    """Down to the cube and against it, where contacts amplify the smallest difference;
    the pixels count as well.
    """
    move = 20 * (obs["cube_pos"] - obs["robot0_eef_pos"])
    turn = [obs["agentview_image"].mean() / 255 - 0.5, 0.0, 0.0]
    return np.tile(np.clip([*move, *turn, 1.0], -1, 1), (4, 1))


@pytest.mark.slow
def test_episodes_of_robosuite_do_not_depend_on_process_or_order() -> None:
    make = partial(envs.make, "robosuite/Lift", cameras=("agentview",), image_size=32, horizon=32)
    env = make()
    init_states, runner, expected, frames = (
        make_init_states(env, 2, seed=0),
        PolicyRunner(reaching),
        {},
        {},
    )
    for index in range(2):
        obs = env.set_state(init_states.states[index])
        frames[index] = camera_hashes(obs)
        episode = rollout(runner, env, obs, index=index)
        expected[index] = (episode.success, episode.steps, episode.total_reward)
    env.close()
    seen = {}
    with Scheduler(make, 1, 2) as pool:
        for order in ([1, 0, 1], [0, 1]):
            for outcome in pool.run(runner, init_states, order, check=seen.__setitem__):
                assert (outcome.success, outcome.steps, outcome.total_reward) == expected[
                    outcome.index
                ]
    assert seen == frames
