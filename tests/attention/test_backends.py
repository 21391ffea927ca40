"""Every backend against masked dense attention in float64, forward and backward."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import dense_attention, dense_mask, offset_sets
from torch import Tensor

from fibopolicy.attention import FibottentionPattern, fibottention

BACKENDS = ["numba", "csr", "sdpa", "reference"]
LAYOUTS = ["heads first", "packed qkv", "tokens first", "numbers apart", "every second"]


def make(
    layout: str, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype
) -> list[Tensor]:
    """q, k and v of shape (B, h, T, d), laid out in memory as named."""
    if layout == "packed qkv":
        return list(torch.randn(batch, length, 3, heads, dim).to(dtype).permute(2, 0, 3, 1, 4))
    if layout == "tokens first":
        return [torch.randn(batch, length, heads, dim).to(dtype).transpose(1, 2) for _ in range(3)]
    if layout == "numbers apart":
        return [torch.randn(batch, heads, dim, length).to(dtype).mT for _ in range(3)]
    if layout == "every second":
        return [
            torch.randn(batch, heads, 2 * length, 2 * dim).to(dtype)[:, :, ::2, ::2]
            for _ in range(3)
        ]
    return [torch.randn(batch, heads, length, dim).to(dtype) for _ in range(3)]


def differentiate(run, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@settings(max_examples=30)
@given(
    backend=st.sampled_from(BACKENDS),
    masking=st.sampled_from(["neg_inf", "zero_logit"]),
    layout=st.sampled_from(LAYOUTS),
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    num_tokens=st.integers(1, 60),
    dim=st.sampled_from([1, 3, 8, 16, 17, 40, 64]),
    prefix=st.integers(0, 3),
    w_min=st.integers(1, 12),
    modified=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    threads=st.integers(1, 4),
)
@example("numba", "zero_logit", "packed qkv", 1, 1, 700, 64, 1, 5, True, torch.float32, 2)
@example("numba", "neg_inf", "heads first", 1, 1, 700, 128, 0, 5, False, torch.float32, 4)
@example("numba", "neg_inf", "packed qkv", 2, 2, 30, 32, 1, 5, False, torch.float32, 2)
def test_outputs_and_gradients_are_those_of_dense_attention(
    backend: str,
    masking: str,
    layout: str,
    batch: int,
    heads: int,
    num_tokens: int,
    dim: int,
    prefix: int,
    w_min: int,
    modified: bool,
    dtype: torch.dtype,
    threads: int,
) -> None:
    torch.manual_seed(num_tokens)
    pattern = FibottentionPattern(
        num_tokens, heads, w_min=w_min, modified=modified, cls_token=prefix
    )
    mask = dense_mask(offset_sets(num_tokens, heads, w_min, None, modified), num_tokens, prefix)
    inputs = make(layout, batch, heads, num_tokens + prefix, dim, dtype)
    grad = torch.randn_like(inputs[0])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = differentiate(
            lambda *x: fibottention(*x, pattern, masking=masking, backend=backend), inputs, grad
        )  # type: ignore[arg-type]
    finally:
        torch.set_num_threads(before)
    expected = differentiate(
        lambda *x: dense_attention(*x, mask, masking), [x.double() for x in inputs], grad
    )
    limits = [(5e-6, 1e-5), *[(3e-5, 1e-5)] * 3] if dtype == torch.float32 else [(1e-12, 1e-12)] * 4
    for got, want, (atol, rtol) in zip(ours, expected, limits, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want.double(), atol=atol, rtol=rtol)


@pytest.mark.parametrize("backend", ["numba", "csr"])
@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
def test_float32_error_is_at_most_three_times_that_of_masked_sdpa(
    backend: str, masking: str
) -> None:
    torch.manual_seed(0)
    pattern = FibottentionPattern(196, 6)
    mask = pattern.mask()
    inputs = make("heads first", 4, 6, 197, 64, torch.float32)
    grad = torch.randn_like(inputs[0])
    want = differentiate(
        lambda *x: dense_attention(*x, mask, masking), [x.double() for x in inputs], grad
    )
    ours = differentiate(
        lambda *x: fibottention(*x, pattern, masking=masking, backend=backend), inputs, grad
    )  # type: ignore[arg-type]
    theirs = differentiate(
        lambda *x: fibottention(*x, pattern, masking=masking, backend="sdpa"), inputs, grad
    )  # type: ignore[arg-type]
    for got, other, exact in zip(ours, theirs, want, strict=True):
        assert (got - exact).abs().max() <= 3 * (other - exact).abs().max()


# Whole rows of 64 numbers, or 40 in chunks of 16. Each kernel takes seconds to compile;
# trainings in bfloat16 use that of chunks, too.
@pytest.mark.parametrize(("dtype", "dim"), [(torch.float16, 64), (torch.bfloat16, 40)])
@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
def test_half_precision_error_is_at_most_twice_that_of_dense_halves(
    dtype: torch.dtype, masking: str, dim: int
) -> None:
    torch.manual_seed(0)
    pattern = FibottentionPattern(100, 2)
    inputs = make("packed qkv", 2, 2, 101, dim, dtype)
    grad = torch.randn_like(inputs[0])
    want = differentiate(
        lambda *x: dense_attention(*x, pattern.mask(), masking), [x.double() for x in inputs], grad
    )
    ours = differentiate(
        lambda *x: fibottention(*x, pattern, masking=masking, backend="numba"), inputs, grad
    )  # type: ignore[arg-type]
    theirs = differentiate(
        lambda *x: fibottention(*x, pattern, masking=masking, backend="sdpa"), inputs, grad
    )  # type: ignore[arg-type]
    for got, other, exact in zip(ours, theirs, want, strict=True):
        assert got.dtype == dtype
        assert (got.double() - exact).abs().max() <= 2 * (other.double() - exact).abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_without_keys_gets_zeros_and_zero_gradients(backend: str) -> None:
    pattern = FibottentionPattern(9, 1, w_min=1, w_max=1, cls_token=False, permuted=False)
    # offsets of heads 3, 4 exceed N
    lonely = FibottentionPattern(5, 4, w_min=1, w_max=1, cls_token=False, permuted=False)
    assert lonely.offsets[2:] == ((), ())
    for case in (pattern, lonely):
        inputs = make("heads first", 2, case.num_heads, case.num_tokens, 8, torch.float32)
        out, *grads = differentiate(
            lambda *x: fibottention(*x, case, backend=backend),  # noqa: B023
            inputs,
            torch.ones_like(inputs[0]),
        )
        empty = ~case.mask().any(-1)
        assert (out[:, empty] == 0).all()
        assert all((g[:, empty] == 0).all() and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", ["numba", "csr"])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
def test_nan_spreads_no_further_than_in_dense_attention(
    backend: str, which: int, masking: str
) -> None:
    pattern = FibottentionPattern(40, 2)
    inputs = make("heads first", 1, 2, 41, 16, torch.float32)
    inputs[which][0, 1, 20, 3] = float("nan")
    ours = fibottention(*inputs, pattern, masking=masking, backend=backend)  # type: ignore[arg-type]
    dense = dense_attention(*inputs, pattern.mask(), masking)
    assert not (ours.isnan() & ~dense.isnan()).any()
    sees = torch.zeros(41, dtype=torch.bool)
    sees[20] = True
    if which:
        sees = pattern.mask()[1, :, 20]
    assert ours[0, 1, sees].isnan().any(-1).all()
    assert not ours[0, 0].isnan().any()


@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_large_logits_neither_overflow_nor_lose_the_answer(masking: str, scale: float) -> None:
    torch.manual_seed(0)
    pattern = FibottentionPattern(30, 2)
    inputs = make("heads first", 1, 2, 31, 16, torch.float64)
    want = fibottention(*inputs, pattern, masking=masking, backend="reference", scale=scale)  # type: ignore[arg-type]
    got = fibottention(
        *(x.float() for x in inputs), pattern, masking=masking, backend="numba", scale=scale
    )  # type: ignore[arg-type]
    assert got.isfinite().all()
    # the logits themselves are rounded
    torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
@pytest.mark.parametrize("magnitude", [1e9, 1e15, 1e37])
def test_logits_of_any_finite_size_pick_the_largest(masking: str, magnitude: float) -> None:
    torch.manual_seed(0)
    pattern = FibottentionPattern(40, 2)
    q, k, v, grad = torch.randn(4, 1, 2, 41, 32)
    inputs = [magnitude * q, k, v]
    ours = differentiate(
        lambda *x: fibottention(*x, pattern, masking=masking, backend="numba"), inputs, grad
    )  # type: ignore[arg-type]
    wide = (x.double() for x in inputs)
    want = fibottention(*wide, pattern, masking=masking, backend="reference")  # type: ignore[arg-type]
    torch.testing.assert_close(ours[0].double(), want, atol=1e-6, rtol=1e-6)
    assert all(x.isfinite().all() for x in ours)


@pytest.mark.parametrize(
    "needed", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_gradients_of_some_inputs_alone(needed: tuple[bool, bool, bool]) -> None:
    pattern = FibottentionPattern(30, 2)
    inputs = [
        x.requires_grad_(flag)
        for x, flag in zip(make("heads first", 1, 2, 31, 16, torch.float32), needed, strict=True)
    ]
    # its gradient is expanded: stride 0
    fibottention(*inputs, pattern, backend="numba").sum().backward()
    got = [x.grad for x in inputs]
    for x in inputs:
        x.grad = None
    fibottention(*inputs, pattern, backend="reference").sum().backward()
    for ours, x in zip(got, inputs, strict=True):
        assert (ours is None) == (x.grad is None)
        if ours is not None:
            torch.testing.assert_close(ours, x.grad, atol=3e-5, rtol=1e-5)


def test_empty_batches() -> None:
    pattern = FibottentionPattern(10, 2)
    for backend in BACKENDS:
        inputs = make("heads first", 0, 2, 11, 16, torch.float32)
        out, *grads = differentiate(
            lambda *x: fibottention(*x, pattern, backend=backend),  # noqa: B023
            inputs,
            inputs[0],
        )
        assert [tuple(x.shape) for x in (out, *grads)] == [(0, 2, 11, 16)] * 4


def test_packed_projections_need_no_copy_of_the_result() -> None:
    pattern = FibottentionPattern(30, 2)
    q, k, v = make("packed qkv", 2, 2, 31, 16, torch.float32)
    assert fibottention(q, k, v, pattern, backend="numba").transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("backend", ["numba", "csr"])
@pytest.mark.parametrize("heads", [1, 6])  # rows split over threads or not
@pytest.mark.parametrize("level", [-20.0, -3.0, 3.0])
def test_zero_logit_keeps_its_precision_on_rows_that_keep_every_key(
    backend: str, heads: int, level: float
) -> None:
    pattern = FibottentionPattern(60, heads)
    q = torch.ones(2, heads, 61, 64)
    k = level + 0.01 * torch.randn(2, heads, 61, 64)
    v, grad = torch.randn(2, 2, heads, 61, 64)
    mask = dense_mask(offset_sets(60, heads), 60, 1)
    got = differentiate(
        lambda *x: fibottention(*x, pattern, masking="zero_logit", backend=backend), [q, k, v], grad
    )
    exact = differentiate(
        lambda *x: dense_attention(*x, mask, "zero_logit"), [x.double() for x in (q, k, v)], grad
    )
    dense = differentiate(
        lambda *x: fibottention(*x, pattern, masking="zero_logit", backend="sdpa"), [q, k, v], grad
    )
    for mine, theirs, right in zip(got, dense, exact, strict=True):
        allowed = max(3 * float((theirs - right).abs().max()), 5e-6)
        assert float((mine - right).abs().max()) <= allowed


@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
@pytest.mark.parametrize("scale", [-0.125, 0.0, 1e-46])
def test_any_scale(masking: str, scale: float) -> None:
    pattern = FibottentionPattern(60, 2)
    inputs = list(torch.randn(3, 1, 2, 61, 64))
    grad = torch.randn_like(inputs[0])
    got = differentiate(
        lambda *x: fibottention(*x, pattern, masking=masking, backend="numba", scale=scale),
        inputs,
        grad,
    )  # type: ignore[arg-type]
    want = differentiate(
        lambda *x: fibottention(*x, pattern, masking=masking, backend="reference", scale=scale),
        inputs,
        grad,
    )  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
