"""Processes and threads: no crash, no hang, the same result."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fibopolicy.attention import FibottentionPattern, cpu, cpu_kernels, fibottention

PATTERN = FibottentionPattern(196, 6)


def work(seed: int) -> float:
    """Uses torch's own threads before and after ours, so that both meet."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 6, 197, 64, generator=generator)
    leaf = (q @ torch.eye(64)).requires_grad_()
    out = fibottention(leaf, leaf, leaf, PATTERN, backend="numba")
    out.square().sum().backward()
    assert leaf.grad is not None
    return float(leaf.grad.double().square().sum())


def _child(seed: int, results: multiprocessing.Queue[float]) -> None:
    results.put(work(seed))


@pytest.fixture(autouse=True)
def two_threads() -> object:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_spawned_processes_compute_the_same() -> None:
    _compare_children("spawn", _child, 1)  # which imports torch


@pytest.mark.slow
def test_forked_processes_compute_the_same() -> None:
    # In a new parent process: if torch.compile runs before the first backward pass,
    # torch's CUDA build starts autograd's device threads, even without a GPU, and then
    # rejects autograd in forked children.
    program = (
        "import torch; torch.set_num_threads(2)\n"
        "from tests.attention.test_threads import _compare_children, _torchless_child\n"
        "_compare_children('fork', _torchless_child, 2)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=1000
    )
    assert done.returncode == 0, done.stderr


def _compare_children(
    method: str, target: Callable[[int, multiprocessing.Queue[float]], None], count: int
) -> None:
    expected = work(1)  # the parent has used its threads already
    context = multiprocessing.get_context(method)
    results = context.Queue()
    children = [context.Process(target=target, args=(1, results)) for _ in range(count)]
    for child in children:
        child.start()
    got = [results.get(timeout=1000) for _ in children]
    for child in children:
        child.join(timeout=120)
        assert child.exitcode == 0
    assert got == pytest.approx([expected] * count)


def _torchless_child(seed: int, results: multiprocessing.Queue[float]) -> None:
    """In a forked child, torch's parallel operators hang and ours must not;
    get_num_threads() still returns 2 here.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.set_num_threads(1)
    q = torch.randn(2, 6, 197, 64, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2)
        leaf = q.clone().requires_grad_()
        out = fibottention(leaf, leaf, leaf, PATTERN, backend="numba")
        out.square().sum().backward()
    assert leaf.grad is not None
    results.put(float(leaf.grad.double().square().sum()))


def test_several_python_threads_at_once() -> None:
    expected = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert list(pool.map(work, range(4))) == pytest.approx(expected)


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
def test_the_number_of_threads_changes_nothing(heads: int, masking: str) -> None:
    pattern = FibottentionPattern(400, heads)
    q, k, v, grad = torch.randn(4, 1, heads, 401, 64)
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = fibottention(*leaves, pattern, masking=masking, backend="numba")  # type: ignore[arg-type]
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=1e-5)


def test_python_threads_stand_in_where_torch_has_no_gnu_openmp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = work(2)
    monkeypatch.setattr(cpu, "_openmp", lambda: None)
    assert work(2) == pytest.approx(expected)


@pytest.mark.slow
def test_a_second_process_finds_the_compiled_code_on_disk() -> None:
    for name in ("forward", "backward"):
        cpu_kernels.kernel(name, "f32", 32, True)
    program = (
        "from fibopolicy.attention import cpu_kernels; "
        "print([cpu_kernels.kernel(name, 'f32', 32, True).function.cache_hits"
        " for name in ('forward', 'backward')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[1, 1]\n", done.stderr
