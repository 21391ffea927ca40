"""Random draws of an acting policy that repeat exactly: they depend on an episode's
first observation and step alone.

So neither the episodes beside it in a batch, nor the number of workers, nor torch's
generator changes what an episode does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypedDict

import torch
from torch import Tensor


class Chance(TypedDict):
    """Where B episodes stand in their random draws, as tensors whose first dimension
    counts them.

    Attributes:
        seed: of an episode's draws, int64 `(B,)`.
        step: decisions taken, int64 `(B,)`.
    """

    seed: Tensor
    step: Tensor


def beginning(obs: Mapping[str, Tensor]) -> Chance:
    """That of episodes which begin with these observations, `(B, ...)` per key, as the
    simulator gave them.
    """
    seeds = [_seed(obs, row) for row in range(len(next(iter(obs.values()))))]
    return {"seed": torch.tensor(seeds), "step": torch.zeros(len(seeds), dtype=torch.int64)}


def draw_seeds(chance: Chance) -> list[int]:
    """Of the draws at this step, one per episode."""
    pairs = zip(chance["seed"].tolist(), chance["step"].tolist(), strict=True)
    return [(seed + 0x9E3779B97F4A7C15 * step) % (1 << 63) for seed, step in pairs]


def gaussian(chance: Chance, shape: tuple[int, ...]) -> Tensor:
    """Standard normal `(B, *shape)` float32 on the CPU, for this step."""
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed))
            for seed in draw_seeds(chance)
        ]
    )


def moved_on(chance: Chance) -> Chance:
    """One step later."""
    return {"seed": chance["seed"], "step": chance["step"] + 1}


def _seed(obs: Mapping[str, Tensor], row: int) -> int:
    digest = hashlib.blake2b(digest_size=7)
    for key in sorted(obs):
        digest.update(obs[key][row].cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest())
