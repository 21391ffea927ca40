from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from demo_files import CAMERAS, VECTORS, demo

from fibopolicy.datasets import DemoFile, WindowDataset
from fibopolicy.errors import UserError


def windows(path: Path, **options: object) -> WindowDataset:
    settings = {
        "cameras": CAMERAS,
        "vectors": VECTORS,
        "horizon": 4,
        "n_obs_steps": 3,
        "cache_dir": path.parent / "cache",
    }
    return WindowDataset(path, **{**settings, **options})  # type: ignore[arg-type]


def test_every_window_is_padded_at_both_ends_and_stays_in_its_demo(path: Path) -> None:
    dataset = windows(path)
    assert len(dataset) == 5 + 3 + 7
    batch = dataset.batch(np.arange(len(dataset)))
    sample = 0
    for seed, steps in enumerate((5, 3, 7)):
        arrays = demo(steps, seed)
        for t in range(steps):
            seen = [max(0, t - 2), max(0, t - 1), t]
            then = [min(t + j, steps - 1) for j in range(4)]
            for camera in CAMERAS:
                np.testing.assert_array_equal(
                    batch["obs"][camera][sample], arrays["obs"][camera][seen]
                )
            np.testing.assert_array_equal(
                batch["obs"]["eef_pos"][sample], arrays["obs"]["eef_pos"][seen].astype(np.float32)
            )
            np.testing.assert_array_equal(
                batch["actions"][sample], arrays["actions"][then].astype(np.float32)
            )
            np.testing.assert_array_equal(
                batch["action_mask"][sample], [t + j < steps for j in range(4)]
            )
            sample += 1


def test_windows_have_the_stated_shapes_and_dtypes(path: Path) -> None:
    dataset = windows(path, horizon=2, n_obs_steps=1)
    batch = dataset.batch(np.array([14, 0, 3, 3]))
    assert list(batch["obs"]) == [*CAMERAS, *VECTORS]
    listed = {
        key: (value.shape, value.dtype.name)
        for key, value in [*batch["obs"].items(), ("actions", batch["actions"])]
    }
    assert listed == {
        "agentview_image": ((4, 1, 8, 6, 3), "uint8"),
        "wrist_image": ((4, 1, 8, 6, 3), "uint8"),
        "eef_pos": ((4, 1, 3), "float32"),
        "actions": ((4, 2, 4), "float32"),
    }
    assert (dataset.image_shapes["wrist_image"], dataset.vector_dims, dataset.action_dim) == (
        (8, 6, 3),
        {"eef_pos": 3},
        4,
    )


def test_writing_to_a_batch_does_not_change_the_dataset(path: Path) -> None:
    dataset = windows(path)
    first = dataset.batch(np.arange(3))
    expected = first["obs"]["wrist_image"].copy()
    for array in (*first["obs"].values(), first["actions"]):
        array[:] = 0
    np.testing.assert_array_equal(dataset.batch(np.arange(3))["obs"]["wrist_image"], expected)


def test_a_filter_key_selects_demos(path: Path) -> None:
    dataset = windows(path, filter_key="valid")
    assert (dataset.demos, dataset.num_demos, len(dataset)) == (("demo_2",), 1, 7)
    np.testing.assert_array_equal(
        dataset.batch(np.array([6]))["obs"]["wrist_image"][0, -1],
        demo(7, 2)["obs"]["wrist_image"][6],
    )


def test_statistics_are_those_of_the_selected_steps(path: Path) -> None:
    stats = windows(path, filter_key="train").stats
    for key, arrays in (
        ("actions", [demo(5, 0)["actions"], demo(3, 1)["actions"]]),
        ("eef_pos", [demo(5, 0)["obs"]["eef_pos"], demo(3, 1)["obs"]["eef_pos"]]),
    ):
        values = np.concatenate(arrays)
        for name in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(
                stats[key][name], getattr(values, name)(axis=0), rtol=1e-6, atol=1e-7
            )
            assert stats[key][name].dtype == np.float64


def test_training_without_cameras_needs_no_frames(path: Path) -> None:
    batch = windows(path, cameras=()).batch(np.array([0]))
    assert list(batch["obs"]) == ["eef_pos"]


@pytest.mark.parametrize("option", ["horizon", "n_obs_steps"])
def test_a_window_without_steps_is_rejected(path: Path, option: str) -> None:
    with pytest.raises(UserError, match=f"{option} must be at least 1, got 0"):
        windows(path, **{option: 0})


def test_invalid_content_is_rejected_before_anything_is_cached(path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'wrist_image'"):
        windows(path, cameras=["wrist_imag"])
    assert not (path.parent / "cache").exists()


def test_a_sequence_ends_with_the_last_action(path: Path) -> None:
    data = windows(path, n_obs_steps=2, sequence=True)
    batch = data.batch(np.arange(len(data)))
    sample = 0
    for seed, steps in enumerate((5, 3, 7)):
        arrays = demo(steps, seed)
        for t in range(steps):
            window = np.clip(np.arange(t - 1, t + 4), 0, steps - 1)
            for key in (*CAMERAS, *VECTORS):
                expected = arrays["obs"][key][window].astype(batch["obs"][key].dtype)
                np.testing.assert_array_equal(batch["obs"][key][sample], expected)
            sample += 1


def test_an_open_file_can_be_read_and_stays_open(path: Path) -> None:
    with DemoFile(path) as file:
        dataset = WindowDataset(
            file, cameras=CAMERAS[:1], vectors=(), horizon=4, cache_dir=path.parent / "cache"
        )
        assert file.read("demo_0", "actions").shape == (5, 4)
    assert dataset.path == path
    assert dataset.left_out == ("eef_pos", "wrist_image")
    expected = windows(path, n_obs_steps=1, cameras=CAMERAS[:1], vectors=()).batch(np.arange(15))
    np.testing.assert_array_equal(
        dataset.batch(np.arange(15))["obs"][CAMERAS[0]], expected["obs"][CAMERAS[0]]
    )
    np.testing.assert_array_equal(dataset.actions, windows(path).actions)
