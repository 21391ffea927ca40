"""Generation of demonstrations, from two of the ten human ones (see
`tests/envs/test_robosuite.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from no_workers import no_workers
from robomimic_rollout import sequence_dataset
from scipy.spatial.transform import Rotation

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.collect import Plan, collect
from fibopolicy.datasets.generate import Generated, SourceDemo, _source, generate, record_attempt
from fibopolicy.datasets.segments import Segment, follow_segments, split_subtasks
from fibopolicy.datasets.shards import VALID_EVERY
from fibopolicy.datasets.writer import DemoWriter, write_filter_key
from fibopolicy.envs.base import SimState, episode_seed
from fibopolicy.envs.robosuite.environment import RobosuiteEnv
from fibopolicy.envs.robosuite.subtasks import SUBTASKS, EndEffector
from fibopolicy.errors import UserError

pytest.importorskip("robosuite", reason="robosuite is not installed")

HUMAN = np.load(Path(__file__).parents[1] / "envs/lift_human.npz")
ENV_ARGS = json.loads(str(HUMAN["env_args"]))


@pytest.fixture(scope="module")
def env() -> RobosuiteEnv:
    return RobosuiteEnv.from_env_args(ENV_ARGS, cameras=())


@pytest.fixture(scope="module")
def source(env: RobosuiteEnv, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "two.hdf5"
    with DemoWriter(path, ENV_ARGS, attrs={"licence": "MIT", "quality": "full"}) as writer:
        for demo in range(2):
            end = int(HUMAN["lengths"][: demo + 1].sum())
            actions = HUMAN["actions"][end - int(HUMAN["lengths"][demo]) : end]
            model, states = HUMAN["models"][demo].decode(), []
            env.set_state(SimState(model, HUMAN["starts"][demo]))
            for action in actions:
                states.append(env.get_state().state)
                env.advance(action)
            zeros = np.zeros(len(actions))
            writer.add({}, actions, states, zeros, zeros, model_file=model)
        writer.add_filter_key("first", ["demo_0"])
    return path


@pytest.fixture(scope="module", autouse=True)
def small_shards() -> Iterator[None]:
    """One episode per shard, so that workers record no more than is needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fibopolicy.datasets.generate.SHARD_SIZE", 1)
        patch.setattr("fibopolicy.datasets.collect.SHARD_SIZE", 1)
        yield


@pytest.fixture(scope="module")
def generated(
    source: Path, small_shards: None, tmp_path_factory: pytest.TempPathFactory
) -> Generated:
    with no_workers():
        return generate(source, 2, tmp_path_factory.mktemp("out") / "more.hdf5", origin="human")


def changed(source: Path, folder: Path, change: Any) -> Path:
    """A copy of the source, changed by `change(file)`."""
    path = folder / "changed.hdf5"
    path.write_bytes(source.read_bytes())
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def split(env: RobosuiteEnv, eef: EndEffector, source: Path, demo: str) -> tuple[Segment, ...]:
    with DemoFile(source) as file:
        model, states, actions = (
            file.attrs(demo)["model_file"],
            file.read(demo, "states"),
            file.read(demo, "actions"),
        )
    return split_subtasks(env, eef, SUBTASKS["Lift"], model, states, actions)


def contents(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def take(name: str, item: Any) -> None:
        found[name] = (
            item[()].tobytes() if isinstance(item, h5py.Dataset) else None,
            sorted(map(str, item.attrs.items())),
        )

    with h5py.File(path) as file:
        file.visititems(take)
    return found


def test_new_scenes_are_solved_and_name_their_source(generated: Generated) -> None:
    assert generated.demos == 2
    assert generated.attempts <= 3
    assert 0.2 < generated.low < generated.demos / generated.attempts <= generated.high <= 1
    with DemoFile(generated.path) as file:
        assert file.file_attrs["generator"] == "expanded from human"
        assert file.file_attrs["licence"] == "MIT"
        assert file.file_attrs["source_env_version"] == "unknown"
        assert "quality" not in file.file_attrs
        assert file.file_attrs["attempts"] == generated.attempts
        assert file.file_attrs["success_rate"] == generated.demos / generated.attempts
        seeds = {episode_seed("expand", 0, index) for index in range(generated.attempts)}
        for k, demo in enumerate(file.demos):
            attrs = file.attrs(demo)
            assert attrs["generator"] == "expanded from human"
            assert attrs["source_demo"] in ("demo_0", "demo_1")
            assert attrs["seed"] in seeds
            assert file.read(demo, "rewards")[-1] == 1, k
            assert file.read(demo, "dones").tolist() == [0] * (file.length(demo) - 1) + [1]
        cubes = np.array([file.read(demo, "obs/cube_pos")[0] for demo in file.demos])
        assert len(np.unique(cubes, axis=0)) == 2
        assert not file.image_keys


def test_executed_actions_have_noise_only_on_the_position(generated: Generated) -> None:
    with DemoFile(generated.path) as file:
        clean, executed = file.read("demo_0", "actions"), file.read("demo_0", "executed_actions")
    assert clean.shape[1] == 7
    assert np.abs(executed).max() <= 1
    assert 0.02 < (executed - clean)[:, :3].std() < 0.08
    np.testing.assert_array_equal(executed[:, 3:], clean[:, 3:])


def test_executed_actions_lead_through_the_recorded_states(generated: Generated) -> None:
    with DemoFile(generated.path) as file:
        env = RobosuiteEnv.from_env_args(file.env_args, cameras=())
        states, executed = file.read("demo_0", "states"), file.read("demo_0", "executed_actions")
        env.set_state(SimState(file.attrs("demo_0")["model_file"], states[0]))
        for t, action in enumerate(executed):
            np.testing.assert_array_equal(env.get_state().state, states[t])
            success = env.advance(action)[1]
        assert success
    env.close()


def test_robomimic_reads_a_generated_file(generated: Generated) -> None:
    pytest.importorskip("robomimic.utils.dataset", exc_type=ImportError)
    keys = ("robot0_eef_pos", "cube_pos")
    read = sequence_dataset(generated.path, keys, ("actions", "rewards", "dones"))
    assert len(read) == generated.steps
    assert read[0]["obs"]["cube_pos"].shape == (1, 3)


def test_the_gripper_turns_by_the_cube_s_symmetry_at_most(env: RobosuiteEnv, source: Path) -> None:
    eef = EndEffector(env)
    (segment,) = segments = split(env, eef, source, "demo_0")
    grasp = segment.goals[np.argmax(segment.gripper > 0)]
    for index in range(3):
        env.reset(seed=index)
        yaws: list[float] = []

        def act(action: Any, yaws: list[float] = yaws) -> bool:
            yaws.append(Rotation.from_matrix(eef.pose[:3, :3] @ grasp[:3, :3].T).as_euler("zyx")[0])
            return env.advance(action)[1]

        assert follow_segments(eef, segments, act), index
        assert abs(yaws[-1]) < np.pi / 4 + 0.2


def test_a_path_that_the_arm_cannot_follow_is_rejected(
    env: RobosuiteEnv, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eef, follow = EndEffector(env), EndEffector.follow
    segments = split(env, eef, source, "demo_0")
    start = segments[0].start[:3, :3]

    def turn_from(pose: Any) -> float:
        return float(np.abs(Rotation.from_matrix(pose[:3, :3] @ start.T).as_euler("zyx")[0]))

    def hindered(eef: EndEffector, joints: Any, goals: Any) -> tuple[Any, float]:
        joints, missed = follow(eef, joints, goals)
        return joints, max(missed, 1.0 if turn_from(goals[-1]) < np.pi / 4 else 0.0)

    monkeypatch.setattr(EndEffector, "follow", hindered)
    env.reset(seed=0)
    assert follow_segments(eef, segments, lambda action: env.advance(action)[1])
    assert turn_from(eef.pose) > np.pi / 4 - 0.2


def test_inverse_kinematics_follow_the_arm_and_respect_its_joint_limits(
    env: RobosuiteEnv, source: Path
) -> None:
    eef = EndEffector(env)
    with DemoFile(source) as file:
        env.set_state(
            SimState(file.attrs("demo_0")["model_file"], file.read("demo_0", "states")[0])
        )
        poses, joints = [], []
        for state in file.read("demo_0", "states"):
            eef.show(state)
            poses.append(eef.pose)
            joints.append(eef.joints)
    reached, missed = eef.follow(joints[0], np.stack(poses))
    assert missed < 0.001
    np.testing.assert_allclose(reached, joints[-1], atol=0.2)  # the elbow is free

    np.testing.assert_array_equal(eef.joints, joints[-1])  # the simulator stays as it is
    away = poses[-1].copy()
    away[:3, 3] += [1.5, 0, 0]
    assert 0.5 < eef.follow(joints[-1], away[None])[1] < 2
    missed_turning = []
    for direction in (1, -1):
        turns = np.tile(poses[-1], (32, 1, 1))
        yaws = Rotation.from_euler("z", direction * np.linspace(0, 3.1, 32)[:, None]).as_matrix()
        turns[:, :3, :3] = yaws @ poses[-1][:3, :3]
        missed_turning.append(eef.follow(joints[-1], turns)[1])
    assert min(missed_turning) < 0.02 < max(missed_turning), (
        "the last joint turns by half a turn one way, not the other"
    )


def test_an_attempt_depends_only_on_its_index(env: RobosuiteEnv, source: Path) -> None:
    eef = EndEffector(env)
    sources = (SourceDemo("demo_1", "human", split(env, eef, source, "demo_1")),)
    first = record_attempt(env, eef, sources, 0.05, 3, 4)
    record_attempt(env, eef, sources, 0.05, 3, 5)
    second = record_attempt(env, eef, sources, 0.05, 3, 4)
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


def test_every_source_gives_training_and_validation_demos() -> None:
    sources = np.array([_source(index, 10, seed=0) for index in range(500)])
    assert (np.bincount(sources) == 50).all()
    valid = np.arange(500) % VALID_EVERY == VALID_EVERY - 1
    assert set(sources[valid]) == set(sources[~valid]) == set(range(10))


def test_demos_held_out_for_validation_are_not_generated_from(source: Path, tmp_path: Path) -> None:
    def hold_out(file: h5py.File) -> None:
        write_filter_key(file, "train", ["demo_1"])
        write_filter_key(file, "valid", ["demo_0"])

    held_out = changed(source, tmp_path, hold_out)
    with no_workers():
        generate(held_out, 2, tmp_path / "more.hdf5")
    with DemoFile(tmp_path / "more.hdf5") as file:
        assert {file.attrs(demo)["source_demo"] for demo in file.demos} == {"demo_1"}


@pytest.mark.slow
def test_the_file_depends_neither_on_workers_nor_on_a_kill(
    source: Path, generated: Generated, tmp_path: Path
) -> None:
    out, shards = tmp_path / "more.hdf5", tmp_path / "more.hdf5.shards"

    class Killed(BaseException):
        pass

    def kill(path: Path, *arguments: Any) -> Any:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fibopolicy.datasets.shards.add_episode", kill)
        with pytest.raises(Killed):
            generate(source, 2, out, workers=2, origin="human")
    assert not out.exists()
    assert (shards / "shard_00000.npz").exists()
    with pytest.raises(UserError, match="other settings"):
        generate(source, 2, out, origin="human", noise=0.1, resume=True)
    with no_workers():
        generate(source, 2, out, origin="human", resume=True)
    assert contents(out) == contents(generated.path)
    assert not shards.exists()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["Stack", "PickPlaceCan", "NutAssemblySquare"])
def test_tasks_of_several_objects_are_generated_from_a_scripted_demonstration(
    task: str, tmp_path: Path
) -> None:
    with no_workers():
        collect(Plan(f"robosuite/{task}", cameras=()), 1, tmp_path / "one.hdf5")
        done = generate(tmp_path / "one.hdf5", 1, tmp_path / "more.hdf5")
    assert done.attempts <= 3
    with DemoFile(tmp_path / "one.hdf5") as one, DemoFile(tmp_path / "more.hdf5") as more:
        assert more.attrs("demo_0")["generator"] == "expanded from scripted expert"
        assert more.attrs("demo_0")["source_demo"] == "demo_0"
        assert more.read("demo_0", "rewards")[-1] == 1
        assert not np.array_equal(more.read("demo_0", "states")[0], one.read("demo_0", "states")[0])


# The user's mistakes


def test_unusable_sources_are_named(source: Path, tmp_path: Path) -> None:
    def of(task: str, kind: int = 1) -> Any:
        def change(file: h5py.File) -> None:
            file["data"].attrs["env_args"] = json.dumps(
                {**ENV_ARGS, "env_name": task, "type": kind}
            )

        return change

    def still(file: h5py.File) -> None:
        file["data/demo_1/states"][:] = file["data/demo_1/states"][0]
        file["data/demo_1/actions"][:] = 0

    def of_width(width: int) -> Any:
        def change(file: h5py.File) -> None:
            demo = file["data/demo_1"]
            demo["actions"] = demo.pop("actions")[:, :width]

        return change

    cases = [
        (lambda f: f["data/demo_1"].pop("states"), {}, "demo_1: holds no states"),
        (
            lambda f: f["data/demo_1"].attrs.pop("model_file"),
            {},
            "demo_1: has no attribute model_file",
        ),
        (still, {}, "demo_1: its states do not meet the goal of robosuite/Lift"),
        (
            lambda f: f["data/demo_1/states"].write_direct(
                np.full((len(f["data/demo_1/states"]), 32), np.nan)
            ),
            {},
            "demo_1: .*finite",
        ),
        (of_width(6), {}, r"demo_1: its actions are of shape \(6,\), this robot's of \(7,\)"),
        (of("PickPlace"), {}, "did you mean 'PickPlaceCan'.*Lift.*--task"),
        (of("Lift-v0", 4), {}, "expected a built-in, Meta-World"),
        (of("fibopolicy/Lift-v0", 2), {}, "not robosuite's"),
        (of("Coffee_D0"), {}, "Coffee_D0' is MimicGen's"),
        (
            lambda f: None,
            {"filter_key": "frist"},
            "unknown filter key 'frist': did you mean 'first'",
        ),
        (lambda f: None, {"task": "Lyft"}, "did you mean 'Lift'"),
    ]
    for change, options, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            generate(
                changed(source, tmp_path, change), 1, tmp_path / "x.hdf5", workers=1, **options
            )
        assert "changed.hdf5" in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["changed.hdf5"]


def test_broken_sources_are_skipped_on_request_and_named(source: Path, tmp_path: Path) -> None:
    def damage(file: h5py.File) -> None:
        file.copy("data/demo_1", "data/demo_2")
        file["data/demo_0"].attrs.pop("model_file")
        file["data/demo_2"].attrs.modify("num_samples", 3)

    broken = changed(source, tmp_path, damage)
    with no_workers(), pytest.warns(UserWarning, match="left out: ") as warned:
        generate(broken, 1, tmp_path / "more.hdf5", skip_corrupt=True)
    messages = "\n".join(str(warning.message) for warning in warned)
    assert "demo_0: has no attribute model_file" in messages
    assert "demo_2: num_samples says 3" in messages
    with DemoFile(tmp_path / "more.hdf5") as file:
        assert file.attrs("demo_0")["source_demo"] == "demo_1"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"demos": 0}, "demos must be at least 1"),
        ({"noise": -0.1}, "noise must be between"),
        ({"seed": -1}, "seed must be between"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"resume": True, "overwrite": True}, "either --resume or --overwrite"),
    ],
)
def test_impossible_settings_are_rejected(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        generate(tmp_path / "none.hdf5", **{"demos": 1, "out": tmp_path / "x.hdf5", **options})
