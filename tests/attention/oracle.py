"""Masked dense attention written from the definition alone, in float64, sharing no code
with the package.
"""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

PHI = (1 + math.sqrt(5)) / 2


def offset_sets(
    num_tokens: int,
    heads: int,
    w_min: int = 5,
    w_max: int | None = None,
    modified: bool = False,
    layer: int = 0,
) -> list[set[int]]:
    """The offsets of each head slot; heads few enough for float arithmetic."""
    w_max = max(num_tokens // 3, w_min) if w_max is None else w_max
    sets = []
    for i in range(1, heads + 1):
        w = w_min if heads == 1 else w_min + math.floor((i - 1) * (w_max - w_min) / (heads - 1))
        m = math.floor(i * PHI)
        a, b = math.floor(m * PHI), math.floor(m * PHI * PHI)
        kept = {a}
        while b <= w:
            kept.add(b)
            a, b = b, a + b
        if modified and i > 1:
            kept |= {i - 1, m}
        sets.append({o for o in kept if o < num_tokens})
    random.Random(layer).shuffle(sets)
    return sets


def dense_mask(sets: list[set[int]], num_tokens: int, prefix: int) -> Tensor:
    """Boolean (h, T, T): every pair with a prefix token, and the kept distances."""
    token = torch.arange(num_tokens + prefix)
    distance = (token[:, None] - token).abs()
    with_prefix = (token[:, None] < prefix) | (token < prefix)
    return torch.stack(
        [with_prefix | torch.isin(distance, torch.tensor(sorted(kept))) for kept in sets]
    )


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, masking: str, scale: float | None = None
) -> Tensor:
    """(B, h, T, d) in float64, differentiable; an all-dropped row is 0 under neg_inf."""
    q, k, v = q.double(), k.double(), v.double()
    logits = torch.einsum("bhjd,bhkd->bhjk", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    if masking == "zero_logit":
        weights = torch.exp(torch.where(mask, logits, torch.zeros_like(logits)))
    else:
        weights = torch.exp(logits) * mask
    total = weights.sum(-1, keepdim=True)
    return torch.einsum(
        "bhjk,bhkd->bhjd", weights / torch.where(total == 0, torch.ones_like(total), total), v
    )
