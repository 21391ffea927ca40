"""Fibottention beside dense attention at small and large batches, on a CPU: one call, and
a whole `vit_tiny`.

    python scripts/benchmarks/attention_batches.py --hardware epyc

The two alternate; a ratio above 1 means that Fibottention takes longer. With one thread,
the clock is the processor time of that thread, which other load on the machine disturbs
less; with two threads it is the wall clock. Writes
docs/benchmarks/attention_batches_<hardware>_<date>.json.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import results
import torch
from torch import Tensor
from torch.nn import functional as F

from fibopolicy.attention import FibottentionPattern, fibottention_qkvpacked
from fibopolicy.attention.profile import Report, ratios
from fibopolicy.encoders.vit import ViT
from fibopolicy.utils.system import torch_threads

BATCHES = (1, 8, 64)
#: N by the grid of patches.
GRIDS = {49: (7, 7), 64: (8, 8), 144: (12, 12), 196: (14, 14), 588: (21, 28)}
HEADS, PATCH = 6, 12
#: Seconds for one row, which has at least `MIN_TURNS` turns and at most `--turns`.
SECONDS, MIN_TURNS = 1.5, 4


def calls(batch: int, num_tokens: int, dim: int) -> Iterator[tuple[str, Any, Any]]:
    """(what, dense, Fibottention) for one attention call."""
    pattern = FibottentionPattern(num_tokens, HEADS)
    qkv = torch.randn(batch, num_tokens + 1, 3, HEADS, dim)
    leaf, grad = qkv.clone().requires_grad_(), torch.randn(batch, num_tokens + 1, HEADS, dim)

    def dense(x: Tensor) -> Tensor:
        q, k, v = x.permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

    def sparse(x: Tensor) -> Tensor:
        return fibottention_qkvpacked(x, pattern)

    def forward(run: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return torch.inference_mode()(lambda: run(qkv))

    def both(run: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(leaf), leaf, grad)

    yield f"call, d = {dim}, forward", forward(dense), forward(sparse)
    yield f"call, d = {dim}, forward+backward", both(dense), both(sparse)


def encoders(batch: int, num_tokens: int) -> Iterator[tuple[str, Any, Any]]:
    """(what, dense, Fibottention) for a whole `vit_tiny`."""
    size = (GRIDS[num_tokens][0] * PATCH, GRIDS[num_tokens][1] * PATCH)
    images = torch.rand(batch, 3, *size)
    models = [ViT(image_size=size, attention=name) for name in ("dense", "fibottention")]

    def step(model: ViT) -> None:
        model.zero_grad(set_to_none=True)
        model(images)[1].square().mean().backward()

    forward = [torch.inference_mode()(lambda model=model: model(images)) for model in models]
    both = [lambda model=model: step(model) for model in models]
    yield "vit_tiny, forward", *forward
    yield "vit_tiny, forward+backward", *both


def measure(
    dense: Callable[[], object], sparse: Callable[[], object], turns: int, clock: Any
) -> tuple[float, float, float]:
    """Quartiles of the ratio."""
    seconds: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    for turn in range(-2, turns):
        if turn >= MIN_TURNS and time.perf_counter() - began > SECONDS:
            break
        for which in (0, 1) if turn % 2 else (1, 0):
            start = clock()
            (dense, sparse)[which]()
            if turn >= 0:
                seconds[which].append(clock() - start)
    return ratios(seconds[1], seconds[0])


def main() -> None:
    options = results.hardware_options(__doc__, turns=300)
    rows = []
    for threads, clock in ((1, time.thread_time), (2, time.perf_counter)):
        for num_tokens in GRIDS:
            for batch in BATCHES:
                torch.manual_seed(0)
                with torch_threads(threads):
                    for make in (
                        lambda b=batch, n=num_tokens: calls(b, n, 16),
                        lambda b=batch, n=num_tokens: calls(b, n, 64),
                        lambda b=batch, n=num_tokens: encoders(b, n),
                    ):
                        for what, dense, sparse in make():
                            quartiles = measure(dense, sparse, options.turns, clock)
                            low, middle, high = (round(value, 2) for value in quartiles)
                            row = {"threads": threads, "batch": batch, "num_tokens": num_tokens}
                            row |= {"what": what, "ratio": middle, "spread": (low, high)}
                            rows.append(row)
                            print(
                                f"| {threads} | {batch}, {num_tokens} | {what} | {middle:.2f}"
                                f" ({low:.2f}-{high:.2f}) |",
                                flush=True,
                            )
    report = Report("attention_batches", rows)
    report.write(
        options.out / f"attention_batches_{options.hardware}_{report.environment['date']}.json"
    )


if __name__ == "__main__":
    main()
