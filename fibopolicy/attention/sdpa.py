"""Torch's fused dense attention with a mask: runs everywhere, saves nothing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fibopolicy.attention.patterns import AttentionPattern, shared_mask


def masked_sdpa(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, masking: str, scale: float
) -> Tensor:
    """`scaled_dot_product_attention` over `(B, h, T, d)` under the pattern's mask;
    without one where all pairs are kept.
    """
    if pattern.keeps_all:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    mask = shared_mask(pattern, q.device)  # (h, T, T)
    if masking == "neg_inf":
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        # A row without any key is NaN in some of torch's backends and 0 in others; the
        # definition says 0.
        return out if pattern.num_prefix else out.masked_fill(~mask.any(dim=-1)[..., None], 0.0)
    # Fused attention can add to a logit, not replace it, so the product is formed here.
    logits = ((q @ k.transpose(-2, -1)) * scale).masked_fill(~mask, 0.0)  # (B, h, T, T)
    return torch.softmax(logits, dim=-1) @ v
