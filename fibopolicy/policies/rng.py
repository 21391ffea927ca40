"""Random numbers that belong to the samples of a batch, or to the episodes of an
evaluation.

With torch's generators, a sample's numbers change when its batch is split, and an
episode's numbers change when other episodes run beside it. Here they stay the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor


def batch_seed(seed: int, number: int) -> int:
    """Seed of a generator of batch `number`.

    Torch's generator on the CPU reads only the lower 32 bits of a seed. Here they
    follow from both numbers. The spawn key makes this seed another than that of
    `SeedSequence((seed, number))`.
    """
    sequence = np.random.SeedSequence((seed, number), spawn_key=(1,))
    return int(sequence.generate_state(1, np.uint64)[0])


@dataclass(frozen=True)
class SampleRng:
    """Draws one row of random numbers per sample of a training batch.

    A batch may be split over processes or computed in parts. Every part draws the rows
    of the whole batch and keeps its own, so the numbers do not depend on the split.

    Attributes:
        generator: lives on the device of the numbers and is in the same state for every
            part of a batch; `None` stands for torch's global generator.
        batch_size: samples in the whole batch; `None`: this part is the whole batch.
        start: position of this part's first sample in the batch.
    """

    generator: torch.Generator | None = None
    batch_size: int | None = None
    start: int = 0

    def randn(self, rows: int, *shape: int, device: torch.device) -> Tensor:
        """Standard normal numbers `(rows, *shape)`, float32."""
        return self._draw(torch.randn, rows, shape, device)

    def rand(self, rows: int, *shape: int, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1), `(rows, *shape)`, float32."""
        return self._draw(torch.rand, rows, shape, device)

    def randint(self, low: int, high: int, rows: int, *shape: int, device: torch.device) -> Tensor:
        """Integers in [low, high), `(rows, *shape)`, int64."""
        return self._draw(partial(torch.randint, low, high), rows, shape, device)

    def _draw(
        self,
        function: Callable[..., Tensor],
        rows: int,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> Tensor:
        batch_size = rows if self.batch_size is None else self.batch_size
        whole = function((batch_size, *shape), generator=self.generator, device=device)
        return whole[self.start : self.start + rows]


#: For a batch that is not split: draws from torch's global generator.
GLOBAL_RNG = SampleRng()


class EpisodeRngState(TypedDict):
    """An `EpisodeRng` as tensors `(B,)`, to be carried between calls of `Policy.act`."""

    seed: Tensor
    step: Tensor


@dataclass(frozen=True)
class EpisodeRng:
    """Draws random numbers for B episodes that run side by side.

    An episode's numbers follow from its first observation and the decisions it has
    taken. Neither the other episodes, nor the number of workers, nor torch's generators
    change them, so an episode repeats exactly.

    Attributes:
        seed: one per episode, int64 `(B,)`.
        step: decisions taken, int64 `(B,)`.
    """

    seed: Tensor
    step: Tensor

    @classmethod
    def init(cls, obs: Mapping[str, Tensor], keys: Iterable[str]) -> EpisodeRng:
        """For episodes that begin with the observations `obs`, `(B, ...)` per key."""
        tensors = [obs[key] for key in sorted(keys)]
        seeds = [_digest(tensor[row] for tensor in tensors) for row in range(len(tensors[0]))]
        return cls(torch.tensor(seeds), torch.zeros(len(seeds), dtype=torch.int64))

    @property
    def state(self) -> EpisodeRngState:
        """`EpisodeRng(**state)` continues from here."""
        return {"seed": self.seed, "step": self.step}

    def advance(self) -> EpisodeRng:
        """The same episodes, one decision later."""
        return EpisodeRng(self.seed, self.step + 1)

    def seeds(self) -> list[int]:
        """One seed per episode for the current decision."""
        pairs = zip(self.seed.tolist(), self.step.tolist(), strict=True)
        return [(seed + 0x9E3779B97F4A7C15 * step) % (1 << 63) for seed, step in pairs]

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers `(B, *shape)` for the current decision, float32 on the CPU."""
        generators = [torch.Generator().manual_seed(seed) for seed in self.seeds()]
        return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def _digest(tensors: Iterable[Tensor]) -> int:
    digest = hashlib.blake2b(digest_size=7)
    for tensor in tensors:
        if tensor.is_floating_point():
            tensor = tensor.float()  # equal numbers give equal digests
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest())
