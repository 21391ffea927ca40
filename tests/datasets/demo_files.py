"""Small demonstration files for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fibopolicy.datasets import DemoWriter

ENV_ARGS = {
    "env_name": "Lift",
    "env_version": "1.5.2",
    "type": 1,
    "env_kwargs": {"control_freq": 20},
}
CAMERAS = ("agentview_image", "wrist_image")
VECTORS = ("eef_pos",)


def demo(steps: int, seed: int) -> dict[str, Any]:
    """The arguments of `DemoWriter.add` for one demo, all of its content random."""
    random = np.random.default_rng(seed)
    seen: dict[str, Any] = {
        camera: random.integers(0, 256, (steps + 1, 8, 6, 3), dtype=np.uint8) for camera in CAMERAS
    }
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
        names = [
            writer.add(**demo(steps, seed), model_file="<mujoco/>")
            for seed, steps in enumerate(lengths)
        ]
        writer.add_filter_key("train", names[:-1] or names)
        writer.add_filter_key("valid", names[-1:])
    return path
