from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.download import convert_recording
from fibopolicy.errors import UserError


def test_a_recording_becomes_a_robomimic_file(tmp_path: Path) -> None:
    actions = np.array([[0.5, -3.75], [0.0, 1.0]])
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_info"] = json.dumps(
            {"env_name": "Lift", "robots": "Panda", "controller_configs": {"type": "OSC_POSE"}}
        )
        data.attrs["repository_version"] = "1.4.0"
        data.attrs["date"] = "4-9-2020"
        for name, model in (("demo_2", "<mujoco/>"), ("demo_10", "model_1.xml")):
            demo = data.create_group(name)
            demo.attrs["model_file"] = model
            demo["actions"], demo["states"] = actions, np.ones((2, 3))
    convert_recording(
        tmp_path / "demo.hdf5",
        tmp_path / "out.hdf5",
        {"licence": "MIT"},
        {"model_1.xml": "<mujoco>1</mujoco>"},
    )
    with DemoFile(tmp_path / "out.hdf5") as file:
        assert file.env_args == {
            "env_name": "Lift",
            "env_version": "1.4.0",
            "type": 1,
            "env_kwargs": {
                "controller_configs": {"type": "OSC_POSE"},
                "robots": ["Panda"],
                "control_freq": 20,
            },
        }
        assert file.demos == ("demo_2", "demo_10")
        assert [file.attrs(demo)["model_file"] for demo in file.demos] == [
            "<mujoco/>",
            "<mujoco>1</mujoco>",
        ]
        assert file.attrs("demo_2")["origin"] == "human"
        assert file.file_attrs == {"licence": "MIT", "date": "4-9-2020"}
        np.testing.assert_array_equal(file.read("demo_2", "actions"), np.clip(actions, -1, 1))
        np.testing.assert_array_equal(file.read("demo_10", "states"), np.ones((2, 3)))
        assert set(file.group("demo_2")) == {"actions", "states"}


def test_rotations_of_robosuite_1_0_are_reversed(tmp_path: Path) -> None:
    actions = np.linspace(-0.9, 0.9, 14).reshape(2, 7)
    with h5py.File(tmp_path / "demo.hdf5", "w") as file:
        data = file.create_group("data")
        data.attrs["env_info"] = json.dumps(
            {"env_name": "Lift", "robots": "Panda", "controller_configs": {"type": "OSC_POSE"}}
        )
        data.attrs["repository_version"] = "1.0.0"
        demo = data.create_group("demo_1")
        demo.attrs["model_file"] = "<mujoco/>"
        demo["actions"], demo["states"] = actions, np.ones((2, 3))
    convert_recording(tmp_path / "demo.hdf5", tmp_path / "out.hdf5", {}, {})
    with DemoFile(tmp_path / "out.hdf5") as file:
        np.testing.assert_array_equal(
            file.read("demo_1", "actions"), actions * [1, 1, 1, -1, -1, -1, 1]
        )


def test_other_files_are_rejected(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a recording of robosuite's script"):
        convert_recording(path, tmp_path / "out.hdf5", {}, {})
