"""Each registered robosuite task behind the environment contract."""

from __future__ import annotations

import numpy as np
import pytest

from fibopolicy.envs import make, resolve, task_ids
from fibopolicy.envs.robosuite.tasks import TASKS

pytest.importorskip("robosuite", reason="robosuite is not installed")

ONE_ARM = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
TWO_ARMS = (*ONE_ARM, *(key.replace("robot0", "robot1") for key in ONE_ARM))
#: Task -> horizon, width of a state, arms.
FACTS = {
    "Lift": (400, 32, 1),
    "Stack": (400, 45, 1),
    "PickPlaceCan": (400, 71, 1),
    "NutAssemblySquare": (400, 45, 1),
    "Door": (400, 23, 1),
    "ToolHang": (700, 58, 1),
    "TwoArmTransport": (700, 115, 2),
    "TwoArmHandover": (700, 50, 2),
}


def test_every_task_is_registered() -> None:
    assert FACTS.keys() == TASKS.keys()
    assert {f"robosuite/{name}" for name in TASKS} <= set(task_ids())
    assert resolve("robosuite/pickplacecan") == "robosuite/PickPlaceCan"
    assert resolve("lift") == "fibopolicy/Lift-v0"  # a short name stays the built-in task's


@pytest.mark.slow
@pytest.mark.parametrize("task", FACTS)
def test_every_task_repeats_its_seeds_and_states_and_gives_proprioception(task: str) -> None:
    horizon, width, arms = FACTS[task]
    env = make(f"robosuite/{task}", cameras=())
    assert env.horizon == horizon
    assert env.proprioception == (ONE_ARM if arms == 1 else TWO_ARMS)
    assert env.eef_keys == tuple(key for key in env.proprioception if key.endswith("eef_pos"))
    assert env.action_space.shape == (7 * arms,)
    first, info = env.reset(seed=3)
    assert info == {"success": False}
    assert env.observation_space.contains(first)
    other, _ = env.reset(seed=4)
    moved = {key for key in first if not np.array_equal(first[key], other[key])}
    assert {f"robot{arm}_joint_pos" for arm in range(arms)} <= moved
    assert moved - {key for key in first if key.startswith("robot")}  # the objects as well
    again, _ = env.reset(seed=3)
    assert all(np.array_equal(first[key], again[key]) for key in first)

    actions = np.random.default_rng(0).uniform(-1, 1, (5, 7 * arms))

    def play() -> list[np.ndarray]:
        for action in actions:
            env.advance(action)
        return [env.get_state().state, *env.observe().values()]

    start = env.get_state()
    assert start.state.shape == (width,)
    run = play()
    restored = env.set_state(start)
    assert all(np.array_equal(first[key], restored[key]) for key in first)
    assert all(np.array_equal(a, b) for a, b in zip(run, play(), strict=True))
    assert not env.success()
    env.close()
