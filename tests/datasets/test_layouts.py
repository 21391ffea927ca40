"""Files of other projects: real robots' recordings, robosuite's own, other names and
nested observations.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from demo_files import CAMERAS, VECTORS

from fibopolicy.datasets import DemoFile, WindowDataset, inspect
from fibopolicy.datasets.conventions import proprioception
from fibopolicy.datasets.generate import generate
from fibopolicy.datasets.render import render
from fibopolicy.datasets.replay import replay
from fibopolicy.errors import UserError

Edited = Callable[[Callable[[h5py.File], object]], Path]


def windows(path: Path, cameras: tuple[str, ...] = CAMERAS) -> WindowDataset:
    return WindowDataset(path, cameras=cameras, vectors=VECTORS, horizon=2, cache_dir=path.parent)


def task(text: str | None) -> Callable[[h5py.File], None]:
    def edit(file: h5py.File) -> None:
        del file["data"].attrs["env_args"]
        if text is not None:
            file["data"].attrs["env_args"] = text

    return edit


@pytest.mark.parametrize("text", [None, "{}", '{"env_name": null}', '{"env_kwargs": null}'])
def test_a_file_without_a_task_gives_windows_but_cannot_be_simulated(
    edited: Edited, text: str | None, tmp_path: Path
) -> None:
    path = edited(task(text))
    assert len(windows(path)) == 15
    assert "none is named" in inspect(path)
    for simulate in (
        lambda: replay(path, workers=1),
        lambda: render(path, tmp_path / "new.hdf5", workers=1),
        lambda: generate(path, 1, tmp_path / "new.hdf5", workers=1),
    ):
        with pytest.raises(
            UserError, match=r"demos.hdf5: the data name no task.*add the attribute env_args"
        ):
            simulate()


def test_null_settings_count_as_missing(edited: Edited) -> None:
    with DemoFile(edited(task('{"env_name": "Lift", "type": 1, "env_kwargs": null}'))) as file:
        assert file.env_args == {"env_name": "Lift", "type": 1, "env_kwargs": {}}


def test_demos_of_any_name_are_read_in_natural_order(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        for old, new in (("demo_0", "episode_10"), ("demo_1", "episode_9"), ("demo_2", "demo0")):
            file["data"].move(old, new)
        del file["mask"]
        file["mask/train"] = np.array([b"episode_10", b"demo0"])
        file["data"].create_group("calibration")["intrinsics"] = np.eye(3)

    with DemoFile(edited(edit)) as file:
        assert file.demos == ("demo0", "episode_9", "episode_10")
        assert file.select("train") == ("demo0", "episode_10")
        assert "ignored in data: calibration (no actions)" in file.warnings


def nested(file: h5py.File) -> None:
    for demo in file["data"].values():
        del demo["next_obs"]
        demo.move("obs/wrist_image", "obs/images/front")


def test_observations_in_groups_are_read(edited: Edited) -> None:
    path = edited(nested)
    with DemoFile(path) as file:
        stored = file.read("demo_0", "obs/images/front")
    batch = windows(path, ("images/front",)).batch(np.arange(5))
    np.testing.assert_array_equal(batch["obs"]["images/front"][:, 0], stored)


@pytest.mark.parametrize(
    ("keys", "own"),
    [
        (("cube_pos", "gripper_opening", "hand_position"), ("hand_position", "gripper_opening")),
        (
            (
                "object",
                "robot1_gripper_qpos",
                "robot1_eef_pos",
                "robot0_joint_pos",
                "robot0_eef_quat",
                "robot0_eef_pos",
            ),
            ("robot0_eef_pos", "robot0_eef_quat", "robot1_eef_pos", "robot1_gripper_qpos"),
        ),
        (
            ("robot0_left_eef_pos", "robot0_right_eef_pos"),
            ("robot0_right_eef_pos", "robot0_left_eef_pos"),
        ),
        (
            ("robot0_base_to_eef_pos", "robot0_base_quat", "robot0_eef_pos", "object"),
            ("robot0_eef_pos", "robot0_base_quat", "robot0_base_to_eef_pos"),
        ),
        (
            ("joint_states", "ee_states", "gripper_states", "ee_ori", "ee_pos"),
            ("ee_pos", "ee_ori", "ee_states", "gripper_states", "joint_states"),
        ),
        (("state/ee_pos", "state/object"), ("state/ee_pos",)),
    ],
)
def test_the_robot_s_own_state_is_recognised_by_name_in_every_suite(
    keys: tuple[str, ...], own: tuple[str, ...]
) -> None:
    assert proprioception(keys) == own


def test_inspect_says_which_vectors_training_reads(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        for demo in file["data"].values():
            demo["obs/robot1_eef_pos"] = demo["obs/eef_pos"][()]

    lines = inspect(edited(edit)).splitlines()
    assert any("robot1_eef_pos" in line and line.endswith("proprioception") for line in lines)
    assert any(
        " eef_pos" in line and line.endswith("left out unless --vectors names it") for line in lines
    )
    assert any("wrist_image" in line and line.endswith("camera") for line in lines)


def recorded(path: Path, version: str = "1.5.2") -> Path:
    """As robosuite's recording script stores two demos."""
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env"] = "Lift"
        data.attrs["env_info"] = json.dumps(
            {"env_name": "Lift", "robots": ["Panda"], "controller_configs": {"type": "OSC_POSE"}}
        )
        data.attrs["repository_version"] = version
        for name in ("demo_1", "demo_2"):
            demo = data.create_group(name)
            demo.attrs["model_file"] = "<mujoco/>"
            demo["actions"], demo["states"] = np.zeros((3, 7)), np.ones((3, 32))
    return path


def test_a_recording_of_robosuite_s_script_is_read(tmp_path: Path) -> None:
    path = recorded(tmp_path / "demo.hdf5")
    with DemoFile(path) as file:
        assert file.env_args == {
            "env_name": "Lift",
            "env_version": "1.5.2",
            "type": 1,
            "env_kwargs": {
                "robots": ["Panda"],
                "controller_configs": {"type": "OSC_POSE"},
                "control_freq": 20,
            },
        }
        assert file.file_attrs == {"env": "Lift", "repository_version": "1.5.2"}
    assert f"render them before training: fibopolicy render {path} --out NEW.hdf5" in inspect(path)


def test_a_recording_of_robosuite_1_0_is_rejected_because_its_rotations_are_reversed(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        UserError, match=r"demo.hdf5: is a recording of robosuite 1.0, .*convert_recording"
    ):
        DemoFile(recorded(tmp_path / "demo.hdf5", "1.0.0"))


@pytest.mark.parametrize("info", ["[]", "{}", '{"env_name": "Lift"}', "no JSON"])
def test_a_recording_with_broken_metadata_is_a_one_line_error(tmp_path: Path, info: str) -> None:
    path = recorded(tmp_path / "demo.hdf5")
    with h5py.File(path, "r+") as file:
        file["data"].attrs["env_info"] = info
    with pytest.raises(UserError, match=r"demo.hdf5: data's attribute env_info"):
        DemoFile(path)


@pytest.mark.slow
def test_a_recording_can_be_rendered_and_trained_on(tmp_path: Path) -> None:
    pytest.importorskip("robosuite", reason="robosuite is not installed")
    from fibopolicy.envs import make

    path = recorded(tmp_path / "my demo.hdf5")
    with make("robosuite/Lift", cameras=()) as env, h5py.File(path, "r+") as file:
        env.reset(seed=0)
        controllers = env.env_args["env_kwargs"]["controller_configs"]
        info = {"env_name": "Lift", "robots": "Panda", "controller_configs": controllers}
        file["data"].attrs["env_info"] = json.dumps(info)
        for demo in file["data"].values():
            state = env.get_state()
            demo.attrs["model_file"] = state.model
            del demo["states"]
            demo["states"] = np.repeat(state.state[None], 3, axis=0)
            demo["actions"][1, 2] = -3.75
    assert len(replay(path, workers=1).demos) == 2
    done = render(path, tmp_path / "images.hdf5", workers=1)
    assert done.demos == 2
    cameras, vectors = ("agentview_image",), ("robot0_eef_pos",)
    dataset = WindowDataset(
        done.path, cameras=cameras, vectors=vectors, horizon=2, cache_dir=tmp_path
    )
    assert dataset.actions.min() == -1
    assert any(
        "2 of 6 steps hold actions outside [-1, 1], up to 3.75; they are clipped" in line
        for line in dataset.warnings
    )
