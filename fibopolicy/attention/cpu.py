"""The CPU backend: chooses a compiled kernel and its number of threads.

Memory beyond the results is linear in T: the logits of a few rows per thread, and in
the backward pass two numbers per kept pair of one head per thread.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fibopolicy.attention.operator import KERNELS, Kernels, dropped_sum, with_contiguous_rows
from fibopolicy.attention.patterns import AttentionPattern, Neighbours, neighbours

_STORAGE = {
    torch.float32: "f32",
    torch.float64: "f64",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
}
#: Head dimensions with a dedicated kernel, which holds a row in registers; others are
#: processed in chunks of `_CHUNK` numbers.
_WHOLE_ROWS = (32, 64, 128)
_CHUNK = 16
#: The kernels read and write whole vectors, so scratch memory ends with room for one.
_VECTOR_BYTES = 64
#: The next head's keys and values are prefetched up to this size, a fraction of the L2
#: cache.
_PREFETCH_BYTES = 1 << 19
#: Larger results would evict everything else from a core's cache; they bypass it.
_CACHE_BYTES = 1 << 22
#: Below this many multiplications a second thread costs more than it saves.
_SERIAL_BELOW = 1 << 17
#: Alignment of the data of each thread: two cache lines, against false sharing.
_ALIGNMENT = 128

_INSTALLED = importlib.util.find_spec("numba") is not None


def available() -> bool:
    """Whether numba, which compiles the kernels, is installed."""
    return _INSTALLED


def supports(dtype: torch.dtype) -> bool:
    """Whether the kernels support a dtype."""
    return dtype in _STORAGE


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
    kernels = _kernels()
    q, k, v = with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(v)
    call = _Call(q, lse, pattern, zero_logit, scale)
    # For each row of a group: the highest logit, the sum of weights, the dropped
    # weight, and the logits, which start at a new vector.
    logits = _pairs_within(call.neighbours, kernels.GROUP) * call.size
    scratch = (q.shape[-1] + 3 * kernels.GROUP) * call.size + logits
    scratch += (kernels.GROUP + 1) * _VECTOR_BYTES
    sums = v.sum(dim=2, dtype=lse.dtype) if zero_logit and call.blocks > 1 else None
    call.run("forward", {"q": q, "k": k, "v": v}, {"out": out}, scratch, sums=sums)


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
    kernels = _kernels()
    q, k, v, out, grad = (with_contiguous_rows(x) for x in (q, k, v, out, grad))
    call = _Call(q, lse, pattern, zero_logit, scale)
    inputs = {"q": q, "k": k, "v": v, "out": out, "grad": grad}
    results = dict(zip(("dq", "dk", "dv"), grads.unbind(0), strict=True))
    row = q.shape[-1] * call.size
    # a weight and a slope for each pair
    pairs = 2 * (call.neighbours.pairs_per_head + _VECTOR_BYTES // call.size)
    if call.blocks == 1:
        call.run("backward", inputs, results, row + pairs * call.size, phase=kernels.WHOLE)
        return
    # Several threads share a head: all its weights must be complete before any thread
    # gathers them.
    shared = lse.new_empty((q.shape[0] * q.shape[1], pairs))
    drops_keys = torch.from_numpy(call.neighbours.start).diff(dim=1) < q.shape[2]  # (h, T)
    sums = dropped_sum(grad, lse, drops_keys).contiguous() if zero_logit else None
    for phase in (kernels.FIRST, kernels.SECOND):
        call.run("backward", inputs, results, row, phase=phase, sums=sums, shared=shared)


KERNELS["numba"] = Kernels(forward, backward, dim_multiple=_CHUNK)


@functools.lru_cache(maxsize=64)
def _pairs_within(near: Neighbours, rows: int) -> int:
    """The largest number of kept pairs in `rows` consecutive rows of one head."""
    last = near.start.shape[1] - 1
    return max(
        int((near.start[:, min(i + rows, last)] - near.start[:, i]).max()) for i in range(last)
    )


#: Two counters that threads share, each alone on its cache lines.
_Counters = ctypes.c_int64 * (2 * _ALIGNMENT // 8)


class _Call:
    """What forward and backward share: the choice of the kernel, the split into units,
    the number of threads.
    """

    def __init__(
        self, q: Tensor, lse: Tensor, pattern: AttentionPattern, zero_logit: bool, scale: float
    ) -> None:
        self.batch, self.heads, self.length, head_dim = q.shape
        single = head_dim in _WHOLE_ROWS and q.dtype != torch.float64
        self.width = head_dim if single else _CHUNK
        self.chunks = head_dim // self.width
        self.kernel = (_STORAGE[q.dtype], self.width, single)
        self.neighbours = neighbours(pattern)
        self.zero_logit, self.scale = zero_logit, scale
        self.lse, self.size = lse, lse.element_size()
        work = self.batch * len(self.neighbours.key) * head_dim
        self.threads = 1 if work < _SERIAL_BELOW else torch.get_num_threads()
        # several units per thread, since some take longer
        wanted = 4 * self.threads if self.threads > 1 else 1
        self.blocks = min(math.ceil(wanted / max(self.batch * self.heads, 1)), self.length)

    def run(
        self,
        name: str,
        inputs: dict[str, Tensor],
        results: dict[str, Tensor],
        scratch_bytes: int,
        *,
        phase: int = 0,
        sums: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> None:
        """Fill in the argument record of a kernel and run it."""
        kernels = _kernels()
        kernel = kernels.kernels(*self.kernel)[name]
        scratch_bytes = math.ceil(scratch_bytes / _ALIGNMENT) * _ALIGNMENT
        scratch = self.lse.new_empty(self.threads * scratch_bytes + _ALIGNMENT, dtype=torch.uint8)
        counters = _Counters()
        ticket = ctypes.addressof(counters)
        size = inputs["q"].element_size()
        row_bytes = self.chunks * self.width * size
        # Results have no gaps, so every row starts at a multiple of 64 bytes if the
        # first does.
        nontemporal = (
            sum(x.nbytes for x in results.values()) > _CACHE_BYTES
            and self.width * size % 64 == 0
            and all(x.data_ptr() % 64 == 0 for x in results.values())
        )
        record = kernel.record(
            scale=self.scale,
            ticket=ticket,
            thread=ticket + _ALIGNMENT,
            units=self.batch * self.heads * self.blocks,
            blocks=self.blocks,
            heads=self.heads,
            length=self.length,
            chunks=self.chunks,
            zero_logit=self.zero_logit,
            phase=phase,
            scratch=math.ceil(scratch.data_ptr() / _ALIGNMENT) * _ALIGNMENT,
            scratch_bytes=scratch_bytes,
            shared=0 if shared is None else shared.data_ptr(),
            shared_bytes=0 if shared is None else shared.stride(0) * self.size,
            lse=self.lse.data_ptr(),
            sums=0 if sums is None else sums.data_ptr(),
            prefetch_next=self.blocks == 1 and 2 * self.length * row_bytes <= _PREFETCH_BYTES,
            nontemporal=nontemporal,
            **self.neighbours.addresses,
            **{name: _strided(x, size) for name, x in (inputs | results).items()},
        )
        _run(kernel.function.address, ctypes.addressof(record), self.threads)


def _strided(x: Tensor, size: int) -> tuple[int, int, int, int]:
    batch, head, token, _ = x.stride()
    return x.data_ptr(), batch * size, head * size, token * size


@functools.cache
def _kernels() -> ModuleType:
    """The compiled kernels, imported on first use, since they need numba."""
    from fibopolicy.attention import cpu_kernels

    return cpu_kernels


# A kernel runs on as many threads as torch uses. With GNU's or Intel's OpenMP, it runs
# on torch's thread team: those threads are awake already, and no second pool competes
# with them. Several Python threads may call it at once, since each has its own team.
# Otherwise a Python thread pool does the same, slightly slower. A forked child has lost
# the team, and OpenMP would wait for it forever, so kernels run serially there.

_in_forked_child = False


def _note_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _run(function: int, argument: int, threads: int) -> None:
    """Call the C function at address `function` with the address `argument`, at least
    once and up to `threads` times at once, without the GIL.
    """
    call: Any = _caller(function)
    if threads <= 1 or _in_forked_child:
        call(argument)
    elif (parallel := _openmp()) is not None:
        parallel(function, argument, threads, 0)
    else:
        others = [_pool(threads - 1).submit(call, argument) for _ in range(threads - 1)]
        call(argument)
        for other in others:
            other.result()


@functools.cache
def _caller(function: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP that torch has
    loaded; None if it has no such function.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fibottention")
