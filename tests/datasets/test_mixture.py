from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from demo_files import CAMERAS, ENV_ARGS, VECTORS, demo

from fibopolicy.datasets import DemoWriter, Mixture, WindowDataset, epoch_order, mixed_indices
from fibopolicy.errors import UserError


def windows(path: Path, **options: Any) -> WindowDataset:
    settings = {
        "cameras": CAMERAS,
        "vectors": VECTORS,
        "horizon": 2,
        "cache_dir": path.parent / "cache",
    }
    return WindowDataset(path, **{**settings, **options})


@pytest.fixture
def parts(path: Path, tmp_path: Path) -> list[WindowDataset]:
    """15 samples in the one file, 6 in the other."""
    with DemoWriter(tmp_path / "other.hdf5", ENV_ARGS) as writer:
        writer.add(**demo(6, 9))
    return [windows(path), windows(tmp_path / "other.hdf5")]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (0.2, 0.5, 0.3), (1, 1, 1, 1, 1)])
def test_every_run_of_steps_contains_each_source_in_its_proportion(
    weights: tuple[float, ...],
) -> None:
    sizes = [40, 700, 31, 90, 5][: len(weights)]
    source_of = np.repeat(np.arange(len(sizes)), sizes)
    drawn = np.concatenate(
        [source_of[mixed_indices(sizes, weights, 10, seed=3, step=step)] for step in range(300)]
    )
    for start, stop in ((0, 3000), (1234, 1334), (2000, 2010)):
        counts = np.bincount(drawn[start:stop], minlength=len(sizes))
        np.testing.assert_allclose(
            counts, (stop - start) * np.array(weights) / sum(weights), atol=len(weights)
        )


def test_a_source_is_drawn_in_whole_epochs_each_in_its_own_order() -> None:
    drawn = np.concatenate(
        [mixed_indices([4, 50], (1, 1), 8, seed=1, step=step) for step in range(10)]
    )
    small, large = drawn[drawn < 4], drawn[drawn >= 4] - 4
    assert (
        small.tolist()
        == np.concatenate([epoch_order(4, 1, epoch, 0) for epoch in range(10)]).tolist()
    )
    assert large.tolist() == epoch_order(50, 1, 0, 1)[:40].tolist()


def test_the_samples_of_a_step_do_not_depend_on_earlier_steps() -> None:
    in_a_row = [mixed_indices([7, 9], (2, 1), 5, seed=4, step=step).tolist() for step in range(12)]
    epoch_order.cache_clear()
    assert [
        mixed_indices([7, 9], (2, 1), 5, seed=4, step=step).tolist() for step in reversed(range(12))
    ] == in_a_row[::-1]
    assert mixed_indices([7, 9], (2, 1), 5, seed=5, step=0).tolist() != in_a_row[0]


def test_the_mixed_order_matches_stored_values() -> None:
    """A changed order would make a resumed run another run."""
    assert mixed_indices([20, 6], (0.7, 0.3), 8, seed=0, step=3).tolist() == [
        14,
        9,
        24,
        1,
        15,
        10,
        21,
        0,
    ]


def test_without_weights_every_sample_of_an_epoch_is_drawn_once(parts: list[WindowDataset]) -> None:
    mixture = Mixture(parts)
    assert sorted(np.concatenate([mixture.indices(7, 0, step) for step in range(3)])) == list(
        range(21)
    )


def test_a_batch_contains_the_samples_of_all_files_in_the_requested_order(
    parts: list[WindowDataset],
) -> None:
    mixture = Mixture(parts, (1, 1))
    assert (len(mixture), mixture.num_demos) == (21, 4)
    batch = mixture.batch(np.array([20, 0, 15, 14, 16]))
    expected = [parts[1].batch(np.array([5, 0, 1])), parts[0].batch(np.array([0, 14]))]
    for rows, wanted in (([0, 2, 4], expected[0]), ([1, 3], expected[1])):
        for key in (*CAMERAS, *VECTORS):
            np.testing.assert_array_equal(batch["obs"][key][rows], wanted["obs"][key])
            assert batch["obs"][key].dtype == wanted["obs"][key].dtype
        np.testing.assert_array_equal(batch["actions"][rows], wanted["actions"])
        np.testing.assert_array_equal(batch["action_mask"][rows], wanted["action_mask"])


@pytest.mark.parametrize(
    ("weights", "repeats"), [(None, (1, 1)), ((1, 1), (2, 5)), ((1, 4), (1, 10))]
)
def test_statistics_are_those_of_the_drawn_samples(
    parts: list[WindowDataset], weights: tuple[float, ...] | None, repeats: tuple[int, int]
) -> None:
    """15 samples twice and 6 five times are half and half."""
    stats = Mixture(parts, weights).stats
    own = [demo(5, 0), demo(3, 1), demo(7, 2)]
    for key, read in (
        ("actions", lambda d: d["actions"]),
        ("eef_pos", lambda d: d["obs"]["eef_pos"]),
    ):
        drawn = [np.concatenate([read(d) for d in own])] * repeats[0] + [
            read(demo(6, 9))
        ] * repeats[1]
        for name in ("min", "max", "mean", "std"):
            np.testing.assert_allclose(
                stats[key][name], getattr(np.concatenate(drawn), name)(axis=0), rtol=1e-5, atol=1e-6
            )


def test_incompatible_files_are_named_with_their_difference(path: Path, tmp_path: Path) -> None:
    other = demo(4, 3)
    small = {
        **other,
        "obs": {**other["obs"], "wrist_image": other["obs"]["wrist_image"][:, :4]},
        "next_obs": None,
    }
    wide = {**other, "actions": np.zeros((4, 7)), "next_obs": None}
    long = {**other, "obs": {**other["obs"], "eef_pos": np.zeros((4, 5))}, "next_obs": None}
    cases = (
        (small, "wrist_image is 4 x 6, in .* 8 x 6"),
        (wide, "7 dimensions, those of .* 4"),
        (long, "eef_pos has 5 numbers"),
    )
    for number, (content, message) in enumerate(cases):
        with DemoWriter(tmp_path / f"{number}.hdf5", ENV_ARGS) as writer:
            writer.add(**content)
        with pytest.raises(UserError, match=message):
            Mixture([windows(path), windows(tmp_path / f"{number}.hdf5")])
    with pytest.raises(UserError, match="cameras are"):
        Mixture([windows(path), windows(path, cameras=CAMERAS[:1])])


def test_different_control_frequencies_are_reported(tmp_path: Path) -> None:
    for name, fps in (("slow", 10), ("fast", 50)):
        with DemoWriter(tmp_path / f"{name}.hdf5", {}, attrs={"fps": fps}) as writer:
            writer.add(**demo(4, 3))
    mixture = Mixture([windows(tmp_path / "slow.hdf5"), windows(tmp_path / "fast.hdf5")])
    (warning,) = [line for line in mixture.warnings if "a second" in line]
    assert "fast.hdf5: has 50 control steps a second" in warning
    assert "slow.hdf5 10;" in warning


def test_different_env_args_are_reported(
    parts: list[WindowDataset], path: Path, tmp_path: Path
) -> None:
    env_args = {**ENV_ARGS, "env_name": "Stack", "env_kwargs": {"control_freq": 10}}
    with DemoWriter(tmp_path / "stack.hdf5", env_args) as writer:
        writer.add(**demo(4, 3))
    assert Mixture(parts[:1] * 2).warnings == parts[0].warnings * 2
    mixture = Mixture([parts[0], windows(tmp_path / "stack.hdf5")])
    assert mixture.env_args["env_name"] == "Lift"
    assert "stack.hdf5: env_args differ" in mixture.warnings[-1]
    assert (
        "env_name is 'Stack', there 'Lift'; env_kwargs.control_freq is 10, there 20"
        in mixture.warnings[-1]
    )


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1,), "got 1 for 2 files"),
        ((1, 0), "must be positive"),
        ((1, -2), "must be positive"),
        ((1, float("nan")), "positive"),
    ],
)
def test_weights_that_do_not_match_the_files_are_rejected(
    parts: list[WindowDataset], weights: tuple[float, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(parts, weights)


def test_warnings_name_their_file(path: Path, tmp_path: Path) -> None:
    with h5py.File(path, "a") as file:
        file["data"].attrs["total"] = 9666
    assert any(str(path) in line and "9666" in line for line in windows(path).warnings)


def test_a_mixture_reads_the_same_in_a_spawned_process(parts: list[WindowDataset]) -> None:
    mixture, samples = Mixture(parts), np.array([0, 14, 15, 20])
    expected = mixture.batch(samples)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seen = pool.submit(mixture.batch, samples).result()
    for key in (*CAMERAS, *VECTORS):
        np.testing.assert_array_equal(seen["obs"][key], expected["obs"][key])
    np.testing.assert_array_equal(seen["actions"], expected["actions"])


def test_pickling_leaves_out_frames_and_buffers(parts: list[WindowDataset]) -> None:
    mixture = Mixture(parts)
    size = len(pickle.dumps(mixture))
    for _ in range(3):
        mixture.batch(np.arange(21).repeat(50))
    assert len(pickle.dumps(mixture)) == size
