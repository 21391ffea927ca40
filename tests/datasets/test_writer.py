from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from demo_files import ENV_ARGS, demo, write

from fibopolicy.datasets import DemoFile, DemoWriter, shards
from fibopolicy.errors import UserError


def test_written_demos_are_read_back_unchanged(tmp_path: Path) -> None:
    given = [demo(5, 0), demo(1, 1)]
    # longer than HDF5 keeps in an object header
    model, noisy = "<mujoco>" + "x" * 200_000 + "</mujoco>", np.ones((5, 4))
    with DemoWriter(tmp_path / "out.hdf5", ENV_ARGS, attrs={"generator": "test"}) as writer:
        writer.add(
            **given[0],
            model_file=model,
            extra={"executed_actions": noisy},
            attrs={"origin": "human"},
        )
        writer.add(**given[1])
    with DemoFile(tmp_path / "out.hdf5") as file:
        for name, arrays in zip(file.demos, given, strict=True):
            for key in ("actions", "states", "rewards", "dones"):
                np.testing.assert_array_equal(file.read(name, key), arrays[key])
            for group in ("obs", "next_obs"):
                for key, value in arrays[group].items():
                    np.testing.assert_array_equal(file.read(name, f"{group}/{key}"), value)
        assert file.attrs("demo_0") == {"num_samples": 5, "model_file": model, "origin": "human"}
        assert file.file_attrs == {"generator": "test"}
        np.testing.assert_array_equal(file.read("demo_0", "executed_actions"), noisy)
    with h5py.File(tmp_path / "out.hdf5") as raw:
        assert raw["data"].attrs["total"] == 6


def test_next_images_take_no_space_and_survive_a_rename(tmp_path: Path) -> None:
    arrays = demo(400, 0)
    with DemoWriter(tmp_path / "out.hdf5", ENV_ARGS) as writer:
        writer.add(**arrays)
    # dones: 8 bytes too
    once = [
        *arrays["obs"].values(),
        *(arrays[key] for key in ("actions", "states", "rewards", "rewards")),
    ]
    assert (tmp_path / "out.hdf5").stat().st_size < sum(array.nbytes for array in once) + 40_000
    (tmp_path / "out.hdf5").rename(tmp_path / "moved.hdf5")
    with DemoFile(tmp_path / "moved.hdf5") as file:
        np.testing.assert_array_equal(
            file.read("demo_0", "next_obs/wrist_image"), arrays["next_obs"]["wrist_image"]
        )


def test_next_observations_that_are_not_shifted_ones_are_stored_as_given(tmp_path: Path) -> None:
    arrays = demo(4, 0)
    arrays["next_obs"]["eef_pos"] = arrays["next_obs"]["eef_pos"] + 1
    with DemoWriter(tmp_path / "out.hdf5", ENV_ARGS) as writer:
        writer.add(**arrays)
    with DemoFile(tmp_path / "out.hdf5") as file:
        np.testing.assert_array_equal(
            file.read("demo_0", "next_obs/eef_pos"), arrays["next_obs"]["eef_pos"]
        )


@pytest.mark.parametrize("steps", [1, 4])
def test_without_next_observations_the_last_one_is_repeated(tmp_path: Path, steps: int) -> None:
    arrays = demo(steps, 0) | {"next_obs": None}
    with DemoWriter(tmp_path / "out.hdf5", ENV_ARGS) as writer:
        writer.add(**arrays)
    seen = arrays["obs"]["wrist_image"]
    with DemoFile(tmp_path / "out.hdf5") as file:
        np.testing.assert_array_equal(
            file.read("demo_0", "next_obs/wrist_image"), np.concatenate([seen[1:], seen[-1:]])
        )


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    def record() -> None:
        with DemoWriter(tmp_path / "out.hdf5", ENV_ARGS) as writer:
            writer.add(**demo(3, 0))
            raise FileNotFoundError("of the caller")

    with pytest.raises(FileNotFoundError, match="of the caller"):
        record()
    assert list(tmp_path.iterdir()) == []


def test_no_demos_means_no_file(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="no demos were recorded"),
        DemoWriter(tmp_path / "out.hdf5", ENV_ARGS),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_file_appears_only_at_the_end(tmp_path: Path) -> None:
    with DemoWriter(tmp_path / "out.hdf5", ENV_ARGS) as writer:
        writer.add(**demo(3, 0))
        assert not (tmp_path / "out.hdf5").exists()
    assert [item.name for item in tmp_path.iterdir()] == ["out.hdf5"]


def test_an_existing_file_is_replaced_only_on_request_and_only_by_a_complete_one(
    path: Path,
) -> None:
    before = path.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        DemoWriter(path, ENV_ARGS)
    with (
        pytest.raises(ValueError, match="rewards"),
        DemoWriter(path, ENV_ARGS, overwrite=True) as writer,
    ):
        writer.add(**demo(2, 9) | {"rewards": np.zeros(5)})
    assert path.read_bytes() == before
    with DemoWriter(path, ENV_ARGS, overwrite=True) as writer:
        writer.add(**demo(2, 9))
    with DemoFile(path) as file:
        assert file.num_steps == 2


def test_leftovers_of_a_killed_process_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.hdf5.partial").write_bytes(b"half")
    write(tmp_path / "out.hdf5")
    assert [item.name for item in tmp_path.iterdir()] == ["out.hdf5"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with DemoWriter(tmp_path / "out.hdf5", ENV_ARGS) as writer:
        with (
            pytest.raises(UserError, match="another process is writing it"),
            DemoWriter(tmp_path / "out.hdf5", ENV_ARGS),
        ):
            pass
        writer.add(**demo(3, 0))
    with DemoFile(tmp_path / "out.hdf5") as file:
        assert file.num_steps == 3


def test_an_unwritable_folder_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="cannot be written"),
        DemoWriter(tmp_path / "file" / "out.hdf5", ENV_ARGS),
    ):
        pass


def test_a_full_disk_is_a_one_line_error_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close = h5py.File.close

    def fail(file: h5py.File) -> None:
        close(file)
        raise RuntimeError("Can't decrement id ref count (No space left on device)")

    monkeypatch.setattr(h5py.File, "close", fail)
    with (
        pytest.raises(UserError, match=r"out.hdf5: cannot be written: Can't decrement id"),
        DemoWriter(tmp_path / "out.hdf5", ENV_ARGS) as writer,
    ):
        writer.add(**demo(3, 0))
    with (
        pytest.raises(UserError, match="the first error"),
        DemoWriter(tmp_path / "out.hdf5", ENV_ARGS),
    ):
        raise UserError("the first error")
    assert not list(tmp_path.iterdir())


def test_a_shard_on_a_full_disk_is_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_record", lambda index: {"actions": np.zeros((4, 2))})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(UserError, match=r"shard_00000.npz: cannot be written: No space left"):
        shards._record_shard(tmp_path, 0, 1)
    assert not list(tmp_path.iterdir())


def test_arrays_of_different_lengths_are_rejected(tmp_path: Path) -> None:
    uneven = demo(3, 0) | {"rewards": np.zeros(2)}
    with (
        pytest.raises(ValueError, match="rewards has 2 steps, actions have 3"),
        DemoWriter(tmp_path / "o", ENV_ARGS) as writer,
    ):
        writer.add(**uneven)
