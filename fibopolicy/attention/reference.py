"""The definition, written as plainly as possible: dense, masked, in the precision of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from fibopolicy.attention.patterns import AttentionPattern, shared_mask


def reference(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, masking: str, scale: float
) -> Tensor:
    """Masked attention over `(B, h, T, d)`, exactly as the pattern states it."""
    mask = shared_mask(pattern, q.device)  # (h, T, T)
    logits = (q @ k.transpose(-2, -1)) * scale  # (B, h, T, T)
    if masking == "zero_logit":
        return torch.softmax(logits.masked_fill(~mask, 0.0), dim=-1) @ v
    # Subtracting the row maximum over the kept keys keeps exp finite; a row that keeps
    # no key has weight sum 0.
    logits = logits.masked_fill(~mask, float("-inf"))
    highest = logits.amax(dim=-1, keepdim=True)
    weights = torch.exp(logits - torch.where(highest == float("-inf"), 0.0, highest))
    total = weights.sum(dim=-1, keepdim=True)
    return (weights / torch.where(total == 0, 1.0, total)) @ v
