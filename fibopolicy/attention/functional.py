"""`fibottention`: one function with several backends, and the choice among them."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fibopolicy.attention import cpu, cuda
from fibopolicy.attention.operator import KERNELS, is_eager, sparse, sparse_packed, unpack
from fibopolicy.attention.patterns import AttentionPattern, constant_to_compiler
from fibopolicy.attention.reference import csr, reference, sdpa
from fibopolicy.errors import UserError, unknown

Masking = Literal["neg_inf", "zero_logit"]
Backend = Callable[[Tensor, Tensor, Tensor, AttentionPattern, str, float], Tensor]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
#: Every backend computes the same function; a faster one is one more entry here.
BACKENDS: Mapping[str, Backend] = {
    "reference": reference,
    "sdpa": sdpa,
    "csr": csr,
    **{name: functools.partial(sparse, backend=name) for name in KERNELS},
}
#: Environment variable with the backend for calls with "auto", read once.
BACKEND_VARIABLE = "FIBOPOLICY_ATTENTION_BACKEND"
#: The backend for calls with "auto"; "auto" for the fastest.
default_backend = os.environ.get(BACKEND_VARIABLE) or "auto"
#: (T, share): up to T tokens, "auto" takes the sparse CPU kernels if at most this share
#: of all T^2 pairs is kept. Above it, masked dense attention is faster, forward and
#: backward together; `docs/results/attention_cpu.md` names the timings.
_CPU_MAX_SHARE = ((101, 0.95), (197, 0.75), (math.inf, 0.6))
#: By compute capability and dtype: up to this many tokens "auto" takes masked dense
#: attention on a GPU, (without, with) gradients. Measured on an H200, from 145 tokens
#: on, with an earlier version of the Triton kernels: `docs/results/attention_gpu.md`.
#: Other cards and dtypes are unmeasured and take these numbers.
#: `scripts/benchmarks/gpu_all` measures them.
_CUDA_DENSE_TOKENS: Mapping[tuple[int, int], Mapping[torch.dtype, tuple[int, int]]] = {
    (9, 0): {torch.float32: (144, 197), torch.bfloat16: (144, 785)},
}

_log = logging.getLogger(__name__)


def fibottention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: AttentionPattern,
    *,
    masking: Masking = "neg_inf",
    backend: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """Attention where each head keeps only its pattern's token pairs (Algorithm 3
    without the projections).

    Args:
        q, k, v: `(B, h, T, d)`, floating, one dtype and device; T = N + the pattern's
            prefix tokens (CLS), which come first.
        pattern: the kept pairs, for h heads and T tokens.
        masking: "neg_inf" removes the dropped pairs before the softmax (the paper's
            later text); "zero_logit" sets their logit to 0, so each still takes part
            with weight exp(0) (the released code).
        backend: a name in `BACKENDS`; "auto" takes the one that the environment
            variable FIBOPOLICY_ATTENTION_BACKEND names, else the fastest for this
            device, dtype, length and pattern.
        scale: factor on q.k; 1 / sqrt(d) by default.

    Returns:
        `(B, h, T, d)`. A query that keeps no key yields zeros (only possible without a
        CLS token).

    Raises:
        UserError: shapes, dtypes or devices do not match, or a name is unknown.
    """
    q, k, v = _autocast(q, k, v)
    if q.ndim != 4 or q.shape != k.shape or q.shape != v.shape:
        raise UserError(
            f"q, k and v must share one shape (B, h, T, d), got {tuple(q.shape)}, {tuple(k.shape)},"
            f" {tuple(v.shape)}"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise UserError(
            f"q, k and v must share one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if q.device != k.device or q.device != v.device:
        raise UserError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
    _, heads, length, dim = q.shape
    backend = choose_backend(q, heads, length, pattern, masking, backend)
    return BACKENDS[backend](q, k, v, pattern, masking, _number(scale, dim))


def fibottention_qkvpacked(
    qkv: Tensor,
    pattern: AttentionPattern,
    *,
    masking: Masking = "neg_inf",
    backend: str = "auto",
    scale: float | None = None,
) -> Tensor:
    """`fibottention` of a packed projection of q, k and v. The sparse backends write
    its gradient in place.

    Args:
        qkv: `(B, T, 3, h, d)`, as `nn.Linear(D, 3 * D)` returns it, reshaped.
        pattern, masking, backend, scale: as for `fibottention`.

    Returns:
        `(B, T, h, d)`, ready to be flattened to `(B, T, h * d)`.

    Raises:
        UserError: as `fibottention`.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise UserError(f"qkv must have shape (B, T, 3, h, d), got {tuple(qkv.shape)}")
    (qkv,) = _autocast(qkv)
    _, length, _, heads, dim = qkv.shape
    backend = choose_backend(qkv, heads, length, pattern, masking, backend)
    factor = _number(scale, dim)
    if backend in KERNELS:
        return sparse_packed(qkv, pattern, masking, factor, backend)
    return BACKENDS[backend](*unpack(qkv), pattern, masking, factor).transpose(1, 2)


def _number(scale: float | None, dim: int) -> float:
    if isinstance(scale, Tensor):  # kernels would read its value and give it no gradient
        raise UserError("scale must be a number; multiply q by a tensor, and pass scale=1")
    return dim**-0.5 if scale is None else scale


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast inputs to the autocast dtype, all but float64, as torch's attention does."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


class Inputs(NamedTuple):
    """All of q, k and v, `(B, h, T, d)`, that the choice of a backend depends on."""

    heads: int
    length: int
    dim: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


def choose_backend(
    x: Tensor,
    heads: int,
    length: int,
    pattern: AttentionPattern,
    masking: str = "neg_inf",
    backend: str = "auto",
) -> str:
    """Check the arguments and return the backend to run. `x` is q or a packed
    projection `(..., d)`.
    """
    if not hasattr(pattern, "spec"):  # quicker than isinstance with an abstract class
        raise UserError(
            f"expected an attention pattern such as FibottentionPattern(196, 12), got {pattern!r}"
        )
    if backend == "auto":
        backend = default_backend
        if torch.compiler.is_exporting() or (
            torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()  # type: ignore[attr-defined,no-untyped-call]
        ):
            backend = "sdpa"  # an exported program must not depend on our operators
    requires_grad = torch.is_grad_enabled() and x.requires_grad
    inputs = (heads, length, x.shape[-1], x.dtype, x.device, requires_grad)
    if is_eager():
        name, reason = _resolve_once(pattern.spec, inputs, masking, backend)
    else:
        name, reason = _resolve(pattern, Inputs(*inputs), masking, backend)
    if not torch.compiler.is_compiling() and _log.isEnabledFor(logging.DEBUG):
        found = (name, x.device.type, x.dtype, length, reason)
        if found not in _logged:
            _logged.add(found)
            _log.debug("attention backend %s for %s %s, T = %d%s", *found)
    return name


#: Choices that were logged: each is logged once.
_logged: set[tuple[object, ...]] = set()


def _resolve(
    pattern: AttentionPattern, inputs: Inputs, masking: str, backend: str
) -> tuple[str, str]:
    """The backend, and why "auto" does not take the one for this device."""
    if inputs.dim == 0:
        raise UserError("q, k and v have head dimension 0; it must be at least 1")
    if inputs.dtype not in _DTYPES:
        raise UserError(
            f"q, k and v must have a floating dtype of 16, 32 or 64 bits, got {inputs.dtype}"
        )
    if inputs.heads != pattern.num_heads or inputs.length != pattern.sequence_length:
        raise UserError(
            f"the pattern is for {pattern.num_heads} heads and {pattern.sequence_length} tokens"
            f" ({pattern.num_tokens} patches + {pattern.num_prefix} prefix), got {inputs.heads}"
            f" heads and {inputs.length} tokens"
        )
    if masking not in ("neg_inf", "zero_logit"):
        raise unknown("masking rule", masking, ("neg_inf", "zero_logit"))
    if backend == "auto":
        return _fastest(inputs, pattern, masking)
    if backend not in BACKENDS:
        raise unknown("attention backend", backend, ("auto", *BACKENDS))
    _check_backend(backend, inputs, pattern, masking)
    return backend, ""


@functools.lru_cache(maxsize=1024)
def _resolve_once(
    spec: str, inputs: tuple[Any, ...], masking: str, backend: str
) -> tuple[str, str]:
    return _resolve(AttentionPattern.from_spec(spec), Inputs(*inputs), masking, backend)


def _check_backend(backend: str, inputs: Inputs, pattern: AttentionPattern, masking: str) -> None:
    if backend == "numba":
        if inputs.device.type != "cpu":
            raise UserError(
                f"attention backend 'numba' runs on the CPU, got tensors on {inputs.device}; use"
                " 'triton', 'csr' or 'sdpa'"
            )
        if not cpu.available():
            raise UserError(
                "attention backend 'numba' needs numba: pip install numba, or use 'csr' or 'sdpa'"
            )
        if not cpu.supports(inputs.dtype):
            raise UserError(
                "attention backend 'numba' supports float32, float64, float16 or bfloat16, got"
                f" {inputs.dtype}"
            )
    if backend == "triton":
        reason = cuda.unsupported(
            pattern, inputs.dim, inputs.dtype, inputs.device, masking == "zero_logit"
        )
        if reason:
            raise UserError(f"attention backend 'triton' {reason}; use 'csr' or 'sdpa'")


def _fastest(inputs: Inputs, pattern: AttentionPattern, masking: str) -> tuple[str, str]:
    """The fastest backend, and why it is not the one for this device."""
    if pattern.keeps_all:
        return "sdpa", ""
    if inputs.device.type == "cuda":
        if pattern.sequence_length <= _cuda_dense_tokens(inputs):
            return "sdpa", ""
        reason = cuda.unsupported(
            pattern, inputs.dim, inputs.dtype, inputs.device, masking == "zero_logit"
        )
        return ("csr", f": triton {reason}") if reason else ("triton", "")
    if inputs.device.type != "cpu" or not cpu.available() or not cpu.supports(inputs.dtype):
        return "sdpa", ""
    return ("numba" if _sparse_enough(pattern.spec) else "sdpa"), ""


def _cuda_dense_tokens(inputs: Inputs) -> int:
    capability = cuda.capability(inputs.device.index)
    by_dtype = _CUDA_DENSE_TOKENS.get(capability, _CUDA_DENSE_TOKENS[9, 0])
    dtype = torch.float32 if inputs.dtype.itemsize >= 4 else torch.bfloat16
    return by_dtype[dtype][inputs.requires_grad]


@constant_to_compiler
def _sparse_enough(spec: str) -> bool:
    """Whether the sparse CPU kernels are faster than masked dense attention."""
    pattern = AttentionPattern.from_spec(spec)
    limit = next(share for length, share in _CPU_MAX_SHARE if pattern.sequence_length <= length)
    return pattern.kept_share <= limit
