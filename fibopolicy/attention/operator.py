"""The torch operator around a compiled backend: it traces under torch.compile,
differentiates once, and passes `torch.library.opcheck`.

A backend registers its `Kernels` in `KERNELS`. The pattern is passed as its `spec`. The
second result, the log-sum-exp of each query's logits ("lse"), is saved for the backward
pass; no gradient flows through it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fibopolicy.attention.patterns import AttentionPattern
from fibopolicy.errors import UserError


@dataclass(frozen=True)
class Kernels:
    """The functions of a compiled backend; the operator allocates their results.

    Attributes:
        forward: `(q, k, v, out, lse, pattern, zero_logit, scale)` fills `out`, `(B, h,
            T, d)`, and `lse`, `(B, h, T)` in float32 (float64 for float64 inputs). Rows
            of q, k and v are contiguous.
        backward: `(grad, q, k, v, out, lse, grads, pattern, zero_logit, scale)` fills
            `grads`, `(3, B, h, T, d)`: the gradients of q, k and v.
        dim_multiple: the head dimension is padded with zeros to a multiple of this.
    """

    forward: Callable[..., None]
    backward: Callable[..., None]
    dim_multiple: int = 1


#: Compiled backends by name.
KERNELS: dict[str, Kernels] = {}
#: A scale below this, or negative, is multiplied into q.
_MIN_SCALE = 1e-30
_ADVICE = "set backend='reference', or FIBOPOLICY_ATTENTION_BACKEND=reference in the environment"


def sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    masking: str,
    scale: float,
    backend: str,
) -> Tensor:
    """Attention by a compiled backend over `(B, h, T, d)`, differentiable once."""
    check_transforms(q, k, v)
    dim = q.shape[-1]
    if padding := -dim % KERNELS[backend].dim_multiple:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))  # zeros change no product
    if scale < _MIN_SCALE:  # the kernels mark an absent key by a logit of -infinity times scale
        q, scale = q * scale, 1.0
    zero_logit = masking == "zero_logit"
    out: Tensor
    if not is_eager():
        out = sparse_attention(q, k, v, pattern.spec, zero_logit, scale, backend)[0]
    elif torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out = _Direct.apply(q, k, v, pattern, zero_logit, scale, backend)  # type: ignore[no-untyped-call]
    else:
        out = _forward(q, k, v, pattern, zero_logit, scale, backend)[0]
    return out[..., :dim] if padding else out


def sparse_packed(
    qkv: Tensor, pattern: AttentionPattern, masking: str, scale: float, backend: str
) -> Tensor:
    """`sparse` of a packed projection `(B, T, 3, h, d)` -> `(B, T, h, d)`; its gradient
    is written in place.
    """
    padded = qkv.shape[-1] % KERNELS[backend].dim_multiple
    plain = is_eager() and qkv.stride(-1) == 1 and not qkv.is_neg()
    if padded or scale < _MIN_SCALE or not plain:
        return sparse(*unpack(qkv), pattern, masking, scale, backend).transpose(1, 2)
    if forward_ad._current_level >= 0:
        check_transforms(qkv)
    zero_logit = masking == "zero_logit"
    out: Tensor
    if torch.is_grad_enabled() and qkv.requires_grad:
        out = _DirectPacked.apply(qkv, pattern, zero_logit, scale, backend)  # type: ignore[no-untyped-call]
    else:
        out = _packed_forward(qkv, pattern, zero_logit, scale, backend)[0]
    return out


def unpack(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, `(B, h, T, d)` each, as views of a packed projection `(B, T, 3, h, d)`."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def is_eager() -> bool:
    """Whether no compiler, export, dispatch mode or `torch.func` transform is active."""
    watched = (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or is_in_torch_dispatch_mode()
    )
    return not (watched or torch._C._are_functorch_transforms_active())


def _forward(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    out, lse = _empty_results(q)
    q, k, v = with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(v)
    _run_forward(q, k, v, out, lse, *options)
    return out, lse


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: AttentionPattern,
    zero_logit: bool,
    scale: float,
    backend: str,
) -> None:
    if q.numel():
        KERNELS[backend].forward(q, k, v, out, lse, pattern, zero_logit, scale)


def _backward(
    grads: Tensor | None,
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: AttentionPattern,
    zero_logit: bool,
    scale: float,
    backend: str,
) -> Tensor:
    """Fill `grads`, or a new tensor if it is None."""
    if grads is None:
        # One allocation: three would be returned to the system and page-faulted in
        # again at every step.
        grads = q.new_empty((3, *q.shape))
    if q.numel():
        args = (grad, q, k, v, out, lse, grads, pattern, zero_logit, scale)
        KERNELS[backend].backward(*args)
    return grads


def _empty_results(q: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for `out`, of q's shape `(B, h, T, d)`, and `lse`.

    `out` has the memory layout `(B, T, h, d)` if q's stride over heads is smaller than
    over tokens, as after a packed projection: then `out.transpose(1, 2).reshape(B, T, h
    * d)` copies nothing.
    """
    batch, heads, length, dim = q.shape
    lse = _empty_lse(q, batch, heads, length)
    if q.stride(-1) == 1 and heads > 1 and q.stride(1) < q.stride(2):
        # Not a view: an operator must not return one.
        return q.new_empty_strided(q.shape, (length * heads * dim, dim, heads * dim, 1)), lse
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _empty_lse(x: Tensor, batch: int, heads: int, length: int) -> Tensor:
    shape, strides = (batch, heads, length), (heads * length, length, 1)
    # `new_empty` takes twice as long.
    return x.new_empty_strided(shape, strides, dtype=compute_dtype(x))


# The operators: `_forward` and `_backward` with the pattern as a string.


@torch.library.custom_op("fibopolicy::sparse_attention", mutates_args=())
def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, zero_logit: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    """`out` and `lse`, see `Kernels`; d must be a multiple of the backend's `dim_multiple`."""
    return _forward(q, k, v, AttentionPattern.from_spec(pattern), zero_logit, scale, backend)


@sparse_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, pattern: str, zero_logit: bool, scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    return _empty_results(q)


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
    """`grads`, see `Kernels`."""
    value = AttentionPattern.from_spec(pattern)
    return _backward(None, grad, q, k, v, out, lse, value, zero_logit, scale, backend)


@sparse_attention_backward.register_fake
def _(grad: Tensor, q: Tensor, *_: Any) -> Tensor:
    return q.new_empty((3, *q.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    ctx.options = inputs[len(tensors) :]
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    grads = sparse_attention_backward(grad, *ctx.saved_tensors, *ctx.options)
    return (*grads.unbind(0), None, None, None, None)


class _Direct(torch.autograd.Function):
    """The operator without its dispatch, which costs as much as a small problem.

    A separate `setup_context` would cost as much again: for it, torch binds the
    arguments to their names at each call.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Tensor:
        out, lse = _forward(q, k, v, *options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = once(_backward, (grad, *saved[:3]), None, grad, *saved, *ctx.options)
        return (*grads.unbind(0), None, None, None, None)


class _DirectPacked(torch.autograd.Function):
    """`_Direct` of one packed projection `(B, T, 3, h, d)`, with a packed gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, *options: Any) -> Tensor:
        out, lse = _packed_forward(qkv, *options)
        ctx.save_for_backward(qkv, out, lse)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse = ctx.saved_tensors
        packed = once(_packed_backward, (grad, qkv), grad, qkv, out, lse, *ctx.options)
        return packed, None, None, None, None


def _packed_forward(qkv: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    """`out`, `(B, T, h, d)`, and `lse`, `(B, h, T)`."""
    batch, length, _, heads, dim = qkv.shape
    row = heads * dim
    out = qkv.new_empty_strided((batch, length, heads, dim), (length * row, row, dim, 1))
    lse = _empty_lse(qkv, batch, heads, length)
    _run_forward(*unpack(qkv), out.transpose(1, 2), lse, *options)
    return out, lse


def _packed_backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, *options: Any) -> Tensor:
    packed = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grads = packed.permute(2, 0, 3, 1, 4)
    _backward(grads, grad.transpose(1, 2), *unpack(qkv), out.transpose(1, 2), lse, *options)
    return packed


# Shared by the backends: the layout of inputs, a term of the gradient, and errors for
# derivatives that a hand-written backward pass does not support.


def with_contiguous_rows(x: Tensor) -> Tensor:
    """`x` as the kernels read it: each row contiguous, any strides over batch, head and
    token.
    """
    return (x if x.stride(-1) == 1 else x.contiguous()).resolve_neg()


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of sums: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dropped_sum(grad: Tensor, lse: Tensor, drops_keys: Tensor) -> Tensor:
    """The contribution of dropped pairs to every key's gradient of v under
    "zero_logit", as if all pairs were dropped: `(B, h, d)`.

    `drops_keys`, bool `(h, T)` or `(T,)`, excludes rows that keep every key, where
    exp(-lse) could overflow.
    """
    weight = torch.exp(-lse).masked_fill(~drops_keys, 0.0)  # (B, h, T)
    # Not a matrix product: under autocast that would be computed in half precision.
    return (weight[..., None] * grad.to(lse.dtype)).sum(dim=2)


def once(backward: Callable[..., Tensor], inputs: tuple[Tensor, ...], *arguments: Any) -> Tensor:
    """Return `backward(*arguments)`; differentiating it by `inputs` raises `UserError`,
    and so do batched gradients.

    `torch.autograd.function.once_differentiable` does not suffice: its error node does
    not depend on the inputs, so `torch.autograd.grad(gradient, x)` skips it, and
    returns a wrong number if x also reaches the gradient another way.
    """
    functorch, grad = torch._C._functorch, inputs[0]
    if functorch.is_legacy_batchedtensor(grad) or functorch.is_functorch_wrapped_tensor(grad):
        raise UserError(f"sparse attention has no batched derivatives; {_ADVICE}")
    if not torch.is_grad_enabled():  # the usual case: without create_graph=True
        return backward(*arguments)
    gradient: Tensor = _Once.apply(backward, arguments, *inputs)  # type: ignore[no-untyped-call]
    return gradient


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backward: Callable[..., Tensor], arguments: tuple[Any, ...], *inputs: Tensor
    ) -> Tensor:
        return backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise UserError(f"sparse attention has no second derivatives; {_ADVICE}")


sparse_attention.register_autograd(_differentiate, setup_context=_save)
sparse_attention_backward.register_autograd(_Once.backward)


def check_transforms(*tensors: Tensor) -> None:
    """Check for forward-mode differentiation and transforms of `torch.func` except
    vmap.

    Raises:
        UserError: one of them applies to a tensor.
    """
    if torch.compiler.is_compiling():  # the compiler traces an operator, which rejects them
        return
    forward = forward_ad._current_level >= 0
    if not forward and not torch._C._are_functorch_transforms_active():
        return
    if any((forward and _has_tangent(x)) or _is_differentiated(x) for x in tensors):
        raise UserError(
            "sparse attention has no forward-mode derivatives and none inside torch.func (grad,"
            f" jvp, hessian); {_ADVICE}"
        )


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _is_differentiated(x: Tensor) -> bool:
    """Whether any of the transforms around a tensor differentiates it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False
