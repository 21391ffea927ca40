"""Sparse attention against dense on a GPU, with what a call costs on the host and without: timed in turns, and in a CUDA graph.

    python scripts/benchmarks/attention_gpu.py --hardware h200

Writes docs/benchmarks/attention_<hardware>_<dtype>_<date>.json, and ..._graph_<date>.json of median microseconds.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench_cudagraph

from fibopolicy.attention import FibottentionPattern, fibottention
from fibopolicy.attention.profile import SHAPES, Contender, Report, profile_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hardware", required=True, help="what the result files call this machine")
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args()
    date, name = datetime.date.today(), options.out / f"attention_{options.hardware}"

    for dtype in DTYPES:
        report = profile_attention(turns=options.turns, device="cuda", dtype=DTYPES[dtype])
        report.write(Path(f"{name}_{dtype}_{date}.json"))
    graphs = [in_graph(shape, dtype) for dtype in DTYPES for shape in SHAPES]
    Report("attention in a CUDA graph", graphs).write(Path(f"{name}_graph_{date}.json"))


def in_graph(shape: tuple[int, int, int], dtype: str) -> dict[str, object]:
    """Median microseconds of dense and of sparse attention at (B, h, N), nothing launched from the host meanwhile."""
    batch, heads, tokens = shape
    pattern = FibottentionPattern(tokens, heads)
    q, k, v, grad = torch.randn(4, batch, heads, pattern.sequence_length, 64, device="cuda", dtype=DTYPES[dtype])
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def both(run: Contender) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(*leaves), leaves, grad)

    def sparse(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return fibottention(q, k, v, pattern, backend="triton")

    dense = scaled_dot_product_attention
    runs = {
        "dense_forward": lambda: dense(q, k, v),
        "dense_both": both(dense),
        "sparse_forward": lambda: sparse(q, k, v),
        "sparse_both": both(sparse),
    }
    return {"shape": shape, "dtype": dtype} | {name: do_bench_cudagraph(run, rep=20) * 1e3 for name, run in runs.items()}


if __name__ == "__main__":
    main()
