from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from fibopolicy.attention import (
    AttentionPattern,
    FibottentionPattern,
    LocalPattern,
    RandomPattern,
    cuda,
    fibottention,
    fibottention_qkvpacked,
    functional,
)
from fibopolicy.attention.operator import sparse_attention, sparse_attention_backward
from fibopolicy.errors import UserError

PATTERN = FibottentionPattern(60, 2)


class Layer(nn.Module):
    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.backend = nn.Linear(32, 96), backend

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return fibottention(q, k, v, PATTERN, backend=self.backend).transpose(1, 2).reshape(b, t, d)


@pytest.mark.parametrize("zero_logit", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(zero_logit: bool, packed: bool) -> None:
    qkv = (
        torch.randn(2, 61, 3, 2, 16).permute(2, 0, 3, 1, 4)
        if packed
        else torch.randn(3, 2, 2, 61, 16)
    )
    q, k, v = (x.detach().requires_grad_() for x in qkv)
    torch.library.opcheck(sparse_attention, (q, k, v, PATTERN.spec, zero_logit, 0.25, "numba"))
    out, lse = sparse_attention(
        q.detach(), k.detach(), v.detach(), PATTERN.spec, zero_logit, 0.25, "numba"
    )
    plain = [x.detach() for x in (q, k, v)]
    torch.library.opcheck(
        sparse_attention_backward, (out, *plain, out, lse, PATTERN.spec, zero_logit, 0.25, "numba")
    )


@pytest.mark.parametrize("backend", ["numba", "csr"])
@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
def test_gradcheck(backend: str, masking: str) -> None:
    pattern = FibottentionPattern(9, 2, w_min=3)
    q, k, v = (torch.randn(1, 2, 10, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    run = lambda *x: fibottention(*x, pattern, masking=masking, backend=backend)  # type: ignore[arg-type]  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=backend == "csr")


@pytest.mark.parametrize("backend", ["auto", "numba", "csr"])
def test_compiles_as_one_graph(backend: str) -> None:
    layer = Layer(backend)
    x = torch.randn(2, 61, 32)
    expected = layer(x)
    expected.square().sum().backward()
    grad, layer.qkv.weight.grad = layer.qkv.weight.grad, None
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(layer.qkv.weight.grad, grad)


@pytest.mark.parametrize("strict", [False, True])
def test_export_falls_back_to_masked_sdpa(strict: bool) -> None:
    layer, x = Layer(), torch.randn(2, 61, 32)
    program = torch.export.export(layer, (x,), strict=strict)
    assert "fibopolicy" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), layer(x), atol=1e-5, rtol=1e-5)
    layer(x)  # nothing that tracing made may be remembered


@pytest.mark.parametrize("backend", ["numba", "csr", "sdpa"])
def test_autocast_computes_in_the_autocast_dtype(backend: str) -> None:
    layer, x = Layer(backend), torch.randn(2, 61, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        single = torch.randn(1, 2, 61, 16, requires_grad=True)
        out = fibottention(single, single, single.bfloat16(), PATTERN, backend=backend)
        assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert single.grad is not None
    assert single.grad.dtype == torch.float32


def test_inference_mode() -> None:
    layer, x = Layer("numba"), torch.randn(2, 61, 32)
    with torch.inference_mode():
        inferred = layer(x)
    torch.testing.assert_close(inferred, layer(x))


def test_auto_says_what_it_chose_and_obeys_the_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q = torch.randn(1, 2, 61, 16)
    monkeypatch.setattr(functional, "_logged", set())
    with caplog.at_level(logging.DEBUG, "fibopolicy"):
        fibottention(q, q, q, PATTERN)
        monkeypatch.setattr(functional, "default_backend", "csr")
        fibottention(q, q, q, PATTERN)
    assert [record.getMessage().split()[2] for record in caplog.records] == ["numba", "csr"]


@pytest.mark.parametrize(
    ("dtype", "gradients", "expected"),
    [
        (torch.float32, True, ["sdpa", "sdpa", "triton", "triton"]),
        (torch.bfloat16, True, ["sdpa", "sdpa", "sdpa", "triton"]),
        (torch.bfloat16, False, ["sdpa", "triton", "triton", "triton"]),
    ],
)
def test_auto_on_a_gpu_takes_the_kernels_where_they_pay(
    dtype: torch.dtype, gradients: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = functional.Inputs(6, 1, 64, dtype, torch.device("cuda", 0), gradients)
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.setattr(cuda, "capability", lambda _: (9, 0))
    chosen = [
        functional._fastest(inputs, FibottentionPattern(tokens, 6), "neg_inf")[0]
        for tokens in (64, 196, 588, 3136)
    ]
    assert chosen == expected


@pytest.mark.parametrize("backend", ["numba", "csr", "sdpa"])
@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
@pytest.mark.parametrize("dim", [16, 20])
def test_a_packed_projection_gives_the_same_and_gets_its_gradient_packed(
    backend: str, masking: str, dim: int
) -> None:
    qkv = torch.randn(2, 61, 3, 2, dim, requires_grad=True)
    grad = torch.randn(2, 61, 2, dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    expected = fibottention(q, k, v, PATTERN, masking=masking, backend=backend).transpose(1, 2)  # type: ignore[arg-type]
    out = fibottention_qkvpacked(qkv, PATTERN, masking=masking, backend=backend)  # type: ignore[arg-type]
    assert out.shape == (2, 61, 2, dim)
    torch.testing.assert_close(out, expected)
    (packed,) = torch.autograd.grad(out, qkv, grad)
    torch.testing.assert_close(packed, torch.autograd.grad(expected, qkv, grad)[0])
    if backend == "numba" and dim == 16:  # other head dimensions are padded first
        assert packed.is_contiguous()


def test_packed_from_a_slice_of_something_larger() -> None:
    wide = torch.randn(2, 61, 4, 2, 16, requires_grad=True)
    expected = (
        fibottention(*wide[:, :, 1:].permute(2, 0, 3, 1, 4), PATTERN, backend="numba")
        .square()
        .sum()
    )
    out = fibottention_qkvpacked(wide[:, :, 1:], PATTERN, backend="numba").square().sum()
    torch.testing.assert_close(
        torch.autograd.grad(out, wide)[0], torch.autograd.grad(expected, wide)[0]
    )


def test_packed_compiles_as_one_graph_and_exports() -> None:
    run = lambda x: fibottention_qkvpacked(x, PATTERN)  # noqa: E731
    qkv = torch.randn(1, 61, 3, 2, 16, requires_grad=True)
    grad = torch.randn(1, 61, 2, 16)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(qkv)
    torch.testing.assert_close(compiled, run(qkv))
    torch.testing.assert_close(
        torch.autograd.grad(compiled, qkv, grad), torch.autograd.grad(run(qkv), qkv, grad)
    )


def test_modes_that_watch_operators_see_one() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    q = torch.randn(1, 2, 61, 16)
    graph = make_fx(lambda x: fibottention(x, x, x, PATTERN, backend="numba"))(q)
    assert "sparse_attention" in str(graph.graph)


def second_derivative(backend: str, masking: str, needed: str, packed: bool) -> Tensor:
    """The second derivative of a function whose inputs also bypass the attention."""
    torch.manual_seed(0)
    qkv = torch.randn(1, 10, 3, 2, 4, dtype=torch.float64)
    pattern = FibottentionPattern(9, 2, w_min=3)
    if packed:
        inputs = [qkv.requires_grad_()]
        out = fibottention_qkvpacked(qkv, pattern, masking=masking, backend=backend).transpose(1, 2)  # type: ignore[arg-type]
    else:
        tensors = {
            name: x.clone().requires_grad_(name in needed)
            for name, x in zip("qkv", qkv.permute(2, 0, 3, 1, 4), strict=True)
        }
        inputs = [x for x in tensors.values() if x.requires_grad]
        out = fibottention(*tensors.values(), pattern, masking=masking, backend=backend)  # type: ignore[arg-type]
    loss = out.square().sum() + sum(x.pow(4).sum() for x in inputs)
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    second = torch.autograd.grad(sum(x.pow(3).sum() for x in first), inputs)  # type: ignore[arg-type]
    return torch.cat([x.flatten() for x in second])


@pytest.mark.parametrize("backend", ["sdpa", "csr", "numba"])
@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
@pytest.mark.parametrize("needed", ["q", "k", "v", "qk", "qkv", "packed"])
def test_a_second_derivative_is_right_or_an_error(backend: str, masking: str, needed: str) -> None:
    packed = needed == "packed"
    if backend == "sdpa":
        expected = second_derivative("reference", masking, needed, packed)
        torch.testing.assert_close(second_derivative(backend, masking, needed, packed), expected)
    else:
        with pytest.raises(UserError, match="no second derivatives; set backend='reference'"):
            second_derivative(backend, masking, needed, packed)


@pytest.mark.parametrize("backend", ["csr", "numba"])
def test_a_backward_pass_with_create_graph_is_the_same_and_rejects_a_second_one(
    backend: str,
) -> None:
    q = torch.randn(1, 2, 61, 16, requires_grad=True)
    (plain,) = torch.autograd.grad(
        fibottention(q, q, q, PATTERN, backend=backend).square().sum(), q
    )
    (grad,) = torch.autograd.grad(
        fibottention(q, q, q, PATTERN, backend=backend).square().sum(), q, create_graph=True
    )
    torch.testing.assert_close(grad, plain)
    with pytest.raises(UserError, match="no second derivatives"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["csr", "numba"])
def test_transforms_that_differentiate_are_rejected(backend: str) -> None:
    q = torch.randn(1, 2, 61, 16)
    loss = lambda x: fibottention(x, x, x, PATTERN, backend=backend).square().sum()  # noqa: E731
    asked = [
        lambda: torch.func.grad(loss)(q),
        lambda: torch.func.jvp(loss, (q,), (q,)),
        lambda: torch.func.jvp(torch.func.grad(loss), (q,), (q,)),
        lambda: torch.vmap(torch.func.grad(loss))(q[None]),
        lambda: torch.func.grad(lambda x: torch.vmap(loss)(x).sum())(q[None]),
    ]
    for ask in asked:
        with pytest.raises(UserError, match=r"none inside torch\.func"):
            ask()


@pytest.mark.parametrize("backend", ["csr", "numba", "packed"])
def test_batched_derivatives_are_rejected(backend: str) -> None:
    qkv = torch.randn(1, 61, 3, 2, 16, requires_grad=True)
    if backend == "packed":
        out = fibottention_qkvpacked(qkv, PATTERN, backend="numba")
    else:
        out = fibottention(*qkv.permute(2, 0, 3, 1, 4), PATTERN, backend=backend)
    with pytest.raises(UserError, match="no batched derivatives; set backend='reference'"):
        torch.autograd.grad(
            out, qkv, torch.ones(2, *out.shape), retain_graph=True, is_grads_batched=True
        )
    with pytest.raises(UserError, match="no batched derivatives"):
        torch.vmap(lambda grad: torch.autograd.grad(out, qkv, grad))(torch.ones(2, *out.shape))


def test_vmap_alone_gives_the_same() -> None:
    q = torch.randn(3, 1, 2, 61, 16)
    got = torch.vmap(lambda x: fibottention(x, x, x, PATTERN, backend="numba"))(q)
    torch.testing.assert_close(
        got, torch.stack([fibottention(x, x, x, PATTERN, backend="numba") for x in q])
    )


@pytest.mark.parametrize("kind", [FibottentionPattern, LocalPattern, RandomPattern])
def test_a_pattern_never_used_before_compiles_as_one_graph(kind: type[AttentionPattern]) -> None:
    options = {} if kind is FibottentionPattern else {"target": 0.1}
    q = torch.randn(1, 2, 54, 16)
    for layer, backend in enumerate(("auto", "sdpa")):
        pattern = kind(53, 2, layer=layer, **options)  # type: ignore[arg-type]
        run = torch.compile(
            lambda x, p=pattern, b=backend: fibottention(x, x, x, p, backend=b),
            fullgraph=True,
            backend="aot_eager",
        )
        torch.testing.assert_close(run(q), fibottention(q, q, q, pattern))


@pytest.mark.parametrize("strict", [False, True])
def test_a_pattern_never_used_before_exports(strict: bool) -> None:
    class Fresh(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fibottention(x, x, x, pattern)

    pattern = FibottentionPattern(47, 2, layer=int(strict))
    q = torch.randn(1, 2, 48, 16)
    program = torch.export.export(Fresh(), (q,), strict=strict)
    torch.testing.assert_close(
        program.module()(q), fibottention(q, q, q, pattern), atol=1e-5, rtol=1e-5
    )


def test_traced_programs_hold_the_operator() -> None:
    q = torch.randn(1, 2, 61, 16)
    traced = torch.jit.trace(lambda x: fibottention(x, x, x, PATTERN, backend="numba"), q)
    other = torch.randn(1, 2, 61, 16)
    torch.testing.assert_close(traced(other), fibottention(other, other, other, PATTERN))


def test_forward_derivatives_are_rejected() -> None:
    q = torch.randn(1, 2, 61, 16)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, q)
        with pytest.raises(UserError, match="no forward-mode derivatives"):
            fibottention(dual, q, q, PATTERN, backend="numba")
        with pytest.raises(UserError, match="no forward-mode derivatives"):
            fibottention_qkvpacked(
                torch.stack([dual] * 3, dim=2).transpose(1, 3), PATTERN, backend="numba"
            )


def test_another_default_device_does_not_matter() -> None:
    q = torch.randn(1, 2, 61, 16)
    with torch.device("meta"):
        out = fibottention(q, q, q, PATTERN, backend="numba")
    torch.testing.assert_close(out, fibottention(q, q, q, PATTERN, backend="reference"))


def test_the_result_of_a_packed_layout_can_be_changed_in_place_and_autograd_notices() -> None:
    qkv = torch.randn(1, 61, 3, 2, 16, requires_grad=True)
    changed = fibottention_qkvpacked(qkv, PATTERN, backend="numba").relu_()
    torch.testing.assert_close(
        changed, fibottention_qkvpacked(qkv, PATTERN, backend="numba").relu()
    )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        changed.sum().backward()


# "numba" splits the rows of one head over threads, not those of six
@pytest.mark.parametrize(("backend", "heads"), [("numba", 1), ("numba", 6), ("csr", 2)])
def test_backward_inside_autocast(backend: str, heads: int) -> None:
    pattern = FibottentionPattern(196, heads)
    leaves = [torch.randn(1, heads, 197, 64, requires_grad=True) for _ in range(3)]
    out = fibottention(*leaves, pattern, masking="zero_logit", backend=backend)
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu"):
        got = torch.autograd.grad(out, leaves, torch.ones_like(out))
    torch.testing.assert_close(got, expected)
