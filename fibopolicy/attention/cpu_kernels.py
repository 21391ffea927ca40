"""The CPU kernels: the work of one thread on its (batch, head, block of rows) units.

A kernel is a C function of a pointer to a `FORWARD` or `BACKWARD` record. It neither
allocates memory nor raises errors. Threads take units from a shared ticket counter
until none is left, so any number of threads computes the same numbers. Rows are
gathered, never scattered: no two units write to the same row.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types

from fibopolicy.attention import simd
from fibopolicy.attention.simd import (
    add_scaled,
    difference,
    exponential,
    fence,
    first,
    highest,
    load,
    logarithm,
    maximum,
    prefetch,
    read,
    splat,
    store,
    store_first,
    stream,
    take_ticket,
    total,
    totals,
    write,
)

#: The arguments of every kernel, all but `scale` as int64. Byte addresses: `ticket` and
#: `thread`, counters that assign units and scratch memory; `start`, `key` and
#: `transpose` of the neighbour lists; `scratch`; `lse`; optionally `shared` (weights
#: and slopes per head) and `sums` (over all tokens). Flags: `prefetch_next`, prefetch
#: the next head; `nontemporal`, write results past the caches.
_ARGUMENTS = (
    *("ticket", "thread", "units", "blocks", "heads", "length", "chunks", "zero_logit", "phase"),
    *("start", "key", "transpose", "scratch", "scratch_bytes", "shared", "shared_bytes"),
    *("lse", "sums", "prefetch_next", "nontemporal"),
)


class Strided(ctypes.Structure):
    """A tensor `(B, h, T, d)`: its address, and its strides over batch, head and token."""

    _fields_ = [(name, ctypes.c_int64) for name in ("address", "batch", "head", "token")]


def _record(*tensors: str) -> type[ctypes.Structure]:
    """The argument record of a kernel: `_ARGUMENTS` and its tensors, named by `TENSORS`."""
    fields = [("scale", ctypes.c_double), *((name, ctypes.c_int64) for name in _ARGUMENTS)]
    fields += [(name, Strided) for name in tensors]
    return type("Record", (ctypes.Structure,), {"_fields_": fields, "TENSORS": tensors})


FORWARD = _record("q", "k", "v", "out")
BACKWARD = _record("q", "k", "v", "out", "grad", "dq", "dk", "dv")

#: Rows per group. Each step of a kernel runs over a whole group: its results stay in
#: cache for the next step, and rows do not wait for each other within a step. One row
#: alone would spend most of its time waiting for its previous instruction.
GROUP = 32
#: Long sums, for example over all tokens for a prefix token, are sums of partial sums
#: of this many terms, which keeps rounding errors small.
TERMS = 64

#: `phase` of BACKWARD: a unit computes a whole head, or its rows in the first or the
#: second pass.
WHOLE, FIRST, SECOND = 0, 1, 2


class Kernel(NamedTuple):
    function: Any
    record: type[ctypes.Structure]


@functools.cache
def kernel(name: str, storage: str, width: int, single: bool) -> Kernel:
    """The compiled "forward" or "backward" for rows of `width` numbers, or of `chunks`
    times `width` if not `single`.

    `storage` is "f32", "f64", "f16" or "bf16"; half precision is computed in float32.
    The first call in the first process compiles; numba caches the result on disk.
    """
    try:
        return _build(name, storage, width, single, simd.VERSION, True)
    except RuntimeError:  # numba found no writable place for its cache
        return _build(name, storage, width, single, simd.VERSION, False)


# These functions are inlined into the kernels, which pass their constants. If they were
# closures of a kernel, numba would make them part of its cache key, and no process
# would find what another one compiled.


@njit(inline="always")
def _head(tensor, batch, head):  # type: ignore[no-untyped-def]
    """The address of a head's first row."""
    return tensor.address + batch * tensor.batch + head * tensor.head


@njit(inline="always")
def _dot(STORAGE, WIDTH, STEP, x0, x, y, chunks):  # type: ignore[no-untyped-def]
    """x . y, where `x0` is the first chunk of x, in registers."""
    product = x0 * load(STORAGE, WIDTH, y)
    for c in range(1, chunks):
        product = product + load(STORAGE, WIDTH, x + c * STEP) * load(STORAGE, WIDTH, y + c * STEP)
    return total(product)


@njit(inline="always")
def _dots(STORAGE, WIDTH, STEP, REAL, SIZE, x0, x, y, stride, keys, count, chunks, target):  # type: ignore[no-untyped-def]
    """x . (row of y), for each row named by `keys`, into `target`."""
    for i in range(0, count - 3, 4):
        a = y + read("i32", keys + i * 4) * stride
        b = y + read("i32", keys + i * 4 + 4) * stride
        c = y + read("i32", keys + i * 4 + 8) * stride
        d = y + read("i32", keys + i * 4 + 12) * stride
        a_product = x0 * load(STORAGE, WIDTH, a)
        b_product = x0 * load(STORAGE, WIDTH, b)
        c_product = x0 * load(STORAGE, WIDTH, c)
        d_product = x0 * load(STORAGE, WIDTH, d)
        for chunk in range(1, chunks):
            more = load(STORAGE, WIDTH, x + chunk * STEP)
            a_product = a_product + more * load(STORAGE, WIDTH, a + chunk * STEP)
            b_product = b_product + more * load(STORAGE, WIDTH, b + chunk * STEP)
            c_product = c_product + more * load(STORAGE, WIDTH, c + chunk * STEP)
            d_product = d_product + more * load(STORAGE, WIDTH, d + chunk * STEP)
        store(REAL, totals(a_product, b_product, c_product, d_product), target + i * SIZE)
    for i in range(count // 4 * 4, count):
        row = y + read("i32", keys + i * 4) * stride
        write(REAL, target + i * SIZE, _dot(STORAGE, WIDTH, STEP, x0, x, row, chunks))


@njit(inline="always")
def _weighted_sum(STORAGE, WIDTH, REAL, SIZE, zero, result, weights, values, stride, keys, count):  # type: ignore[no-untyped-def]
    """`result` + the sum of weight * (row of values), for each row named by `keys`."""
    for low in range(0, count, TERMS):
        part = splat(WIDTH, zero)
        for i in range(low, min(low + TERMS, count)):
            value = load(STORAGE, WIDTH, values + read("i32", keys + i * 4) * stride)
            part = add_scaled(part, read(REAL, weights + i * SIZE), value)
        result = result + part
    return result


@njit(inline="always")
def _prefetch_row(STEP, chunks, address):  # type: ignore[no-untyped-def]
    """Prefetch a row, since the processor does not predict rows that are far apart."""
    for at in range(0, STEP * chunks, 64):
        prefetch(address + at)


@njit(inline="always")
def _write_result(STORAGE, nontemporal, vector, address):  # type: ignore[no-untyped-def]
    """Write a part of a result, past the caches if `nontemporal`, which saves reading
    the memory first.
    """
    if nontemporal:
        stream(STORAGE, vector, address)
    else:
        store(STORAGE, vector, address)


@njit(inline="always")
def _column_sum(  # type: ignore[no-untyped-def]
    STORAGE, WIDTH, STEP, REAL, SIZE, LANES,
    zero, values, stride, start, length, chunks, lse, target,
):  # fmt: skip
    """Sum `values` over tokens into `target`. With `lse`, sum only tokens that drop a
    key, each divided by exp(lse).
    """
    for c in range(chunks):
        result = splat(WIDTH, zero)
        for t in range(length):
            row = load(STORAGE, WIDTH, values + t * stride + c * STEP)
            if lse:
                if read("i64", start + t * 8 + 8) - read("i64", start + t * 8) == length:
                    continue
                weight = first(exponential(splat(LANES, zero - read(REAL, lse + t * SIZE))))
                result = add_scaled(result, weight, row)
            else:
                result = result + row
        store(REAL, result, target + c * WIDTH * SIZE)


def _build(name: str, STORAGE: str, WIDTH: int, SINGLE: bool, VERSION: int, cache: bool) -> Kernel:
    # Upper-case names are constants of the compiled code. Numba's disk cache tells
    # kernels apart by their values.
    REAL = "f64" if STORAGE == "f64" else "f32"
    SIZE = 8 if REAL == "f64" else 4
    LANES = 64 // SIZE

    STEP = WIDTH * {"f64": 8, "f32": 4, "f16": 2, "bf16": 2}[STORAGE]
    real = np.float64 if REAL == "f64" else np.float32
    LOWEST, ZERO, ONE = real(-np.inf), real(0), real(1)

    def forward(pointer):  # type: ignore[no-untyped-def]
        p = carray(pointer, 1)[0]
        version = VERSION  # noqa: F841 - part of the cache key
        length, zero_logit, scale = p.length, p.zero_logit, real(p.scale)
        chunks = 1 if SINGLE else p.chunks  # a constant if possible: its loops vanish
        own_sums = p.scratch + take_ticket(p.thread) * p.scratch_bytes
        peaks = own_sums + chunks * WIDTH * SIZE
        row_sums = peaks + GROUP * SIZE
        dropped_weights = row_sums + GROUP * SIZE
        logits = dropped_weights + GROUP * SIZE
        unit = take_ticket(p.ticket)
        while unit < p.units:
            block = unit % p.blocks
            head = (unit // p.blocks) % p.heads
            batch = unit // (p.blocks * p.heads)
            k, k_t = _head(p.k, batch, head), p.k.token
            v, v_t = _head(p.v, batch, head), p.v.token
            start = p.start + head * (length + 1) * 8
            lse = p.lse + (batch * p.heads + head) * length * SIZE
            sums = p.sums + (batch * p.heads + head) * chunks * WIDTH * SIZE
            if zero_logit and not p.sums:
                sums = own_sums
                _column_sum(
                    STORAGE, WIDTH, STEP, REAL, SIZE, LANES, ZERO,
                    v, v_t, start, length, chunks, 0, sums,
                )  # fmt: skip
            row_end = length * (block + 1) // p.blocks
            # Prefetch the next head's keys and values while this head is computed.
            next_k, next_v = 0, 0
            if p.prefetch_next:
                unit = take_ticket(p.ticket)
                next_k = _head(p.k, unit // p.heads, unit % p.heads)
                next_v = _head(p.v, unit // p.heads, unit % p.heads)
            for top in range(length * block // p.blocks, row_end, GROUP):
                bottom = min(top + GROUP, row_end)
                # Each row's logits start at a new vector; the lanes after the last one
                # get weight exp(-inf) = 0.
                row_logits = logits
                for row in range(top, bottom):
                    q = _head(p.q, batch, head) + row * p.q.token
                    begin = read("i64", start + row * 8)
                    count = read("i64", start + row * 8 + 8) - begin
                    q0, keys = load(STORAGE, WIDTH, q), p.key + begin * 4
                    _prefetch_row(STEP, chunks, q + 16 * p.q.token)
                    _dots(
                        STORAGE, WIDTH, STEP, REAL, SIZE,
                        q0, q, k, k_t, keys, count, chunks, row_logits,
                    )  # fmt: skip
                    store(REAL, splat(LANES, LOWEST), row_logits + count * SIZE)
                    row_logits += (count + LANES - 1) // LANES * LANES * SIZE

                row_logits = logits
                for row in range(top, bottom):
                    count = read("i64", start + row * 8 + 8) - read("i64", start + row * 8)
                    drops_keys = zero_logit and count < length
                    row_peaks = splat(LANES, ZERO if drops_keys else LOWEST)
                    for i in range(0, count, LANES):
                        logit = splat(LANES, scale) * load(REAL, LANES, row_logits + i * SIZE)
                        row_peaks = maximum(row_peaks, logit)
                    peak = highest(row_peaks)
                    # Under zero_logit each dropped key has logit 0, so weight
                    # `dropped`; `sums` is the sum of all values.
                    dropped = splat(LANES, ZERO)
                    if drops_keys:
                        dropped = exponential(splat(LANES, ZERO - peak))
                    partial_sums = splat(LANES, ZERO)
                    for i in range(0, count, LANES):
                        logit = splat(LANES, scale) * load(REAL, LANES, row_logits + i * SIZE)
                        # If fused, a logit above 1e9 would differ from its rounded
                        # value, the peak, by more than exp can take.
                        weight = exponential(difference(logit, splat(LANES, peak)))
                        partial_sums = partial_sums + weight
                        store(REAL, weight - dropped, row_logits + i * SIZE)
                    row_sum = total(partial_sums) + first(dropped) * real(length - count)
                    if count == 0 and not zero_logit:
                        row_sum, peak = ONE, ZERO
                    write(REAL, peaks + (row - top) * SIZE, peak)
                    write(REAL, row_sums + (row - top) * SIZE, row_sum)
                    write(REAL, dropped_weights + (row - top) * SIZE, first(dropped))
                    row_logits += (count + LANES - 1) // LANES * LANES * SIZE

                for i in range(0, bottom - top, LANES):
                    group_sums = load(REAL, LANES, row_sums + i * SIZE)
                    group_lse = load(REAL, LANES, peaks + i * SIZE) + logarithm(group_sums)
                    store_first(group_lse, lse + (top + i) * SIZE, bottom - top - i)
                    store(REAL, splat(LANES, ONE) / group_sums, row_sums + i * SIZE)

                row_logits = logits
                for row in range(top, bottom):
                    if p.prefetch_next:
                        _prefetch_row(STEP, chunks, next_k + row * p.k.token)
                        _prefetch_row(STEP, chunks, next_v + row * p.v.token)
                    out = _head(p.out, batch, head) + row * p.out.token
                    begin = read("i64", start + row * 8)
                    count = read("i64", start + row * 8 + 8) - begin
                    keys = p.key + begin * 4
                    inverse = splat(WIDTH, read(REAL, row_sums + (row - top) * SIZE))
                    for c in range(chunks):
                        result, values = splat(WIDTH, ZERO), v + c * STEP
                        if zero_logit and count < length:
                            row_dropped = read(REAL, dropped_weights + (row - top) * SIZE)
                            value_sum = load(REAL, WIDTH, sums + c * WIDTH * SIZE)
                            result = splat(WIDTH, row_dropped) * value_sum
                        result = _weighted_sum(
                            STORAGE, WIDTH, REAL, SIZE, ZERO,
                            result, row_logits, values, v_t, keys, count,
                        )  # fmt: skip
                        _write_result(STORAGE, p.nontemporal, result * inverse, out + c * STEP)
                    row_logits += (count + LANES - 1) // LANES * LANES * SIZE
            if not p.prefetch_next:
                unit = take_ticket(p.ticket)
        fence()

    def backward(pointer):  # type: ignore[no-untyped-def]
        p = carray(pointer, 1)[0]
        version = VERSION  # noqa: F841 - part of the cache key
        length, zero_logit, scale = p.length, p.zero_logit, real(p.scale)
        chunks = 1 if SINGLE else p.chunks  # a constant if possible: its loops vanish
        own_sums = p.scratch + take_ticket(p.thread) * p.scratch_bytes
        own_weights = own_sums + chunks * WIDTH * SIZE
        unit = take_ticket(p.ticket)
        while unit < p.units:
            block = unit % p.blocks
            head = (unit // p.blocks) % p.heads
            batch = unit // (p.blocks * p.heads)
            row_begin, row_end = length * block // p.blocks, length * (block + 1) // p.blocks
            q = _head(p.q, batch, head)
            k = _head(p.k, batch, head)
            v = _head(p.v, batch, head)
            out = _head(p.out, batch, head)
            grad = _head(p.grad, batch, head)
            start = p.start + head * (length + 1) * 8
            origin = read("i64", start)
            pairs = read("i64", start + length * 8) - origin
            lse = p.lse + (batch * p.heads + head) * length * SIZE
            # If threads share a head, they share its memory; else each thread has its
            # own, which stays in cache.
            weights = own_weights
            if p.phase != WHOLE:
                weights = p.shared + (batch * p.heads + head) * p.shared_bytes
            slopes = weights + (pairs + LANES) * SIZE

            # The first pass: weights and slopes dL/dlogit of this unit's rows, and dq.
            if p.phase != SECOND:
                end = read("i64", start + row_end * 8) - origin
                for row in range(row_begin, row_end):
                    q_row = q + row * p.q.token
                    grad_row = grad + row * p.grad.token
                    begin = read("i64", start + row * 8) - origin
                    count = read("i64", start + row * 8 + 8) - origin - begin
                    keys = p.key + (origin + begin) * 4
                    q0 = load(STORAGE, WIDTH, q_row)
                    grad0 = load(STORAGE, WIDTH, grad_row)
                    _prefetch_row(STEP, chunks, q_row + 8 * p.q.token)
                    _prefetch_row(STEP, chunks, grad_row + 8 * p.grad.token)
                    _prefetch_row(STEP, chunks, out + (row + 8) * p.out.token)
                    mean = _dot(
                        STORAGE, WIDTH, STEP, grad0, grad_row, out + row * p.out.token, chunks
                    )
                    _dots(
                        STORAGE, WIDTH, STEP, REAL, SIZE,
                        q0, q_row, k, p.k.token, keys, count, chunks, weights + begin * SIZE,
                    )  # fmt: skip
                    _dots(
                        STORAGE, WIDTH, STEP, REAL, SIZE,
                        grad0, grad_row, v, p.v.token, keys, count, chunks, slopes + begin * SIZE,
                    )  # fmt: skip
                    row_lse = read(REAL, lse + row * SIZE)
                    dropped = splat(LANES, ZERO)
                    if zero_logit and count < length:
                        dropped = exponential(splat(LANES, ZERO - row_lse))
                    for i in range(begin, begin + count, LANES):
                        logit = splat(LANES, scale) * load(REAL, LANES, weights + i * SIZE)
                        weight = exponential(difference(logit, splat(LANES, row_lse)))
                        slope = load(REAL, LANES, slopes + i * SIZE) - splat(LANES, mean)
                        slope = slope * weight * splat(LANES, scale)
                        weight = weight - dropped
                        # Lanes after this row's last key belong to later rows, which
                        # overwrite them. After this unit's last row they would belong
                        # to another thread.
                        if i + LANES <= end:
                            store(REAL, weight, weights + i * SIZE)
                            store(REAL, slope, slopes + i * SIZE)
                        else:
                            store_first(weight, weights + i * SIZE, end - i)
                            store_first(slope, slopes + i * SIZE, end - i)
                    for c in range(chunks):
                        result, values = splat(WIDTH, ZERO), k + c * STEP
                        row_slopes = slopes + begin * SIZE
                        result = _weighted_sum(
                            STORAGE, WIDTH, REAL, SIZE, ZERO,
                            result, row_slopes, values, p.k.token, keys, count,
                        )  # fmt: skip
                        dq = _head(p.dq, batch, head) + row * p.dq.token
                        _write_result(STORAGE, p.nontemporal, result, dq + c * STEP)

            next_k, next_v = 0, 0
            if p.prefetch_next:
                unit = take_ticket(p.ticket)
                next_k = _head(p.k, unit // p.heads, unit % p.heads)
                next_v = _head(p.v, unit // p.heads, unit % p.heads)
            # The second pass: dk and dv, gathered through the transposed pairs.
            if p.phase != FIRST:
                sums = p.sums + (batch * p.heads + head) * chunks * WIDTH * SIZE
                if zero_logit and not p.sums:
                    sums = own_sums
                    _column_sum(
                        STORAGE, WIDTH, STEP, REAL, SIZE, LANES, ZERO,
                        grad, p.grad.token, start, length, chunks, lse, sums,
                    )  # fmt: skip
                for row in range(row_begin, row_end):
                    begin = read("i64", start + row * 8)
                    count = read("i64", start + row * 8 + 8) - begin
                    keys, transposed = p.key + begin * 4, p.transpose + begin * 4
                    if p.prefetch_next:
                        _prefetch_row(STEP, chunks, next_k + row * p.k.token)
                        _prefetch_row(STEP, chunks, next_v + row * p.v.token)
                    dk = _head(p.dk, batch, head) + row * p.dk.token
                    dv = _head(p.dv, batch, head) + row * p.dv.token
                    for c in range(chunks):
                        k_result = splat(WIDTH, ZERO)
                        v_result = splat(WIDTH, ZERO)
                        if zero_logit:
                            v_result = load(REAL, WIDTH, sums + c * WIDTH * SIZE)
                        for low in range(0, count, TERMS):
                            k_part, v_part = splat(WIDTH, ZERO), splat(WIDTH, ZERO)
                            for i in range(low, min(low + TERMS, count)):
                                other = read("i32", keys + i * 4)
                                at = read("i32", transposed + i * 4) * SIZE
                                q_other = load(STORAGE, WIDTH, q + other * p.q.token + c * STEP)
                                g_other = load(
                                    STORAGE, WIDTH, grad + other * p.grad.token + c * STEP
                                )
                                k_part = add_scaled(k_part, read(REAL, slopes + at), q_other)
                                v_part = add_scaled(v_part, read(REAL, weights + at), g_other)
                            k_result = k_result + k_part
                            v_result = v_result + v_part
                        _write_result(STORAGE, p.nontemporal, k_result, dk + c * STEP)
                        _write_result(STORAGE, p.nontemporal, v_result, dv + c * STEP)
            if not p.prefetch_next:
                unit = take_ticket(p.ticket)
        fence()

    source, record = (forward, FORWARD) if name == "forward" else (backward, BACKWARD)
    signature = types.void(types.CPointer(from_dtype(np.dtype(record))))
    return Kernel(cfunc(signature, cache=cache, error_model="numpy")(source), record)
