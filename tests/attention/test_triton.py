"""The Triton kernels, on a GPU if there is one, else in Triton's interpreter: small
shapes, the same results.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from oracle import dense_attention

from fibopolicy.attention import FibottentionPattern, fibottention, like
from fibopolicy.errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("masking", ["neg_inf", "zero_logit"])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "dim", "prefix", "dtype"),
    [
        (40, 2, 16, 1, torch.float32),
        (33, 3, 20, 0, torch.float32),
        (20, 1, 64, 3, torch.float32),
        (40, 2, 16, 1, torch.bfloat16),
        (1, 2, 1, 1, torch.float32),
        (5, 4, 8, 0, torch.float16),  # heads 3 and 4 keep nothing
    ],
)
def test_outputs_and_gradients(
    masking: str, num_tokens: int, heads: int, dim: int, prefix: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    pattern = FibottentionPattern(num_tokens, heads, cls_token=prefix, w_min=3, permuted=False)
    qkv = (
        torch.randn(2, num_tokens + prefix, 3, heads, dim).to(DEVICE, dtype).permute(2, 0, 3, 1, 4)
    )
    grad = torch.randn(qkv.shape[1:]).to(DEVICE, dtype)
    results = []
    for cast, run in (
        (dtype, lambda *x: fibottention(*x, pattern, masking=masking, backend="triton")),  # type: ignore[arg-type]
        (torch.float64, lambda *x: dense_attention(*x, pattern.mask(DEVICE), masking)),
    ):
        leaves = [x.to(cast).detach().requires_grad_() for x in qkv]
        out = run(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))])
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want.double(), atol=tolerance, rtol=tolerance)


def test_unsupported_triton_inputs_are_rejected() -> None:
    pattern = FibottentionPattern(10, 2)
    q = torch.randn(1, 2, 11, 4, device=DEVICE)
    with pytest.raises(UserError, match=r"got torch\.float64"):
        fibottention(q.double(), q.double(), q.double(), pattern, backend="triton")
    with pytest.raises(UserError, match="RandomPattern"):
        fibottention(q, q, q, like(pattern, "random"), backend="triton")
