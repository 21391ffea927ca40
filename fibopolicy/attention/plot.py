"""Plots of the masks of a pattern, and of the speed-up of sparse attention by length."""

from __future__ import annotations

from pathlib import Path

from fibopolicy.attention.patterns import AttentionPattern, OffsetPattern
from fibopolicy.attention.profile import Report


def plot_pattern(pattern: AttentionPattern, path: Path) -> None:
    """Plot the mask of every head; the titles hold the offsets if there are any."""
    from matplotlib.figure import Figure

    columns = min(pattern.num_heads, 6)
    rows = -(-pattern.num_heads // columns)
    figure = Figure(figsize=(2.2 * columns, 2.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flat
    masks = pattern.mask().numpy()
    for head, axis in enumerate(axes):
        axis.set_axis_off()
        if head < pattern.num_heads:
            axis.imshow(masks[head], cmap="Blues", interpolation="nearest")
            title = f"head {head + 1}"
            if isinstance(pattern, OffsetPattern):
                title += ": " + _shortened(pattern.offsets[head])
            axis.set_title(title, fontsize=8)
    figure.suptitle(
        f"{type(pattern).__name__}, {pattern.num_tokens} tokens, layer {pattern.layer}:"
        f" {pattern.density:.2%} of the patch pairs",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _shortened(offsets: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, offsets[:6]))
    return shown + (", ..." if len(offsets) > 6 else "")


def plot_crossover(report: Report, path: Path) -> None:
    """Plot the speed-up over dense SDPA against N: a line per contender and pass, with
    a band for the quartiles.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    lines: dict[tuple[str, str], list[tuple[int, float, float, float]]] = {}
    for t in report.timings:
        if t.what != "dense SDPA":
            lines.setdefault((t.what, t.passes), []).append((t.shape[2], t.speedup, *t.spread))
    for (what, passes), points in lines.items():
        tokens, middle, low, high = zip(*sorted(points), strict=True)
        (line,) = axis.plot(
            tokens,
            middle,
            marker="o",
            linestyle="-" if passes == "forward" else "--",
            label=f"{what}, {passes}",
        )
        axis.fill_between(tokens, low, high, alpha=0.2, color=line.get_color())
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", yscale="log", xlabel="patch tokens N", ylabel="speed-up over dense SDPA")
    axis.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
