"""The compiled kernels as torch operators: they trace under torch.compile, differentiate, and pass `torch.library.opcheck`.

The pattern travels by value, as its `spec`. The second result, the logarithm of each query's sum of weights, is kept for the
backward pass; no gradient flows through it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fibopolicy.attention import cpu, cuda
from fibopolicy.attention.patterns import AttentionPattern

_FORWARD = {"numba": cpu.forward, "triton": cuda.forward}
_BACKWARD = {"numba": cpu.backward, "triton": cuda.backward}


@torch.library.custom_op("fibopolicy::sparse_attention", mutates_args=())
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, zero_logit: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """See `cpu.forward`; the head dimension has to be one that its kernels work on, see `cpu.pad`."""
    return _FORWARD[backend](q, k, v, AttentionPattern.from_spec(pattern), zero_logit, scale)


@sparse_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, pattern: str, zero_logit: bool, scale: float, backend: str) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return cpu.empty_like(q), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.custom_op("fibopolicy::sparse_attention_backward", mutates_args=())
def sparse_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: str,
    zero_logit: bool,
    scale: float,
    backend: str,
) -> Tensor:
    """See `cpu.backward`."""
    return _BACKWARD[backend](grad, q, k, v, out, lse, AttentionPattern.from_spec(pattern), zero_logit, scale)


@sparse_attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: str,
    zero_logit: bool,
    scale: float,
    backend: str,
) -> Tensor:
    return q.new_empty((3, *q.shape))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    q, k, v, out, lse = ctx.saved_tensors
    grads = sparse_attention_backward(grad, q, k, v, out, lse, *ctx.options)
    return (*grads.unbind(0), None, None, None, None)


sparse_attention.register_autograd(_differentiate, setup_context=_remember)


def numba_attention(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, masking: str, scale: float) -> Tensor:
    """The CPU kernels over `(B, h, T, d)`, differentiable."""
    dim = q.shape[-1]
    q, k, v = cpu.pad(q), cpu.pad(k), cpu.pad(v)
    out: Tensor = sparse_attention(q, k, v, pattern.spec, masking == "zero_logit", scale, "numba")[0]
    return out if out.shape[-1] == dim else out[..., :dim]


def triton_attention(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, masking: str, scale: float) -> Tensor:
    """The Triton kernels over `(B, h, T, d)`, differentiable."""
    out: Tensor = sparse_attention(q, k, v, pattern.spec, masking == "zero_logit", scale, "triton")[0]
    return out
