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
_WHOLE_ROWS = (16, 32, 64, 128)
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
    launch = _launch(
        "forward", pattern.spec, zero_logit, scale, torch.get_num_threads(), q.dtype, q.shape,
        (q.stride(), k.stride(), v.stride(), out.stride()),
    )  # fmt: skip
    sums = v.sum(dim=2, dtype=lse.dtype) if zero_logit and launch.blocks > 1 else None
    launch((q, k, v, out), lse, sums=sums)


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
    q, k, v, out, grad = (with_contiguous_rows(x) for x in (q, k, v, out, grad))
    tensors = (q, k, v, out, grad, *grads.unbind(0))
    launch = _launch(
        "backward", pattern.spec, zero_logit, scale, torch.get_num_threads(), q.dtype, q.shape,
        tuple([x.stride() for x in tensors]),
    )  # fmt: skip
    kernels = _kernels()
    if launch.blocks == 1:
        launch(tensors, lse, phase=kernels.WHOLE)
        return
    # Several threads share a head: all its weights must be complete before any thread
    # gathers them.
    shared = lse.new_empty((q.shape[0] * q.shape[1], launch.weights))
    near = neighbours(pattern)
    drops_keys = torch.from_numpy(near.start).diff(dim=1) < q.shape[2]  # (h, T)
    sums = dropped_sum(grad, lse, drops_keys).contiguous() if zero_logit else None
    for phase in (kernels.FIRST, kernels.SECOND):
        launch(tensors, lse, phase=phase, sums=sums, shared=shared)


KERNELS["numba"] = Kernels(forward, backward, dim_multiple=_CHUNK)


class _Launch:
    """A kernel with all that depends only on the pattern, the shape and the strides:
    the split into units, the number of threads, and most of the kernel's arguments.

    Args:
        name: "forward" or "backward".
        threads: at most this many.
        shape, strides: `(B, h, T, d)`, and the strides of each tensor of the kernel, in
            its order.

    Attributes:
        blocks: units per head, each a block of rows.
        weights: what the backward pass stores for the pairs of a head: that many
            numbers.
    """

    def __init__(
        self,
        name: str,
        spec: str,
        zero_logit: bool,
        scale: float,
        threads: int,
        dtype: torch.dtype,
        shape: torch.Size,
        strides: tuple[tuple[int, ...], ...],
    ) -> None:
        kernels = _kernels()
        batch, heads, length, head_dim = shape
        single = head_dim in _WHOLE_ROWS and dtype != torch.float64
        width = head_dim if single else _CHUNK
        kernel = kernels.kernel(name, _STORAGE[dtype], width, single)
        near = neighbours(AttentionPattern.from_spec(spec))
        work = batch * len(near.key) * head_dim
        self.threads = 1 if work < _SERIAL_BELOW else threads
        # several units per thread, since some take longer
        wanted = 4 * self.threads if self.threads > 1 else 1
        self.blocks = min(math.ceil(wanted / max(batch * heads, 1)), length)
        row_bytes, size = head_dim * dtype.itemsize, 8 if dtype == torch.float64 else 4
        # a weight and a slope for each pair
        self.weights = 2 * (near.pairs_per_head + _VECTOR_BYTES // size)
        if name == "forward":
            # For each row of a group: the highest logit, the sum of weights, the
            # dropped weight, and the logits, which start at a new vector.
            scratch = (head_dim + 3 * kernels.GROUP + _pairs_within(near, kernels.GROUP)) * size
            scratch += (kernels.GROUP + 1) * _VECTOR_BYTES
        else:
            scratch = (head_dim + (self.weights if self.blocks == 1 else 0)) * size
        self.scratch_bytes = math.ceil(scratch / _ALIGNMENT) * _ALIGNMENT
        # Results have no gaps, so every row starts at a multiple of 64 bytes if the
        # first does.
        results = slice(3, None) if name == "forward" else slice(5, None)
        bytes_of_results = len(strides[results]) * batch * heads * length * row_bytes
        self.bypasses_caches = bytes_of_results > _CACHE_BYTES and width * dtype.itemsize % 64 == 0
        self.results = results
        self.record, self.names = kernel.record, kernel.record.TENSORS
        self.function = kernel.function.address
        self.neighbours = near  # whose addresses are in the record
        self.arguments = bytes(
            kernel.record(
                scale=scale,
                units=batch * heads * self.blocks,
                blocks=self.blocks,
                heads=heads,
                length=length,
                chunks=head_dim // width,
                zero_logit=zero_logit,
                scratch_bytes=self.scratch_bytes,
                shared_bytes=self.weights * size,
                prefetch_next=self.blocks == 1 and 2 * length * row_bytes <= _PREFETCH_BYTES,
                **near.addresses,
                **{
                    tensor: (0, *(dtype.itemsize * stride for stride in by_dim[:3]))
                    for tensor, by_dim in zip(self.names, strides, strict=True)
                },
            )
        )

    def __call__(
        self,
        tensors: tuple[Tensor, ...],
        lse: Tensor,
        *,
        phase: int = 0,
        sums: Tensor | None = None,
        shared: Tensor | None = None,
    ) -> None:
        """Run the kernel on its tensors."""
        record: Any = self.record.from_buffer_copy(self.arguments)
        for name, tensor in zip(self.names, tensors, strict=True):
            getattr(record, name).address = tensor.data_ptr()
        record.lse = lse.data_ptr()
        counters = _Counters()
        record.ticket = ctypes.addressof(counters)
        record.thread = record.ticket + _ALIGNMENT
        bytes_of_all = self.threads * self.scratch_bytes + _ALIGNMENT
        scratch = lse.new_empty(bytes_of_all, dtype=torch.uint8)
        record.scratch = math.ceil(scratch.data_ptr() / _ALIGNMENT) * _ALIGNMENT
        record.phase = phase
        if sums is not None:
            record.sums = sums.data_ptr()
        if shared is not None:
            record.shared = shared.data_ptr()
        if self.bypasses_caches:
            record.nontemporal = all(x.data_ptr() % 64 == 0 for x in tensors[self.results])
        _run(self.function, ctypes.addressof(record), self.threads)


#: Makes a `_Launch` once for equal arguments.
_launch = functools.lru_cache(maxsize=1024)(_Launch)


@functools.lru_cache(maxsize=64)
def _pairs_within(near: Neighbours, rows: int) -> int:
    """The largest number of kept pairs in `rows` consecutive rows of one head."""
    last = near.start.shape[1] - 1
    return max(
        int((near.start[:, min(i + rows, last)] - near.start[:, i]).max()) for i in range(last)
    )


#: Two counters that threads share, each alone on its cache lines.
_Counters = ctypes.c_int64 * (2 * _ALIGNMENT // 8)


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
