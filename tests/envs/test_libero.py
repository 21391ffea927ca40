from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from libero_scene import write_scene
from scipy.spatial.transform import Rotation

from fibopolicy.datasets import HOSTED
from fibopolicy.envs import SimState, from_env_args, make, resolve, task_ids
from fibopolicy.envs.base import camera_keys
from fibopolicy.envs.libero.tasks import LIBERO, instruction_of
from fibopolicy.envs.registry import is_known, task_id_of, unavailable
from fibopolicy.errors import UserError
from fibopolicy.evaluation.init_states import make_init_states

STOVE = "libero/goal/turn_on_the_stove"
#: Its scene draws how far the drawer is open.
DRAWER = (
    "libero/spatial/"
    "pick_up_the_black_bowl_in_the_top_drawer_of_the_wooden_cabinet_and_place_it_on_the_plate"
)
#: Where the bowl's pose begins in a state: after time, 7 joints and 2 fingers.
BOWL = 10
#: The robot stands still, its gripper open.
IDLE = np.array([0, 0, 0, 0, 0, 0, -1], dtype=np.float32)


def libero_file(path: str) -> dict[str, Any]:
    """The `env_args` of one of LIBERO's own files."""
    kwargs = {"robots": ["Panda"], "bddl_file_name": path, "camera_heights": 128}
    return {"env_name": "Libero_Tabletop_Manipulation", "type": 1, "env_kwargs": kwargs}


def test_all_tasks_are_known_without_libero_and_are_those_of_its_datasets() -> None:
    assert len(LIBERO) == 130
    assert set(LIBERO) < set(task_ids())
    assert set(LIBERO) == {name for name in HOSTED if name.startswith("libero/")}


def test_a_task_is_found_without_its_prefix_and_a_wrong_name_gets_the_nearest() -> None:
    assert resolve("goal/turn_on_the_stove") == STOVE
    with pytest.raises(UserError, match="did you mean 'libero/goal/turn_on_the_stove'"):
        resolve("libero/goal/turn_on_stove")


def test_the_instruction_is_the_benchmark_s() -> None:
    assert instruction_of(STOVE) == "turn on the stove"
    scene = "libero/90/KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet"
    assert instruction_of(scene) == "close the top drawer of the cabinet"


def test_a_file_of_libero_names_its_task_by_its_problem() -> None:
    args = libero_file("libero/libero/bddl_files/libero_goal/turn_on_the_stove.bddl")
    assert task_id_of(args) == STOVE
    assert unavailable(args) is None
    assert is_known(args)
    args = libero_file("mine/own_task.bddl")
    assert not is_known(args)
    with pytest.raises(UserError, match="is LIBERO's, and env_args name none of its 130 tasks"):
        from_env_args(args)


def test_missing_assets_are_a_line_with_the_command_that_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("robosuite", reason="robosuite is not installed")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="run `fibopolicy download libero-assets`") as caught:
        make(STOVE)
    assert "\n" not in str(caught.value)


# With a scene of boxes in place of LIBERO's meshes.


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder with assets and three initial states of the suite "goal"."""
    pytest.importorskip("robosuite", reason="robosuite is not installed")
    pytest.importorskip("bddl", reason="LIBERO is not installed")
    folder = tmp_path_factory.mktemp("cache")
    home = folder / "fibopolicy/libero"
    write_scene(home)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setenv("LIBERO_CONFIG_PATH", str(folder / "settings"))
        with make(STOVE, cameras=()) as env:
            published = []
            for seed in range(3):
                env.reset(seed=seed)
                state = env.get_state().state
                state[0] = 0
                state[BOWL + 2] += 0.03  # above the table
                published.append(state)
        states = home / "init_states/goal/turn_on_the_stove.npz"
        states.parent.mkdir(parents=True)
        np.savez(states, states=np.stack(published))
        yield folder


@pytest.fixture(scope="module")
def env(cache: Path) -> Iterator[Any]:
    with make(STOVE, image_size=32) as env:
        yield env


def test_observations_are_robosuite_s_with_the_instruction_beside(env: Any) -> None:
    obs, info = env.reset(seed=0)
    assert info == {"success": False, "language_instruction": "turn on the stove"}
    assert {"robot0_eef_pos", "plate_1_pos", "robot0_eye_in_hand_image"} <= obs.keys()
    assert env.observation_space.contains(obs)
    assert (env.horizon, env.control_hz) == (300, 20)
    assert env.step(IDLE)[4]["language_instruction"] == "turn on the stove"


def test_the_prescribed_states_are_the_initial_states_of_seed_0(env: Any, cache: Path) -> None:
    published = np.load(cache / "fibopolicy/libero/init_states/goal/turn_on_the_stove.npz")[
        "states"
    ]
    init_states = make_init_states(env, 2, seed=0)
    assert [s.state.tolist() for s in init_states.states] == published[:2].tolist()
    assert init_states.states[0].model == init_states.states[1].model
    drawn = [make_init_states(env, count, seed) for count, seed in ((4, 0), (1, 1))]
    assert all(init_states.states[0].model != one.states[0].model for one in drawn)


def test_objects_come_to_rest_before_the_policy_acts(env: Any) -> None:
    obs = env.set_state(env.benchmark_states()[0])
    height = env.begin(obs)["akita_black_bowl_1_pos"][2]
    assert height < obs["akita_black_bowl_1_pos"][2] - 0.02
    assert env.get_state().state[0] == pytest.approx(0.5)
    assert not any(env.advance(IDLE)[2] for _ in range(5))
    rested, _ = env.reset(seed=0)
    assert env.begin(rested) is rested


def test_layouts_depend_on_the_seed_alone_and_restore_with_the_furniture(env: Any) -> None:
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    first, _ = env.reset(seed=1)
    state = env.get_state()
    env.benchmark_states()  # which moves the furniture
    assert np.array_equal(env.set_state(state)["agentview_image"], first["agentview_image"])
    other, _ = env.reset(seed=2)
    assert not np.array_equal(first["agentview_image"], other["agentview_image"])
    assert state.model != env.get_state().model
    assert np.array_equal(env.set_state(state)["agentview_image"], first["agentview_image"])
    again, _ = env.reset(seed=1)
    assert np.array_equal(again["agentview_image"], first["agentview_image"])
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002


def test_what_is_drawn_on_furniture_stands_there_after_any_earlier_layout(cache: Path) -> None:
    task = "libero/spatial/pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate"
    with make(task, cameras=()) as env:
        states = []
        for seed in (1, 2, 1):
            obs, _ = env.reset(seed=seed)
            stove = env._env.sim.data.get_site_xpos("flat_stove_1_cook_region")
            assert np.abs(obs["akita_black_bowl_1_pos"] - stove)[:2].max() < 0.05
            states.append(env.get_state())
    assert np.array_equal(states[0].state, states[2].state)
    assert states[0].model == states[2].model != states[1].model


def test_a_state_from_another_machine_is_restored(env: Any) -> None:
    obs, _ = env.reset(seed=0)
    state = env.get_state()
    elsewhere = state.model.replace("libero/assets/", "/home/other/LIBERO/libero/libero/assets/")
    assert elsewhere != state.model
    env.reset(seed=1)
    restored = env.set_state(SimState(elsewhere, state.state))
    assert np.array_equal(restored["agentview_image"], obs["agentview_image"])


def test_the_env_args_make_an_equal_environment(env: Any) -> None:
    obs = env.set_state(env.benchmark_states()[0])
    args = json.loads(json.dumps(env.env_args))
    assert args["language_instruction"] == "turn on the stove"
    with from_env_args(args) as again:
        assert again.env_args == env.env_args
        assert again.observation_space == env.observation_space
        frames = again.set_state(again.benchmark_states()[0])
        assert np.array_equal(frames["agentview_image"], obs["agentview_image"])


def test_a_policy_of_libero_s_files_sees_their_keys(env: Any) -> None:
    args = libero_file("libero/libero/bddl_files/libero_goal/turn_on_the_stove.bddl")
    cameras = ("agentview_rgb", "eye_in_hand_rgb")
    with from_env_args(args, cameras=cameras, image_size=32, quality="fast") as theirs:
        assert camera_keys(theirs) == list(cameras)
        obs = theirs.set_state(env.benchmark_states()[0])
        assert theirs.observation_space.contains(obs)
        assert set(theirs.proprioception) <= obs.keys()
    ours = env.set_state(env.benchmark_states()[0])
    assert np.array_equal(obs["agentview_rgb"], ours["agentview_image"])
    assert np.array_equal(obs["eye_in_hand_rgb"], ours["robot0_eye_in_hand_image"])
    assert np.array_equal(obs["ee_states"][:3], ours["robot0_eef_pos"])
    turn = Rotation.from_rotvec(obs["ee_ori"]) * Rotation.from_quat(ours["robot0_eef_quat"]).inv()
    assert turn.magnitude() < 1e-5
    assert np.array_equal(obs["gripper_states"], ours["robot0_gripper_qpos"])


@pytest.mark.parametrize(
    ("predicate", "joint", "value"),
    [
        (("on", "akita_black_bowl_1", "plate_1"), "akita_black_bowl_1_joint0", "plate_1_main"),
        (("on", "wine_bottle_1", "wooden_cabinet_1_top_side"), "wine_bottle_1_joint0", "wooden_cabinet_1_base"),  # noqa: E501
        (("in", "cream_cheese_1", "wooden_cabinet_1_top_region"), "cream_cheese_1_joint0", "wooden_cabinet_1_cabinet_top"),  # noqa: E501
        (("open", "wooden_cabinet_1_top_region"), "wooden_cabinet_1_top_level", -0.15),
        (("close", "wooden_cabinet_1_top_region"), "wooden_cabinet_1_top_level", 0.003),
        (("turnon", "flat_stove_1"), "flat_stove_1_button", 1.0),
        (("turnoff", "flat_stove_1"), "flat_stove_1_button", -0.003),
    ],
)  # fmt: skip
def test_each_kind_of_goal_is_met_where_the_scene_meets_it(
    env: Any, predicate: tuple[str, ...], joint: str, value: float | str
) -> None:
    env.set_state(env.benchmark_states()[0])
    scene, data = env._env, env._env.sim.data
    if predicate[0] in ("close", "turnoff"):  # hold at first
        data.set_joint_qpos(joint, -0.1 if predicate[0] == "close" else 1.0)
        scene.sim.forward()
    assert not scene._eval_predicate(predicate)
    places: list[Any] = [value]
    if isinstance(value, str):
        at = np.array(data.body_xpos[scene.sim.model.body_name2id(value)])
        places = [[*(at + [0, 0, up]), 1, 0, 0, 0] for up in np.arange(0.3, 0, -0.005)]
    met = []
    for place in places:
        data.set_joint_qpos(joint, place)
        scene.sim.forward()
        met.append(scene._eval_predicate(predicate))
    assert any(met)
    assert env.success() == (predicate == ("turnon", "flat_stove_1"))


def test_what_scripted_experts_read_is_there(env: Any) -> None:
    from fibopolicy.envs.robosuite.arm import Arm

    obs, _ = env.reset(seed=0)
    arm = Arm(env._env)
    assert env.goal == (("turnon", "flat_stove_1"),)
    assert arm.position == pytest.approx(obs["robot0_eef_pos"], abs=1e-6)
    assert arm.body("plate_1_main")[0] == pytest.approx(obs["plate_1_pos"], abs=1e-6)
    assert arm.opening == pytest.approx(obs["robot0_gripper_qpos"][0], abs=1e-6)
    with pytest.raises(UserError, match="libero/goal/turn_on_the_stove has no scripted expert"):
        env.expert_action()


def test_a_stove_that_is_on_glows_in_every_frame_of_that_state(env: Any) -> None:
    off = env.benchmark_states()[0]
    frames = env.set_state(off)
    env._env.sim.data.set_joint_qpos("flat_stove_1_button", 1.0)
    on = env.get_state()
    env.set_state(off)
    glowing = env.set_state(on)
    assert env.success()
    assert not np.array_equal(glowing["agentview_image"], frames["agentview_image"])
    assert np.array_equal(env.set_state(off)["agentview_image"], frames["agentview_image"])


def test_frames_in_full_quality_are_those_of_libero_s_own_environment(cache: Path) -> None:
    from fibopolicy.envs.libero.installation import import_libero, problem_file

    theirs = import_libero().OffScreenRenderEnv(
        bddl_file_name=str(problem_file(DRAWER)), camera_heights=32, camera_widths=32
    )
    np.random.seed(0)  # noqa: NPY002
    theirs.reset()
    state = theirs.get_sim_state()
    obs = theirs.set_init_state(state)
    states = cache / f"fibopolicy/libero/init_states/{DRAWER.removeprefix('libero/')}.npz"
    states.parent.mkdir(parents=True, exist_ok=True)
    np.savez(states, states=[state])
    with make(DRAWER, image_size=32, quality="full") as full:
        ours = full.set_state(full.benchmark_states()[0])
        places = [each.model.body_pos for each in (full._env.sim, theirs.sim)]
    theirs.close()
    np.testing.assert_array_equal(*places)
    for key in ("agentview_image", "robot0_eye_in_hand_image"):
        assert np.array_equal(obs[key][::-1], ours[key])


# The scripted expert.

EXPERTS = (
    "libero/spatial/pick_up_the_black_bowl_from_table_center_and_place_it_on_the_plate",
    "libero/object/pick_up_the_butter_and_place_it_in_the_basket",
)


@pytest.fixture(scope="module", params=EXPERTS)
def expert_env(cache: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    with make(request.param, cameras=()) as env:
        yield env


def solves(env: Any) -> bool:
    """Whether the expert succeeds from here within the task's horizon."""
    while True:
        _, succeeded, truncated, _ = env.advance(env.expert_action())
        if succeeded or truncated:
            return bool(succeeded)


@pytest.mark.slow
def test_the_expert_succeeds_and_depends_on_the_state_alone(expert_env: Any) -> None:
    expert_env.reset(seed=1)
    seen, succeeded = [], False
    while not succeeded and len(seen) < expert_env.horizon:
        action = expert_env.expert_action()
        assert expert_env.action_space.contains(action)
        seen.append((expert_env.get_state(), action))
        _, succeeded, _, _ = expert_env.advance(action)
    assert succeeded
    for state, action in reversed(seen[5::15]):
        expert_env.set_state(state)
        np.testing.assert_allclose(expert_env.expert_action(), action, atol=1e-4)
    expert_env.set_state(seen[len(seen) // 2][0])
    assert solves(expert_env)


@pytest.mark.slow
def test_the_expert_picks_up_again_what_it_lost(expert_env: Any) -> None:
    expert_env.reset(seed=2)
    before = expert_env.observe()["object"]
    for _ in range(45):
        expert_env.advance(expert_env.expert_action())
    assert expert_env.expert_action()[6] == 1  # it holds the object
    assert not np.array_equal(expert_env.observe()["object"], before)
    for _ in range(10):
        expert_env.advance(IDLE)  # and lets it fall
    assert solves(expert_env)


def test_a_task_without_an_expert_names_the_suites_that_have_one(env: Any) -> None:
    with pytest.raises(UserError, match="the tasks of libero/spatial and libero/object have one"):
        env.expert_action()
