"""A small image file, and checkpoints as robomimic itself writes them.

This folder is not called `robomimic`: pytest puts its parent on the path, where that
name would pass for the library if it is not installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fibopolicy.datasets import DemoWriter

if importlib.util.find_spec("robomimic") is None:
    collect_ignore_glob = ["test_*"]

IMAGES = ("agentview_image", "robot0_eye_in_hand_image")
VECTORS = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2, "object": 10}
ENV_ARGS = {
    "env_name": "Lift",
    "env_version": "1.5.2",
    "type": 1,
    "env_kwargs": {"robots": "Panda", "control_freq": 20},
}


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Robomimic's training would set torch's threads for the whole process."""
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.fixture(scope="session")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two demonstrations of 6 steps, all content random, with the observations of
    robosuite's Lift.
    """
    path = tmp_path_factory.mktemp("demos") / "lift.hdf5"
    random = np.random.default_rng(0)

    def seen() -> dict[str, Any]:
        images = {key: random.integers(0, 256, (6, 84, 84, 3), dtype=np.uint8) for key in IMAGES}
        return images | {key: random.normal(size=(6, dim)) for key, dim in VECTORS.items()}

    with DemoWriter(path, ENV_ARGS) as writer:
        for _ in range(2):
            writer.add(
                obs=seen(),
                next_obs=seen(),
                actions=random.uniform(-1, 1, (6, 7)),
                states=random.normal(size=(6, 32)),
                rewards=np.zeros(6),
                dones=np.zeros(6),
                model_file="<mujoco/>",
            )
        writer.add_filter_key("train", ["demo_0"])
        writer.add_filter_key("valid", ["demo_1"])
    return path


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes a checkpoint of fresh weights by robomimic's own functions; `edit` may
    change the configuration.
    """
    import fibopolicy.robomimic.encoder_core  # noqa: F401
    from fibopolicy.policies.base import Shapes

    def write(
        edit: Callable[[Any], object] = lambda config: None,
        shapes: Shapes | None = None,
        statistics: dict[str, Any] | None = None,
        algo: str = "bc",
    ) -> Path:
        import robomimic.utils.obs_utils as obs_utils
        import robomimic.utils.train_utils as train_utils
        from robomimic.algo import algo_factory
        from robomimic.config import config_factory

        shapes = shapes or Shapes({}, {"hand": 3, "cube": 4}, 5)
        config = config_factory(algo)
        if algo == "bc":
            config.algo.actor_layer_dims = (16, 16)
        config.observation.modalities.obs.low_dim = list(shapes.vectors)
        config.observation.modalities.obs.rgb = list(shapes.images)
        config.train.hdf5_normalize_obs = statistics is not None
        config.experiment.rollout.horizon = 123
        with config.unlocked():
            for network in config.algo.optim_params.values():
                network.update(num_train_batches=1, num_epochs=1)  # as 0.5's training does
            edit(config)
        every = {key: [3, *size] for key, size in shapes.images.items()} | {
            key: [dim] for key, dim in shapes.vectors.items()
        }
        ordered = OrderedDict(sorted(every.items()))
        with contextlib.redirect_stdout(io.StringIO()):
            obs_utils.initialize_obs_utils_with_config(config)
            torch.manual_seed(0)
            model = algo_factory(algo, config, ordered, shapes.action_dim, torch.device("cpu"))
            path = tmp_path / "model_epoch_20.pth"
            meta = {
                "ac_dim": shapes.action_dim,
                "all_shapes": ordered,
                "all_obs_keys": list(ordered),
                "use_images": bool(shapes.images),
            }
            train_utils.save_model(
                model, config, ENV_ARGS, meta, str(path), obs_normalization_stats=statistics
            )
        return path

    return write
