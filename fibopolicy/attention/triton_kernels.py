"""The Triton kernels: `forward` (and `merge` for long sequences), and for the backward
pass `backward_queries`, then `backward_keys`.

A program computes 16 G rows of patches of one head. It walks over the head's offsets;
`forward` takes the tokens at +o and -o together, and so rescales its softmax once for
both. The keys of adjacent rows at one offset are adjacent too, so every load is a tile
of whole rows, and no index list is read. Softmax is online, in float32 and to base 2.

The prefix tokens (CLS, registers) attend to all tokens, and all tokens to them. Their
rows are computed by other programs of the same launches, M rows in each. In long
sequences several programs share the keys of these rows; their partial results are added
up afterwards.

Rows lie in groups of 16, so vectors over rows have shape (G, 16) and tiles (G, 16, D),
because a tensor core multiplies 16 rows by 16: with `DOT`, for 16-bit inputs, the
product of two rows is an entry on the diagonal of a 16 x 16 product, which takes fewer
instructions than 16 dot products without tensor cores.

Tensors are (B, h, T, d) with unit stride over d; the arguments x_b, x_h and x_t are the
strides of q, k and v over batch, head and token, and so on for the others. `D` is d
(`HEAD_DIM`) rounded up to a power of two. `TABLE` holds, for each head, the number of
its offsets and the offsets.
"""

# Triton's language has no annotations for tensors.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
#: Numbers whose values must not lead to a compilation of their own.
_NUMBERS = ["heads", "length", "most", "programs", "prefix_programs", "splits", "blocks"]


# Tiles of rows, and their products.


@triton.jit
def _load(base, stride, rows, kept, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """The rows of a head, `rows.shape + (D,)`; zero where not `kept` and beyond d."""
    column = tl.arange(0, D)
    mask = tl.expand_dims(kept, -1)
    if HEAD_DIM < D:
        mask = mask & (column < HEAD_DIM)
    return tl.load(base + tl.expand_dims(rows * stride, -1) + column, mask=mask, other=0.0)


@triton.jit
def _store(base, stride, rows, kept, value, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    column = tl.arange(0, D)
    mask = tl.expand_dims(kept, -1)
    if HEAD_DIM < D:
        mask = mask & (column < HEAD_DIM)
    to = base + tl.expand_dims(rows * stride, -1) + column
    tl.store(to, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _dots(x, y, DOT: tl.constexpr):
    """Row by row, the dot product of two tiles (G, 16, D): (G, 16)."""
    if DOT:
        i = tl.arange(0, 16)
        tile = tl.dot(x, tl.permute(y, (0, 2, 1)))  # (G, 16, 16)
        return tl.sum(tl.where((i[:, None] == i)[None], tile, 0.0), 2)
    else:  # noqa: RET505 (without `else`, Triton would compile both)
        return tl.sum(x.to(tl.float32) * y.to(tl.float32), 2)


@triton.jit
def _add_scaled(total, weight, y, DOT: tl.constexpr):
    """`total` + each row of a tile (G, 16, D) times its weight, (G, 16)."""
    if DOT:
        i = tl.arange(0, 16)
        tile = tl.where((i[:, None] == i)[None], weight[:, :, None], 0.0)
        return tl.dot(tile.to(y.dtype), y, total)
    else:  # noqa: RET505
        return total + weight[:, :, None] * y.to(tl.float32)


@triton.jit
def _products(x, y, DOT: tl.constexpr):
    """All dot products of rows (M, D) and (KEYS, D): (M, KEYS); without `DOT`, M = 1."""
    if DOT:
        return tl.dot(x, tl.trans(y))
    else:  # noqa: RET505
        return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)[None, :]


@triton.jit
def _add_mixed(total, weight, y, DOT: tl.constexpr):
    """`total` (M, D) + the sums of rows (KEYS, D) with weights (M, KEYS)."""
    if DOT:
        return tl.dot(weight.to(y.dtype), y, total)
    else:  # noqa: RET505
        return total + tl.sum(tl.trans(weight) * y.to(tl.float32), 0)[None, :]


# What every program begins with.


@triton.jit
def _place(programs):
    """Which of the `programs` of a head this is, and the head's index in (B h)."""
    return tl.program_id(0) % programs, tl.program_id(0) // programs


@triton.jit
def _head(base, index, heads, b, h):
    """The start of a head in a tensor with strides b and h."""
    return base + (index // heads).to(tl.int64) * b + (index % heads).to(tl.int64) * h


@triton.jit
def _patch_rows(block, length, PREFIX: tl.constexpr, G: tl.constexpr):
    """A block of patches, (G, 16), and which of them exist."""
    row = PREFIX + block * 16 * G + tl.arange(0, G)[:, None] * 16 + tl.arange(0, 16)[None, :]
    return row, row < length


@triton.jit
def _neighbour(row, inside, table, i, length, PREFIX: tl.constexpr):
    """The tokens at the offset i // 2 of the head, after (even i) or before (odd i) each
    row, and which of them exist. 0 is its own mirror image and counts once.
    """
    offset = tl.load(table + 1 + i // 2)
    token = row + tl.where(i % 2 == 0, offset, -tl.where(offset == 0, length, offset))
    return token, inside & (token >= PREFIX) & (token < length)


@triton.jit
def _prefix_rows(part, splits, length, PREFIX: tl.constexpr, M: tl.constexpr):
    """M prefix rows, (M,), which of them exist, and a part of the tokens: the first,
    and the end.
    """
    row = part // splits * M + tl.arange(0, M)
    share = tl.cdiv(length, splits)
    first = part % splits * share
    return row, row < PREFIX, first, tl.minimum(first + share, length)


# Forward.


@triton.jit(do_not_specialize=_NUMBERS)
def forward(
    Q, K, V, OUT, LSE, SUMS, PARTIAL, TABLE, scale, x_b, x_h, x_t, o_b, o_h, o_t,
    heads, length, most, programs, prefix_programs, splits,
    PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    M: tl.constexpr, KEYS: tl.constexpr, ZERO_LOGIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`OUT` and `LSE`. `SUMS`: under zero_logit the sum of v over all tokens, (B h, d)."""
    part, index = _place(programs)
    q, k = _head(Q, index, heads, x_b, x_h), _head(K, index, heads, x_b, x_h)
    v, out = _head(V, index, heads, x_b, x_h), _head(OUT, index, heads, o_b, o_h)
    lse = LSE + index.to(tl.int64) * length
    scale *= LOG2_E
    if part < prefix_programs:
        partial = PARTIAL + index.to(tl.int64) * PREFIX * splits * (HEAD_DIM + 1)
        _forward_prefix(
            q, k, v, out, lse, partial, scale, x_t, o_t, part, splits, length,
            PREFIX, HEAD_DIM, D, M, KEYS, DOT,
        )  # fmt: skip
    else:
        sums = SUMS + index.to(tl.int64) * HEAD_DIM
        table = TABLE + index % heads * most
        row, inside = _patch_rows(part - prefix_programs, length, PREFIX, G)
        _forward_patches(
            q, k, v, out, lse, sums, table, scale, x_t, o_t, row, inside, length,
            PREFIX, HEAD_DIM, D, G, ZERO_LOGIT, DOT,
        )  # fmt: skip


@triton.jit
def _forward_patches(
    q, k, v, out, lse, sums, table, scale, x_t, o_t, row, inside, length,
    PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    ZERO_LOGIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    q_row = _load(q, x_t, row, inside, HEAD_DIM, D)
    row_sum = tl.zeros([G, 16], tl.float32)
    result = tl.zeros([G, 16, D], tl.float32)
    if ZERO_LOGIT:  # start with every key at logit 0
        column = tl.arange(0, D)
        result += tl.load(sums + column, mask=column < HEAD_DIM, other=0.0)[None, None, :]
        peak = tl.zeros([G, 16], tl.float32)
        dropped = tl.zeros([G, 16], tl.float32) + (length - PREFIX)
    else:
        peak = tl.full([G, 16], float("-inf"), tl.float32)
        dropped = row_sum
    for i in range(PREFIX):
        key = tl.zeros([G, 16], tl.int32) + i
        k_i, v_i = _load(k, x_t, key, inside, HEAD_DIM, D), _load(v, x_t, key, inside, HEAD_DIM, D)
        logit = _dots(q_row, k_i, DOT) * scale
        higher = tl.maximum(peak, logit)
        old, weight = tl.exp2(peak - higher), tl.exp2(logit - higher)
        row_sum = row_sum * old + weight
        if ZERO_LOGIT:  # it was counted as a dropped key
            weight -= tl.exp2(-higher)
        result = _add_scaled(result * old[:, :, None], weight, v_i, DOT)
        peak = higher
    for i in range(tl.load(table)):
        offset = tl.load(table + 1 + i)
        after, before = row + offset, row - tl.where(offset == 0, length, offset)
        kept_after, kept_before = after < length, inside & (before >= PREFIX)
        k_after = _load(k, x_t, after, kept_after, HEAD_DIM, D)
        k_before = _load(k, x_t, before, kept_before, HEAD_DIM, D)
        v_after = _load(v, x_t, after, kept_after, HEAD_DIM, D)
        v_before = _load(v, x_t, before, kept_before, HEAD_DIM, D)
        logit_after = tl.where(kept_after, _dots(q_row, k_after, DOT) * scale, float("-inf"))
        logit_before = tl.where(kept_before, _dots(q_row, k_before, DOT) * scale, float("-inf"))
        higher = tl.maximum(peak, tl.maximum(logit_after, logit_before))
        # All may still be -inf, whose differences would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        old = tl.exp2(peak - shift)
        weight_after, weight_before = tl.exp2(logit_after - shift), tl.exp2(logit_before - shift)
        row_sum = row_sum * old + weight_after + weight_before
        if ZERO_LOGIT:
            weight_after -= tl.where(kept_after, tl.exp2(-shift), 0.0)
            weight_before -= tl.where(kept_before, tl.exp2(-shift), 0.0)
            dropped -= kept_after.to(tl.float32) + kept_before.to(tl.float32)
        result = _add_scaled(result * old[:, :, None], weight_after, v_after, DOT)
        result = _add_scaled(result, weight_before, v_before, DOT)
        peak = higher
    if ZERO_LOGIT:
        row_sum += dropped * tl.exp2(-peak)
    empty = row_sum == 0  # no key at all
    row_sum = tl.where(empty, 1.0, row_sum)
    peak = tl.where(empty, 0.0, peak)
    _store(out, o_t, row, inside, result / row_sum[:, :, None], HEAD_DIM, D)
    tl.store(lse + row, (peak + tl.log2(row_sum)) * LN_2, mask=inside)


@triton.jit
def _forward_prefix(
    q, k, v, out, lse, partial, scale, x_t, o_t, part, splits, length,
    PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    row, inside, first, end = _prefix_rows(part, splits, length, PREFIX, M)
    q_row = _load(q, x_t, row, inside, HEAD_DIM, D)
    peak = tl.full([M], float("-inf"), tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    result = tl.zeros([M, D], tl.float32)
    for start in range(first, end, KEYS):
        key = start + tl.arange(0, KEYS)
        kept = key < end
        logit = _products(q_row, _load(k, x_t, key, kept, HEAD_DIM, D), DOT) * scale
        logit = tl.where(kept[None, :], logit, float("-inf"))
        higher = tl.maximum(peak, tl.max(logit, 1))
        old, weight = tl.exp2(peak - higher), tl.exp2(logit - higher[:, None])
        row_sum = row_sum * old + tl.sum(weight, 1)
        v_key = _load(v, x_t, key, kept, HEAD_DIM, D)
        result = _add_mixed(result * old[:, None], weight, v_key, DOT)
        peak = higher
    result /= row_sum[:, None]
    row_lse = (peak + tl.log2(row_sum)) * LN_2
    if splits == 1:
        _store(out, o_t, row, inside, result, HEAD_DIM, D)
        tl.store(lse + row, row_lse, mask=inside)
    else:
        at = row * splits + part % splits
        _store(partial, HEAD_DIM + 1, at, inside, result, HEAD_DIM, D)
        tl.store(partial + at * (HEAD_DIM + 1) + HEAD_DIM, row_lse, mask=inside)


@triton.jit(do_not_specialize=_NUMBERS)
def merge(
    PARTIAL, OUT, LSE, o_b, o_h, o_t, heads, length, splits,
    PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One prefix row's `OUT` and `LSE` from its partial results. `SPLITS` is the number
    of them, rounded up to a power of two.
    """
    row, index = _place(PREFIX)
    partial = PARTIAL + (index.to(tl.int64) * PREFIX + row) * splits * (HEAD_DIM + 1)
    at = tl.arange(0, SPLITS)
    lse = tl.load(partial + at * (HEAD_DIM + 1) + HEAD_DIM, mask=at < splits, other=float("-inf"))
    peak = tl.max(lse, 0)
    weight = tl.exp(lse - peak)
    row_sum = tl.sum(weight, 0)
    result = _load(partial, HEAD_DIM + 1, at, at < splits, HEAD_DIM, D)
    result = tl.sum(weight[:, None] * result, 0) / row_sum
    column = tl.arange(0, D)
    to = _head(OUT, index, heads, o_b, o_h) + row * o_t + column
    tl.store(to, result.to(OUT.dtype.element_ty), mask=column < HEAD_DIM)
    tl.store(LSE + index.to(tl.int64) * length + row, peak + tl.log(row_sum))


# Backward. With weights p = exp(logit - lse), dp = grad . v and delta = grad . out of a
# query, the gradient of a logit is p (dp - delta).


@triton.jit(do_not_specialize=_NUMBERS)
def backward_queries(
    Q, K, V, OUT, GRAD, DQ, LSE, DELTA, SUMS, PARTIAL, TABLE, scale,
    x_b, x_h, x_t, o_b, o_h, o_t, g_b, g_h, g_t, d_b, d_h, d_t,
    heads, length, most, programs, prefix_programs, splits,
    PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    M: tl.constexpr, KEYS: tl.constexpr, ZERO_LOGIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`DQ`, and `DELTA` for `backward_keys`. `SUMS`: under zero_logit, the gradient of v
    by the keys that a program's patches drop, as if they dropped all, (B h, blocks, d).
    """
    part, index = _place(programs)
    q, k = _head(Q, index, heads, x_b, x_h), _head(K, index, heads, x_b, x_h)
    v, out = _head(V, index, heads, x_b, x_h), _head(OUT, index, heads, o_b, o_h)
    grad, dq = _head(GRAD, index, heads, g_b, g_h), _head(DQ, index, heads, d_b, d_h)
    lse, deltas = LSE + index.to(tl.int64) * length, DELTA + index.to(tl.int64) * length
    if part < prefix_programs:
        partial = PARTIAL + index.to(tl.int64) * PREFIX * splits * HEAD_DIM
        _prefix_queries(
            q, k, v, out, grad, dq, lse, deltas, partial, scale, x_t, o_t, g_t, d_t,
            part, splits, length, PREFIX, HEAD_DIM, D, M, KEYS, DOT,
        )  # fmt: skip
    else:
        block = part - prefix_programs
        table = TABLE + index % heads * most
        row, inside = _patch_rows(block, length, PREFIX, G)
        q_row = _load(q, x_t, row, inside, HEAD_DIM, D)
        g_row = _load(grad, g_t, row, inside, HEAD_DIM, D)
        delta = _load(out, o_t, row, inside, HEAD_DIM, D).to(tl.float32)
        delta = tl.sum(delta * g_row.to(tl.float32), 2)
        tl.store(deltas + row, delta, mask=inside)
        row_lse = tl.load(lse + row, mask=inside, other=0.0)
        if ZERO_LOGIT:
            sums = SUMS + (index.to(tl.int64) * (programs - prefix_programs) + block) * HEAD_DIM
            total = tl.sum(tl.exp(-row_lse)[:, :, None] * g_row.to(tl.float32), 1)
            column = tl.arange(0, D)
            tl.store(sums + column, tl.sum(total, 0), mask=column < HEAD_DIM)
        total = tl.zeros([G, 16, D], tl.float32)
        for i in range(PREFIX):
            key = tl.zeros([G, 16], tl.int32) + i
            total = _add_query_gradient(
                total, q_row, g_row, row_lse, delta, k, v, scale, x_t, key, inside,
                HEAD_DIM, D, DOT,
            )  # fmt: skip
        for i in range(2 * tl.load(table)):
            key, kept = _neighbour(row, inside, table, i, length, PREFIX)
            total = _add_query_gradient(
                total, q_row, g_row, row_lse, delta, k, v, scale, x_t, key, kept, HEAD_DIM, D, DOT
            )
        _store(dq, d_t, row, inside, total * scale, HEAD_DIM, D)


@triton.jit
def _add_query_gradient(
    total, q_row, g_row, lse, delta, k, v, scale, x_t, key, kept,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`total` + the gradient of queries by one key each, up to the scale."""
    k_key, v_key = _load(k, x_t, key, kept, HEAD_DIM, D), _load(v, x_t, key, kept, HEAD_DIM, D)
    weight = tl.exp2((_dots(q_row, k_key, DOT) * scale - lse) * LOG2_E)
    slope = tl.where(kept, weight * (_dots(g_row, v_key, DOT) - delta), 0.0)
    return _add_scaled(total, slope, k_key, DOT)


@triton.jit
def _prefix_queries(
    q, k, v, out, grad, dq, lse, deltas, partial, scale, x_t, o_t, g_t, d_t, part, splits, length,
    PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    row, inside, first, end = _prefix_rows(part, splits, length, PREFIX, M)
    q_row = _load(q, x_t, row, inside, HEAD_DIM, D)
    g_row = _load(grad, g_t, row, inside, HEAD_DIM, D)
    delta = _load(out, o_t, row, inside, HEAD_DIM, D).to(tl.float32)
    delta = tl.sum(delta * g_row.to(tl.float32), 1)
    tl.store(deltas + row, delta, mask=inside)
    row_lse = tl.load(lse + row, mask=inside, other=0.0)
    total = tl.zeros([M, D], tl.float32)
    for start in range(first, end, KEYS):
        key = start + tl.arange(0, KEYS)
        kept = key < end
        k_key, v_key = _load(k, x_t, key, kept, HEAD_DIM, D), _load(v, x_t, key, kept, HEAD_DIM, D)
        weight = tl.exp2((_products(q_row, k_key, DOT) * scale - row_lse[:, None]) * LOG2_E)
        slope = weight * (_products(g_row, v_key, DOT) - delta[:, None])
        slope = tl.where(kept[None, :] & inside[:, None], slope, 0.0)
        total = _add_mixed(total, slope, k_key, DOT)
    if splits == 1:
        _store(dq, d_t, row, inside, total * scale, HEAD_DIM, D)
    else:
        at = row * splits + part % splits
        _store(partial, HEAD_DIM, at, inside, total * scale, HEAD_DIM, D)


@triton.jit(do_not_specialize=_NUMBERS)
def backward_keys(
    Q, K, V, GRAD, DK, DV, LSE, DELTA, SUMS, PARTIAL_K, PARTIAL_V, TABLE, scale,
    x_b, x_h, x_t, g_b, g_h, g_t, d_b, d_h, d_t,
    heads, length, most, programs, prefix_programs, splits, blocks,
    PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    M: tl.constexpr, KEYS: tl.constexpr, ZERO_LOGIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """`DK` and `DV`. Patterns are symmetric, so the queries that attend to a token are
    the tokens that it attends to.
    """
    part, index = _place(programs)
    q, k = _head(Q, index, heads, x_b, x_h), _head(K, index, heads, x_b, x_h)
    v, grad = _head(V, index, heads, x_b, x_h), _head(GRAD, index, heads, g_b, g_h)
    dk, dv = _head(DK, index, heads, d_b, d_h), _head(DV, index, heads, d_b, d_h)
    lse, deltas = LSE + index.to(tl.int64) * length, DELTA + index.to(tl.int64) * length
    if part < prefix_programs:
        at = index.to(tl.int64) * PREFIX * splits * HEAD_DIM
        _prefix_keys(
            q, k, v, grad, dk, dv, lse, deltas, PARTIAL_K + at, PARTIAL_V + at, scale, x_t, g_t,
            d_t, part, splits, length, PREFIX, HEAD_DIM, D, M, KEYS, DOT,
        )  # fmt: skip
    else:
        table = TABLE + index % heads * most
        row, inside = _patch_rows(part - prefix_programs, length, PREFIX, G)
        k_row = _load(k, x_t, row, inside, HEAD_DIM, D)
        v_row = _load(v, x_t, row, inside, HEAD_DIM, D)
        total_k = tl.zeros([G, 16, D], tl.float32)
        total_v = tl.zeros([G, 16, D], tl.float32)
        if ZERO_LOGIT:  # as if the patches dropped all keys; kept pairs take their part back
            sums = SUMS + index.to(tl.int64) * blocks * HEAD_DIM
            for first in range(0, blocks, 16):
                block = first + tl.arange(0, 16)
                rows = _load(sums, HEAD_DIM, block, block < blocks, HEAD_DIM, D)
                total_v += tl.sum(rows, 0)[None, None, :]
        for i in range(PREFIX):  # prefix tokens drop no key
            query = tl.zeros([G, 16], tl.int32) + i
            total_k, total_v = _add_key_gradients(
                total_k, total_v, k_row, v_row, q, grad, lse, deltas, scale, x_t, g_t, query,
                inside, HEAD_DIM, D, False, DOT,
            )  # fmt: skip
        for i in range(2 * tl.load(table)):
            query, kept = _neighbour(row, inside, table, i, length, PREFIX)
            total_k, total_v = _add_key_gradients(
                total_k, total_v, k_row, v_row, q, grad, lse, deltas, scale, x_t, g_t, query, kept,
                HEAD_DIM, D, ZERO_LOGIT, DOT,
            )  # fmt: skip
        _store(dk, d_t, row, inside, total_k * scale, HEAD_DIM, D)
        _store(dv, d_t, row, inside, total_v, HEAD_DIM, D)


@triton.jit
def _add_key_gradients(
    total_k, total_v, k_row, v_row, q, grad, lse, deltas, scale, x_t, g_t, query, kept,
    HEAD_DIM: tl.constexpr, D: tl.constexpr, ZERO_LOGIT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The totals + the gradients of keys and values by one query each, that of k up to
    the scale.
    """
    q_query = _load(q, x_t, query, kept, HEAD_DIM, D)
    g_query = _load(grad, g_t, query, kept, HEAD_DIM, D)
    query_lse = tl.load(lse + query, mask=kept, other=0.0)
    delta = tl.load(deltas + query, mask=kept, other=0.0)
    weight = tl.exp2((_dots(k_row, q_query, DOT) * scale - query_lse) * LOG2_E)
    weight = tl.where(kept, weight, 0.0)
    slope = weight * (_dots(v_row, g_query, DOT) - delta)
    if ZERO_LOGIT:
        weight -= tl.where(kept, tl.exp(-query_lse), 0.0)
    total_k = _add_scaled(total_k, slope, q_query, DOT)
    return total_k, _add_scaled(total_v, weight, g_query, DOT)


@triton.jit
def _prefix_keys(
    q, k, v, grad, dk, dv, lse, deltas, partial_k, partial_v, scale, x_t, g_t, d_t,
    part, splits, length,
    PREFIX: tl.constexpr, HEAD_DIM: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    row, inside, first, end = _prefix_rows(part, splits, length, PREFIX, M)
    k_row = _load(k, x_t, row, inside, HEAD_DIM, D)
    v_row = _load(v, x_t, row, inside, HEAD_DIM, D)
    total_k = tl.zeros([M, D], tl.float32)
    total_v = tl.zeros([M, D], tl.float32)
    for start in range(first, end, KEYS):
        query = start + tl.arange(0, KEYS)
        kept = query < end
        q_query = _load(q, x_t, query, kept, HEAD_DIM, D)
        g_query = _load(grad, g_t, query, kept, HEAD_DIM, D)
        query_lse = tl.load(lse + query, mask=kept, other=0.0)
        delta = tl.load(deltas + query, mask=kept, other=0.0)
        weight = tl.exp2((_products(k_row, q_query, DOT) * scale - query_lse[None, :]) * LOG2_E)
        weight = tl.where(kept[None, :] & inside[:, None], weight, 0.0)
        slope = weight * (_products(v_row, g_query, DOT) - delta[None, :])
        total_k = _add_mixed(total_k, slope, q_query, DOT)
        total_v = _add_mixed(total_v, weight, g_query, DOT)
    if splits == 1:
        _store(dk, d_t, row, inside, total_k * scale, HEAD_DIM, D)
        _store(dv, d_t, row, inside, total_v, HEAD_DIM, D)
    else:
        at = row * splits + part % splits
        _store(partial_k, HEAD_DIM, at, inside, total_k * scale, HEAD_DIM, D)
        _store(partial_v, HEAD_DIM, at, inside, total_v, HEAD_DIM, D)
