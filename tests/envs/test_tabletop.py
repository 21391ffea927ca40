from __future__ import annotations

import os
import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from fibopolicy import envs
from fibopolicy.envs.registry import BUILT_IN
from fibopolicy.envs.tabletop.lift import Lift
from fibopolicy.envs.tabletop.push import Push
from fibopolicy.envs.tabletop.stack import Stack
from fibopolicy.errors import UserError

TASKS = sorted(BUILT_IN)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.filterwarnings("ignore:.*action space.*")
def test_gymnasium_accepts_the_environment(task: str) -> None:
    env = gymnasium.make(task)
    check_env(env.unwrapped)
    env.close()


@pytest.mark.parametrize("task", TASKS)
def test_expert_succeeds_in_98_percent_of_200_layouts(task: str) -> None:
    env = envs.make(task, cameras=())
    successes = 0
    for seed in range(200):
        env.reset(seed=seed)
        done = False
        while not done:
            _, terminated, truncated, info = env.advance(env.expert_action())
            done = terminated or truncated
        successes += info["success"]
    assert successes >= 196


@pytest.mark.parametrize("task", TASKS)
def test_a_restored_state_repeats_the_instant_and_the_future_exactly(task: str) -> None:
    env = envs.make(task, image_size=32)
    env.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(12):
        env.advance(env.expert_action())
    seen, expert = env.observe(), env.expert_action()
    state, actions = env.get_state(), rng.uniform(-1, 1, (8, 4))
    first = [env.step(a)[0] for a in actions]
    end = env.get_state().state
    env.reset(seed=4)
    restored = env.set_state(state)
    np.testing.assert_array_equal(env.expert_action(), expert)
    again = [env.step(a)[0] for a in actions]
    np.testing.assert_array_equal(env.get_state().state, end)
    for a, b in zip([seen, *first], [restored, *again], strict=True):
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])
    env.close()


def test_a_state_is_restored_in_another_environment_with_the_same_pixels() -> None:
    one, other = envs.make("Push-v0", image_size=32), envs.make("Push-v0", image_size=32)
    seen, _ = one.reset(seed=1)
    restored = other.set_state(one.get_state())
    np.testing.assert_array_equal(seen["workspace_image"], restored["workspace_image"])
    one.close()
    other.close()


def test_the_same_seed_draws_the_same_layout_and_another_seed_another() -> None:
    env = envs.make("Stack-v0", cameras=())
    env.reset(seed=5)
    first = env.get_state().state
    env.reset(seed=6)
    second = env.get_state().state
    env.reset(seed=5)
    np.testing.assert_array_equal(env.get_state().state, first)
    assert not np.array_equal(first, second)


def test_layouts_stay_in_their_stated_ranges() -> None:
    lift, push, stack = Lift(cameras=()), Push(cameras=()), Stack(cameras=())
    cubes, pucks, gaps = [], [], []
    for seed in range(300):
        lift.reset(seed=seed)
        cubes.append(lift.position("cube"))
        push.reset(seed=seed)
        pucks.append(np.linalg.norm(push.position("puck")[:2] - push.position("target")[:2]))
        stack.reset(seed=seed)
        gaps.append(np.linalg.norm(stack.position("cube")[:2] - stack.position("base")[:2]))
    xy = np.array(cubes)[:, :2]
    assert np.abs(xy).max() <= 0.1
    assert xy.min() < -0.09
    assert xy.max() > 0.09
    assert min(pucks) >= 0.08
    assert max(pucks) <= 0.14
    assert min(gaps) >= 0.11


def test_images_are_upright_and_the_cameras_differ() -> None:
    env = envs.make("Lift-v0")
    obs, _ = env.reset(seed=0)
    image = obs["workspace_image"].astype(int)
    red = np.argwhere((image[..., 0] > 120) & (image[..., 1] < 60))
    white = np.argwhere(image.min(axis=-1) > 180)  # the hand, which hovers above the cube
    assert white[:, 0].mean() < red[:, 0].mean()
    assert not np.array_equal(image, obs["wrist_image"])
    env.close()


def test_stacking_succeeds_only_after_the_gripper_releases_and_withdraws() -> None:
    env = Stack(cameras=())
    env.reset(seed=0)
    held, opening = False, 0
    for _ in range(env.horizon):
        action = env.expert_action()
        _, terminated, _, _ = env.advance(action)
        resting = env._resting(0.012)
        held = held or (resting and env.opening < 0.023 and not terminated)
        opening += bool(resting and action[3] < 0)
        if terminated:
            break
    assert held
    assert env.opening > 0.023
    assert env.hand[2] > env.position("cube")[2] + 0.04
    assert opening >= 4  # steps of letting go that a demonstration shows


def test_doing_nothing_never_succeeds() -> None:
    for task in TASKS:
        env = envs.make(task, cameras=())
        env.reset(seed=0)
        for _ in range(env.horizon):
            _, terminated, truncated, _ = env.advance(np.zeros(4))
        assert truncated
        assert not terminated


@pytest.mark.parametrize("action", [np.zeros(3), np.array([0, 0, np.nan, 0]), np.zeros((2, 4))])
def test_malformed_actions_are_rejected(action: np.ndarray) -> None:
    env = envs.make("Reach-v0", cameras=())
    env.reset(seed=0)
    with pytest.raises(UserError, match="takes an action of 4 finite numbers"):
        env.advance(action)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": ("wrists",)}, "unknown camera 'wrists': did you mean 'wrist'"),
        ({"quality": "ultra"}, "unknown render quality 'ultra'"),
        ({"image_size": 2}, "image_size must be between 8 and 1024"),
        ({"horizon": 0}, "horizon must be at least 1"),
        ({"camera": "wrist"}, "unexpected keyword argument 'camera'"),
    ],
)
def test_unknown_options_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        envs.make("Lift-v0", **options)


def test_unknown_tasks_get_a_suggestion_and_short_names_resolve() -> None:
    with pytest.raises(UserError, match="did you mean 'Lift-v0'"):
        envs.make("Lfit-v0")
    assert envs.resolve("lift") == "fibopolicy/Lift-v0"
    assert envs.resolve("robosuite/Lift") == "robosuite/Lift"


def test_env_args_rebuild_the_same_environment() -> None:
    env = envs.make("Reach-v0", cameras=("wrist",), image_size=16, horizon=7)
    again = envs.from_env_args(env.env_args)
    assert again.env_args == env.env_args
    assert (
        envs.from_env_args(env.env_args, image_size=20).env_args["env_kwargs"]["image_size"] == 20
    )


def test_a_state_of_another_width_is_rejected() -> None:
    env = envs.make("Lift-v0", cameras=())
    with pytest.raises(UserError, match="has width"):
        env.set_state(envs.SimState("", np.zeros(3)))


@pytest.mark.slow
def test_without_opengl_the_error_names_the_command_that_installs_it() -> None:
    code = "import sys; sys.argv = 'fibopolicy collect Lift-v0 --episodes 1 --out x'.split()\n"
    code += "from fibopolicy.__main__ import main; main()"
    # PyOpenGL looks its libraries up through ctypes; hiding them is what a machine
    # without them looks like.
    hide = "import ctypes.util; ctypes.util.find_library = lambda name: None\n"
    env = {**os.environ, "MUJOCO_GL": "osmesa", "PYOPENGL_PLATFORM": ""}
    done = subprocess.run(
        [sys.executable, "-c", hide + code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "apt-get install" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_mujoco_may_be_imported_first() -> None:
    code = "import mujoco; from fibopolicy import envs; e = envs.make('Lift-v0'); e.reset(seed=0)"
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_an_environment_left_open_ends_without_a_traceback() -> None:
    code = "from fibopolicy import envs; e = envs.make('Lift-v0'); e.reset(seed=0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.slow
def test_rendering_first_leaves_triton_and_the_optimizer_usable() -> None:
    code = "from fibopolicy import envs; e = envs.make('Lift-v0'); e.reset(seed=0); e.close()\n"
    code += "import torch; torch.optim.AdamW([torch.zeros(1, requires_grad=True)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
