"""Side-by-side timings of attention: `fibopolicy profile attention`.

Contenders alternate (ours, dense, ours, dense, ...), so that other load on the machine
affects all of them equally. Speed-ups are ratios within a turn. Absolute times hold for
one machine on one day.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fibopolicy.attention.functional import choose_backend, fibottention
from fibopolicy.attention.patterns import FibottentionPattern, neighbours
from fibopolicy.utils.system import environment, status_bytes

#: (B, h, N) of the published table.
SHAPES = ((16, 6, 144), (16, 6, 196), (8, 6, 588), (4, 12, 784), (1, 12, 3136))

Contender = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Timing:
    """One contender at one shape.

    Attributes:
        what: the contender.
        passes: "forward" or "forward+backward".
        seconds: median time.
        speedup: median over turns of dense SDPA's time over this one's; 1 for dense
            itself.
        spread: first and third quartile of the speed-up.
        flops: multiplications and additions that the kept pairs need.
        bytes: to read each input and write each result once.
        roofline: the time of the memory traffic alone, divided by `seconds`.
        peak_bytes: peak memory beyond inputs and results; None if it cannot be
            measured.
    """

    shape: tuple[int, int, int]
    what: str
    passes: str
    seconds: float
    speedup: float
    spread: tuple[float, float]
    flops: int
    bytes: int
    roofline: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Report:
    """All timings of a run, with its environment."""

    theme: str
    timings: Sequence[Any]
    environment: Mapping[str, Any] = field(default_factory=lambda: environment())

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


def profile_attention(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    *,
    head_dim: int = 64,
    turns: int = 20,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
    flex: bool = False,
    seed: int = 0,
) -> Report:
    """Time Fibottention (with the backend that "auto" selects) against dense and masked
    SDPA.

    Args:
        shapes: (B, h, N) each.
        turns: timed turns, after one warm-up turn.
        packed: q, k and v are views of one projection, as in an encoder, instead of
            contiguous tensors.
        flex: also time FlexAttention, which torch compiles first.
    """
    torch.manual_seed(seed)
    bandwidth = _bandwidth(device, dtype)
    timings: list[Timing] = []
    for batch, heads, num_tokens in shapes:
        pattern = FibottentionPattern(num_tokens, heads)
        length = pattern.sequence_length
        qkv = torch.randn(batch, length, 3, heads, head_dim, device=device, dtype=dtype).permute(
            2, 0, 3, 1, 4
        )
        qkv = qkv if packed else qkv.contiguous()
        grad = torch.randn_like(qkv[0])
        contenders = _contenders(pattern, qkv[0], flex)
        pairs = batch * len(neighbours(pattern).key)
        for passes in ("forward", "forward+backward"):
            runs = {name: one_pass(run, qkv, grad, passes) for name, run in contenders.items()}
            runs = {name: run for name, run in runs.items() if _works(run)}
            seconds = interleave(runs, turns, device)
            tensor = qkv[0].numel() * qkv.element_size()
            backward = passes != "forward"
            moved = tensor * (4 + (8 if backward else 0))
            for name, times in seconds.items():
                kept = batch * heads * length**2 if "SDPA" in name else pairs
                low, middle, high = ratios(seconds["dense SDPA"], times)
                timings.append(
                    Timing(
                        (batch, heads, num_tokens),
                        name,
                        passes,
                        statistics.median(times),
                        middle,
                        (low, high),
                        kept * head_dim * 2 * (2 + (5 if backward else 0)),
                        moved,
                        moved / bandwidth / statistics.median(times),
                        _peak(runs[name], tensor * (4 if backward else 1), device),
                    )
                )
    return Report("attention", timings)


def _contenders(pattern: FibottentionPattern, q: Tensor, flex: bool) -> dict[str, Contender]:
    backend = choose_backend(q, q.shape[1], q.shape[2], pattern)
    contenders: dict[str, Contender] = {
        "dense SDPA": F.scaled_dot_product_attention,
        f"{backend}, neg_inf": lambda q, k, v: fibottention(q, k, v, pattern, backend=backend),
        f"{backend}, zero_logit": lambda q, k, v: fibottention(
            q, k, v, pattern, masking="zero_logit", backend=backend
        ),
        "masked SDPA": lambda q, k, v: fibottention(q, k, v, pattern, backend="sdpa"),
    }
    if flex:
        contenders["FlexAttention"] = _flex(pattern, q.device)
    return contenders


def _flex(pattern: FibottentionPattern, device: torch.device) -> Contender:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = pattern.mask(device)
    length = pattern.sequence_length
    blocks = create_block_mask(
        lambda b, h, j, k: mask[h, j, k],
        None,
        pattern.num_heads,
        length,
        length,
        device=str(device),
    )
    run = torch.compile(flex_attention)
    return lambda q, k, v: run(q, k, v, block_mask=blocks)


def one_pass(run: Contender, qkv: Tensor, grad: Tensor, passes: str) -> Callable[[], object]:
    """A function that runs a contender "forward" or "forward+backward" on `qkv` `(3, B,
    h, T, d)`; `grad` is the gradient of the output.
    """
    if passes == "forward":
        q, k, v = qkv.unbind(0)
        return lambda: run(q, k, v)
    leaves = [x.detach().requires_grad_() for x in qkv]
    return lambda: torch.autograd.grad(run(*leaves), leaves, grad)


def _works(run: Callable[[], object]) -> bool:
    """Whether a run succeeds: FlexAttention has no backward pass on CPUs and needs a
    C++ compiler.
    """
    try:
        run()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def interleave(
    runs: Mapping[str, Callable[[], object]], turns: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each run in each turn; runs alternate, and the first turn is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def ratios(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """Quartiles of slow / fast, turn by turn."""
    values = torch.tensor(slow, dtype=torch.float64) / torch.tensor(fast, dtype=torch.float64)
    low, middle, high = torch.quantile(
        values, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    ).tolist()
    return low, middle, high


def _bandwidth(device: str, dtype: torch.dtype) -> float:
    """Memory bandwidth in bytes per second, from adding two tensors of 4 Mi numbers."""
    a, b, c = torch.ones(3, 1 << 22, device=device, dtype=dtype)
    seconds = interleave({"add": lambda: torch.add(a, b, out=c)}, 10, device)["add"]
    return float(3 * a.numel() * a.element_size() / min(seconds))


def _peak(run: Callable[[], object], results: int, device: str) -> int | None:
    """Peak memory of a run in bytes, beyond what was allocated before and its
    `results`.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return max(torch.cuda.max_memory_allocated(device) - before - results, 0)
    try:
        # Linux: reset the peak resident size
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = status_bytes("VmRSS")
        run()
        return max(status_bytes("VmHWM") - before - results, 0)
    except OSError:
        return None


def attention_table(report: Report) -> str:
    """A report on attention as a Markdown table."""
    rows = [
        "| B,h,N | passes | what | ms | speed-up (quartiles) | of memory roofline | extra MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for t in report.timings:
        extra = "" if t.peak_bytes is None else f"{t.peak_bytes / 2**20:.0f}"
        rows.append(
            f"| {','.join(map(str, t.shape))} | {t.passes} | {t.what} | {t.seconds * 1e3:.2f} |"
            f" {t.speedup:.2f}x ({t.spread[0]:.2f}-{t.spread[1]:.2f}) | {t.roofline:.0%} |"
            f" {extra} |"
        )
    return "\n".join(rows)
