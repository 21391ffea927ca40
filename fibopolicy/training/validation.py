"""The loss on demonstrations that training does not see."""

from __future__ import annotations

import numpy as np
import torch

from fibopolicy.datasets import Windows
from fibopolicy.policies import Policy
from fibopolicy.training.batches import to_device


def validation_figures(
    policy: Policy, dataset: Windows, *, samples: int, batch_size: int, device: torch.device, seed: int = 0
) -> dict[str, float]:
    """The loss and the figures of `policy.loss`, each as `validation_<name>`, without augmentation and averaged over windows.

    Args:
        policy: in evaluation mode.
        samples: windows at most, evenly spread over the dataset.
        seed: of a loss that draws random numbers; each batch draws the same ones every time, so that losses of several
            steps compare, and training's own random numbers are left alone.
    """
    count = min(samples, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(np.int64)
    sums: dict[str, float] = {}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for start in range(0, count, batch_size):
            indices = chosen[start : start + batch_size]
            torch.manual_seed((seed << 32) + start)
            loss, figures = policy.loss(to_device(dataset.batch(indices), device))
            told = {name: float(value) for name, value in figures.items()} | {"loss": float(loss)}
            for name, value in told.items():
                sums[name] = sums.get(name, 0.0) + value * len(indices)
    return {f"validation_{name}": total / count for name, total in sums.items()}
