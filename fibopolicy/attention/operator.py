"""The compiled kernels as torch operators: they trace under torch.compile,
differentiate, and pass `torch.library.opcheck`.

The pattern travels by value, as its `spec`. The second result, the logarithm of each
query's sum of weights, is kept for the backward pass; no gradient flows through it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fibopolicy.attention import cpu, cuda
from fibopolicy.attention.derivatives import check_transforms, once, refuse_second
from fibopolicy.attention.patterns import AttentionPattern

_FORWARD: Mapping[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "numba": cpu.forward,
    "triton": cuda.forward,
}
#: Smaller ones, and negative ones, are multiplied into q.
_SMALLEST_SCALE = 1e-30
_BACKWARD: Mapping[str, Callable[..., Tensor]] = {"numba": cpu.backward, "triton": cuda.backward}


@torch.library.custom_op("fibopolicy::sparse_attention", mutates_args=())
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, zero_logit: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """See `cpu.forward`; the head dimension has to be one that its kernels work on, see
    `cpu.pad`.
    """
    return _FORWARD[backend](q, k, v, AttentionPattern.from_spec(pattern), zero_logit, scale)


@sparse_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, zero_logit: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
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
    return _BACKWARD[backend](
        grad, q, k, v, out, lse, AttentionPattern.from_spec(pattern), zero_logit, scale
    )


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
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.options = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    q, k, v, out, lse = ctx.saved_tensors
    grads = sparse_attention_backward(grad, q, k, v, out, lse, *ctx.options)
    return (*grads.unbind(0), None, None, None, None)


sparse_attention.register_autograd(_differentiate, setup_context=_remember)
sparse_attention_backward.register_autograd(refuse_second)


class _Direct(torch.autograd.Function):
    """The operator without its dispatch, which costs as much as a small problem itself.

    So would a `setup_context` apart from `forward`: for it, torch binds the arguments
    to their names at each call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pattern: AttentionPattern,
        zero_logit: bool,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        results = _FORWARD[backend](q, k, v, pattern, zero_logit, scale)
        _remember(ctx, (q, k, v, pattern, zero_logit, scale, backend), results)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        q, k, v, out, lse = ctx.saved_tensors
        pattern, zero_logit, scale, backend = ctx.options
        grads = once(
            _BACKWARD[backend], (grad, q, k, v), grad, q, k, v, out, lse, pattern, zero_logit, scale
        )
        return (*grads.unbind(0), None, None, None, None)


class _DirectPacked(torch.autograd.Function):
    """The same from one packed projection `(B, T, 3, h, d)`, whose gradient is written
    in place, packed as well.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        pattern: AttentionPattern,
        zero_logit: bool,
        scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        results = _FORWARD[backend](*unpack(qkv), pattern, zero_logit, scale)
        _remember(ctx, (qkv, pattern, zero_logit, scale, backend), results)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        qkv, out, lse = ctx.saved_tensors
        return (
            once(_packed_backward, (grad, qkv), grad, qkv, out, lse, *ctx.options),
            None,
            None,
            None,
            None,
        )


def _packed_backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: AttentionPattern,
    zero_logit: bool,
    scale: float,
    backend: str,
) -> Tensor:
    """The gradient of a packed projection, laid out as the projection: `(B, T, 3, h, d)`."""
    packed = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    _BACKWARD[backend](
        grad, *unpack(qkv), out, lse, pattern, zero_logit, scale, packed.permute(2, 0, 3, 1, 4)
    )
    return packed


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, `(B, h, T, d)` each, as views of a packed projection `(B, T, 3, h, d)`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _eager() -> bool:
    """Whether nobody watches: no compiler, no export, no mode and no transform
    (`torch.func`) that has to see an operator.
    """
    watched = (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or is_in_torch_dispatch_mode()
    )
    return not (watched or torch._C._are_functorch_transforms_active())


def _differentiates(*tensors: Tensor) -> bool:
    """Whether a backward pass may follow."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    masking: str,
    scale: float,
    backend: str,
) -> Tensor:
    """A compiled backend over `(B, h, T, d)`, differentiable."""
    check_transforms(q, k, v)
    dim = q.shape[-1]
    if backend == "numba":
        q, k, v = cpu.pad(q), cpu.pad(k), cpu.pad(v)
    # the kernels mark what is no key by a logit of -infinity times scale
    if scale < _SMALLEST_SCALE:
        q, scale = q * scale, 1.0
    if _eager() and not _differentiates(q, k, v):
        out = _FORWARD[backend](q, k, v, pattern, masking == "zero_logit", scale)[0]
    elif _eager():
        out = _Direct.apply(q, k, v, pattern, masking == "zero_logit", scale, backend)[0]  # type: ignore[no-untyped-call]
    else:
        out = sparse_attention(q, k, v, pattern.spec, masking == "zero_logit", scale, backend)[0]
    return out if out.shape[-1] == dim else out[..., :dim]


def sparse_packed(
    qkv: Tensor, pattern: AttentionPattern, masking: str, scale: float, backend: str
) -> Tensor:
    """A compiled backend over a packed projection `(B, T, 3, h, d)`, differentiable ->
    `(B, h, T, d)`.
    """
    padded = backend == "numba" and cpu.padded_dim(qkv.shape[-1]) != qkv.shape[-1]
    if padded or scale < _SMALLEST_SCALE or not _eager():
        return sparse(*unpack(qkv), pattern, masking, scale, backend)
    check_transforms(qkv)
    out: Tensor = _DirectPacked.apply(qkv, pattern, masking == "zero_logit", scale, backend)[0]  # type: ignore[no-untyped-call]
    return out
