from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from fibopolicy.datasets import DemoFile, inspect
from fibopolicy.errors import UserError

Edited = Callable[[Callable[[h5py.File], object]], Path]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        DemoFile(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_a_valid_file_is_described_without_warnings(path: Path) -> None:
    with DemoFile(path) as file:
        assert file.demos == ("demo_0", "demo_1", "demo_2")
        assert [file.length(demo) for demo in file.demos] == [5, 3, 7]
        assert file.num_steps == 15
        assert file.filter_keys == {"train": ("demo_0", "demo_1"), "valid": ("demo_2",)}
        assert (file.image_keys, file.vector_keys) == (
            ("agentview_image", "wrist_image"),
            ("eef_pos",),
        )
        assert file.image_shape("wrist_image") == (8, 6, 3)
        assert (file.vector_dim("eef_pos"), file.action_dim) == (3, 4)
        assert file.env_args["env_name"] == "Lift"
        assert file.attrs("demo_1") == {"num_samples": 3, "model_file": "<mujoco/>"}
        assert file.warnings == ()


def test_a_range_of_steps_can_be_read(path: Path) -> None:
    with DemoFile(path) as file:
        np.testing.assert_array_equal(
            file.read("demo_2", "obs/wrist_image", 2, 5),
            file.read("demo_2", "obs/wrist_image")[2:5],
        )


def test_a_missing_file_is_named() -> None:
    assert "no such file" in refusal(Path("nowhere/demos.hdf5"))


def test_a_folder_names_the_files_in_it(path: Path) -> None:
    assert "is a folder" in refusal(path.parent)
    assert "demos.hdf5" in refusal(path.parent)


def test_a_truncated_file_is_reported(path: Path) -> None:
    with path.open("r+b") as raw:
        raw.truncate(path.stat().st_size // 2)
    assert "truncated" in refusal(path)


@pytest.mark.parametrize(
    "content", [b"", b"episode,step\n0,1\n", b"\x00" * 5000], ids=["empty", "csv", "zeros"]
)
def test_a_file_of_another_format_is_rejected(tmp_path: Path, content: bytes) -> None:
    other = tmp_path / "demos.csv"
    other.write_bytes(content)
    assert "not an HDF5 file" in refusal(other)


def test_overwritten_bytes_in_the_middle_are_reported_as_corruption(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as raw:  # leave the superblock, break what it points to
        raw.seek(200)
        raw.write(b"\xff" * (size - 200))
    refusal(path)


def no_data(file: h5py.File) -> None:
    del file["data"]


def broken_env_args(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = "{'env_name': 'Lift'}"


def numbered_env_args(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = json.dumps({"env_name": 1})


def no_demos(file: h5py.File) -> None:
    for demo in list(file["data"]):
        del file["data"][demo]


def false_num_samples(file: h5py.File) -> None:
    file["data/demo_1"].attrs["num_samples"] = 9


def no_actions(file: h5py.File) -> None:
    del file["data/demo_1/actions"]


def flat_actions(file: h5py.File) -> None:
    del file["data/demo_1/actions"]
    file["data/demo_1/actions"] = np.zeros(3)


def listed_type(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "type": [1]})


def two_num_samples(file: h5py.File) -> None:
    file["data/demo_1"].attrs["num_samples"] = [3, 3]


def lost_filter_key(file: h5py.File) -> None:
    del file["mask/train"]
    file["mask/train"] = h5py.ExternalLink("gone.hdf5", "/mask/train")


def lost_mask(file: h5py.File) -> None:
    del file["mask"]
    file["mask"] = h5py.ExternalLink("gone.hdf5", "/mask")


def virtual_filter_key(file: h5py.File) -> None:
    del file["mask/train"]
    layout = h5py.VirtualLayout((2,), "S8")
    layout[:] = h5py.VirtualSource("gone.hdf5", "mask/train", (2,), "S8")
    file["mask"].create_virtual_dataset("train", layout)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (listed_type, "type of data's attribute env_args"),
        (two_num_samples, "demo_1: num_samples says [3 3], actions hold 3 steps"),
        (lost_filter_key, "mask/train links to '/mask/train' of gone.hdf5"),
        (lost_mask, "mask links to '/mask' of gone.hdf5"),
        (virtual_filter_key, "mask/train is a virtual dataset over 'mask/train' of gone.hdf5"),
        (no_data, "no group 'data'"),
        (broken_env_args, "env_args is not valid JSON"),
        (numbered_env_args, '"env_name"'),
        (no_demos, "no demos"),
        (false_num_samples, "demo_1: num_samples says 9, actions hold 3 steps"),
        (no_actions, "demo_1: expected actions of shape (N, A), found none"),
        (flat_actions, "demo_1: expected actions of shape (N, A), found shape (3,)"),
    ],
)
def test_a_broken_structure_is_rejected(
    edited: Edited, edit: Callable[[h5py.File], None], expected: str
) -> None:
    assert expected in refusal(edited(edit))


def test_unknown_names_get_the_nearest_one_suggested(path: Path) -> None:
    with DemoFile(path) as file:
        for ask, near in (
            (lambda: file.select("trian"), "did you mean 'train'?"),
            (lambda: file.image_shape("agentview"), "did you mean 'agentview_image'?"),
            (lambda: file.vector_dim("eef_position"), "did you mean 'eef_pos'?"),
            (lambda: file.read("demo_0", "obs/wrist"), "did you mean 'wrist_image'?"),
            (lambda: file.read("demo_0", "action"), "did you mean 'actions'?"),
            (lambda: file.read("demo_9", "actions"), "unknown demo 'demo_9'"),
        ):
            with pytest.raises(UserError) as caught:
                ask()
            assert near in str(caught.value)


def test_a_selected_filter_key_without_existing_demos_is_rejected(
    edited: Edited,
) -> None:
    def edit(file: h5py.File) -> None:
        file["mask/none"] = np.array([], dtype="S8")
        file["mask/absent"] = np.array([b"demo_0", b"demo_7"])

    with DemoFile(edited(edit)) as file:
        assert file.select("train") == ("demo_0", "demo_1")
        with pytest.raises(UserError, match="filter key 'none' names no demos"):
            file.select("none")
        with pytest.raises(UserError, match="filter key 'absent' names 'demo_7'"):
            file.select("absent")


def test_filter_keys_of_variable_length_strings_are_read(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        file["mask"].create_dataset("better", data=["demo_1", "demo_0"], dtype=h5py.string_dtype())

    with DemoFile(edited(edit)) as file:
        assert file.select("better") == ("demo_0", "demo_1")


def test_filter_keys_of_any_shape_are_read(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        file["mask/row"] = np.array([[b"demo_0", b"demo_2"]])
        file["mask/one"] = b"demo_1"
        file["mask/nothing"] = h5py.Empty("S8")

    with DemoFile(edited(edit)) as file:
        assert (file.select("row"), file.select("one")) == (("demo_0", "demo_2"), ("demo_1",))
        with pytest.raises(UserError, match="filter key 'nothing' names no demos"):
            file.select("nothing")


def test_observations_without_pixels_or_values_are_not_read(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        file["data/demo_0/obs/no_image"] = np.zeros((5, 0, 6, 3), dtype=np.uint8)
        file["data/demo_0/obs/no_vector"] = np.zeros((5, 0))

    with DemoFile(edited(edit)) as file:
        assert (file.image_keys, file.vector_keys) == (
            ("agentview_image", "wrist_image"),
            ("eef_pos",),
        )
        assert [reason.partition(": ")[2] for reason in file.unreadable.values()] == [
            "holds no values"
        ] * 2


def test_numbering_from_one_and_gaps_are_read_in_numeric_order(edited: Edited) -> None:
    def edit(file: h5py.File) -> None:
        file["data"].move("demo_0", "demo_1000")
        file["data"].move("demo_2", "demo_20")

    with DemoFile(edited(edit)) as file:
        assert file.demos == ("demo_1", "demo_20", "demo_1000")
        assert any("starts at 1" in warning for warning in file.warnings)
        assert any("gaps" in warning for warning in file.warnings)


def other_total(file: h5py.File) -> None:
    file["data"].attrs["total"] = 9666


def no_mask(file: h5py.File) -> None:
    del file["mask"]


def bool_dones(file: h5py.File) -> None:
    del file["data/demo_0/dones"]
    file["data/demo_0/dones"] = np.zeros(5, dtype=bool)


def no_env_args(file: h5py.File) -> None:
    del file["data"].attrs["env_args"]


def nameless_env_args(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = json.dumps({"type": 4})


def other_names(file: h5py.File) -> None:
    for number in range(3):
        file["data"].move(f"demo_{number}", f"episode_{number}")
    del file["mask"]
    file["mask/train"] = np.array([b"episode_0"])


def deep_observations(file: h5py.File) -> None:
    file["data/demo_0/obs/images/left/raw"] = np.zeros(5)
    file["data/demo_0/obs"].create_dataset("nothing", data=h5py.Empty("f"))


def no_version(file: h5py.File) -> None:
    file["data"].attrs["env_args"] = json.dumps({"env_name": "Lift", "type": 1, "env_kwargs": {}})


def no_num_samples(file: h5py.File) -> None:
    del file["data/demo_1"].attrs["num_samples"]


def foreign_group(file: h5py.File) -> None:
    file["data"].create_group("notes")


def no_observations(file: h5py.File) -> None:
    for demo in file["data"].values():
        del demo["obs"], demo["next_obs"]


def worded_total(file: h5py.File) -> None:
    file["data"].attrs["total"] = "many"
    file["data/demo_1"].attrs["num_samples"] = "3"


def key_that_the_first_lacks(file: h5py.File) -> None:
    del file["data/demo_0/obs/eef_pos"]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (other_total, "attribute total says 9666, the demos hold 15 steps"),
        (worded_total, "attribute total says many, the demos hold 15 steps"),
        (
            key_that_the_first_lacks,
            "not read, since demo_0 lacks what demo_1 holds in obs: eef_pos",
        ),
        (no_mask, "no filter keys"),
        (bool_dones, "dones are stored as bool"),
        (no_env_args, "no task is named (attribute env_args)"),
        (nameless_env_args, "no task is named (attribute env_args)"),
        (other_names, "demos are not named demo_<number>, e.g. episode_0"),
        (deep_observations, "ignored in obs: images/left, nothing"),
        (no_version, "no env_version"),
        (no_num_samples, "1 demos without num_samples"),
        (foreign_group, "ignored in data: notes"),
        (no_observations, "only states and actions are stored"),
    ],
)
def test_harmless_deviations_are_read_with_one_warning(
    edited: Edited, edit: Callable[[h5py.File], None], expected: str
) -> None:
    with DemoFile(edited(edit)) as file:
        assert [file.length(demo) for demo in file.demos] == [5, 3, 7]
        (warning,) = file.warnings
        assert expected in warning


def test_reading_observations_that_were_never_stored_says_so(edited: Edited) -> None:
    with (
        DemoFile(edited(no_observations)) as file,
        pytest.raises(UserError, match="render them before training"),
    ):
        file.read("demo_0", "obs/agentview_image")


def test_the_human_file_is_read_with_a_warning_about_its_wrong_total(human_file: Path) -> None:
    with DemoFile(human_file) as file:
        assert (len(file.demos), file.num_steps) == (10, 531)
        assert (len(file.select("train")), len(file.select("valid"))) == (7, 3)
        assert "attribute total says 9666, the demos hold 531 steps" in file.warnings
        assert file.image_shape("agentview_image") == (84, 84, 3)
        assert file.read("demo_0", "states").shape == (59, 32)


def test_a_broken_group_is_a_one_line_error_wherever_it_is_read(path: Path) -> None:
    """Breaks the name tables of the groups (HDF5's local heaps), one at a time; those
    of next_obs are never read.
    """
    whole = path.read_bytes()
    expected = []
    for table in re.finditer(b"HEAP", whole):
        path.write_bytes(whole[: table.start()] + b"XXXX" + whole[table.end() :])
        try:
            inspect(path)
        except UserError as error:
            expected.append(str(error))
    # the file, data, every demo; corruption below that is expected as a warning
    assert len(expected) >= 1 + 1 + 3
    assert not any("\n" in message for message in expected)
