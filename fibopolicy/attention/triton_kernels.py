"""The Triton kernels: one program per block of rows of one head, walking over that
head's signed offsets.

At offset o the keys of rows j..j+R are adjacent, so every load is a coalesced tile and
no index list is read. Softmax is online, in float32. Prefix tokens (CLS, registers)
attend to everything: each has one program, which streams over all tokens.

`Q` etc. are (B, h, T, d) tensors with unit stride over d, given with their strides over
batch, head and token.
"""

# Triton's language has no annotations for tensors.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(base, stride, rows, kept, d, D: tl.constexpr):
    """Rows `rows` of a head as float32 (R, D), zero where not `kept` or beyond d."""
    column = tl.arange(0, D)
    mask = kept[:, None] & (column < d)[None, :]
    return tl.load(base + rows[:, None] * stride + column[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _write(base, stride, rows, kept, d, value, D: tl.constexpr):
    column = tl.arange(0, D)
    mask = kept[:, None] & (column < d)[None, :]
    tl.store(
        base + rows[:, None] * stride + column[None, :], value.to(base.dtype.element_ty), mask=mask
    )


@triton.jit
def _online_softmax_step(logit, kept, value, peak, row_sum, result, ZERO_LOGIT: tl.constexpr):
    """One more key for each row, (R,) logits and (R, D) values, in the running softmax
    of that row.
    """
    higher = tl.where(kept, tl.maximum(peak, logit), peak)
    same = higher == peak  # also where both are still -inf, whose difference would be NaN
    old = tl.where(same, 1.0, tl.exp(tl.where(same, 0.0, peak - higher)))
    weight = tl.where(kept, tl.exp(logit - higher), 0.0)
    if ZERO_LOGIT:  # it was counted as a dropped key, at logit 0
        weight -= tl.where(kept, tl.exp(-higher), 0.0)
    return higher, row_sum * old + weight, result * old[:, None] + weight[:, None] * value


@triton.jit
def forward_patches(
    Q, q_b, q_h, q_t, K, k_b, k_h, k_t, V, v_b, v_h, v_t, OUT, out_b, out_h, out_t,
    LSE, SUMS, OFFSETS, COUNTS, heads, length, prefix, d, scale, most,
    D: tl.constexpr, R: tl.constexpr, ZERO_LOGIT: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1) % heads, tl.program_id(1) // heads
    row = prefix + tl.program_id(0) * R + tl.arange(0, R)
    inside = row < length
    k = K + batch.to(tl.int64) * k_b + head * k_h
    v = V + batch.to(tl.int64) * v_b + head * v_h
    q = _tile(Q + batch.to(tl.int64) * q_b + head * q_h, q_t, row, inside, d, D) * scale
    column = tl.arange(0, D)
    if ZERO_LOGIT:  # start with every key at logit 0
        peak = tl.zeros([R], tl.float32)
        row_sum = tl.zeros([R], tl.float32) + length
        sums = tl.load(SUMS + tl.program_id(1) * d + column, mask=column < d, other=0.0)
        result = tl.zeros([R, D], tl.float32) + sums[None, :]
    else:
        peak = tl.full([R], float("-inf"), tl.float32)
        row_sum = tl.zeros([R], tl.float32)
        result = tl.zeros([R, D], tl.float32)
    for i in range(prefix):
        key = tl.zeros([R], tl.int32) + i
        logit = tl.sum(q * _tile(k, k_t, key, inside, d, D), 1)
        peak, row_sum, result = _online_softmax_step(
            logit, inside, _tile(v, v_t, key, inside, d, D), peak, row_sum, result, ZERO_LOGIT
        )
    for i in range(tl.load(COUNTS + head)):
        key = row + tl.load(OFFSETS + head * most + i)
        kept = inside & (key >= prefix) & (key < length)
        logit = tl.sum(q * _tile(k, k_t, key, kept, d, D), 1)
        peak, row_sum, result = _online_softmax_step(
            logit, kept, _tile(v, v_t, key, kept, d, D), peak, row_sum, result, ZERO_LOGIT
        )
    empty = row_sum == 0
    row_sum = tl.where(empty, 1.0, row_sum)
    _write(
        OUT + batch.to(tl.int64) * out_b + head * out_h,
        out_t,
        row,
        inside,
        d,
        result / row_sum[:, None],
        D,
    )
    tl.store(
        LSE + tl.program_id(1) * length + row,
        tl.where(empty, 0.0, peak) + tl.log(row_sum),
        mask=inside,
    )


@triton.jit
def forward_prefix(
    Q, q_b, q_h, q_t, K, k_b, k_h, k_t, V, v_b, v_h, v_t, OUT, out_b, out_h, out_t,
    LSE, heads, length, d, scale, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1) % heads, tl.program_id(1) // heads
    row = tl.program_id(0) + tl.zeros([1], tl.int32)
    always = row >= 0
    k = K + batch.to(tl.int64) * k_b + head * k_h
    v = V + batch.to(tl.int64) * v_b + head * v_h
    q = _tile(Q + batch.to(tl.int64) * q_b + head * q_h, q_t, row, always, d, D) * scale  # (1, D)
    peak = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    result = tl.zeros([1, D], tl.float32)
    for first in range(0, length, R):
        key = first + tl.arange(0, R)
        inside = key < length
        logit = tl.where(inside, tl.sum(q * _tile(k, k_t, key, inside, d, D), 1), float("-inf"))
        higher = tl.maximum(peak, tl.max(logit, 0))
        old = tl.exp(peak - higher)
        weight = tl.exp(logit - higher)  # (R,)
        row_sum = row_sum * old + tl.sum(weight, 0)
        result = (
            result * old[:, None]
            + tl.sum(weight[:, None] * _tile(v, v_t, key, inside, d, D), 0)[None, :]
        )
        peak = higher
    _write(
        OUT + batch.to(tl.int64) * out_b + head * out_h,
        out_t,
        row,
        always,
        d,
        result / row_sum[:, None],
        D,
    )
    tl.store(LSE + tl.program_id(1) * length + row, peak + tl.log(row_sum))


@triton.jit
def backward_patches(
    Q, q_b, q_h, q_t, K, k_b, k_h, k_t, V, v_b, v_h, v_t, G, g_b, g_h, g_t,
    DQ, DK, DV, dq_b, dq_h, dq_t, LSE, MEAN, SUMS, OFFSETS, COUNTS, heads, length, prefix, d, scale, most,  # noqa: E501
    D: tl.constexpr, R: tl.constexpr, ZERO_LOGIT: tl.constexpr,
):  # fmt: skip
    """dq of the rows as queries and, since the pattern is symmetric, dk and dv of the
    same rows as keys.
    """
    head, batch = tl.program_id(1) % heads, tl.program_id(1) // heads
    row = prefix + tl.program_id(0) * R + tl.arange(0, R)
    inside = row < length
    q, k = Q + batch.to(tl.int64) * q_b + head * q_h, K + batch.to(tl.int64) * k_b + head * k_h
    v, g = V + batch.to(tl.int64) * v_b + head * v_h, G + batch.to(tl.int64) * g_b + head * g_h
    lse, mean = LSE + tl.program_id(1) * length, MEAN + tl.program_id(1) * length
    q_row, k_row = _tile(q, q_t, row, inside, d, D), _tile(k, k_t, row, inside, d, D)
    v_row, g_row = _tile(v, v_t, row, inside, d, D), _tile(g, g_t, row, inside, d, D)
    lse_row = tl.load(lse + row, mask=inside, other=0.0)
    mean_row = tl.load(mean + row, mask=inside, other=0.0)
    dq, dk = tl.zeros([R, D], tl.float32), tl.zeros([R, D], tl.float32)
    dv = tl.zeros([R, D], tl.float32)
    if ZERO_LOGIT:
        column = tl.arange(0, D)
        dv += tl.load(SUMS + tl.program_id(1) * d + column, mask=column < d, other=0.0)[None, :]
    for i in range(prefix + tl.load(COUNTS + head)):
        # Signed offsets come in pairs, so these rows attend to the same tokens that
        # attend to them.
        which = tl.zeros([R], tl.int32) + i
        offset = tl.load(OFFSETS + head * most + tl.maximum(which - prefix, 0))
        other = tl.where(which < prefix, which, row + offset)
        kept = inside & (other < length) & ((which < prefix) | (other >= prefix))
        k_other, v_other = _tile(k, k_t, other, kept, d, D), _tile(v, v_t, other, kept, d, D)
        weight = tl.where(kept, tl.exp(tl.sum(q_row * k_other, 1) * scale - lse_row), 0.0)
        slope = weight * (tl.sum(g_row * v_other, 1) - mean_row) * scale
        dq += slope[:, None] * k_other
        q_other, g_other = _tile(q, q_t, other, kept, d, D), _tile(g, g_t, other, kept, d, D)
        lse_other = tl.load(lse + other, mask=kept, other=0.0)
        mean_other = tl.load(mean + other, mask=kept, other=0.0)
        weight = tl.where(kept, tl.exp(tl.sum(q_other * k_row, 1) * scale - lse_other), 0.0)
        slope = weight * (tl.sum(g_other * v_row, 1) - mean_other) * scale
        dk += slope[:, None] * q_other
        if ZERO_LOGIT:  # prefix tokens drop nothing, and are not in SUMS
            weight -= tl.where(kept & (which >= prefix), tl.exp(-lse_other), 0.0)
        dv += weight[:, None] * g_other
    at = batch.to(tl.int64) * dq_b + head * dq_h
    _write(DQ + at, dq_t, row, inside, d, dq, D)
    _write(DK + at, dq_t, row, inside, d, dk, D)
    _write(DV + at, dq_t, row, inside, d, dv, D)


@triton.jit
def backward_prefix(
    Q, q_b, q_h, q_t, K, k_b, k_h, k_t, V, v_b, v_h, v_t, G, g_b, g_h, g_t,
    DQ, DK, DV, dq_b, dq_h, dq_t, LSE, MEAN, heads, length, d, scale, D: tl.constexpr, R: tl.constexpr,  # noqa: E501
):  # fmt: skip
    """The three gradients of one prefix token, which pairs with every token: none of
    its pairs is dropped.
    """
    head, batch = tl.program_id(1) % heads, tl.program_id(1) // heads
    row = tl.program_id(0) + tl.zeros([1], tl.int32)
    always = row >= 0
    q, k = Q + batch.to(tl.int64) * q_b + head * q_h, K + batch.to(tl.int64) * k_b + head * k_h
    v, g = V + batch.to(tl.int64) * v_b + head * v_h, G + batch.to(tl.int64) * g_b + head * g_h
    lse, mean = LSE + tl.program_id(1) * length, MEAN + tl.program_id(1) * length
    q_row, k_row = _tile(q, q_t, row, always, d, D), _tile(k, k_t, row, always, d, D)  # (1, D)
    v_row, g_row = _tile(v, v_t, row, always, d, D), _tile(g, g_t, row, always, d, D)
    lse_row, mean_row = tl.load(lse + row), tl.load(mean + row)
    dq, dk, dv = (
        tl.zeros([1, D], tl.float32),
        tl.zeros([1, D], tl.float32),
        tl.zeros([1, D], tl.float32),
    )
    for first in range(0, length, R):
        other = first + tl.arange(0, R)
        kept = other < length
        k_other, v_other = _tile(k, k_t, other, kept, d, D), _tile(v, v_t, other, kept, d, D)
        weight = tl.where(kept, tl.exp(tl.sum(q_row * k_other, 1) * scale - lse_row), 0.0)
        slope = weight * (tl.sum(g_row * v_other, 1) - mean_row) * scale
        dq += tl.sum(slope[:, None] * k_other, 0)[None, :]
        q_other, g_other = _tile(q, q_t, other, kept, d, D), _tile(g, g_t, other, kept, d, D)
        weight = tl.where(
            kept,
            tl.exp(tl.sum(q_other * k_row, 1) * scale - tl.load(lse + other, mask=kept, other=0.0)),
            0.0,
        )
        slope = (
            weight
            * (tl.sum(g_other * v_row, 1) - tl.load(mean + other, mask=kept, other=0.0))
            * scale
        )
        dk += tl.sum(slope[:, None] * q_other, 0)[None, :]
        dv += tl.sum(weight[:, None] * g_other, 0)[None, :]
    at = batch.to(tl.int64) * dq_b + head * dq_h
    _write(DQ + at, dq_t, row, always, d, dq, D)
    _write(DK + at, dq_t, row, always, d, dk, D)
    _write(DV + at, dq_t, row, always, d, dv, D)
