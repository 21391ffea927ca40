from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fibopolicy.attention import (
    FibottentionPattern,
    cpu,
    cuda,
    fibottention,
    fibottention_qkvpacked,
)
from fibopolicy.errors import UserError

PATTERN = FibottentionPattern(10, 2)


def tensors(*shape: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(*shape).to(dtype) for _ in range(3)]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (tensors(2, 11, 4), "share one shape"),
        ([*tensors(1, 2, 11, 4)[:2], torch.randn(1, 2, 11, 5)], "share one shape"),
        (tensors(1, 2, 11, 0), "head dimension 0"),
        (tensors(1, 2, 11, 4, dtype=torch.int64), "floating dtype"),
        ([*tensors(1, 2, 11, 4)[:2], torch.randn(1, 2, 11, 4).double()], "one floating dtype"),
        ([*tensors(1, 2, 11, 4)[:2], torch.empty(1, 2, 11, 4, device="meta")], "one device"),
        (tensors(1, 2, 10, 4), "2 heads and 11 tokens.*got 2 heads and 10 tokens"),
        (tensors(1, 3, 11, 4), "2 heads and 11 tokens.*got 3 heads"),
    ],
)
def test_tensors_that_do_not_fit(inputs: list[torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fibottention(*inputs, PATTERN)


def test_an_invalid_pattern_is_named() -> None:
    with pytest.raises(UserError, match="expected an attention pattern"):
        fibottention(*tensors(1, 2, 11, 4), None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"num_tokens of a pattern must be an integer, got 10\.5"):
        FibottentionPattern(10.5, 2)  # type: ignore[arg-type]
    assert FibottentionPattern(np.int64(10), np.int32(2)) == PATTERN


@pytest.mark.parametrize("shape", [(2, 11, 6, 4), (2, 11, 2, 2, 4), (2, 2, 11, 3, 4)])
def test_a_projection_that_is_not_packed(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"shape \(B, T, 3, h, d\)"):
        fibottention_qkvpacked(torch.randn(shape), PATTERN)


@pytest.mark.parametrize("options", [{"masking": "neginf"}, {"backend": "nubma"}])
def test_unknown_names_suggest_the_nearest(options: dict[str, str]) -> None:
    with pytest.raises(UserError, match="did you mean"):
        fibottention(*tensors(1, 2, 11, 4), PATTERN, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["numba", "csr", "sdpa", "reference"])
def test_a_scale_that_would_not_be_learned_is_rejected(backend: str) -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(UserError, match="scale must be a number; multiply q by a tensor"):
        fibottention(*tensors(1, 2, 11, 4), PATTERN, backend=backend, scale=scale)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="scale must be a number"):
        fibottention_qkvpacked(torch.randn(1, 11, 3, 2, 4), PATTERN, backend=backend, scale=scale)  # type: ignore[arg-type]


def test_an_unknown_backend_in_the_environment_is_rejected() -> None:
    program = (
        "import torch; from fibopolicy.attention import FibottentionPattern, fibottention;"
        "q = torch.zeros(1, 2, 11, 4); fibottention(q, q, q, FibottentionPattern(10, 2))"
    )
    environment = {**os.environ, "FIBOPOLICY_ATTENTION_BACKEND": "cuda"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert "unknown attention backend 'cuda'" in done.stderr


def test_numba_is_rejected_off_the_cpu() -> None:
    with pytest.raises(UserError, match="runs on the CPU, got tensors on meta"):
        fibottention(*(x.to("meta") for x in tensors(1, 2, 11, 4)), PATTERN, backend="numba")


def test_triton_is_rejected_off_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="runs on CUDA, got tensors on cpu"):
        fibottention(*tensors(1, 2, 11, 4), PATTERN, backend="triton")


def test_without_numba_auto_falls_back_and_a_forced_numba_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "available", lambda: False)
    inputs, pattern = tensors(1, 2, 13, 4), FibottentionPattern(12, 2)  # not used elsewhere
    torch.testing.assert_close(
        fibottention(*inputs, pattern), fibottention(*inputs, pattern, backend="reference")
    )
    with pytest.raises(UserError, match="needs numba"):
        fibottention(*inputs, pattern, backend="numba")
