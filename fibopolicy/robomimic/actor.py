"""One control step of robomimic's policy networks, for a batch of episodes that each
carry a memory of their own.

Robomimic acts for one episode and keeps its memory inside the algorithm. Here memory is
a value, and what is drawn at random depends on an episode's first observation and step
alone: an episode repeats exactly, whatever runs beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from fibopolicy.policies.rng import EpisodeRng, EpisodeRngState

Observations = Mapping[str, Tensor]


class Memory(TypedDict):
    """What B episodes carry from step to step, as tensors whose first dimension counts
    them.

    Attributes:
        rng: where the episodes' random numbers come from.
        hidden: of a recurrent network, `(B, layers, H)` each: LSTM two, GRU one, others
            none.
        first: of an open-loop recurrent network, the observations `(B, ...)` that its
            actions follow from; else empty.
    """

    rng: EpisodeRngState
    hidden: tuple[Tensor, ...]
    first: dict[str, Tensor]


def init_memory(obs: Observations, keys: Iterable[str]) -> Memory:
    """The memory of episodes that begin with `obs`, `(B, ...)` per key, as the simulator
    gave them.
    """
    return {"rng": EpisodeRng.init(obs, keys).state, "hidden": (), "first": {}}


def forward(network: Any, obs: Observations, memory: Memory) -> tuple[Tensor, Memory]:
    """Actions `(B, A)` of a feed-forward or transformer network.

    Args:
        network: an actor of `robomimic.models.policy_nets`.
        obs: as the network takes it: `(B, ...)` per key, or `(B, T, ...)` for a
            transformer, whose last step counts.
    """
    out = network.forward_train(obs) if hasattr(network, "forward_train") else network(obs)
    rng = EpisodeRng(**memory["rng"])
    return draw(network, out, rng.seeds()), {**memory, "rng": rng.advance().state}


def forward_recurrent(
    network: Any, obs: Observations, memory: Memory, *, horizon: int, open_loop: bool = False
) -> tuple[Tensor, Memory]:
    """Actions `(B, A)` of a recurrent network, which forgets every `horizon` steps, the
    length that it was trained on.

    Args:
        obs: `(B, ...)` per key.
        open_loop: act on the observation seen when it last forgot.
    """
    device, rng = next(iter(obs.values())).device, EpisodeRng(**memory["rng"])
    afresh = (rng.step % horizon == 0).to(device)  # (B,)
    start = network.get_rnn_init_state(batch_size=len(afresh), device=device)
    lstm = isinstance(start, tuple)
    zeros = start if lstm else (start,)  # (layers, B, H) each
    before = tuple(part.transpose(0, 1) for part in memory["hidden"]) or zeros
    hidden = tuple(
        torch.where(afresh[None, :, None], zero, part).contiguous()
        for zero, part in zip(zeros, before, strict=True)
    )
    first = dict(memory["first"] or obs) if open_loop else {}
    if open_loop:
        first = {
            key: torch.where(_over(afresh, value), value, first[key]) for key, value in obs.items()
        }
        obs = first
    sequence = {key: value.unsqueeze(1) for key, value in obs.items()}  # (B, 1, ...)
    step = getattr(network, "forward_train", network)
    out, after = step(sequence, rnn_init_state=hidden if lstm else hidden[0], return_state=True)
    actions = draw(network, out, rng.seeds())
    # (B, layers, H) each
    carried = tuple(part.transpose(0, 1) for part in (after if lstm else (after,)))
    return actions, {"rng": rng.advance().state, "hidden": carried, "first": first}


def _over(rows: Tensor, value: Tensor) -> Tensor:
    """`(B,)` in the shape that broadcasts over `(B, ...)`."""
    return rows.view(-1, *[1] * (value.ndim - 1))


def draw(network: Any, out: Any, seeds: Sequence[int]) -> Tensor:
    """Actions `(B, A)` from what a network returns: actions, or a Gaussian or a mixture
    of them to draw from.

    Where it holds several steps, `(B, T, ...)`, the last is taken. A draw is what the
    distribution's own `sample` gives, but for the source of its randomness; a Gaussian
    with `low_noise_eval` gives its mean, as in robomimic.
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
