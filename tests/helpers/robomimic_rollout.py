"""robomimic's own rollout and dataset, in its 0.3 and 0.5."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor


def is_0_5() -> bool:
    try:
        import robomimic
    except ImportError:
        return False
    return bool(robomimic.__version__.startswith("0.5"))


needs_0_5 = pytest.mark.skipif(not is_0_5(), reason="of robomimic 0.5 only")


def rollout_policy(path: Path) -> Any:
    """Robomimic's own wrapper around the policy of a checkpoint, at an episode's start."""
    import robomimic.utils.file_utils as file_utils

    with contextlib.redirect_stdout(io.StringIO()):
        policy, _ = file_utils.policy_from_checkpoint(
            ckpt_path=str(path), device=torch.device("cpu")
        )
    policy.start_episode()
    return policy


def observed(
    window: Mapping[str, Tensor], row: int, images: Collection[str], stacked: bool
) -> dict[str, Any]:
    """One episode of observations `(B, T, ...)` as robomimic's environments give it.

    Without `stacked`, the newest step. The environments of 0.5 leave images as they
    are, those of 0.3 make them channels first in [0, 1].
    """
    given = {key: value[row].numpy() for key, value in window.items()}
    if not is_0_5():
        for key in images:
            given[key] = (given[key].astype(np.float32) / 255).transpose(0, 3, 1, 2)
    return given if stacked else {key: value[-1] for key, value in given.items()}


def sequence_dataset(path: Path, obs_keys: Any, dataset_keys: Any, **options: Any) -> Any:
    """Robomimic's dataset, which in 0.5 needs to know what the actions are."""
    from robomimic.utils.dataset import SequenceDataset

    if is_0_5():
        options |= {"action_keys": ("actions",), "action_config": {"actions": {}}}
    return SequenceDataset(str(path), obs_keys, dataset_keys=dataset_keys, **options)
