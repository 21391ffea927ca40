"""Temporal ensembling: what is executed at a step averages everything that was predicted for it."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor


class Predictions(TypedDict):
    """What B episodes have predicted for the next T steps, as tensors whose first
    dimension counts the episodes.

    Attributes:
        total: the predictions' weighted sum, `(B, T, D)`.
        weight: the sum of their weights, `(B, T)`.
        count: how many there are, `(B, T)` float32.
    """

    total: Tensor
    weight: Tensor
    count: Tensor


def ensemble(chunk: Tensor, decay: float, before: Predictions | None) -> tuple[Tensor, Predictions]:
    """The average of all predictions for this step, and what to carry to the next.

    The n-th prediction for a step, counted from the oldest, 0, weighs exp(-decay * n):
    Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost
    Hardware" (ACT), which takes 0.01.

    Args:
        chunk: predictions for this step and those after it, `(B, T, D)`. They must be
            of a kind that may be averaged, so normalised ones, with rotations in 6-D.
        before: carried from the step before, `None` at an episode's start.

    Returns:
        `(B, 1, D)` for this step, and what is known of the T steps after it.
    """
    zeros = torch.zeros_like(chunk[..., 0])  # (B, T)
    known: Predictions = before or {
        "total": torch.zeros_like(chunk),
        "weight": zeros,
        "count": zeros,
    }
    weight = torch.exp(-decay * known["count"])
    total = known["total"] + weight.unsqueeze(-1) * chunk
    weights = known["weight"] + weight
    now = total[:, :1] / weights[:, :1, None]
    return now, {
        "total": _later(total),
        "weight": _later(weights),
        "count": _later(known["count"] + 1),
    }


def _later(values: Tensor) -> Tensor:
    """Seen from one step later: nothing is known of the new last step."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
