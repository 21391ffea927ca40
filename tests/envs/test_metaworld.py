from __future__ import annotations

import builtins
import hashlib
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType

import mujoco
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from fibopolicy import envs
from fibopolicy.envs.metaworld import environment
from fibopolicy.envs.metaworld.environment import MetaWorldEnv
from fibopolicy.envs.metaworld.tasks import METAWORLD
from fibopolicy.errors import UserError

pytest.importorskip("metaworld")


@pytest.fixture(scope="module")
def reach() -> Iterator[MetaWorldEnv]:
    env = MetaWorldEnv("metaworld/reach-v3", image_size=32)
    yield env
    env.close()


def test_the_task_names_are_those_of_the_installed_suite() -> None:
    from metaworld.env_dict import ENV_CLS_MAP

    assert sorted(METAWORLD) == sorted(f"metaworld/{name}" for name in ENV_CLS_MAP)


def run(env: MetaWorldEnv, actions: np.ndarray) -> list[np.ndarray]:
    """Everything there is to see of a stretch: rewards, success, Meta-World's
    observation, the expert's opinion, the end.
    """
    seen = []
    for action in actions:
        reward, _, _, info = env.advance(action)
        seen.append(
            np.array(
                [
                    reward,
                    info["success"],
                    info["shaped_reward"],
                    *env.metaworld_observation(),
                    *env.expert_action(),
                ]
            )
        )
    return [*seen, env.get_state().state]


@pytest.mark.parametrize("task", METAWORLD)
def test_layouts_follow_seeds_and_states_repeat_the_future_exactly(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The text of a model takes a third of the time, and does not matter here.
    monkeypatch.setattr(
        environment, "_model_text", lambda task_id, _: f'<mujoco model="{task_id}">'
    )
    env = MetaWorldEnv(task, cameras=())
    env.reset(seed=1)
    start = env.get_state()
    for _ in range(25):
        env.advance(env.expert_action())
    state, actions = env.get_state(), np.random.default_rng(0).uniform(-1, 1, (5, 4))
    before = run(env, actions)
    env.reset(seed=2)
    assert not np.array_equal(env.get_state().state, start.state)
    env.set_state(state)  # of another layout than the present one
    np.testing.assert_array_equal(env.get_state().state, state.state)
    for a, b in zip(before, run(env, actions), strict=True):
        np.testing.assert_array_equal(a, b)
    env.reset(seed=1)
    np.testing.assert_array_equal(env.get_state().state, start.state)


DRAWN = ("metaworld/bin-picking-v3", "metaworld/peg-insert-side-v3")


def frames_after_a_restore(tasks: Sequence[str] = DRAWN) -> str:
    """A digest of states, and of frames that follow them in an environment that lived
    through something else before.
    """
    digest = hashlib.sha256()
    for task in tasks:
        env = MetaWorldEnv(task, image_size=48)
        env.reset(seed=3)
        for _ in range(20):
            env.advance(env.expert_action())
        state = env.get_state()
        action = env.expert_action()
        after = env.step(action)[0]
        env.reset(seed=4)
        env.set_state(state)
        again = env.step(action)[0]
        for key, value in after.items():
            np.testing.assert_array_equal(value, again[key])
            digest.update(value.tobytes())
        digest.update(state.model.encode() + state.state.tobytes())
        env.close()
    return digest.hexdigest()


@pytest.mark.slow
def test_another_process_draws_and_renders_the_same_bits() -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1])\n"
    code += (
        "from fibopolicy import envs; e = envs.make('metaworld/soccer-v3', cameras=());"
        " e.reset(seed=8)\n"
    )
    code += "from test_metaworld import frames_after_a_restore; print(frames_after_a_restore())"
    folder = __file__.rpartition("/")[0]
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == frames_after_a_restore()
    assert done.stderr == ""


@pytest.mark.filterwarnings("ignore:.*Box observation space.*")
def test_gymnasium_accepts_the_environment(reach: MetaWorldEnv) -> None:
    check_env(reach, skip_render_check=True)


def test_observations_match_the_observation_space(reach: MetaWorldEnv) -> None:
    obs, info = reach.reset(seed=0)
    assert info == {"success": False}
    assert reach.observation_space.contains(obs)
    assert list(obs) == [
        "corner2_image",
        "gripperPOV_image",
        "hand_position",
        "gripper_opening",
        "object_state",
        "goal_position",
    ]
    assert reach.control_hz == 80
    np.testing.assert_allclose(obs["hand_position"], reach.data.body("hand").xpos, atol=1e-6)
    np.testing.assert_allclose(obs["goal_position"], reach.data.site("goal").xpos, atol=1e-6)
    np.testing.assert_allclose(obs["object_state"][:3], reach.data.body("obj").xpos, atol=1e-6)


@pytest.mark.parametrize("task", ["reach", "button-press", "door-open"])
def test_the_expert_reaches_the_goal_and_ends_the_episode(task: str) -> None:
    env = envs.make(f"metaworld/{task}", cameras=())
    env.reset(seed=0)
    terminated = truncated = False
    while not (terminated or truncated):
        action = env.expert_action()
        assert env.action_space.contains(action)
        reward, terminated, truncated, info = env.advance(action)
        assert reward == terminated == info["success"]
    assert terminated
    assert info["shaped_reward"] > 1


def test_doing_nothing_is_truncated_at_the_horizon() -> None:
    env = envs.make("metaworld/reach-v3", cameras=(), horizon=6)
    env.reset(seed=0)
    ends = [env.advance(np.zeros(4))[1:3] for _ in range(6)]
    assert ends == [(False, False)] * 5 + [(False, True)]


def test_frames_are_upright_in_every_corner_camera() -> None:
    """A big ball lifted by 30 cm is seen higher in the frame: its place is where a
    frame differs from one without it.
    """
    env = MetaWorldEnv(
        "metaworld/reach-v3", cameras=("corner", "corner2", "corner3", "corner4"), image_size=84
    )
    env.reset(seed=0)
    env.model.site("goal").size[:] = 0.07
    for camera in env.cameras:
        frames = []
        for height in (-5.0, 0.02, 0.32):
            env.data.site("goal").xpos[:] = (0.0, 0.75, height)
            frames.append(env.render_camera(camera).astype(int))
        without, low, high = frames
        rows = [np.nonzero(np.abs(frame - without).sum(-1) > 30)[0].mean() for frame in (low, high)]
        assert rows[1] < rows[0] - 3, camera
    env.close()


def test_a_hidden_goal_is_neither_rendered_nor_observed_but_the_expert_knows_it(
    reach: MetaWorldEnv,
) -> None:
    hidden = envs.from_env_args(
        reach.env_args, goal_visible=False, cameras=("corner4",), image_size=84
    )
    obs, _ = hidden.reset(seed=5)
    reach.reset(seed=5)
    assert not obs["goal_position"].any()
    assert hidden.env_args["env_kwargs"]["goal_visible"] is False
    hidden.data.site("goal").xpos[:] = (0.0, 0.75, 0.02)
    np.testing.assert_array_equal(hidden.render_camera("corner4"), obs["corner4_image"])
    np.testing.assert_array_equal(hidden.expert_action(), reach.expert_action())
    hidden.close()


def test_env_args_rebuild_the_same_environment(reach: MetaWorldEnv) -> None:
    again = envs.from_env_args(reach.env_args)
    assert again.env_args == reach.env_args
    np.testing.assert_array_equal(
        again.reset(seed=1)[0]["corner2_image"], reach.reset(seed=1)[0]["corner2_image"]
    )
    again.close()
    with pytest.warns(UserWarning, match="come from metaworld 3.0.0, and 3.1.1 is installed"):
        envs.from_env_args({**reach.env_args, "env_version": "3.0.0"}, cameras=())


def test_fast_and_full_quality_give_different_frames(reach: MetaWorldEnv) -> None:
    full = envs.from_env_args(reach.env_args, quality="full", cameras=("corner2",))
    assert not np.array_equal(
        full.reset(seed=1)[0]["corner2_image"], reach.reset(seed=1)[0]["corner2_image"]
    )
    full.close()


def test_short_names_resolve_and_built_in_tasks_come_first() -> None:
    assert envs.resolve("reach-v3") == envs.resolve("metaworld/reach") == "metaworld/reach-v3"
    assert envs.resolve("button-press") == "metaworld/button-press-v3"
    assert envs.resolve("reach") == "fibopolicy/Reach-v0"


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("metaworld/recah-v3", {}, "did you mean 'metaworld/reach-v3'"),
        ("buton-press-v3", {}, "did you mean 'button-press-v3'"),
        (
            "metaworld/reach-v3",
            {"cameras": ("corner9",)},
            "unknown camera of metaworld/reach-v3 'corner9': did you mean 'corner'",
        ),
        ("metaworld/reach-v3", {"quality": "ultra"}, "unknown render quality"),
        ("metaworld/reach-v3", {"horizon": 0}, "horizon must be at least 1"),
        ("metaworld/reach-v3", {"image_size": 4}, "image_size must be between"),
        ("metaworld/reach-v3", {"goals": True}, "unexpected keyword argument 'goals'"),
    ],
)
def test_wrong_arguments_are_named(task: str, options: Mapping[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        envs.make(task, **options)


def test_incompatible_states_are_rejected(reach: MetaWorldEnv) -> None:
    reach.reset(seed=0)
    good = reach.get_state()
    door = MetaWorldEnv("metaworld/push-v3", cameras=())
    door.reset(seed=0)
    with pytest.raises(
        UserError, match="a state of metaworld/push-v3 does not fit metaworld/reach-v3"
    ):
        reach.set_state(door.get_state())
    with pytest.raises(UserError, match="a state of an unknown model"):
        reach.set_state(envs.SimState("", good.state))
    with pytest.raises(UserError, match="is 80 finite numbers, got shape"):
        reach.set_state(envs.SimState(good.model, good.state[:-1]))
    with pytest.raises(UserError, match="rejects the layout of this state"):
        reach.set_state(envs.SimState(good.model, np.zeros(80)))
    reach.set_state(good)
    np.testing.assert_array_equal(reach.get_state().state, good.state)


@pytest.mark.parametrize("action", [np.zeros(3), np.array([0, 0, np.nan, 0])])
def test_malformed_actions_are_rejected(reach: MetaWorldEnv, action: np.ndarray) -> None:
    with pytest.raises(UserError, match="takes an action of 4 finite numbers"):
        reach.advance(action)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *rest: object) -> ModuleType:
        if name == "metaworld":
            raise ImportError("No module named 'metaworld'")
        return original(name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r"pip install 'fibopolicy\[metaworld\]'"):
        envs.make("metaworld/reach-v3")


def test_another_mujoco_is_rejected_with_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mujoco, "__version__", "3.6.0")
    with pytest.raises(UserError, match=r"works with mujoco==3.3.0, and 3.6.0 is installed"):
        envs.make("metaworld/reach-v3")
