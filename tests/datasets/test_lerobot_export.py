from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from command import call

from fibopolicy.datasets import DemoFile, DemoWriter, import_demos, lerobot_export
from fibopolicy.datasets.lerobot_export import export_lerobot
from fibopolicy.errors import UserError

pytest.importorskip("av", reason="PyAV is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

LENGTHS = (6, 1, 9)
KEYS = ("robot0_eef_pos", "robot0_gripper_qpos", "object")


def frames(random: np.random.Generator, steps: int, height: int, width: int) -> Any:
    """Frames of large blocks of random colours, all different and little changed by a codec."""
    small = random.integers(0, 256, (steps, 6, 6, 3), dtype=np.uint8)
    return small.repeat(8, 1).repeat(8, 2)[:, :height, :width]


def write(path: Path, *, fps: float | None = 12.5, task: str = "lift") -> Path:
    """Three demonstrations with a camera of odd size."""
    random = np.random.default_rng(len(task))
    with DemoWriter(path, {}, attrs={"fps": fps} if fps else {}) as writer:
        for number, steps in enumerate(LENGTHS):
            writer.add(
                {
                    "front_image": frames(random, steps, 48, 40),
                    "wrist_image": frames(random, steps, 45, 37),
                    "object": random.normal(size=(steps, 5)),
                    "robot0_gripper_qpos": random.normal(size=(steps, 2)),
                    "robot0_eef_pos": random.normal(size=(steps, 3)),
                },
                random.normal(size=(steps, 7)),
                random.normal(size=(steps, 4)),
                random.normal(size=steps),
                np.arange(steps) == steps - 1,
                attrs={"language_instruction": f"{task} {number % 2}"},
            )
        writer.add_filter_key("train", ["demo_0", "demo_2"])
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "demos.hdf5")


@pytest.mark.parametrize("images", [False, True])
def test_an_exported_dataset_is_imported_with_its_keys_numbers_and_frames(
    source: Path, tmp_path: Path, images: bool
) -> None:
    done = export_lerobot([source], tmp_path / "dataset", images=images)
    assert (done.episodes, done.steps, done.fps) == (3, 16, 12.5)
    back = import_demos(done.path, tmp_path / "back.hdf5")
    assert back.left_out == {}
    with DemoFile(source) as old, DemoFile(back.path) as new:
        assert sorted(new.obs) == sorted(old.obs)
        assert new.control_hz == 12.5
        for demo, steps in zip(new.demos, LENGTHS, strict=True):
            assert new.length(demo) == steps
            for key in ("actions", "rewards", "dones", *(f"obs/{key}" for key in KEYS)):
                wanted = old.read(demo, key).astype(np.float32)
                np.testing.assert_array_equal(new.read(demo, key), wanted)
            for camera in ("obs/front_image", "obs/wrist_image"):
                seen, wanted = (file.read(demo, camera).astype(int) for file in (new, old))
                # (N, N): of every frame that was read, the distance to each that was written
                distance = np.abs(seen[:, None] - wanted[None]).mean(axis=(2, 3, 4))
                assert (distance.argmin(axis=1) == np.arange(steps)).all()
                assert distance.diagonal().max() <= (0 if images else 10)
            instruction = old.attrs(demo)["language_instruction"]
            assert new.attrs(demo)["language_instruction"] == instruction


def test_large_files_are_split_between_episodes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lerobot_export, "_VIDEO_MB", -1)
    monkeypatch.setattr(lerobot_export, "_DATA_MB", 0)
    monkeypatch.setattr(lerobot_export, "_CHUNK_FILES", 2)
    monkeypatch.setattr(lerobot_export, "_ROWS", 2)
    done = export_lerobot([source], tmp_path / "dataset")
    places = ["chunk-000/file-000", "chunk-000/file-001", "chunk-001/file-000"]
    for folder, suffix in (
        ("data", "parquet"),
        ("videos/observation.images.front", "mp4"),
    ):
        found = sorted(str(p.relative_to(done.path)) for p in (done.path / folder).rglob("*.*"))
        assert found == [f"{folder}/{place}.{suffix}" for place in places]
    back = import_demos(done.path, tmp_path / "back.hdf5")
    assert back.steps == 16


def test_files_of_several_tasks_become_one_dataset(source: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.hdf5", task="push")
    done = export_lerobot([source, other], tmp_path / "dataset", cameras=(), filter_key="train")
    rows = pq.read_table(done.path / "data/chunk-000/file-000.parquet").to_pylist()
    tasks = pq.read_table(done.path / "meta/tasks.parquet")
    assert tasks.to_pydict() == {"task_index": [0, 1], "task": ["lift 0", "push 0"]}
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert [row["episode_index"] for row in rows] == [0] * 6 + [1] * 9 + [2] * 6 + [3] * 9
    assert [row["task_index"] for row in rows] == [0] * 15 + [1] * 15
    assert [row["index"] for row in rows] == list(range(30))
    np.testing.assert_allclose([row["timestamp"] for row in rows[6:9]], [0, 0.08, 0.16])


def test_the_description_states_features_and_their_statistics(source: Path, tmp_path: Path) -> None:
    done = export_lerobot([source], tmp_path / "dataset")
    info, stats = (
        json.loads((done.path / f"meta/{n}.json").read_text()) for n in ("info", "stats")
    )
    assert info["codebase_version"] == "v3.0"
    assert (info["fps"], info["total_episodes"], info["total_frames"], info["total_tasks"]) == (
        *(12.5, 3, 16),
        2,
    )
    state = info["features"]["observation.state"]
    assert (state["dtype"], state["shape"]) == ("float32", [5])
    assert state["names"][2:4] == ["robot0_eef_pos.2", "robot0_gripper_qpos.0"]
    assert info["features"]["observation.images.wrist"]["shape"] == [45, 37, 3]
    with DemoFile(source) as file:
        actions = np.concatenate([file.read(demo, "actions") for demo in file.demos])
        seen = np.concatenate([file.read(demo, "obs/front_image") for demo in file.demos]) / 255
    for name in ("min", "max", "mean", "std"):
        np.testing.assert_allclose(stats["action"][name], getattr(actions, name)(axis=0), rtol=1e-5)
        found = np.array(stats["observation.images.front"][name])
        assert found.shape == (3, 1, 1)
        np.testing.assert_allclose(found.ravel(), getattr(seen, name)(axis=(0, 1, 2)), rtol=1e-5)
    assert stats["action"]["count"] == [16]
    rows = pq.read_table(done.path / "meta/episodes").to_pylist()
    quantile = np.quantile(actions[:6].astype(np.float32), 0.9, axis=0)
    np.testing.assert_allclose(rows[0]["stats/action/q90"], quantile, rtol=1e-6)
    levels = np.quantile(seen[:6], 0.5, axis=(0, 1, 2), method="inverted_cdf")
    median = np.ravel(rows[0]["stats/observation.images.front/q50"])
    np.testing.assert_allclose(median, levels, atol=1e-6)


def test_a_built_in_task_gives_its_control_frequency_and_its_name(
    lift_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "dataset"
    arguments = ("export", str(lift_file), "--lerobot", str(out), "--cameras", "wrist_image")
    code, printed, errors = call(monkeypatch, capsys, *arguments)
    assert code == 0, errors
    assert printed.splitlines()[0] == "observation.images.wrist: wrist_image"
    assert "observation.state: hand_position, gripper_opening" in printed
    assert "11 episodes" in printed
    assert "20 frames a second" in printed
    assert pq.read_table(out / "meta/tasks.parquet")["task"].to_pylist() == ["fibopolicy/Lift-v0"]


def without(path: Path, what: str) -> Path:
    with h5py.File(path, "r+") as file:
        for demo in file["data"].values():
            for name in (what,) if what == "obs/object" else ("obs/front_image", "obs/wrist_image"):
                del demo[name], demo[f"next_{name}"]
    return path


def edited(path: Path, edit: Callable[[h5py.Group], Any]) -> Path:
    with h5py.File(path, "r+") as file:
        edit(file["data/demo_2"])
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: [without(write(p), "frames")], "a.hdf5: holds no frames; store frames as"),
        (lambda p: [write(p, fps=None)], "a.hdf5: does not say how many steps .*; pass --fps"),
        (
            lambda p: [write(p), without(write(p.with_name("b.hdf5")), "obs/object")],
            r"b.hdf5: has other observations than .*a.hdf5 \(object = \(5,\) there, None now\)",
        ),
        (
            lambda p: [write(p), write(p.with_name("b.hdf5"), fps=10)],
            "b.hdf5: has 10 steps a second, .*a.hdf5 12.5; export them one by one",
        ),
        (
            lambda p: [edited(write(p), lambda demo: demo.attrs.pop("language_instruction"))],
            "demo_2: names no task; pass --instruction TEXT",
        ),
        (
            lambda p: [
                edited(write(p), lambda demo: demo["actions"].write_direct(np.full((9, 7), np.nan)))
            ],
            "demo_2: action is not finite everywhere",
        ),
        (
            lambda p: [edited(write(p), lambda demo: demo.pop("obs/object"))],
            "demo_2: unknown array of obs 'object'",
        ),
        (
            lambda p: [edited(write(p), lambda demo: demo.pop("rewards"))],
            "demo_2: rewards is none, in the first episode float32",
        ),
        (
            lambda p: [
                edited(write(p), lambda demo: demo.parent["demo_0/obs"].move("object", "state"))
            ],
            "demo_0: both robot0_eef_pos, .* and state would become .* --map obs/state=NAME",
        ),
        (lambda p: [], "export: no file is named"),
        (lambda p: [p.parent], "no such file, or a folder without HDF5 files"),
    ],
)
def test_a_source_that_cannot_be_exported_is_named_and_leaves_no_folder(
    tmp_path: Path, make: Callable[[Path], list[Path]], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        export_lerobot(make(tmp_path / "a.hdf5"), tmp_path / "dataset")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("dataset*"))


def test_an_existing_folder_is_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "dataset").mkdir()
    with pytest.raises(UserError, match="dataset: exists already"):
        export_lerobot([source], tmp_path / "dataset")


def stop(error: BaseException) -> Callable[..., Iterator[Any]]:
    def parts(*_: object) -> Iterator[Any]:
        raise error
        yield

    return parts


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (OSError(errno.ENOSPC, "No space left on device"), UserError, "dataset: cannot be written"),
    ],
)
def test_an_interruption_or_a_full_disk_leaves_nothing(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    message: str,
) -> None:
    (tmp_path / "dataset.partial/data").mkdir(parents=True)  # of a process that was killed
    (tmp_path / "dataset.partial/data/old.parquet").write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(lerobot_export, "_counted", stop(error))
        with pytest.raises(raised, match=message):
            export_lerobot([source], tmp_path / "dataset")
    assert [path.name for path in tmp_path.iterdir()] == ["demos.hdf5"]
    (tmp_path / "dataset.partial/data").mkdir(parents=True)
    (tmp_path / "dataset.partial/data/old.parquet").write_bytes(b"old")
    done = export_lerobot([source], tmp_path / "dataset")
    assert not list(done.path.rglob("old.parquet"))
