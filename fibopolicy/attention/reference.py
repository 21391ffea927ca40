"""The backends in plain torch, for any device: `reference` is the definition, `sdpa` is
torch's fused dense attention with a mask, `csr` multiplies sparse matrices with memory
linear in T.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fibopolicy.attention.operator import check_transforms, compute_dtype, once
from fibopolicy.attention.patterns import AttentionPattern, neighbours, shared_mask

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def reference(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, masking: str, scale: float
) -> Tensor:
    """Masked attention over `(B, h, T, d)`, dense, in the precision of its inputs."""
    mask = shared_mask(pattern, q.device)  # (h, T, T)
    logits = (q @ k.transpose(-2, -1)) * scale  # (B, h, T, T)
    if masking == "zero_logit":
        return torch.softmax(logits.masked_fill(~mask, 0.0), dim=-1) @ v
    # Subtracting the row maximum over the kept keys keeps exp finite; a row that keeps
    # no key has a weight sum of 0.
    logits = logits.masked_fill(~mask, float("-inf"))
    highest = logits.amax(dim=-1, keepdim=True)
    weights = torch.exp(logits - torch.where(highest == float("-inf"), 0.0, highest))
    total = weights.sum(dim=-1, keepdim=True)
    return (weights / torch.where(total == 0, 1.0, total)) @ v


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, masking: str, scale: float
) -> Tensor:
    """`scaled_dot_product_attention` over `(B, h, T, d)` under the pattern's mask;
    without a mask if all pairs are kept.
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


def csr(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, masking: str, scale: float
) -> Tensor:
    """Masked attention over `(B, h, T, d)`, differentiable once; half precision is
    computed in float32. Compilers do not take sparse matrices and get `sdpa`.
    """
    if torch.compiler.is_compiling():
        return sdpa(q, k, v, pattern, masking, scale)
    if not q.numel():
        return reference(q, k, v, pattern, masking, scale)
    check_transforms(q, k, v)
    out: Tensor
    with torch.autocast(q.device.type, enabled=False):  # sparse products stay in float32
        out = _Sparse.apply(q, k, v, pattern, masking == "zero_logit", scale)  # type: ignore[no-untyped-call]
    return out


class _Pairs:
    """The kept pairs of a batch as a sparse block-diagonal `(B h T, B h T)` matrix,
    with one block per sample and head.
    """

    def __init__(self, pattern: AttentionPattern, batch: int, device: torch.device) -> None:
        near = neighbours(pattern)
        heads, length = pattern.num_heads, pattern.sequence_length
        start = torch.from_numpy(near.start)  # (h, T + 1)
        count = start.diff(dim=1)  # (h, T)
        pairs = len(near.key)
        head = torch.arange(heads).repeat_interleave(count.sum(dim=1))  # (pairs,)
        key = torch.from_numpy(near.key).long() + head * length
        transpose = torch.from_numpy(near.transpose).long() + start[:, 0][head]
        block = torch.arange(batch)[:, None]
        self.rows = batch * heads * length
        self.count = count.flatten().repeat(batch).to(device)  # (B h T,)
        self.start = torch.cat(
            [torch.zeros(1, dtype=torch.long, device=device), self.count.cumsum(0)]
        )
        self.key = (key + block * heads * length).flatten().to(device)  # (B pairs,)
        self.transpose = (transpose + block * pairs).flatten().to(device)
        self.row = torch.arange(self.rows, device=device).repeat_interleave(self.count)

    def matrix(self, values: Tensor) -> Tensor:
        return torch.sparse_csr_tensor(
            self.start, self.key, values, (self.rows, self.rows), check_invariants=False
        )

    def products(self, x: Tensor, y: Tensor) -> Tensor:
        """x_j . y_k for every kept pair, `(B pairs,)`, of `(B h T, d)` matrices."""
        zeros = self.matrix(x.new_zeros(len(self.key)))
        result: Tensor = torch.sparse.sampled_addmm(zeros, x, y.T, beta=0.0).values()
        return result


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, *options: Any
    ) -> Tensor:
        zero_logit, scale = options
        pairs = _Pairs(pattern, q.shape[0], q.device)
        flat_q, flat_k, flat_v = (_flatten(x) for x in (q, k, v))
        logits = pairs.products(flat_q, flat_k) * scale
        drops_keys = (pairs.count < pattern.sequence_length) & zero_logit
        peak = logits.new_full((pairs.rows,), float("-inf")).masked_fill(drops_keys, 0.0)
        peak = peak.scatter_reduce(0, pairs.row, logits, "amax")
        peak = torch.where(pairs.count == 0, 0.0, peak)
        weight = torch.exp(logits - peak[pairs.row])
        total = torch.zeros_like(peak).index_add(0, pairs.row, weight)
        # Under zero_logit each dropped key counts with logit 0.
        dropped = torch.where(drops_keys, torch.exp(-peak), 0.0)
        total = total + dropped * (pattern.sequence_length - pairs.count)
        total = torch.where((pairs.count == 0) & (total == 0), 1.0, total)
        dropped = dropped / total
        weight = weight / total[pairs.row]
        out = pairs.matrix(weight - dropped[pairs.row]) @ flat_v
        if zero_logit:
            sums = flat_v.view(q.shape).sum(dim=2, keepdim=True)
            out = out + (dropped.view(*q.shape[:3], 1) * sums).flatten(0, 2)
        ctx.save_for_backward(q, k, v, out, weight, dropped)
        ctx.pairs, ctx.zero_logit, ctx.scale = pairs, zero_logit, scale
        return out.view(q.shape).to(q.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = saved = ctx.saved_tensors
        arguments = (grad, *saved, ctx.pairs, ctx.zero_logit, ctx.scale)
        with torch.autocast(grad.device.type, enabled=False):
            grads = once(_backward, (grad, q, k, v), *arguments)
        return (*grads.unbind(0), None, None, None)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    weight: Tensor,
    dropped: Tensor,
    pairs: _Pairs,
    zero_logit: bool,
    scale: float,
) -> Tensor:
    """The gradients of q, k and v, stacked: `(3, B, h, T, d)`."""
    shape, dtype = q.shape, q.dtype
    flat_grad, q, k, v = (_flatten(x) for x in (grad, q, k, v))
    mean = (flat_grad * out).sum(dim=1)  # (B h T,)
    slope = weight * (pairs.products(flat_grad, v) - mean[pairs.row]) * scale
    dq = pairs.matrix(slope) @ k
    dk = pairs.matrix(slope[pairs.transpose]) @ q
    dv = pairs.matrix((weight - dropped[pairs.row])[pairs.transpose]) @ flat_grad
    dv = dv.view(shape)
    if zero_logit:
        dv = dv + (dropped[:, None] * flat_grad).view(shape).sum(dim=2, keepdim=True)
    return torch.stack([dq.view(shape), dk.view(shape), dv]).to(dtype)


def _flatten(x: Tensor) -> Tensor:
    """`(B, h, T, d)` as a contiguous `(B h T, d)` in the precision of the computation."""
    return x.detach().to(compute_dtype(x)).flatten(0, 2).contiguous()
