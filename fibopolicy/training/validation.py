"""The loss on demonstrations that training does not see."""

from __future__ import annotations

import numpy as np
import torch

from fibopolicy.datasets import Windows
from fibopolicy.errors import unknown
from fibopolicy.policies import Policy
from fibopolicy.training.batches import to_device


def check_criterion(
    criterion: str, average: Policy, dataset: Windows, device: torch.device
) -> None:
    """Refuse the name of a figure that validation will not have.

    Raises:
        UserError: with the nearest that it has.
    """
    figures = validation_figures(average, dataset, samples=1, batch_size=1, device=device)
    if criterion not in figures:
        raise unknown("criterion", criterion, figures)


def validation_figures(
    policy: Policy,
    dataset: Windows,
    *,
    samples: int,
    batch_size: int,
    device: torch.device,
    seed: int = 0,
) -> dict[str, float]:
    """The loss and the figures of `policy.loss`, each as `validation_<name>`, without
    augmentation and averaged over windows.

    Args:
        policy: in evaluation mode.
        samples: windows at most, evenly spread over the dataset.
        seed: of a loss that draws random numbers; each batch draws the same ones every
            time, so that losses of several steps compare, and training's own random
            numbers are left alone.
    """
    count = min(samples, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(np.int64)
    sums: dict[str, float] = {}
    whole = 0.0  # what the loss is a mean over
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        for start in range(0, count, batch_size):
            indices = chosen[start : start + batch_size]
            torch.manual_seed((seed << 32) + start)
            batch = to_device(dataset.batch(indices), device)
            loss, figures = policy.loss(batch)
            weight = float(policy.loss_denominator(batch))
            whole += weight
            for name, value in {**figures, "loss": float(loss)}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * weight
    return {f"validation_{name}": total / whole for name, total in sums.items()}
