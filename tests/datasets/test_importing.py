from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from command import call
from demo_files import write
from PIL import Image

from fibopolicy.datasets import DemoFile, importing
from fibopolicy.datasets.conversions import resize_larger
from fibopolicy.datasets.importing import import_demos
from fibopolicy.errors import UserError

LENGTHS = {2: 4, 0: 5, 10: 3}  # steps of an episode's file, by its number
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 12, 16, 3), dtype=np.uint8)


def png(frame: np.ndarray[Any, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "png")
    return file.getvalue()


def episodes(folder: Path, *, compress: bool = False) -> Path:
    """Episodes of ALOHA: two arms of seven joints each, two cameras."""
    folder.mkdir()
    random = np.random.default_rng(1)
    for number, steps in LENGTHS.items():
        with h5py.File(folder / f"episode_{number}.hdf5", "w") as file:
            file.attrs["sim"], file.attrs["compress"] = False, compress
            file["action"] = np.full((steps, 14), number, np.float32)
            for key in ("qpos", "qvel", "effort"):
                file[f"observations/{key}"] = random.normal(size=(steps, 14)).astype(np.float32)
            for camera in ("cam_high", "cam_left_wrist"):
                rows = [png(frame) for frame in FRAMES[:steps]]
                longest = max(map(len, rows)) + 5
                padded = np.stack([np.frombuffer(row.ljust(longest, b"\0"), "u1") for row in rows])
                file[f"observations/images/{camera}"] = padded if compress else FRAMES[:steps]
            if compress:
                file["compress_len"] = np.ones((2, steps))
    return folder


@pytest.mark.parametrize("compress", [False, True])
def test_a_folder_of_aloha_episodes_becomes_one_file_in_numeric_order(
    tmp_path: Path, compress: bool
) -> None:
    source = episodes(tmp_path / "aloha", compress=compress)
    done = import_demos(source, tmp_path / "out.hdf5", fps=50)
    assert (done.demos, done.steps) == (3, 12)
    assert done.converted == (
        dict.fromkeys(("cam_high_image", "cam_left_wrist_image"), "PNG decoded") if compress else {}
    )
    with DemoFile(done.path) as file, h5py.File(source / "episode_10.hdf5") as last:
        assert [file.read(demo, "actions")[0, 0] for demo in file.demos] == [0, 2, 10]
        assert file.image_keys == ("cam_high_image", "cam_left_wrist_image")
        assert all(file.is_in_place(f"obs/{key}") for key in file.obs)
        assert file.converted == {}
        for key in ("qpos", "qvel", "effort"):
            np.testing.assert_array_equal(
                file.read("demo_2", f"obs/{key}"), last[f"observations/{key}"]
            )
        np.testing.assert_array_equal(file.read("demo_2", "obs/cam_high_image"), FRAMES[:3])
        np.testing.assert_array_equal(
            file.read("demo_2", "next_obs/cam_high_image"), FRAMES[[1, 2, 2]]
        )
        assert file.file_attrs == {"imported_from": "aloha", "fps": 50}
        assert file.attrs("demo_0") == {"num_samples": 5, "sim": False}
        assert not file.has("demo_0", "states")


def test_frames_are_resized_swapped_and_chosen(tmp_path: Path) -> None:
    done = import_demos(
        episodes(tmp_path / "aloha"),
        tmp_path / "out.hdf5",
        cameras=("cam_high_image",),
        image_size=(6, 8),
        bgr=True,
    )
    how = "red and blue swapped, 12 x 16 resized to 6 x 8 pixels"
    assert done.converted == {"cam_high_image": how}
    with DemoFile(done.path) as file:
        assert file.image_keys == ("cam_high_image",)
        small = resize_larger(FRAMES[..., ::-1], (6, 8))
        np.testing.assert_array_equal(file.read("demo_0", "obs/cam_high_image"), small)


def test_a_file_of_libero_is_imported_upright_with_its_instruction(tmp_path: Path) -> None:
    path = tmp_path / "libero.hdf5"
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["macros_image_convention"] = "opengl"
        data.attrs["problem_info"] = json.dumps({"language_instruction": "open the drawer"})
        data.attrs["env_args"] = json.dumps({"env_name": "Libero_Floor_Manipulation", "type": 1})
        demo = data.create_group("demo_0")
        demo.attrs["model_file"], demo.attrs["init_state"] = "<mujoco/>", np.zeros(3)
        demo["actions"], demo["states"] = np.zeros((5, 7)), np.ones((5, 9))
        demo["rewards"], demo["dones"] = np.zeros(5, np.uint8), np.zeros(5, np.uint8)
        demo["robot_states"] = np.zeros((5, 9))
        demo["obs/agentview_rgb"], demo["obs/ee_states"] = FRAMES, np.ones((5, 6))
        file["mask/train"] = np.array([b"demo_0"])
    done = import_demos(path, tmp_path / "out.hdf5")
    with DemoFile(done.path) as file:
        assert file.converted == {}
        np.testing.assert_array_equal(file.read("demo_0", "obs/agentview_rgb"), FRAMES[:, ::-1])
        assert file.env_args["env_name"] == "Libero_Floor_Manipulation"
        attrs = file.attrs("demo_0")
        assert (attrs["language_instruction"], attrs["model_file"]) == (
            "open the drawer",
            "<mujoco/>",
        )
        assert file.read("demo_0", "states").shape == (5, 9)
        assert file.select("train") == ("demo_0",)


def test_an_import_repeats_a_plain_file_with_its_filter_keys(path: Path, tmp_path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["data/demo_2/executed_actions"] = file["data/demo_2/actions"][()] / 2
    done = import_demos(path, tmp_path / "out.hdf5")
    with DemoFile(path) as old, DemoFile(done.path) as new:
        assert new.filter_keys == old.filter_keys
        observed = [f"{group}/{key}" for group in ("obs", "next_obs") for key in old.obs]
        for key in ("actions", "states", "rewards", "dones", "executed_actions", *observed):
            np.testing.assert_array_equal(new.read("demo_2", key), old.read("demo_2", key))


def test_the_last_next_observation_is_converted_like_the_others(tmp_path: Path) -> None:
    path = tmp_path / "first.hdf5"
    with h5py.File(path, "w") as file:
        demo = file.create_group("data/demo_0")
        demo["actions"] = np.zeros((4, 7))
        for group, start in (("obs", 0), ("next_obs", 1)):
            channels_first = FRAMES[start : start + 4].transpose(0, 3, 1, 2)
            demo[f"{group}/front"] = channels_first / np.float32(255)
    done = import_demos(path, tmp_path / "out.hdf5", image_size=(6, 8), bgr=True)
    with DemoFile(done.path) as file:
        small = resize_larger(FRAMES[1:, ..., ::-1], (6, 8))
        np.testing.assert_array_equal(file.read("demo_0", "next_obs/front_image"), small)


def test_what_all_files_of_a_folder_share_is_kept_and_the_rest_reported(tmp_path: Path) -> None:
    source = tmp_path / "parts"
    source.mkdir()
    for number, lengths in enumerate([(2, 3), (4, 5)]):
        with h5py.File(write(source / f"part_{number}.hdf5", lengths), "r+") as file:
            file["data"].attrs.update({"fps": 30, "licence": "mit", "seed": number})
            if number == 1:
                file["mask/few"] = file["mask/valid"][()]
    done = import_demos(source, tmp_path / "out.hdf5")
    assert done.left_out == {
        "attribute seed": "not the same in all files",
        "filter key few": "not in all files",
    }
    with DemoFile(done.path) as file:
        assert file.file_attrs == {"imported_from": "parts", "fps": 30, "licence": "mit"}
        assert file.filter_keys == {"train": ("demo_0", "demo_2"), "valid": ("demo_1", "demo_3")}


def test_a_folder_of_episodes_keeps_their_frequency(tmp_path: Path) -> None:
    source = episodes(tmp_path / "aloha")
    for path in source.iterdir():
        with h5py.File(path, "r+") as file:
            file.attrs["fps"] = 50
    done = import_demos(source, tmp_path / "out.hdf5")
    with DemoFile(done.path) as file:
        assert (done.left_out, file.file_attrs) == ({}, {"imported_from": "aloha", "fps": 50})


def test_episodes_of_different_kinds_are_rejected_and_leave_no_file(tmp_path: Path) -> None:
    source = episodes(tmp_path / "aloha")
    with h5py.File(source / "episode_2.hdf5", "r+") as file:
        del file["observations/effort"]
    with pytest.raises(
        UserError, match=r"episode_2.hdf5: episode_2: effort is none, in the first episode float32"
    ):
        import_demos(source, tmp_path / "out.hdf5")
    assert [item.name for item in tmp_path.iterdir()] == ["aloha"]


def test_files_of_different_tasks_are_rejected(tmp_path: Path) -> None:
    source = episodes(tmp_path / "aloha")
    with h5py.File(source / "episode_2.hdf5", "r+") as file:
        file.attrs["env_args"] = json.dumps({"env_name": "Cup"})
    with pytest.raises(UserError, match=r"episode_2.hdf5: is of another task than episode_0.hdf5"):
        import_demos(source, tmp_path / "out.hdf5")


def test_files_of_different_frequencies_are_rejected(tmp_path: Path) -> None:
    source = episodes(tmp_path / "aloha")
    for number, fps in ((0, 50), (2, 50), (10, 25)):
        with h5py.File(source / f"episode_{number}.hdf5", "r+") as file:
            file.attrs["fps"] = fps
    with pytest.raises(UserError, match=r"episode_10.hdf5: has 25.0 steps a second, episode_0"):
        import_demos(source, tmp_path / "out.hdf5")


def test_an_episode_that_cannot_be_read_is_named_before_anything_is_written(
    tmp_path: Path,
) -> None:
    source = episodes(tmp_path / "aloha")
    (source / "episode_3.hdf5").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match=r"episode_3.hdf5: not an HDF5 file"):
        import_demos(source, tmp_path / "out.hdf5")
    assert not list(tmp_path.glob("out*"))


def test_frames_in_small_blocks_give_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = episodes(tmp_path / "aloha")
    whole = import_demos(source, tmp_path / "whole.hdf5")
    monkeypatch.setattr("fibopolicy.datasets.hdf5._BLOCK_BYTES", 1000)
    blocks = import_demos(source, tmp_path / "blocks.hdf5")
    assert whole.path.read_bytes() == blocks.path.read_bytes()


def test_a_full_disk_is_noticed_after_the_first_episode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 5000})
    monkeypatch.setattr(importing.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match=r"needs about 0\.0 GB, 0\.0 GB are free; pass --image"):
        import_demos(episodes(tmp_path / "aloha"), tmp_path / "out.hdf5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cameras": ("cam_hgh_image",)}, "unknown camera 'cam_hgh_image': did you mean 'cam_high"),
        ({"format": "rlds"}, "unknown format 'rlds'"),
    ],
)
def test_unknown_names_suggest_the_nearest(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        import_demos(episodes(tmp_path / "aloha"), tmp_path / "out.hdf5", **options)


def test_a_source_without_demonstrations_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no demonstrations in a known format: hdf5"):
        import_demos(tmp_path, tmp_path / "out.hdf5")
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        import_demos(tmp_path / "nowhere", tmp_path / "out.hdf5")


def test_the_command_says_what_it_converted_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = episodes(tmp_path / "aloha", compress=True)
    with h5py.File(source / "episode_0.hdf5", "r+") as file:
        file["observations/images/depth"] = np.zeros((5, 12, 16), np.uint16)
    out = str(tmp_path / "my out.hdf5")
    arguments = ("import", str(source), "--out", out, "--image-size", "6", "8")
    code, printed, _ = call(monkeypatch, capsys, *arguments)
    assert code == 0
    assert printed.splitlines() == [
        "converted cam_high_image: PNG decoded, 12 x 16 resized to 6 x 8 pixels",
        "converted cam_left_wrist_image: PNG decoded, 12 x 16 resized to 6 x 8 pixels",
        "left out images/depth: uint16 (N, 12, 16): one channel; --cameras images/depth reads it as"
        " grey",
        f"{out}: 3 demos, 12 steps",
        f"next: fibopolicy train --dataset '{out}' --out RUN",
    ]


def test_an_output_in_the_folder_of_the_source_replaces_no_input(tmp_path: Path) -> None:
    source = episodes(tmp_path / "aloha")
    before = (source / "episode_2.hdf5").read_bytes()
    with pytest.raises(UserError, match=r"episode_2.hdf5: is the input itself"):
        import_demos(source, source / "episode_2.hdf5", overwrite=True)
    assert (source / "episode_2.hdf5").read_bytes() == before
    assert len(list(source.iterdir())) == len(LENGTHS)


def test_a_file_of_ours_is_never_overwritten_unasked(path: Path) -> None:
    with pytest.raises(UserError, match="is the input itself"):
        import_demos(path, path, overwrite=True)
    with pytest.raises(UserError, match="exists already"):
        import_demos(path, write(path.with_name("other.hdf5")))
