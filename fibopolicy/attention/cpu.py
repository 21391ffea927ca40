"""The CPU backend around the compiled kernels: what fits them, which one runs, and on how many threads.

Memory beyond the results is linear in T: logits of a few rows per thread, in backward also two numbers per kept pair of
one head per thread.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fibopolicy.attention import threads
from fibopolicy.attention.neighbours import Neighbours, neighbours
from fibopolicy.attention.patterns import AttentionPattern

_STORAGE = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}
#: Head dimensions that get a kernel of their own, with a row in registers; others go in chunks of `_CHUNK` numbers.
_WHOLE_ROWS = (32, 64, 128)
_CHUNK = 16
#: The kernels read and write whole vectors; a row's scratch ends with room for one.
_VECTOR_BYTES = 64
#: Below this many multiplications a second thread costs more than it saves.
_SERIAL_BELOW = 1 << 17


def available() -> bool:
    """Whether the compiled kernels can be had: numba is installed."""
    return importlib.util.find_spec("numba") is not None


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels know a dtype."""
    return dtype in _STORAGE


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, zero_logit: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of `(B, h, T, d)` tensors on the CPU.

    Returns:
        out: `(B, h, T, d)`, laid out by `empty_like`; and the logarithm of each query's sum of weights,
        `(B, h, T)` in float32 (float64 for float64 inputs).
    """
    q, k, v = (_readable(x) for x in (q, k, v))
    out = empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=_compute_dtype(q))
    call = _Call(q, pattern, zero_logit, scale, lse)
    if q.numel():
        from fibopolicy.attention import cpu_kernels

        scratch = (q.shape[-1] + call.neighbours.pairs_per_token) * lse.element_size() + _VECTOR_BYTES
        sums = v.sum(dim=2, dtype=lse.dtype) if zero_logit and call.blocks > 1 else None
        call.run(0, cpu_kernels.FORWARD, 0, scratch, None, sums, (q, k, v, out))
    return out, lse


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: AttentionPattern,
    zero_logit: bool,
    scale: float,
) -> Tensor:
    """The gradients of q, k and v, stacked: `(3, B, h, T, d)`, from those of `forward`'s `out`."""
    grad, q, k, v, out = (_readable(x) for x in (grad, q, k, v, out))
    # One block of memory: three would be given back to the system and faulted in again at every step.
    grads = empty_like(q, 3)
    call = _Call(q, pattern, zero_logit, scale, lse)
    if q.numel():
        from fibopolicy.attention import cpu_kernels

        size = lse.element_size()
        pairs = 2 * (call.neighbours.pairs_per_head + _VECTOR_BYTES // size)  # a weight and a slope for each
        tensors = (q, k, v, out, grad, *grads.unbind(0))
        scratch = q.shape[-1]
        if call.blocks == 1:
            call.run(1, cpu_kernels.BACKWARD, cpu_kernels.WHOLE, (scratch + pairs) * size, None, None, tensors)
        else:
            # Rows of one head on several threads: all its weights must stand before anyone gathers them.
            shared = torch.empty(q.shape[0] * q.shape[1], pairs, dtype=lse.dtype)
            sums = (torch.exp(-lse)[:, :, None] @ grad.to(lse.dtype))[:, :, 0].contiguous() if zero_logit else None
            for phase in (cpu_kernels.FIRST, cpu_kernels.SECOND):
                call.run(1, cpu_kernels.BACKWARD, phase, scratch * size, shared, sums, tensors)
    return grads


def empty_like(q: Tensor, copies: int | None = None) -> Tensor:
    """Memory for a result of q's shape `(B, h, T, d)`, or for several, `(copies, B, h, T, d)`.

    It is laid out as `(B, T, h, d)` where q's heads of one token stand closer than its tokens, as after a packed projection:
    then `out.transpose(1, 2).reshape(B, T, h * d)` copies nothing.
    """
    batch, heads, length, dim = q.shape
    lead = () if copies is None else (copies,)
    if heads > 1 and q.stride(1) < q.stride(2):
        return q.new_empty((*lead, batch, length, heads, dim)).transpose(-3, -2)
    return q.new_empty((*lead, batch, heads, length, dim))


def padded_dim(head_dim: int) -> int:
    """The head dimension the kernels work on: a multiple of a chunk."""
    return math.ceil(head_dim / _CHUNK) * _CHUNK


def pad(x: Tensor) -> Tensor:
    """`x` with zeros appended to the head dimension where the kernels need it; they change no product and no sum."""
    missing = padded_dim(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _readable(x: Tensor) -> Tensor:
    """The kernels step freely over batch, head and token, but read a row's numbers side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class _Call:
    """What forward and backward decide alike: the kernel, the split into units, the number of threads."""

    def __init__(self, q: Tensor, pattern: AttentionPattern, zero_logit: bool, scale: float, lse: Tensor) -> None:
        self.batch, self.heads, self.length, head_dim = q.shape
        self.storage = _STORAGE[q.dtype]
        self.single = head_dim in _WHOLE_ROWS and q.dtype != torch.float64
        self.width = head_dim if self.single else _CHUNK
        self.chunks = head_dim // self.width
        self.neighbours: Neighbours = neighbours(pattern)
        self.zero_logit, self.scale, self.lse = zero_logit, scale, lse
        work = self.batch * len(self.neighbours.key) * head_dim
        self.threads = 1 if work < _SERIAL_BELOW else torch.get_num_threads()
        wanted = 4 * self.threads if self.threads > 1 else 1  # several units a thread, as some take longer
        self.blocks = min(math.ceil(wanted / max(self.batch * self.heads, 1)), self.length)

    def run(
        self,
        which: int,
        record: np.dtype[Any],
        phase: int,
        scratch_bytes: int,
        shared: Tensor | None,
        sums: Tensor | None,
        tensors: tuple[Tensor, ...],
    ) -> None:
        from fibopolicy.attention import cpu_kernels

        kernel = cpu_kernels.kernels(self.storage, self.width, self.single)[which]
        scratch_bytes = (scratch_bytes + 127) // 128 * 128  # threads keep off each other's cache lines
        scratch = np.empty(self.threads * scratch_bytes + 128, np.uint8)
        counters = np.zeros(32, np.int64)
        address = counters.ctypes.data
        near = self.neighbours
        values = [
            self.scale, address, address + 128, self.batch * self.heads * self.blocks, self.blocks, self.heads, self.length,
            self.chunks, int(self.zero_logit), phase, near.start.ctypes.data, near.key.ctypes.data, near.twin.ctypes.data,
            scratch.ctypes.data, scratch_bytes, 0 if shared is None else shared.data_ptr(),
            0 if shared is None else shared.stride(0) * shared.element_size(), self.lse.data_ptr(),
            0 if sums is None else sums.data_ptr(),
        ]  # fmt: skip
        size = tensors[0].element_size()
        for x in tensors:
            b, h, t, _ = x.stride()
            values += [x.data_ptr(), b * size, h * size, t * size]
        call = np.array([tuple(values)], dtype=record)
        threads.run(kernel.address, call.ctypes.data, self.threads)
