"""One control step of robomimic's policy networks, for a batch of episodes that each carry a state of their own.

Robomimic acts for one episode and keeps its memory inside the algorithm. Here memory is a value, one per episode, and what
is drawn at random depends on the episode's first observation and step alone: an episode repeats exactly, whatever runs
beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Observations = Mapping[str, Tensor]


@dataclass(frozen=True)
class Memory:
    """What one episode carries from step to step.

    Args:
        seed: of its random draws.
        step: control steps taken.
        hidden: of a recurrent network, tensors `(layers, H)`: LSTM two, GRU one.
        first: of an open-loop recurrent network, the observation `(...)` per key that its actions follow from.
    """

    seed: int
    step: int = 0
    hidden: tuple[Tensor, ...] = ()
    first: Mapping[str, Tensor] | None = None

    @property
    def draw_seed(self) -> int:
        """Of the draws at this step."""
        return (self.seed + 0x9E3779B97F4A7C15 * self.step) % (1 << 63)


def recall(raw: Observations, state: Sequence[Memory | None] | None) -> list[Memory]:
    """The episodes' memories, those of beginning episodes made from their first observation.

    Args:
        raw: observations `(B, ...)` as the simulator gave them.
        state: one memory or None per episode, or None when all of them begin.
    """
    rows = len(next(iter(raw.values())))
    memories = list(state) if state is not None else [None] * rows
    if len(memories) != rows:
        raise ValueError(f"{len(memories)} states for {rows} episodes")
    return [Memory(_seed(raw, row)) if memory is None else memory for row, memory in enumerate(memories)]


def _seed(raw: Observations, row: int) -> int:
    digest = hashlib.blake2b(digest_size=7)
    for key in sorted(raw):
        digest.update(raw[key][row].cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest())


def forward(network: Any, obs: Observations, memories: Sequence[Memory]) -> tuple[Tensor, list[Memory]]:
    """Actions `(B, A)` of a feed-forward or transformer network.

    Args:
        network: an actor of `robomimic.models.policy_nets`.
        obs: as the network takes it: `(B, ...)` per key, or `(B, T, ...)` for a transformer, whose last step counts.
    """
    seeds = [memory.draw_seed for memory in memories]
    actions = draw(network, network.forward_train(obs) if hasattr(network, "forward_train") else network(obs), seeds)
    return actions, [Memory(memory.seed, memory.step + 1) for memory in memories]


def forward_recurrent(
    network: Any, obs: Observations, memories: Sequence[Memory], *, horizon: int, open_loop: bool = False
) -> tuple[Tensor, list[Memory]]:
    """Actions `(B, A)` of a recurrent network, which forgets every `horizon` steps, the length that it was trained on.

    Args:
        obs: `(B, ...)` per key.
        open_loop: act on the observation seen when it last forgot.
    """
    afresh = [memory.step % horizon == 0 for memory in memories]
    device = next(iter(obs.values())).device
    start = network.get_rnn_init_state(batch_size=len(memories), device=device)
    lstm = isinstance(start, tuple)
    hidden = []
    for i, zeros in enumerate(start if lstm else (start,)):  # (layers, B, H) each
        rows = [zeros[:, b] if new else memory.hidden[i] for b, (new, memory) in enumerate(zip(afresh, memories, strict=True))]
        hidden.append(torch.stack(rows, dim=1))
    firsts: list[Mapping[str, Tensor] | None] = [None] * len(memories)
    if open_loop:
        firsts = [
            {key: value[b] for key, value in obs.items()} if new or memory.first is None else memory.first
            for b, (new, memory) in enumerate(zip(afresh, memories, strict=True))
        ]
        obs = {key: torch.stack([first[key] for first in firsts if first is not None]) for key in obs}
    sequence = {key: value.unsqueeze(1) for key, value in obs.items()}  # (B, 1, ...)
    step = getattr(network, "forward_train", network)
    out, after = step(sequence, rnn_init_state=tuple(hidden) if lstm else hidden[0], return_state=True)
    actions = draw(network, out, [memory.draw_seed for memory in memories])
    after = after if lstm else (after,)
    carried = [
        Memory(memory.seed, memory.step + 1, tuple(part[:, b] for part in after), firsts[b]) for b, memory in enumerate(memories)
    ]
    return actions, carried


def draw(network: Any, out: Any, seeds: Sequence[int]) -> Tensor:
    """Actions `(B, A)` from what a network returns: actions, or a Gaussian or a mixture of them to draw from.

    Where it holds several steps, `(B, T, ...)`, the last is taken. A draw is what the distribution's own `sample` gives,
    but for the source of its randomness; a Gaussian with `low_noise_eval` gives its mean, as in robomimic.
    """
    if isinstance(out, Tensor):
        return out[:, -1] if out.ndim == 3 else out
    mixture = getattr(out, "mixture_distribution", None)
    if mixture is None:
        if network.low_noise_eval and not network.training:
            mean: Tensor = out.mean
            return mean
        normal, logits = out.base_dist, None
        loc, scale = normal.loc, normal.scale  # (B, A)
    else:
        normal, logits = out.component_distribution.base_dist, mixture.logits
        loc, scale = normal.loc, normal.scale  # (B, K, A), or (B, T, K, A)
        if loc.ndim == 4:
            loc, scale, logits = loc[:, -1], scale[:, -1], logits[:, -1]
    rows = []
    for b, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        mean, spread = loc[b], scale[b]
        if logits is not None:
            mode = int(torch.multinomial(logits[b].softmax(-1).cpu(), 1, generator=generator))
            mean, spread = mean[mode], spread[mode]
        rows.append(mean + spread * torch.randn(mean.shape, generator=generator).to(mean.device))
    return torch.stack(rows)
