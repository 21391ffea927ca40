from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from fibopolicy.datasets import inspect
from fibopolicy.errors import UserError

Edited = Callable[[Callable[[h5py.File], object]], Path]


def test_inspect_describes_the_human_demonstrations(human_file: Path) -> None:
    report = inspect(human_file)
    for line in (
        "45.9 MB",
        "Lift (type 1: robosuite, version unknown)",
        "OSC_POSE",
        "20 Hz",
        "531 (min 44, median 53, max 59 per demo)",
        "10 of 10",
        "train (7 demos)",
        "valid (3 demos)",
        "uint8 (84, 84, 3)",
        "2: -0.894 .. +1.000\n",
        "6: -1.000 .. +1.000, 100% at either end",
        "warning: attribute total says 9666, the demos hold 531 steps",
    ):
        assert line in report


def test_a_valid_file_has_no_warnings_and_names_its_origin(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        file["data"].attrs["generator"] = "scripted expert"
        for demo in file["data"].values():
            demo.attrs["origin"] = "human"
            demo.attrs["generator"] = "scripted expert"

    report = inspect(edited(edit))
    assert "warning" not in report
    assert report.count("scripted expert") == 1  # the demos only repeat it
    assert "human (3 demos)" in report


def test_inspect_warns_about_content_that_training_rejects(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        for demo in file["data"].values():
            demo["actions"][0, 1] = np.nan
        file["data/demo_1/actions"][2, 3] = np.inf
        file["data/demo_1/actions"][0, 1] = 0
        file["mask/none"] = np.array([], dtype="S8")

    report = inspect(edited(edit))
    assert "warning: demo_1: action inf at step 2, dimension 3" in report
    assert "warning: demo_2: action nan at step 0, dimension 1" in report
    assert "warning: filter key 'none' names no demos" in report


def test_rewards_that_are_not_numbers_count_as_no_success(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        for demo in file["data"].values():
            steps = len(demo["rewards"])
            del demo["rewards"]
            demo["rewards"] = np.array([b"good"] * steps)

    assert "successes" not in inspect(edited(edit))


def test_inspect_lists_the_parts_of_a_composite_controller(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        file["data"].attrs["env_args"] = (
            '{"env_name": "Lift", "env_version": "1.5.2", "type": 1, "env_kwargs":'
            ' {"controller_configs": {"type": "BASIC", "body_parts": {"right": {"type":'
            ' "OSC_POSE"}}}}}'
        )

    assert "BASIC (right: OSC_POSE)" in inspect(edited(edit))


def test_inspecting_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        inspect(tmp_path / "nowhere.hdf5")
