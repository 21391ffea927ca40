"""Side-by-side timings of a whole ViT: `fibopolicy profile encoder`.

The same encoder without attention is timed, too: it bounds what sparse attention can
gain.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fibopolicy.attention.profile import Report, interleave, ratios
from fibopolicy.encoders.vit import ViT

#: (batch, image side in pixels) with 16-pixel patches: N = 196, 784, 3136.
SHAPES = ((8, 224), (2, 448), (1, 896))


@dataclass(frozen=True)
class EncoderTiming:
    """One shape of the encoder, forward and backward.

    Attributes:
        dense, fibottention, deleted: median seconds; deleted is without attention.
        speedup: dense over Fibottention, median over turns, and its quartiles.
        ceiling: dense over deleted.
        saving_reached: the time that Fibottention saves, divided by the time that
            deleting attention saves; median over turns.
    """

    batch: int
    num_tokens: int
    dense: float
    fibottention: float
    deleted: float
    speedup: float
    spread: tuple[float, float]
    ceiling: float
    saving_reached: float


class _Deleted(nn.Module):
    """No attention: the projections alone."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.qkv, self.out = attention.qkv, attention.out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(self.qkv(x)[..., 2 * x.shape[-1] :])
        return y


def profile_encoder(
    shapes: Sequence[tuple[int, int]] = SHAPES,
    *,
    width: int = 384,
    depth: int = 12,
    num_heads: int = 6,
    turns: int = 5,
    device: str = "cpu",
    seed: int = 0,
) -> Report:
    """Time a ViT (ViT-S by default), forward and backward: dense, with Fibottention,
    and without attention.
    """
    torch.manual_seed(seed)
    names = ("dense", "fibottention", "deleted")
    timings = []
    for batch, side in shapes:
        images = torch.rand(batch, 3, side, side, device=device)
        runs: dict[str, Callable[[], object]] = {}
        for name in names:
            kind: Any = "fibottention" if name == "fibottention" else "dense"
            model = ViT(
                image_size=(side, side),
                patch_size=16,
                width=width,
                depth=depth,
                num_heads=num_heads,
                pool="mean",
                attention=kind,
            ).to(device)
            if name == "deleted":
                for block in model.blocks:
                    block.attention = _Deleted(block.attention)
            runs[name] = _step(model, images)
        seconds = interleave(runs, turns, device)
        low, middle, high = ratios(seconds["dense"], seconds["fibottention"])
        dense, ours, deleted = (statistics.median(seconds[name]) for name in names)
        timings.append(
            EncoderTiming(
                batch,
                (side // 16) ** 2,
                dense,
                ours,
                deleted,
                middle,
                (low, high),
                ratios(seconds["dense"], seconds["deleted"])[1],
                statistics.median(
                    (a - b) / (a - c)
                    for a, b, c in zip(*(seconds[name] for name in names), strict=True)
                ),
            )
        )
    return Report("encoder", timings)


def _step(model: nn.Module, images: Tensor) -> Callable[[], object]:
    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(images)[1].square().mean().backward()

    return step


def encoder_table(report: Report) -> str:
    """A report on encoders as a Markdown table."""
    rows = [
        (
            "| batch, N | dense ms | Fibottention ms | no attention ms | speed-up (quartiles)"
            " | ceiling | saving reached |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for t in report.timings:
        rows.append(
            f"| {t.batch}, {t.num_tokens} | {t.dense * 1e3:.0f} | {t.fibottention * 1e3:.0f} |"
            f" {t.deleted * 1e3:.0f} | {t.speedup:.2f}x ({t.spread[0]:.2f}-{t.spread[1]:.2f}) |"
            f" {t.ceiling:.2f}x | {t.saving_reached:.0%} |"
        )
    return "\n".join(rows)
