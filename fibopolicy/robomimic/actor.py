"""One control step of robomimic's policy networks, for a batch of episodes.

robomimic acts for one episode and keeps the memory inside its algorithm. Here the
memory is a value, and random numbers come from `EpisodeRng`: an episode repeats
exactly, regardless of the other episodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from fibopolicy.policies.rng import EpisodeRng, EpisodeRngState

Observations = Mapping[str, Tensor]


class Memory(TypedDict):
    """The state of B episodes between two steps: tensors whose first dimension is B.

    Attributes:
        rng: state of the episodes' `EpisodeRng`.
        hidden: `(B, layers, H)` each: two for an LSTM, one for a GRU, none for others.
        first: for an open-loop recurrent network, the observations `(B, ...)` that it
            acts on; else empty.
    """

    rng: EpisodeRngState
    hidden: tuple[Tensor, ...]
    first: dict[str, Tensor]


def init_memory(obs: Observations, keys: Iterable[str]) -> Memory:
    """Memory of episodes that begin with a simulator's observations, `(B, ...)` per key."""
    return {"rng": EpisodeRng.init(obs, keys).state, "hidden": (), "first": {}}


def forward(network: Any, obs: Observations, memory: Memory) -> tuple[Tensor, Memory]:
    """Actions `(B, A)` of a feed-forward or transformer network.

    Args:
        network: an actor of `robomimic.models.policy_nets`.
        obs: inputs of the network: `(B, ...)` per key, or `(B, T_o, ...)` of a
            transformer, whose output for the last step is used.
    """
    out = getattr(network, "forward_train", network)(obs)
    rng = EpisodeRng(**memory["rng"])
    return _draw(network, out, rng.seeds()), {**memory, "rng": rng.advance().state}


def forward_recurrent(
    network: Any, obs: Observations, memory: Memory, *, horizon: int, open_loop: bool = False
) -> tuple[Tensor, Memory]:
    """Actions `(B, A)` of a recurrent network.

    Args:
        obs: `(B, ...)` per key.
        horizon: steps after which the hidden state is reset: the length of the
            sequences that the network was trained on.
        open_loop: act on the observation of the last reset.
    """
    device, rng = next(iter(obs.values())).device, EpisodeRng(**memory["rng"])
    reset = (rng.step % horizon == 0).to(device)  # (B,)
    zeros = network.get_rnn_init_state(batch_size=len(reset), device=device)
    lstm = isinstance(zeros, tuple)
    zeros = zeros if lstm else (zeros,)  # (layers, B, H) each
    before = tuple(part.transpose(0, 1) for part in memory["hidden"]) or zeros
    hidden = tuple(
        torch.where(reset[None, :, None], zero, part).contiguous()
        for zero, part in zip(zeros, before, strict=True)
    )
    first: dict[str, Tensor] = {}
    if open_loop:
        for key, value in obs.items():
            rows = reset.view(-1, *[1] * (value.ndim - 1))  # broadcasts over (B, ...)
            first[key] = torch.where(rows, value, memory["first"].get(key, value))
        obs = first
    sequence = {key: value.unsqueeze(1) for key, value in obs.items()}  # (B, 1, ...)
    step = getattr(network, "forward_train", network)
    out, after = step(sequence, rnn_init_state=hidden if lstm else hidden[0], return_state=True)
    after = tuple(part.transpose(0, 1) for part in (after if lstm else (after,)))
    actions = _draw(network, out, rng.seeds())
    return actions, {"rng": rng.advance().state, "hidden": after, "first": first}


def _draw(network: Any, out: Any, seeds: Sequence[int]) -> Tensor:
    """Actions `(B, A)` from the output of a network: actions, or a Gaussian or a
    mixture of Gaussians to draw from.

    Of several steps, `(B, T, ...)`, the last is used. With `low_noise_eval` a Gaussian
    gives its mean, as in robomimic.
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
        mean, std = loc[b], scale[b]
        if logits is not None:
            mode = int(torch.multinomial(logits[b].softmax(-1).cpu(), 1, generator=generator))
            mean, std = mean[mode], std[mode]
        rows.append(mean + std * torch.randn(mean.shape, generator=generator).to(mean.device))
    return torch.stack(rows)
