"""Kernels with a hand-written backward pass have first derivatives only; all other
derivatives are refused here.

`torch.autograd.function.once_differentiable` does not suffice: its error is no function
of the inputs, so `torch.autograd.grad(gradient, x)` leaves it out, and gives a wrong
number wherever x also reaches the gradient another way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fibopolicy.errors import UserError

_INSTEAD = "set backend='reference', or FIBOPOLICY_ATTENTION_BACKEND=reference in the environment"


def once(backward: Callable[..., Tensor], inputs: tuple[Tensor, ...], *arguments: Any) -> Tensor:
    """`backward(*arguments)`; where that is differentiated with respect to `inputs`, a
    `UserError` is raised.
    """
    if not torch.is_grad_enabled():  # the usual case: without create_graph=True
        return backward(*arguments)
    gradient: Tensor = _Once.apply(backward, arguments, *inputs)  # type: ignore[no-untyped-call]
    return gradient


def refuse_second(*_: Any) -> NoReturn:
    """The backward pass of a backward pass."""
    raise UserError(f"sparse attention has no second derivatives; {_INSTEAD}")


def check_transforms(*tensors: Tensor) -> None:
    """Refuse tensors that forward-mode differentiation or a transform of `torch.func`
    other than vmap watches.

    Raises:
        UserError: there is such a tensor.
    """
    if torch.compiler.is_compiling():  # the compiler traces an operator, which refuses them
        return
    forward = forward_ad._current_level >= 0
    if not forward and not torch._C._are_functorch_transforms_active():
        return
    if any((forward and _has_tangent(x)) or _tracked(x) for x in tensors):
        raise UserError(
            "sparse attention has no forward-mode derivatives and none inside torch.func (grad,"
            f" jvp, hessian); {_INSTEAD}"
        )


def _has_tangent(x: Tensor) -> bool:
    return forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]


def _tracked(x: Tensor) -> bool:
    """Whether any of the transforms around a tensor differentiates it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, backward: Callable[..., Tensor], arguments: tuple[Any, ...], *inputs: Tensor
    ) -> Tensor:
        return backward(*arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        refuse_second()
