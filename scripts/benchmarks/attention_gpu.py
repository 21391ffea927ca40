"""Sparse against dense attention on a GPU, with the cost of a call on the host (timed
in turns) and without it (in a CUDA graph).

    python scripts/benchmarks/attention_gpu.py --hardware h200

Writes docs/benchmarks/attention_<hardware>_<dtype>_<date>.json, and
..._graph_<date>.json of median microseconds.
"""

from __future__ import annotations

import results
import torch
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench_cudagraph

from fibopolicy.attention import FibottentionPattern, fibottention
from fibopolicy.attention.profile import SHAPES, Contender, Report, one_pass, profile_attention

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    options = results.hardware_options(__doc__, turns=20)
    reports = {
        name: profile_attention(turns=options.turns, device="cuda", dtype=dtype)
        for name, dtype in DTYPES.items()
    }
    reports["graph"] = Report(
        "attention in a CUDA graph", [in_graph(shape, name) for name in DTYPES for shape in SHAPES]
    )
    for name, report in reports.items():
        report.write(
            options.out / f"attention_{options.hardware}_{name}_{report.environment['date']}.json"
        )


def in_graph(shape: tuple[int, int, int], dtype: str) -> dict[str, object]:
    """Median microseconds of dense and sparse attention at (B, h, N), without launches
    from the host.
    """
    batch, heads, tokens = shape
    pattern = FibottentionPattern(tokens, heads)
    qkv = torch.randn(
        3, batch, heads, pattern.sequence_length, 64, device="cuda", dtype=DTYPES[dtype]
    )
    grad = torch.randn_like(qkv[0])
    contenders: dict[str, Contender] = {
        "dense": scaled_dot_product_attention,
        "sparse": lambda q, k, v: fibottention(q, k, v, pattern, backend="triton"),
    }
    row: dict[str, object] = {"shape": shape, "dtype": dtype}
    for name, run in contenders.items():
        for column, passes in (("forward", "forward"), ("both", "forward+backward")):
            row[f"{name}_{column}"] = (
                do_bench_cudagraph(one_pass(run, qkv, grad, passes), rep=20) * 1e3
            )
    return row


if __name__ == "__main__":
    main()
