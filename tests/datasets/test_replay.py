from __future__ import annotations

import json
from pathlib import Path

import h5py
import imageio.v3 as iio
import numpy as np
import pytest
from command import call

from fibopolicy.cli.data import Replay
from fibopolicy.datasets.draw import draw_demos
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.replay import replay, replay_table, write_replay
from fibopolicy.errors import UserError


def test_executed_actions_replay_to_success_and_stay_on_the_recording(
    lift_file: Path,
) -> None:
    done = replay(lift_file, workers=1)
    assert done.successes == len(done.demos) == 11
    for row in done.demos:
        assert row.success_step == row.steps
        assert row.max_drift_cm is not None
        assert row.max_drift_cm < 0.1


def test_other_actions_drift_and_fail(lift_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.hdf5"
    path.write_bytes(lift_file.read_bytes())
    with h5py.File(path, "r+") as file:
        executed = file["data/demo_1/executed_actions"]
        executed[...] = -executed[()]
        del file["data/demo_2/states"]
    with pytest.raises(UserError, match=r"wrong.hdf5: demo_2: holds no states.*--skip-corrupt"):
        replay(path, workers=1)
    done = replay(path, filter_key="train", workers=1, skip_corrupt=True)
    rows = {row.demo: row for row in done.demos}
    assert not rows["demo_1"].success
    assert (rows["demo_1"].max_drift_cm or 0) > 2
    assert rows["demo_0"].success
    assert list(done.skipped) == ["demo_2"]
    assert "demo_9" not in rows  # it is held out
    assert "never" in replay_table(done)
    assert "skipped demo_2" in replay_table(done)
    write_replay(tmp_path / "rows.json", done, {"low": 0.1})
    stored = json.loads((tmp_path / "rows.json").read_text())
    assert stored["success_rate"] == {"successes": 8, "demos": 9, "low": 0.1}
    assert stored["demos"][0]["demo"] == "demo_0"
    assert stored["environment"]["mujoco"]


@pytest.mark.slow
def test_human_demonstrations_replay(
    human_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    pytest.importorskip("robosuite", reason="robosuite is not installed")
    path = tmp_path / "three.hdf5"
    path.write_bytes(human_file.read_bytes())
    with h5py.File(path, "r+") as file:
        file["mask/three"] = np.array([b"demo_1", b"demo_4", b"demo_9"])
    options = ["--filter-key", "three", "--workers", "1", "--out", str(tmp_path / "r.json")]
    code, out, errors = call(monkeypatch, capsys, "replay", str(path), *options)
    assert code == 0, errors
    assert "success 3/3 = 100.0 % [" in out
    drifts = [row["max_drift_cm"] for row in json.loads((tmp_path / "r.json").read_text())["demos"]]
    assert np.max(drifts) < 0.2


def test_demos_are_filmed_from_their_states_and_the_file_stays(
    lift_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = lift_file.read_bytes()
    video = tmp_path / "demos.mp4"
    demos = ("demo_3", "demo_1")
    with DemoFile(lift_file) as file:
        drawn = draw_demos(file, demos, 96, workers=1)
        lengths = [file.length(demo) for demo in demos]
        few = draw_demos(file, demos[:1], 96, cameras=("wrist",), max_frames=5, workers=1)
    assert [len(one.frames) for one in drawn] == [length + 1 for length in lengths]
    assert all(one.success for one in drawn)
    assert few[0].frames.shape == (5 + 1, 96, 96, 3)  # and what follows the last action
    assert np.array_equal(few[0].frames[-1], drawn[0].frames[-1, :, 96:])
    assert drawn[0].frames.shape[1:] == (96, 2 * 96, 3)  # both cameras, stored at 24 pixels
    Replay(file=lift_file, video=video, video_demos=demos, video_size=96, workers=1).run()
    assert f"video   {video}" in capsys.readouterr().out
    assert len(iio.imread(video)) == max(lengths) + 1 + 20
    assert lift_file.read_bytes() == before
    with pytest.raises(UserError, match="unknown demo 'demo_99'"):
        Replay(file=lift_file, video=tmp_path / "no.mp4", video_demos=("demo_99",)).run()


def test_a_file_of_another_version_gives_a_warning_with_both_versions(
    lift_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "old.hdf5"
    path.write_bytes(lift_file.read_bytes())
    with h5py.File(path, "r+") as file:
        env_args = json.loads(file["data"].attrs["env_args"])
        file["data"].attrs["env_args"] = json.dumps({**env_args, "env_version": "2.1.0"})
        for demo in [name for name in file["data"] if name != "demo_0"]:
            del file["data"][demo]
        del file["mask"]
    with pytest.warns(UserWarning, match=r"come from mujoco 2\.1\.0, and 3\.\d+\.\d+ is installed"):
        replay(path, workers=1)


def test_a_file_without_scenes_is_replayed_in_the_installed_scene_with_a_warning(
    lift_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "no_scene.hdf5"
    path.write_bytes(lift_file.read_bytes())
    with h5py.File(path, "r+") as file:
        for name in ("demo_0", "demo_2"):
            del file[f"data/{name}"].attrs["model_file"]
    with pytest.warns(UserWarning, match=r"no_scene.hdf5: demo_0 and 1 more keep no scene"):
        assert replay(path, workers=1).successes == 11


def test_upside_down_frames_are_reported_and_upright_ones_match(
    lift_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "raw frames.hdf5"
    path.write_bytes(lift_file.read_bytes())
    with h5py.File(path, "r+") as file:
        for name in list(file["data"])[1:]:
            del file["data"][name]
        del file["mask"]
        frames = file["data/demo_0/obs/wrist_image"]
        frames[...] = frames[()][:, ::-1]
    with pytest.warns(
        UserWarning,
        match=r"frames of wrist_image are upside down; .*render '.*raw frames.hdf5' --out NEW.hdf5",
    ):
        done = replay(path, workers=1)
    assert done.frames["workspace_image"].upright == 0
    assert done.frames["wrist_image"].flipped == 0
    assert done.frames["wrist_image"].upright > 5
    assert "first frame of wrist_image: differs by" in replay_table(done)


def test_frames_of_a_camera_that_the_task_lacks_are_skipped(
    lift_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.hdf5"
    path.write_bytes(lift_file.read_bytes())
    with h5py.File(path, "r+") as file:
        for name in list(file["data"])[1:]:
            del file["data"][name]
        del file["mask"]
        file.move("data/demo_0/obs/wrist_image", "data/demo_0/obs/phone_image")
    with pytest.warns(
        UserWarning, match=r"the frames are not compared with the simulator's: .*phone"
    ):
        done = replay(path, workers=1)
    assert (done.successes, done.frames) == (1, {})
