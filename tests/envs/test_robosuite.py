"""Robosuite behind the environment contract.

`lift_human.npz` holds what replay needs of the ten human Lift demonstrations in
robomimic 0.1.0's tests (MIT, robosuite 1.2): models, initial states, actions, and the
gripper's recorded positions.
"""

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy.spatial.transform import Rotation

from fibopolicy.envs import registry
from fibopolicy.envs.base import Observation, SimState
from fibopolicy.envs.robosuite.environment import RobosuiteEnv
from fibopolicy.envs.robosuite.legacy import composite_controller, convert_model
from fibopolicy.errors import UserError

robosuite = pytest.importorskip("robosuite", reason="robosuite is not installed")

HUMAN = np.load(Path(__file__).parent / "lift_human.npz")
FLAT = json.loads(str(HUMAN["env_args"]))["env_kwargs"]["controller_configs"]
#: A composite controller config as robosuite 1.5 loads it, in metres and radians in the
#: world's frame.
ABSOLUTE = {
    "type": "BASIC",
    "body_parts": {
        "right": {
            **FLAT,
            "input_type": "absolute",
            "input_ref_frame": "world",
            "gripper": {"type": "GRIP"},
        }
    },
}


@pytest.fixture(scope="module")
def env() -> RobosuiteEnv:
    env = RobosuiteEnv()
    try:
        env.render()
    except UserError as error:
        pytest.skip(str(error))
    return env


@pytest.fixture(scope="module")
def blind() -> RobosuiteEnv:
    """The human demonstrations' environment, without cameras."""
    return RobosuiteEnv.from_env_args(json.loads(str(HUMAN["env_args"])), cameras=())


def human(demo: int) -> tuple[SimState, Any, Any]:
    """A demonstration's start, its actions `(N, 7)`, and the gripper's positions before
    each `(N, 3)`.
    """
    end = int(HUMAN["lengths"][: demo + 1].sum())
    steps = slice(end - int(HUMAN["lengths"][demo]), end)
    start = SimState(HUMAN["models"][demo].decode(), HUMAN["starts"][demo])
    return start, HUMAN["actions"][steps], HUMAN["eef"][steps]


def equal(a: Observation, b: Observation) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def play(env: RobosuiteEnv, actions: Any) -> Any:
    """The states after each action."""
    states = []
    for action in actions:
        env.advance(action)
        states.append(env.get_state().state)
    return np.stack(states)


def some_actions(steps: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).uniform(-1, 1, (steps, 7))


# Observations


def test_observations_are_upright_images_and_float32_vectors(env: RobosuiteEnv) -> None:
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert {k for k in observation if k.endswith("_image")} == {
        "agentview_image",
        "robot0_eye_in_hand_image",
    }
    assert set(env.proprioception) <= observation.keys()
    assert not any(key.endswith("-state") for key in observation)
    image = observation["agentview_image"].astype(int)
    red = image[..., 0] - image[..., 1] > 60
    assert image[:20].mean() < image[-20:].mean() - 20  # the robot above, the white table below
    assert red.any()
    assert red.mean() < 0.05  # the cube


@pytest.mark.parametrize("quality", ["fast", "full"])
def test_frames_equal_those_of_robosuite_s_camera(env: RobosuiteEnv, quality: Any) -> None:
    env.reset(seed=1)
    state = env.get_state()
    own = robosuite.make(
        "Lift",
        robots="Panda",
        camera_names=list(env.cameras),
        camera_heights=84,
        camera_widths=84,
        renderer="mujoco",
        hard_reset=False,
    )
    if quality == "fast":
        own.set_xml_processor(
            lambda xml: xml.replace("<visual>", '<visual><quality shadowsize="0" offsamples="0"/>')
        )
    own.reset_from_xml_string(state.model)
    if quality == "fast":
        own.sim.model.mat_reflectance[:] = 0
    own.sim.set_state_from_flattened(state.state)
    own.sim.forward()
    theirs = own._get_observations(force_update=True)
    frames = {f"{camera}_image": theirs[f"{camera}_image"][::-1].copy() for camera in env.cameras}
    vectors = {key: np.float32(theirs[key]) for key in env.proprioception}
    own.close()
    other = RobosuiteEnv(quality=quality)
    ours = other.set_state(state)
    other.close()
    for key, value in {**frames, **vectors}.items():
        np.testing.assert_array_equal(ours[key], value, err_msg=key)


def test_environments_in_one_process_keep_their_own_frames(env: RobosuiteEnv) -> None:
    other = RobosuiteEnv(image_size=(40, 60))
    mine, _ = env.reset(seed=2)
    theirs, _ = other.reset(seed=3)
    assert theirs["agentview_image"].shape == (40, 60, 3)
    assert equal(env.observe(), mine)
    assert equal(other.observe(), theirs)
    other.close()
    assert equal(env.observe(), mine)


def test_advance_renders_nothing(env: RobosuiteEnv, monkeypatch: pytest.MonkeyPatch) -> None:
    env.reset(seed=0)
    monkeypatch.setattr(env, "render_camera", lambda camera: pytest.fail("rendered"))
    for _ in range(3):
        env.advance(np.zeros(7))


# Episodes


@pytest.mark.filterwarnings("ignore:.*observation space.*")
def test_a_robosuite_task_is_a_gymnasium_environment(env: RobosuiteEnv) -> None:
    check_env(env, skip_render_check=True)


def test_the_layout_depends_only_on_the_seed(env: RobosuiteEnv) -> None:
    first, _ = env.reset(seed=5)
    second, _ = env.reset(seed=6)
    assert not np.array_equal(first["cube_pos"], second["cube_pos"])
    assert not np.array_equal(first["robot0_joint_pos"], second["robot0_joint_pos"])
    env.set_state(human(0)[0])
    play(env, some_actions(3))
    assert equal(env.reset(seed=5)[0], first)
    again = registry.from_env_args(env.env_args)
    assert equal(again.reset(seed=5)[0], first)
    again.close()


def test_without_a_seed_layouts_follow_the_last_seed(blind: RobosuiteEnv) -> None:
    blind.reset(seed=7)
    first = [blind.reset()[0]["cube_pos"] for _ in range(2)]
    blind.reset(seed=7)
    assert np.array_equal(first, [blind.reset()[0]["cube_pos"] for _ in range(2)])
    assert not np.array_equal(first[0], first[1])


def test_success_ends_an_episode_and_the_horizon_truncates_it() -> None:
    env = RobosuiteEnv(cameras=(), horizon=2)
    _, info = env.reset(seed=0)
    assert info == {"success": False}
    assert [env.advance(np.zeros(7))[1:] for _ in range(2)] == [
        (False, False, {"success": False}),
        (False, True, {"success": False}),
    ]
    state = env.get_state()
    lifted = state.state.copy()
    lifted[1 + 9 + 2] += 0.2  # time, 7 arm joints, 2 fingers, then the cube's x, y, z
    env.set_state(dataclasses.replace(state, state=lifted))
    assert env.advance(np.zeros(7)) == (1.0, True, False, {"success": True})


@pytest.mark.parametrize("action", [np.zeros(6), np.zeros((1, 7)), np.full(7, np.nan)])
def test_an_invalid_action_is_rejected(blind: RobosuiteEnv, action: Any) -> None:
    with pytest.raises(UserError, match="takes an action of 7 finite numbers"):
        blind.advance(action)


# States


def test_a_first_run_and_its_replays_are_bit_exact(env: RobosuiteEnv) -> None:
    start, _ = env.reset(seed=8)
    state = env.get_state()
    run = play(env, some_actions(30))
    end = env.observe()
    env.reset(seed=9)
    for _ in range(2):
        assert equal(env.set_state(state), start)
        assert np.array_equal(play(env, some_actions(30)), run)
        assert equal(env.observe(), end)


def test_a_state_from_mid_episode_replays_exactly_and_without_a_jerk(blind: RobosuiteEnv) -> None:
    blind.reset(seed=10)
    play(blind, np.tile([1.0, 0, -1, 0, 0, 0, -1], (15, 1)))
    hand, middle = blind.observe()["robot0_eef_pos"], blind.get_state()
    runs = []
    for _ in range(2):
        assert np.array_equal(blind.set_state(middle)["robot0_eef_pos"], hand)
        runs.append(play(blind, np.zeros((5, 7))))
    assert np.array_equal(*runs)
    # It was moving at 1 m/s at most; pulled back to the start pose it would end 15 cm
    # away.
    assert np.linalg.norm(blind.observe()["robot0_eef_pos"] - hand) < 0.06


def test_state_and_model_round_trip_and_contain_no_local_path(blind: RobosuiteEnv) -> None:
    for state in (human(3)[0], blind.get_state()):
        blind.set_state(state)
        assert np.array_equal(blind.get_state().state, state.state)
        text = blind.get_state().model
        assert str(Path(robosuite.__file__).parent) not in text
        assert text == convert_model(text, text, [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": np.zeros(31)}, "is 32 finite numbers for this model, got shape \\(31,\\)"),
        ({"state": np.full(32, np.nan)}, "32 finite numbers .* with NaN or infinity"),
        ({"model": "<mujoco"}, "not MJCF"),
        ({"model": "<mujoco/>"}, "has the joints none, but this task's are robot0_joint1"),
    ],
)
def test_an_incompatible_state_is_rejected_and_leaves_the_environment_usable(
    blind: RobosuiteEnv, change: dict[str, Any], message: str
) -> None:
    before, _ = blind.reset(seed=0)
    with pytest.raises(UserError, match=message):
        blind.set_state(dataclasses.replace(blind.get_state(), **change))
    assert equal(blind.reset(seed=0)[0], before)


def test_a_missing_asset_is_named(blind: RobosuiteEnv) -> None:
    before, _ = blind.reset(seed=0)
    state = blind.get_state()
    with pytest.raises(UserError, match=r"link9\.stl"):
        blind.set_state(
            dataclasses.replace(state, model=state.model.replace("link0.stl", "link9.stl"))
        )
    assert equal(blind.set_state(state), before)


def test_a_model_without_a_part_of_the_task_is_rejected_and_leaves_the_environment_usable(
    blind: RobosuiteEnv,
) -> None:
    before, _ = blind.reset(seed=0)
    state = blind.get_state()
    with pytest.raises(UserError, match='No "geom" with name cube_g0'):
        blind.set_state(
            dataclasses.replace(state, model=state.model.replace('"cube_g0"', '"cube_g7"'))
        )
    assert equal(blind.set_state(state), before)
    assert equal(blind.reset(seed=0)[0], before)


@pytest.mark.slow
def test_a_door_that_a_reset_moved_is_part_of_the_state() -> None:
    env = RobosuiteEnv("robosuite/Door", cameras=())
    first, _ = env.reset(seed=0)
    state = env.get_state()
    second, _ = env.reset(seed=1)
    assert not np.array_equal(first["door_pos"], second["door_pos"])
    assert equal(env.set_state(state), first)
    assert env.get_state().model == state.model
    assert equal(env.reset(seed=1)[0], second)


# Files of other robosuites


@pytest.mark.slow
def test_human_demonstrations_of_robosuite_1_2_replay(blind: RobosuiteEnv) -> None:
    for demo in (0, 6):
        start, actions, recorded = human(demo)
        blind.set_state(start)
        for action, position in zip(actions, recorded, strict=True):
            assert np.linalg.norm(blind.observe()["robot0_eef_pos"] - position) < 0.002, demo
            success = blind.advance(action)[1]
        assert success, demo


def test_an_old_model_keeps_its_own_cube(blind: RobosuiteEnv) -> None:
    blind.set_state(human(0)[0])
    model = blind._env.sim.model
    assert model.geom_size[model.geom_name2id("cube_g0")].tolist() == [
        0.0212431,
        0.020076,
        0.0214241,
    ]


def test_an_arm_of_an_older_file_returns_to_its_commanded_orientation(
    blind: RobosuiteEnv,
) -> None:
    blind.reset(seed=0)
    commanded = np.array(
        blind._env.robots[0].composite_controller.part_controllers["right"].goal_ori
    )
    for _ in range(20):  # the arm begins beside its nominal pose, and sags
        blind.advance(np.zeros(7))
    controller = blind._env.robots[0].composite_controller.part_controllers["right"]
    np.testing.assert_array_equal(controller.goal_ori, commanded)
    blind.advance(np.array([0, 0, 0, 0, 0, 0.2, 0]))
    assert np.abs(controller.goal_ori - commanded).max() > 0.01


def test_flat_controllers_become_composite_ones() -> None:
    arm = composite_controller({**FLAT, "damping": 0.7}, "Panda")["body_parts"]["right"]
    assert (arm["damping_ratio"], arm["input_type"], arm["input_ref_frame"]) == (
        0.7,
        "delta",
        "world",
    )
    assert (
        composite_controller({**FLAT, "control_delta": False}, "Panda")["body_parts"]["right"][
            "input_type"
        ]
        == "absolute"
    )
    assert composite_controller(ABSOLUTE, "Panda") == ABSOLUTE


@pytest.mark.parametrize("config", [{**FLAT, "control_delta": False}, ABSOLUTE])
def test_absolute_commands_are_poses_in_world_coordinates(config: dict[str, Any]) -> None:
    kwargs = {"robots": ["Panda"], "controller_configs": config}
    env = RobosuiteEnv.from_env_args(
        {"env_name": "Lift", "type": 1, "env_kwargs": kwargs}, cameras=()
    )
    observation, _ = env.reset(seed=0)
    assert env.action_space == gymnasium.spaces.Box(-np.inf, np.inf, (7,), np.float32)
    target = observation["robot0_eef_pos"] + [0.05, -0.05, -0.05]
    rotation = Rotation.from_quat(observation["robot0_eef_quat_site"]).as_rotvec()
    for _ in range(30):
        env.advance(np.array([*target, *rotation, -1]))
    assert np.linalg.norm(env.observe()["robot0_eef_pos"] - target) < 0.005


def test_env_args_round_trip_and_work_with_robosuite_itself(env: RobosuiteEnv) -> None:
    made = RobosuiteEnv(
        cameras=("frontview",), image_size=(32, 48), quality="full", horizon=77, control_freq=10
    )
    stored = json.loads(json.dumps(made.env_args))
    again = RobosuiteEnv.from_env_args(stored)
    assert again.env_args == stored
    assert (again.cameras, again.quality, again.horizon) == (("frontview",), "full", 77)
    assert again.observation_space["frontview_image"].shape == (32, 48, 3)
    assert again.control_hz == 10
    assert (
        RobosuiteEnv.from_env_args(stored, cameras=(), quality="fast").env_args["render_quality"]
        == "fast"
    )
    plain = robosuite.make(
        stored["env_name"],
        **{**stored["env_kwargs"], "has_offscreen_renderer": False, "use_camera_obs": False},
    )
    assert plain.action_dim == 7
    plain.close()


def test_a_class_that_robosuite_does_not_ship_is_a_custom_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tutorial = Path(__file__).parents[2] / "docs" / "tutorials" / "your_task.md"
    (source,) = re.findall(r'title="my_lift.py"\n(.*?)```', tutorial.read_text(), re.DOTALL)
    (tmp_path / "my_lift.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_lift", raising=False)
    with registry.make("my_lift:Task", cameras=(), horizon=2) as custom:
        assert custom.task_id == custom.env_args["env_name"] == "my_lift:Task"
        custom.reset(seed=0)
        state, stored = custom.get_state(), json.loads(json.dumps(custom.env_args))
        with registry.from_env_args(stored, cameras=()) as other:
            assert equal(other.set_state(state), custom.set_state(state))
            assert other.env_args == custom.env_args
            assert not other.success()
            raised = state.state.copy()
            raised[1 + other.simulation()[0].joint("cube_joint0").qposadr[0] + 2] += 0.12
            other.set_state(dataclasses.replace(state, state=raised))
            assert other.success()


def test_sizes_per_camera_follow_robosuite_s_lists_and_cameras_are_independent() -> None:
    kwargs = {
        "robots": "Panda",
        "camera_names": ["agentview", "robot0_eye_in_hand"],
        "camera_heights": [24, 48],
    }
    args = {
        "env_name": "Lift",
        "type": 1,
        "env_kwargs": {**kwargs, "camera_widths": [36, 48]},
        "render_quality": "fast",
    }
    both = RobosuiteEnv.from_env_args(args)
    frames, _ = both.reset(seed=0)
    stored = both.env_args
    assert (stored["env_kwargs"]["camera_heights"], stored["env_kwargs"]["camera_widths"]) == (
        [24, 48],
        [36, 48],
    )
    both.close()
    one = RobosuiteEnv.from_env_args(json.loads(json.dumps(stored)), cameras=("agentview",))
    alone, _ = one.reset(seed=0)
    one.close()
    assert (
        frames["robot0_eye_in_hand_image"].shape
        == both.observation_space["robot0_eye_in_hand_image"].shape
        == (48, 48, 3)
    )
    assert frames["agentview_image"].shape == (24, 36, 3)
    np.testing.assert_array_equal(alone["agentview_image"], frames["agentview_image"])


def test_data_of_another_robosuite_version_gives_a_warning() -> None:
    with pytest.warns(UserWarning, match=r"robosuite 1\.2.*1\.5"):
        RobosuiteEnv.from_env_args(
            {
                "env_name": "Lift",
                "type": 1,
                "env_version": "1.2.0",
                "env_kwargs": {"robots": "Panda"},
            },
            cameras=(),
        )


# The user's mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"env_name": "Lifft"},
            "unknown robosuite task 'robosuite/Lifft': did you mean 'robosuite/Lift'",
        ),
        ({"env_name": None}, "have type 1 and an env_name"),
        ({"type": 2}, "have type 1"),
        (
            {"env_kwargs": {"robots": ["Pandas"]}},
            "unknown robosuite robot 'Pandas': did you mean 'Panda'",
        ),
        (
            {"env_kwargs": {"gripper_type": "x"}},
            "unknown option .* 'gripper_type': did you mean 'gripper_types'",
        ),
        (
            {"env_kwargs": {"controller_configs": {"type": "OSC_POS"}}},
            "unknown robosuite controller 'OSC_POS': did you mean 'OSC_POSE'",
        ),
        (
            {"env_kwargs": {"controller_configs": {"type": "BASE", "body_parts": {}}}},
            "composite controller 'BASE': did you mean 'BASIC'",
        ),
        ({"env_kwargs": {"controller_configs": [None, None]}}, "2 controller_configs for 1 robots"),
        (
            {"env_kwargs": {"camera_names": ["agentveiw"]}},
            "unknown camera 'agentveiw': did you mean 'agentview'",
        ),
        (
            {"env_kwargs": {"camera_heights": [84, 100], "camera_widths": 84}},
            "2 sizes for the 0 camera_names",
        ),
        ({"render_quality": "best"}, "unknown render quality 'best'"),
        ({"env_kwargs": {"robots": None}}, "robots must be a name or a list of names, got None"),
        ({"env_kwargs": {"robots": [["Panda"]]}}, "robots must be a name or a list of names"),
        (
            {"env_kwargs": {"control_freq": 0}},
            "cannot make robosuite/Lift: SimulationError: Control frequency 0",
        ),
        (
            {"env_kwargs": {"controller_configs": {"type": "BASIC", "body_parts": []}}},
            "body_parts .* map each part",
        ),
        (
            {
                "env_kwargs": {
                    "controller_configs": {"type": "BASIC", "body_parts": {"right": "OSC"}}
                }
            },
            "body_parts .* map each part",
        ),
        (
            {"env_kwargs": {"camera_names": 3}},
            "camera_names must be a name or a list of names, got 3",
        ),
        (
            {"env_kwargs": {"camera_heights": [84, 84, 84], "camera_widths": [84, 84]}},
            "must be numbers of pixels",
        ),
        (
            {"env_kwargs": {"camera_heights": 100_000}},
            "image_size must be between 8 and 1024 pixels, got 100000",
        ),
        (
            {"env_name": "Wipe"},
            "robosuite/Wipe cannot be simulated here",
        ),
        ({"env_name": "NutAssemblySingle"}, "use the task of one object, such as robosuite/Pick"),
        (
            {"env_name": "PickPlace", "env_kwargs": {"single_object_mode": 1}},
            "robosuite/PickPlace cannot be simulated here: it draws which object to use",
        ),
        ({"env_kwargs": {"horizon": "400"}}, "horizon must be at least 1 control step, got '400'"),
    ],
)
def test_env_args_with_unknown_names_are_rejected(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        RobosuiteEnv.from_env_args({"env_name": "Lift", "type": 1, "env_kwargs": {}, **change})
    assert "\n" not in str(caught.value)


def test_a_missing_robosuite_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robosuite", None)
    with pytest.raises(UserError, match=r"pip install 'fibopolicy\[robosuite\]'"):
        RobosuiteEnv()


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_environment_starts_silently_and_exits_cleanly_without_close(env: RobosuiteEnv) -> None:
    # tempfile registers an exit handler before OpenGL does, which once made the
    # renderer close too late.
    early = "import tempfile; d = tempfile.TemporaryDirectory();"
    code = f"{early} from fibopolicy.envs import make; e = make('robosuite/Lift'); e.reset(seed=0)"
    done = run(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_opengl_the_error_says_what_to_install() -> None:
    look = (
        "e = envs.make('robosuite/Lift'); e.advance([0.0] * 7)\ntry: e.observe()\nexcept"
        " errors.UserError as error: print(error)"
    )
    done = run(
        f"from fibopolicy import envs, errors; {look}", MUJOCO_GL="egl", MUJOCO_EGL_DEVICE_ID="99"
    )
    assert done.stdout.startswith("cannot render: no OpenGL context could be made (MUJOCO_GL=egl")
    assert "apt-get install" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_memory_does_not_grow_with_resets_and_models(env: RobosuiteEnv) -> None:
    psutil = pytest.importorskip("psutil")
    state = human(0)[0]

    def use() -> int:
        env.set_state(state)
        env.reset(seed=0)
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    use()
    before = use()
    use()
    assert use() - before < 100e6  # four models were loaded, of 70 MB each with their renderers


def test_object_is_robosuite_s_object_state_under_robomimic_s_name(blind: RobosuiteEnv) -> None:
    observation, _ = blind.reset(seed=0)
    parts = [observation[key] for key in ("cube_pos", "cube_quat", "gripper_to_cube_pos")]
    assert np.array_equal(observation["object"], np.concatenate(parts))
    assert np.allclose(
        observation["gripper_to_cube_pos"],
        observation["cube_pos"] - observation["robot0_eef_pos"],
        atol=1e-6,
    )
