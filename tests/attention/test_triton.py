"""The Triton kernels, on a GPU if there is one, else in Triton's interpreter: small
shapes, the same results.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import random
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from oracle import dense_attention
from torch import Tensor

from fibopolicy.attention import (
    AttentionPattern,
    FibottentionPattern,
    LocalPattern,
    cuda,
    fibottention,
    fibottention_qkvpacked,
    functional,
    like,
)
from fibopolicy.errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: The interpreter takes seconds for a shape; on a GPU only compiling takes time.
CASES, SHAPES, TOKENS = (24, 8, 1000) if DEVICE == "cuda" else (6, 1, 24)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """To change how the backend divides its work."""
    cuda.forget_launches()
    yield monkeypatch
    monkeypatch.undo()
    cuda.forget_launches()


def use_no_tensor_cores(changed: pytest.MonkeyPatch) -> None:
    for kernel in cuda.TILINGS:
        changed.setitem(cuda.OVERRIDES, kernel, cuda.Tiling(False, 1, 4, 1))


def assert_results_of_dense_attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: AttentionPattern, masking: str
) -> None:
    grad = torch.randn(q.shape).to(DEVICE, q.dtype)
    results = []
    for cast, run in (
        (q.dtype, lambda *x: fibottention(*x, pattern, masking=masking, backend="triton")),  # type: ignore[arg-type]
        (torch.float64, lambda *x: dense_attention(*x, pattern.mask(DEVICE), masking)),
    ):
        leaves = [x.to(cast).detach().requires_grad_() for x in (q, k, v)]
        out = run(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    tolerance = TOLERANCE[q.dtype]
    for got, want in zip(*results, strict=True):
        assert got.dtype == q.dtype
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("seed", range(CASES))
def test_outputs_and_gradients_at_random_shapes(seed: int, changed: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    # The interpreter multiplies matrices of bfloat16 wrongly.
    dtype = (torch.float32, torch.float16, torch.bfloat16)[seed % 3]
    dot = dtype == torch.float16 or (dtype == torch.bfloat16 and DEVICE == "cuda")
    if not dot:
        use_no_tensor_cores(changed)
    changed.setattr(cuda, "_TOKENS_PER_SPLIT", draw.choice([9, 1024]))
    masking = ("neg_inf", "zero_logit")[seed // 3 % 2]
    prefix, dim = draw.choice([0, 1, 1, 2]), draw.choice([1, 16, 20, 64, 64, 100, 256])
    if dot and prefix == 2:
        prefix = 18  # more than the 16 rows of a program
    for _ in range(SHAPES):
        batch, heads, num_tokens = draw.randint(1, 2), draw.randint(1, 2), draw.randint(1, TOKENS)
        pattern: AttentionPattern = FibottentionPattern(
            num_tokens,
            heads,
            cls_token=prefix,
            w_min=draw.randint(1, 9),
            modified=draw.random() < 0.5,
            layer=draw.randint(0, 9),
        )
        if draw.random() < 0.2:
            pattern = like(pattern, "dilated")
        qkv = torch.randn(batch, num_tokens + prefix, 3, heads, dim).to(DEVICE, dtype)
        assert_results_of_dense_attention(*qkv.permute(2, 0, 3, 1, 4), pattern, masking)


@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_token_without_keys_gets_zeros_and_zero_gradients(
    dtype: torch.dtype, masking: str
) -> None:
    torch.manual_seed(0)
    pattern = FibottentionPattern(5, 4, cls_token=False, w_min=1, w_max=1, permuted=False)
    assert pattern.offsets[2:] == ((), ())
    qkv = torch.randn(3, 1, 4, 5, 8).to(DEVICE, dtype)
    assert_results_of_dense_attention(*qkv, pattern, masking)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_q_k_and_v_may_be_laid_out_differently_and_not_aligned(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pattern = LocalPattern(20, 2, target=0.3)
    q = torch.randn(1, 21, 2, 20).to(DEVICE, dtype).transpose(1, 2)
    k = torch.randn(1, 2, 20, 21).to(DEVICE, dtype).mT
    v = torch.randn(1, 2, 21, 21).to(DEVICE, dtype)[..., 1:]
    assert_results_of_dense_attention(q, k, v, pattern, "neg_inf")


@pytest.mark.parametrize("view", [lambda x: x.mT.contiguous().mT, torch._neg_view])
def test_numbers_of_a_row_may_lie_apart_or_be_negated_by_a_view(
    view: Callable[[Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    q, k, v = (view(torch.randn(1, 2, 21, 20, device=DEVICE)) for _ in range(3))
    assert_results_of_dense_attention(q, k, v, FibottentionPattern(20, 2), "neg_inf")


def test_a_packed_projection_gets_its_gradient_and_compiles_as_one_graph() -> None:
    torch.manual_seed(0)
    pattern = FibottentionPattern(20, 2)
    qkv = torch.randn(1, 21, 3, 2, 16, device=DEVICE, requires_grad=True)
    run = lambda x: fibottention_qkvpacked(x, pattern, backend="triton")  # noqa: E731
    expected = dense_attention(*qkv.permute(2, 0, 3, 1, 4), pattern.mask(DEVICE), "neg_inf")
    grad = torch.randn(1, 21, 2, 16, device=DEVICE)
    want = torch.autograd.grad(expected.transpose(1, 2), qkv, grad.double())[0]
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        out = call(qkv)
        torch.testing.assert_close(out.double(), expected.transpose(1, 2), atol=2e-5, rtol=2e-5)
        (got,) = torch.autograd.grad(out, qkv, grad)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
def test_a_cuda_graph_captures_both_passes(masking: str) -> None:
    pattern = FibottentionPattern(1500, 4)
    q, k, v, grad = torch.randn(4, 2, 4, 1501, 64, device=DEVICE, dtype=torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def step() -> tuple[Tensor, ...]:
        out = fibottention(*leaves, pattern, masking=masking, backend="triton")  # type: ignore[arg-type]
        return out, *torch.autograd.grad(out, leaves, grad)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(captured, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_unsupported_triton_inputs_are_rejected() -> None:
    pattern = FibottentionPattern(10, 2)
    q = torch.randn(1, 2, 11, 4, device=DEVICE)
    with pytest.raises(UserError, match=r"got torch\.float64"):
        fibottention(q.double(), q.double(), q.double(), pattern, backend="triton")
    with pytest.raises(UserError, match="RandomPattern"):
        fibottention(q, q, q, like(pattern, "random"), backend="triton")
    wide = torch.randn(1, 2, 11, 257, device=DEVICE)
    with pytest.raises(UserError, match="head dimensions up to 256, got 257"):
        fibottention(wide, wide, wide, pattern, backend="triton")
    whole = LocalPattern(10, 2, target=1.0)
    with pytest.raises(UserError, match="'zero_logit' where a patch keeps every key"):
        fibottention(q, q, q, whole, masking="zero_logit", backend="triton")


def test_an_old_gpu_is_rejected_and_auto_names_its_fallback_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class OnOldGPU:
        device, dtype = torch.device("cuda", 0), torch.float16
        shape, requires_grad = (1, 6, 3137, 64), True

    monkeypatch.setattr(cuda, "capability", lambda _: (7, 5))
    q, pattern = OnOldGPU(), FibottentionPattern(3136, 6)
    with caplog.at_level(logging.DEBUG, "fibopolicy"):
        assert [functional.choose_backend(q, 6, 3137, pattern) for _ in range(3)] == ["csr"] * 3  # type: ignore[arg-type]
    (record,) = caplog.records
    assert "csr for cuda torch.float16, T = 3137: triton needs a GPU" in record.getMessage()
    assert "8.0 or higher, got 7.5" in record.getMessage()
    with pytest.raises(UserError, match=r"compute capability 8\.0 or higher, got 7\.5"):
        functional.choose_backend(q, 6, 3137, pattern, backend="triton")  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_kernel_with_most_registers_compiles_for_a_gpu_without_spilling_them() -> None:
    script = Path(__file__).parents[2] / "scripts" / "benchmarks" / "attention_registers.py"
    options = ["--archs", "90", "--dtypes", "bf16", "--dims", "64"]
    options += ["--kernels", "backward_keys", "--maskings", "zero_logit"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, script, *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "| 90 | bf16 | 64 | backward_keys |" in done.stdout


@pytest.mark.slow
def test_all_gpu_measurements_run_and_are_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parents[2] / "scripts" / "benchmarks" / "gpu_all"
    command = [sys.executable, script, "--dry-run", "--out", tmp_path]
    subprocess.run(command, capture_output=True, check=True)
    (rows,), (page,) = tmp_path.glob("*.jsonl"), tmp_path.glob("*.md")
    measured = [json.loads(line) for line in rows.read_text().splitlines()]
    assert not [row for row in measured if "error" in row]
    assert {row["section"] for row in measured} - {"robomimic"} == {
        *("card", "tests", "compile", "attention", "kernels", "training", "encoder", "auto"),
        "shared",
    }
    assert "Tests passed" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["gpu_all", "--dry-run"])
    monkeypatch.setattr(sys, "path", [*sys.path])  # which it changes
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    there = runpy.run_path(str(script))["Rows"](rows, "attention")
    assert there.names
    for name in there.names:
        there.measure(name, lambda: pytest.fail("measured again"))
