"""The CUDA backend around the Triton kernels. On a CPU they run in Triton's
interpreter, for tests: TRITON_INTERPRET=1.

`docs/results/attention_gpu.md` has timings on one GPU, an H200. In float32 the
kernels beat dense attention from about 600 tokens; in bfloat16, where dense attention
uses tensor cores, they never do.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from fibopolicy.attention.operator import KERNELS, Kernels, dropped_sum, with_contiguous_rows
from fibopolicy.attention.patterns import AttentionPattern, OffsetPattern

#: Rows per program.
_ROWS = 32

_INSTALLED = importlib.util.find_spec("triton") is not None


def available() -> bool:
    """Whether Triton is installed."""
    return _INSTALLED


def supports(dtype: torch.dtype, pattern: AttentionPattern) -> bool:
    """Whether the kernels support a dtype and a pattern, which must be made of diagonals."""
    return dtype in (torch.float32, torch.float16, torch.bfloat16) and isinstance(
        pattern, OffsetPattern
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: AttentionPattern,
    zero_logit: bool,
    scale: float,
) -> None:
    """See `Kernels.forward`."""
    from fibopolicy.attention import triton_kernels as kernels

    q, k, v = with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(v)
    batch, heads, length, d = q.shape
    prefix, block = pattern.num_prefix, _block(d)
    offsets, counts = _offsets(pattern, q.device)
    sums = v.sum(dim=2, dtype=torch.float32).contiguous() if zero_logit else lse
    tensors = [x for tensor in (q, k, v, out) for x in (tensor, *tensor.stride()[:3])]
    patch_blocks = -(-pattern.num_tokens // _ROWS)
    kernels.forward_patches[(patch_blocks, batch * heads)](
        *tensors, lse, sums, offsets, counts, heads, length, prefix, d, scale, offsets.shape[1],
        D=block, R=_ROWS, ZERO_LOGIT=zero_logit,
    )  # fmt: skip
    if prefix:
        kernels.forward_prefix[(prefix, batch * heads)](
            *tensors, lse, heads, length, d, scale, D=block, R=_ROWS
        )


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: Tensor,
    pattern: AttentionPattern,
    zero_logit: bool,
    scale: float,
) -> None:
    """See `Kernels.backward`."""
    from fibopolicy.attention import triton_kernels as kernels

    grad, q, k, v = (with_contiguous_rows(x) for x in (grad, q, k, v))
    batch, heads, length, d = q.shape
    prefix, block = pattern.num_prefix, _block(d)
    offsets, counts = _offsets(pattern, q.device)
    mean = (grad.float() * out.float()).sum(dim=-1).contiguous()  # (B, h, T)
    patches = torch.arange(length, device=q.device) >= prefix
    sums = dropped_sum(grad, lse, patches).contiguous() if zero_logit else mean
    tensors: list[Any] = [x for tensor in (q, k, v, grad) for x in (tensor, *tensor.stride()[:3])]
    tensors += [*grads.unbind(0), *grads.stride()[1:4], lse, mean]
    patch_blocks = -(-pattern.num_tokens // _ROWS)
    kernels.backward_patches[(patch_blocks, batch * heads)](
        *tensors, sums, offsets, counts, heads, length, prefix, d, scale, offsets.shape[1],
        D=block, R=_ROWS, ZERO_LOGIT=zero_logit,
    )  # fmt: skip
    if prefix:
        kernels.backward_prefix[(prefix, batch * heads)](
            *tensors, heads, length, d, scale, D=block, R=_ROWS
        )


KERNELS["triton"] = Kernels(forward, backward)


def _block(d: int) -> int:
    """Width of a tile: Triton needs a power of two."""
    return max(16, 1 << (d - 1).bit_length())


@functools.lru_cache(maxsize=64)
def _offsets(pattern: AttentionPattern, device: torch.device) -> tuple[Tensor, Tensor]:
    """Signed offsets `(h, most)` and their number per head `(h,)`, int32."""
    assert isinstance(pattern, OffsetPattern)
    heads = [sorted({sign * o for o in offsets for sign in (-1, 1)}) for offsets in pattern.offsets]
    most = max(1, max(len(signed) for signed in heads))
    padded = [signed + [0] * (most - len(signed)) for signed in heads]
    return (
        torch.tensor(padded, dtype=torch.int32, device=device),
        torch.tensor([len(signed) for signed in heads], dtype=torch.int32, device=device),
    )
