from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from demo_files import write

from fibopolicy.datasets import DemoFile, split
from fibopolicy.errors import UserError


@pytest.fixture
def twenty(tmp_path: Path) -> Path:
    return write(tmp_path / "twenty.hdf5", lengths=[2] * 20)


def test_split_assigns_every_demo_to_train_or_valid_in_a_new_file(
    twenty: Path, tmp_path: Path
) -> None:
    before = twenty.read_bytes()
    made = split(twenty, tmp_path / "out.hdf5", valid_fraction=0.25, seed=3)
    assert twenty.read_bytes() == before
    with DemoFile(tmp_path / "out.hdf5") as file:
        assert {key: file.select(key) for key in file.filter_keys} == made
        assert (len(made["train"]), len(made["valid"])) == (15, 5)
        assert sorted(made["train"] + made["valid"]) == sorted(file.demos)
        assert file.read("demo_19", "next_obs/wrist_image").shape == (2, 8, 6, 3)


def test_the_split_depends_on_the_seed(twenty: Path, tmp_path: Path) -> None:
    made = [
        split(twenty, tmp_path / "out.hdf5", 0.25, seed, overwrite=True)["valid"]
        for seed in (0, 0, 1)
    ]
    assert made[0] == made[1] != made[2]


def test_subsets_are_nested_and_exclude_valid(twenty: Path, tmp_path: Path) -> None:
    made = split(twenty, tmp_path / "out.hdf5", 0.5, subsets={"20_percent": 0.2, "50_percent": 0.5})
    assert (len(made["20_percent"]), len(made["50_percent"])) == (2, 5)
    assert set(made["20_percent"]) < set(made["50_percent"]) < set(made["train"])


def test_no_held_out_demos_means_no_valid_key(twenty: Path, tmp_path: Path) -> None:
    split(twenty, tmp_path / "out.hdf5", valid_fraction=0)
    with DemoFile(tmp_path / "out.hdf5") as file:
        assert set(file.filter_keys) == {"train"}


def test_split_handles_non_ascii_names_and_a_mask_that_is_not_a_group(
    path: Path, tmp_path: Path
) -> None:
    with h5py.File(path, "r+") as file:
        file["data"].move("demo_1", "démo_1")
        del file["mask"]
        file["mask"] = np.zeros(3)
    made = split(path, tmp_path / "out.hdf5", valid_fraction=0.5)
    with DemoFile(tmp_path / "out.hdf5") as file:
        assert {key: file.select(key) for key in file.filter_keys} == made
        assert "démo_1" in made["train"] + made["valid"]


def test_split_rejects_bad_arguments(path: Path, tmp_path: Path) -> None:
    one = write(tmp_path / "one.hdf5", lengths=[4])
    with pytest.raises(UserError, match="is the input itself"):
        split(path, path, overwrite=True)
    with pytest.raises(UserError, match="exists already"):
        split(path, one)
    with pytest.raises(UserError, match="leave none to train on"):
        split(one, tmp_path / "out.hdf5")
    with pytest.raises(UserError, match=r"share of 'valid' must be in \[0, 1\), got 1.5"):
        split(path, tmp_path / "out.hdf5", valid_fraction=1.5)
    for name in ("train", "valid", "worst"):
        with pytest.raises(UserError, match=f"'{name}' is a filter key of split itself"):
            split(path, tmp_path / "out.hdf5", subsets={name: 0.5})
    assert not (tmp_path / "out.hdf5").exists()
