"""Temporal ensembling: a step's action is the average of all chunks' predictions for it.

Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware" (ACT).
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor


class Predictions(TypedDict):
    """What B episodes have predicted for the next T steps.

    Attributes:
        total: weighted sum of the predictions, `(B, T, D)`.
        weight: sum of their weights, `(B, T)`.
        count: number of predictions, `(B, T)` float32.
    """

    total: Tensor
    weight: Tensor
    count: Tensor


def ensemble(
    chunk: Tensor, coeff: float, predictions: Predictions | None
) -> tuple[Tensor, Predictions]:
    """Average all predictions for this step.

    The n-th prediction for a step, counted from the oldest, 0, has the weight
    exp(-coeff * n). ACT uses a coefficient of 0.01.

    Args:
        chunk: predictions for this step and the T - 1 steps after it, `(B, T, D)`, in a
            space where an average makes sense: normalised, with rotations in 6-D.
        predictions: what the previous step returned, `None` at the start of an episode.

    Returns:
        The average `(B, 1, D)`, and the predictions for the T steps after this one.
    """
    if predictions is None:
        zeros = torch.zeros_like(chunk[..., 0])  # (B, T)
        predictions = {"total": torch.zeros_like(chunk), "weight": zeros, "count": zeros}
    weight = torch.exp(-coeff * predictions["count"])
    total = predictions["total"] + weight.unsqueeze(-1) * chunk
    weights = predictions["weight"] + weight
    average = total[:, :1] / weights[:, :1, None]
    count = predictions["count"] + 1
    return average, {"total": _shift(total), "weight": _shift(weights), "count": _shift(count)}


def _shift(values: Tensor) -> Tensor:
    """Drop the first step and append an unknown last one: `(B, T, ...)` to the same shape."""
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
