"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same nested batch with torch tensors for numpy arrays."""
    moved: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Mapping):
            moved[key] = to_device(value, device)
        else:
            moved[key] = torch.from_numpy(np.ascontiguousarray(value)).to(device, non_blocking=True)
    return moved


def rows(batch: Mapping[str, Any], which: slice) -> dict[str, Any]:
    """Some samples of a nested batch of tensors, as views."""
    return {
        key: rows(value, which) if isinstance(value, Mapping) else value[which]
        for key, value in batch.items()
    }
