"""The CPU backend around the compiled kernels: what fits them, which one runs, and on
how many threads.

Memory beyond the results is linear in T: logits of a few rows per thread, in backward
also two numbers per kept pair of one head per thread.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import struct
from array import array
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from fibopolicy.attention import threads
from fibopolicy.attention.neighbours import Neighbours, neighbours
from fibopolicy.attention.patterns import AttentionPattern

_STORAGE = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
#: Head dimensions that get a kernel of their own, with a row in registers; others go in
#: chunks of `_CHUNK` numbers.
_WHOLE_ROWS = (32, 64, 128)
_CHUNK = 16
#: The kernels read and write whole vectors; a row's scratch ends with room for one.
_VECTOR_BYTES = 64
#: The next head's keys and values are fetched ahead if they take no more than this, a
#: share of the second-level cache.
_AHEAD_BYTES = 1 << 19
#: Results larger than this would push everything else out of a core's cache, and are
#: written past it.
_CACHE_BYTES = 1 << 22
_COUNTERS = bytes(256)
#: Below this many multiplications a second thread costs more than it saves.
_SERIAL_BELOW = 1 << 17


_INSTALLED = importlib.util.find_spec("numba") is not None


def available() -> bool:
    """Whether the compiled kernels can be had: numba is installed."""
    return _INSTALLED


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels know a dtype."""
    return dtype in _STORAGE


def forward(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, zero_logit: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of `(B, h, T, d)` tensors on the CPU.

    Returns:
        out: `(B, h, T, d)`, laid out by `empty_like`; and the logarithm of each query's
            sum of weights,
        `(B, h, T)` in float32 (float64 for float64 inputs).
    """
    out = empty_like(q)
    q, k, v = _readable(q, k, v)
    lse = q.new_empty(q.shape[:3], dtype=_compute_dtype(q))
    call = _Call(q, pattern, zero_logit, scale, lse)
    if q.numel():
        group = _kernels().GROUP
        # A peak, a sum and a dropped weight for each row of a group, and its logits,
        # each row's in vectors of their own.
        logits = _pairs_within(call.neighbours, group) * lse.element_size() + group * _VECTOR_BYTES
        scratch = (q.shape[-1] + 3 * group) * lse.element_size() + logits + _VECTOR_BYTES
        sums = v.sum(dim=2, dtype=lse.dtype) if zero_logit and call.blocks > 1 else None
        call.run(0, 0, scratch, None, sums, (q, k, v), (out,))
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
    grads: Tensor | None = None,
) -> Tensor:
    """The gradients of q, k and v, stacked: `(3, B, h, T, d)`, from those of
    `forward`'s `out`; into `grads` if given.
    """
    grad, q, k, v, out = _readable(grad, q, k, v, out)
    if grads is None:
        # One block of memory: three would be given back to the system and faulted in
        # again at every step.
        grads = q.new_empty((3, *q.shape))
    call = _Call(q, pattern, zero_logit, scale, lse)
    if q.numel():
        kernels = _kernels()
        size = lse.element_size()
        # a weight and a slope for each
        pairs = 2 * (call.neighbours.pairs_per_head + _VECTOR_BYTES // size)
        tensors = (q, k, v, out, grad), grads.unbind(0)
        scratch = q.shape[-1] * size
        if call.blocks == 1:
            scratch += pairs * size
            call.run(1, kernels.WHOLE, scratch, None, None, *tensors)
        else:
            # Rows of one head on several threads: all its weights must stand before
            # anyone gathers them.
            shared = lse.new_empty((q.shape[0] * q.shape[1], pairs))
            drops = torch.from_numpy(call.neighbours.start).diff(dim=1) < q.shape[2]  # (h, T)
            sums = dropped_sum(grad, lse, drops).contiguous() if zero_logit else None
            for phase in (kernels.FIRST, kernels.SECOND):
                call.run(1, phase, scratch, shared, sums, *tensors)
    return grads


def dropped_sum(grad: Tensor, lse: Tensor, drops: Tensor) -> Tensor:
    """What the dropped pairs of "zero_logit" add to every key's gradient of v, as if
    all pairs were dropped: `(B, h, d)`.

    `drops`, bool `(h, T)` or `(T,)`, leaves out rows that keep every key: exp(-lse)
    could overflow there.
    """
    weight = torch.exp(-lse).masked_fill(~drops, 0.0)  # (B, h, T)
    # Not as a matrix product: under autocast that would be computed in half precision.
    return (weight[..., None] * grad.to(lse.dtype)).sum(dim=2)


def empty_like(q: Tensor) -> Tensor:
    """Memory for a result of q's shape `(B, h, T, d)`.

    It is laid out as `(B, T, h, d)` where q's heads of one token stand closer than its
    tokens, as after a packed projection: then `out.transpose(1, 2).reshape(B, T, h *
    d)` copies nothing.
    """
    _, heads, length, dim = q.shape
    if q.stride(-1) == 1 and heads > 1 and q.stride(1) < q.stride(2):
        # Not as a view of something else, which an operator's result must not be.
        return q.new_empty_strided(q.shape, (length * heads * dim, dim, heads * dim, 1))
    return q.new_empty(q.shape)


def padded_dim(head_dim: int) -> int:
    """The head dimension the kernels work on: a multiple of a chunk."""
    return math.ceil(head_dim / _CHUNK) * _CHUNK


def pad(x: Tensor) -> Tensor:
    """`x` with zeros appended to the head dimension where the kernels need it; they
    change no product and no sum.
    """
    missing = padded_dim(x.shape[-1]) - x.shape[-1]
    return F.pad(x, (0, missing)) if missing else x


def _readable(*tensors: Tensor) -> list[Tensor]:
    """The kernels step freely over batch, head and token, but read a row's numbers side by side."""
    return [(x if x.stride(-1) == 1 else x.contiguous()).resolve_neg() for x in tensors]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@functools.lru_cache(maxsize=64)
def _pairs_within(near: Neighbours, rows: int) -> int:
    """The largest number of kept pairs that so many consecutive rows of one head have together."""
    last = near.start.shape[1] - 1
    return max(
        int((near.start[:, min(i + rows, last)] - near.start[:, i]).max()) for i in range(last)
    )


class _Call:
    """What forward and backward decide alike: the kernel, the split into units, the
    number of threads.
    """

    def __init__(
        self, q: Tensor, pattern: AttentionPattern, zero_logit: bool, scale: float, lse: Tensor
    ) -> None:
        self.batch, self.heads, self.length, head_dim = q.shape
        self.storage = _STORAGE[q.dtype]
        self.single = head_dim in _WHOLE_ROWS and q.dtype != torch.float64
        self.width = head_dim if self.single else _CHUNK
        self.chunks = head_dim // self.width
        self.neighbours: Neighbours = neighbours(pattern)
        self.zero_logit, self.scale, self.lse = zero_logit, scale, lse
        work = self.batch * len(self.neighbours.key) * head_dim
        self.threads = 1 if work < _SERIAL_BELOW else torch.get_num_threads()
        # several units a thread, as some take longer
        wanted = 4 * self.threads if self.threads > 1 else 1
        self.blocks = min(math.ceil(wanted / max(self.batch * self.heads, 1)), self.length)

    def run(
        self,
        which: int,
        phase: int,
        scratch_bytes: int,
        shared: Tensor | None,
        sums: Tensor | None,
        tensors: tuple[Tensor, ...],
        results: tuple[Tensor, ...],
    ) -> None:
        kernel = _kernels().kernels(self.storage, self.width, self.single)[which]
        # threads keep off each other's cache lines
        scratch_bytes = (scratch_bytes + 127) // 128 * 128
        scratch = self.lse.new_empty(self.threads * scratch_bytes + 128, dtype=torch.uint8)
        scratch_address = (scratch.data_ptr() + 127) // 128 * 128
        near = self.neighbours
        size = tensors[0].element_size()
        head_bytes = 2 * self.length * self.chunks * self.width * size
        # Every row of a result begins at a multiple of 64 bytes if the first does:
        # results are laid out without gaps.
        past = sum(x.nbytes for x in results) > _CACHE_BYTES and self.width * size % 64 == 0
        past = past and all(x.data_ptr() % 64 == 0 for x in results)
        ahead = self.blocks == 1 and head_bytes <= _AHEAD_BYTES
        # What the kernel reads: two ticket counters, each alone on its cache lines,
        # then its record, which names their places.
        call = array("q", _COUNTERS)
        values = [
            _bits(self.scale), 0, 0, self.batch * self.heads * self.blocks, self.blocks, self.heads, self.length,  # noqa: E501
            self.chunks, int(self.zero_logit), phase, *near.addresses,
            scratch_address, scratch_bytes, 0 if shared is None else shared.data_ptr(),
            0 if shared is None else shared.stride(0) * shared.element_size(), self.lse.data_ptr(),
            0 if sums is None else sums.data_ptr(), int(ahead), int(past),
        ]  # fmt: skip
        for x in (*tensors, *results):
            b, h, t, _ = x.stride()
            values += (x.data_ptr(), b * size, h * size, t * size)
        call.extend(values)
        address = call.buffer_info()[0]
        call[33], call[34] = address, address + 128
        threads.run(kernel.address, address + len(_COUNTERS), self.threads)


@functools.lru_cache(maxsize=64)
def _bits(number: float) -> int:
    """A float64 as the integer of the same bits."""
    return int(struct.unpack("q", struct.pack("d", number))[0])


@functools.cache
def _kernels() -> ModuleType:
    """The compiled kernels, imported when they are needed first: they need numba."""
    from fibopolicy.attention import cpu_kernels

    return cpu_kernels
