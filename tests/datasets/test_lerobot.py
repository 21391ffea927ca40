from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.importing import import_demos
from fibopolicy.datasets.lerobot import LeRobotReader
from fibopolicy.errors import UserError

pytest.importorskip("av", reason="PyAV is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

from hub_server import Hub, serving, use_hub  # noqa: E402
from lerobot_files import frame, shade, write_lerobot  # noqa: E402

LENGTHS = (5, 3, 4)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three episodes, the first two in the same files."""
    return write_lerobot(tmp_path_factory.mktemp("lerobot") / "dataset")


def test_episodes_are_imported_exactly_to_the_frame(dataset: Path, tmp_path: Path) -> None:
    done = import_demos(dataset, tmp_path / "out.hdf5")
    assert (done.demos, done.steps, done.left_out) == (3, 12, {})
    rows = [row for n in (0, 1) for row in read_rows(dataset, n)]
    with DemoFile(done.path) as file:
        assert file.image_keys == ("front_image", "wrist_image")
        assert [file.length(demo) for demo in file.demos] == list(LENGTHS)
        for episode, demo in enumerate(file.demos):
            steps = LENGTHS[episode]
            seen = file.read(demo, "obs/front_image")
            assert seen.shape == (steps, 48, 64, 3)
            expected = [shade(episode, step) for step in range(steps)]
            # neighbouring frames differ by 9, the codec's loss is less
            assert np.abs(seen.mean(axis=(1, 2, 3)) - expected).max() < 2
            np.testing.assert_array_equal(
                file.read(demo, "obs/wrist_image"),
                [frame(episode, step, (12, 16)) for step in range(steps)],
            )
            own = [row for row in rows if row["episode_index"] == episode]
            for key, feature in (
                ("actions", "action"),
                ("obs/robot_state", "observation.state"),
                ("rewards", "next.reward"),
            ):
                np.testing.assert_array_equal(file.read(demo, key), [row[feature] for row in own])
            assert file.attrs(demo)["language_instruction"] == f"do task {episode}"
        assert file.file_attrs == {
            "imported_from": "dataset",
            "fps": 10.0,
            "robot_type": "so100",
            "lerobot_version": "v3.0",
        }


def read_rows(dataset: Path, number: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(
        dataset / f"data/chunk-000/file-{number:03d}.parquet"
    ).to_pylist()
    return rows


def test_cameras_are_chosen_by_either_name_and_features_are_mapped(
    dataset: Path, tmp_path: Path
) -> None:
    done = import_demos(
        dataset,
        tmp_path / "out.hdf5",
        cameras=("observation.images.front",),
        image_size=(12, 16),
        mapped={"observation.state": "joints", "observation.images.front": "agentview_image"},
    )
    assert done.converted == {"agentview_image": "48 x 64 resized to 12 x 16 pixels"}
    with DemoFile(done.path) as file:
        assert (file.image_keys, file.vector_keys) == (("agentview_image",), ("joints",))


def rename(dataset: Path, **features: str) -> None:
    """Rename features in the description alone."""
    found = json.loads((dataset / "meta/info.json").read_text())["features"]
    edit_info(dataset, features={features.get(key, key): spec for key, spec in found.items()})


def test_cameras_of_the_same_last_name_are_told_apart(tmp_path: Path) -> None:
    dataset = write_lerobot(tmp_path / "dataset", [(2,)])
    front, wrist = "observation.images.front", "observation.images.wrist"
    rename(dataset, **{front: "observation.left.rgb", wrist: "observation.right.rgb"})
    reader = LeRobotReader(dataset, {})
    assert reader.cameras == {
        "rgb": "observation.left.rgb",
        "right_rgb": "observation.right.rgb",
    }


def test_features_of_one_key_are_refused(dataset: Path) -> None:
    mapped = {f"observation.images.{name}": "rgb" for name in ("front", "wrist")}
    with pytest.raises(UserError, match=r"wrist and observation.images.front would both become"):
        LeRobotReader(dataset, mapped)


def test_an_unknown_feature_to_map_suggests_the_nearest(dataset: Path) -> None:
    for key in ("joints", "actions"):
        with pytest.raises(UserError, match=r"--map: unknown feature .* mean 'observation.state'"):
            LeRobotReader(dataset, {"observation.stat": key})


def test_episodes_that_lie_out_of_order_in_a_video_are_found(
    tmp_path: Path,
) -> None:
    dataset = write_lerobot(tmp_path / "dataset", [(3, 3)])

    def swap(rows: list[dict[str, Any]]) -> None:
        key = "videos/observation.images.front/from_timestamp"
        rows[0][key], rows[1][key] = rows[1][key], rows[0][key]

    edit_episodes(dataset, swap)
    done = import_demos(dataset, tmp_path / "out.hdf5")
    with DemoFile(done.path) as file:
        brightness = [
            file.read(demo, "obs/front_image").mean(axis=(1, 2, 3)) for demo in file.demos
        ]
    for found, episode in zip(brightness, (1, 0), strict=True):
        assert np.abs(found - [shade(episode, step) for step in range(3)]).max() < 2


def edit_episodes(dataset: Path, edit: Callable[[list[dict[str, Any]]], None]) -> None:
    import pyarrow as pa

    path = dataset / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)


def edit_info(dataset: Path, **changes: Any) -> None:
    path = dataset / "meta/info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def longer(rows: list[dict[str, Any]]) -> None:
    rows[0]["videos/observation.images.front/from_timestamp"] = 0.3


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: edit_info(d, codebase_version="v2.1"), "of version v2.1, expected v3; convert"),
        (lambda d: (d / "meta/info.json").write_text("{}"), "info.json: is not LeRobot's"),
        (
            lambda d: next(d.rglob("*.mp4")).unlink(),
            "no such file; download the whole dataset, or leave out observation.images.front",
        ),
        (lambda d: next(d.rglob("data/**/*.parquet")).unlink(), "no such file; download the"),
        (lambda d: edit_episodes(d, list.clear), "has no episodes in meta/episodes"),
        (lambda d: edit_info(d, total_episodes=3), "describes 1 of 3 episodes in meta/episodes"),
        (lambda d: edit_episodes(d, longer), "file-000.mp4: has no frame at 0.400 s"),
        (lambda d: next(d.rglob("*.mp4")).write_bytes(b"x" * 99), "file-000.mp4: is not a video"),
    ],
)
def test_a_faulty_dataset_is_named_and_leaves_no_file(
    tmp_path: Path, edit: Callable[[Path], Any], message: str
) -> None:
    dataset = write_lerobot(tmp_path / "dataset", [(4,)])
    edit(dataset)
    with pytest.raises(UserError) as caught:
        import_demos(dataset, tmp_path / "out.hdf5")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out*"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving() as hub:
        use_hub(hub.url, tmp_path / "cache", monkeypatch)
        monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's attempts
        yield hub


def put(hub: Hub, dataset: Path) -> None:
    """Put a dataset on the hub as me/arm."""
    for path in filter(Path.is_file, dataset.rglob("*")):
        hub.files[f"datasets/me/arm/{path.relative_to(dataset)}"] = path.read_bytes()


def test_a_dataset_on_the_hub_is_imported_with_the_chosen_cameras(
    hub: Hub, dataset: Path, tmp_path: Path
) -> None:
    put(hub, dataset)
    commit = hub.commit("datasets/me/arm")
    local = import_demos(dataset, tmp_path / "local.hdf5", cameras=("wrist_image",))
    done = import_demos("hub:me/arm", tmp_path / "hub.hdf5", cameras=("wrist_image",))
    with DemoFile(local.path) as here, DemoFile(done.path) as there:
        assert there.file_attrs["imported_from"] == f"hub:me/arm@{commit}"
        for key in ("actions", "obs/wrist_image", "obs/robot_state"):
            np.testing.assert_array_equal(there.read("demo_2", key), here.read("demo_2", key))
    assert not [path for path, _ in hub.sent if path.endswith(".mp4")]
    hub.requests.clear()
    assert import_demos(f"hub:me/arm@{commit}", tmp_path / "all.hdf5").steps == 12
    assert {Path(path).suffix for path, _ in hub.sent} == {".mp4"}, "the rest is in the cache"


def test_without_network_a_cached_dataset_is_imported(
    hub: Hub, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(hub, dataset)
    import_demos("hub:me/arm", tmp_path / "first.hdf5")
    use_hub("http://127.0.0.1:9", tmp_path / "cache", monkeypatch)
    assert import_demos("hub:me/arm", tmp_path / "second.hdf5").steps == 12
    with pytest.raises(UserError, match=r"hub:me/other: cannot be downloaded .* HF_ENDPOINT"):
        import_demos("hub:me/other", tmp_path / "other.hdf5")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: edit_info(d, codebase_version="v2.1"), "hub:me/arm: is a LeRobot dataset of v"),
        (lambda d: next(d.rglob("*.mp4")).unlink(), "hub:me/arm/videos/.*mp4: no such file; down"),
        (lambda d: (d / "meta/info.json").unlink(), "hub:me/arm: is no LeRobot dataset, it has"),
        (lambda d: shutil.rmtree(d / "meta"), "hub:me/arm: is no LeRobot dataset, it has"),
        (shutil.rmtree, "hub:me/arm: no such repository"),
    ],
)
def test_a_faulty_dataset_on_the_hub_is_named_by_its_repository(
    hub: Hub, tmp_path: Path, edit: Callable[[Path], Any], message: str
) -> None:
    dataset = write_lerobot(tmp_path / "dataset", [(4,)])
    edit(dataset)
    put(hub, dataset)
    with pytest.raises(UserError, match=message):
        import_demos("hub:me/arm", tmp_path / "out.hdf5")
    assert not [path for path, _ in hub.sent if path.endswith(".mp4")]
    assert not list(tmp_path.glob("out*"))
