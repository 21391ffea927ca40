"""The pictures of a study's report; SVG, whose ink turns light on a dark screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fibopolicy.evaluation.figures import COLOURS, FAINT, colours, figure, save_svg, short
from fibopolicy.evaluation.statistics import Rate
from fibopolicy.study.report.costs import cost
from fibopolicy.study.report.curves import Band
from fibopolicy.study.report.directory import printed
from fibopolicy.study.report.results import Compared, Results, Verdict

#: Told apart in grey, too: by shape.
_LOOKS = {Verdict.NOT_INFERIOR: (COLOURS[2], "o"), Verdict.INFERIOR: (COLOURS[1], "s"), Verdict.UNDECIDED: (FAINT, "D")}


def plot_forest(comparisons: Sequence[Compared], control: str, margin: float | None, path: Path) -> None:
    """Differences from the control with their 95 % intervals, task by task, and the mean over tasks last.

    Args:
        comparisons: of one head and regime.
    """
    subjects = dict.fromkeys(one.subject for one in sorted(comparisons, key=lambda one: one.task is None))
    lines: list[tuple[str, Compared | None]] = []
    for subject in subjects:
        lines.append((subject, None))
        lines += [(one.candidate, one) for one in comparisons if one.subject == subject]
    drawn, axes = figure(1, height=0.9 + 0.24 * len(lines))
    one_axes = axes[0, 0]
    edge = _edge(comparisons, margin)
    for y, (_, one) in enumerate(lines):
        if one is None:
            continue
        colour, marker = _LOOKS[one.verdict]
        low, value, high = (
            float(np.clip(100 * x, -edge, edge)) for x in (one.difference.low, one.difference.value, one.difference.high)
        )
        one_axes.plot([low, high], [y, y], color=colour, linewidth=2)
        one_axes.plot(value, y, marker, color=colour, markersize=7 if one.task is None else 5.5)
        for end, arrow in ((low, "<"), (high, ">")):
            if abs(end) == edge:  # it goes on
                one_axes.plot(end, y, arrow, color=colour, markersize=6)
    one_axes.axvline(0, color=FAINT, linewidth=1)
    if margin is not None:
        one_axes.axvline(-100 * margin, color=COLOURS[1], linewidth=1, linestyle="--")
    labels = [short(label, 30) for label, _ in lines]
    one_axes.set(yticks=range(len(lines)), ylim=(len(lines) - 0.5, -0.7))
    one_axes.set_yticklabels(labels)
    for label, (_, one) in zip(one_axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if one is None else "normal")
    one_axes.tick_params(axis="y", length=0)
    one_axes.grid(visible=False, axis="y")
    one_axes.set_xlabel(f"points above {short(control)}")
    for verdict, (colour, marker) in _LOOKS.items():
        if any(one.verdict is verdict for one in comparisons):
            one_axes.plot([], [], marker, color=colour, label=verdict.value)
    drawn.legend(frameon=False, loc="outside upper left", ncols=3)
    save_svg(drawn, path)


def _edge(comparisons: Sequence[Compared], margin: float | None) -> float:
    """How many points the forest shows to either side: one interval, wide because seeds are few, must not squeeze the others."""
    halves = [(one.difference.high - one.difference.low) / 2 for one in comparisons]
    usual = [one.difference for one, half in zip(comparisons, halves, strict=True) if half <= 4 * float(np.median(halves))]
    ends = [abs(x) for d in usual for x in (d.low, d.high)]
    return 105 * max(*ends, 2 * (margin or 0.0))


def plot_pareto(found: Results, setting: tuple[str, str], path: Path) -> bool:
    """Success against the encoder's latency and against training throughput, a row of panels per task.

    A step line joins the encoders that no other beats in both. Returns whether there was anything to draw.
    """
    study = found.study
    looks = dict(zip(study.encoders, colours(len(study.encoders)), strict=True))
    panels: list[tuple[str, list[tuple[str, Rate, float | None, float | None]]]] = []
    for task in study.tasks:
        points: list[tuple[str, Rate, float | None, float | None]] = []
        for encoder in study.encoders:
            one = found.cell(task, encoder, setting)
            if one is not None and one.rate is not None:
                spent = cost([one.cell])
                points.append((encoder, one.rate, spent.encoder_ms_1, spent.samples_per_s))
        if any(x is not None for point in points for x in point[2:]):
            panels.append((task, points))
    if not panels:
        return False
    drawn, axes = figure(len(panels), 2, height=2.1, sharex="col", sharey="row")
    for row, (task, points) in zip(axes, panels, strict=True):
        for column, (one_axes, faster) in enumerate(zip(row, (min, max), strict=True)):
            shown = [(encoder, rate, x) for encoder, rate, *xs in points if (x := xs[column]) is not None]
            for encoder, rate, x in shown:
                one_axes.plot([x, x], [100 * rate.low, 100 * rate.high], color=looks[encoder], linewidth=1.5, alpha=0.6)
                one_axes.plot(x, 100 * rate.value, "o", color=looks[encoder], markersize=6)
            front = pareto_front([(x, rate.value) for _, rate, x in shown], lower_is_better=faster is min)
            one_axes.plot(
                [x for x, _ in front], [100 * y for _, y in front], color=FAINT, linewidth=1, drawstyle="steps-post", zorder=0
            )
        row[0].set_ylabel(f"{short(printed(task), 18)}\nsuccess, %")
    axes[-1, 0].set_xlabel("encoder, ms (batch 1)")
    axes[-1, 1].set_xlabel("training samples/s")
    for encoder in study.encoders:
        axes[0, 0].plot([], [], "o", color=looks[encoder], label=short(encoder))
    drawn.legend(frameon=False, loc="outside upper left", ncols=2)
    save_svg(drawn, path)
    return True


def pareto_front(points: Sequence[tuple[float, float]], *, lower_is_better: bool) -> list[tuple[float, float]]:
    """Of (cost, success) those that no other point beats in one without losing in the other, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0] if lower_is_better else -point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def plot_curves(curves: Mapping[str, Mapping[str, Mapping[str, Band]]], encoders: Sequence[str], path: Path) -> None:
    """Learning curves: a row of panels per task, a column per quantity, a line per encoder with the range over seeds.

    Args:
        curves: per task (as it is printed), quantity and encoder.
    """
    quantities = list(dict.fromkeys(name for by_quantity in curves.values() for name in by_quantity))
    looks = dict(zip(encoders, colours(len(encoders)), strict=True))
    drawn, axes = figure(len(curves), len(quantities), height=2.1 if len(curves) > 1 else 2.6, sharex=True)
    for row, (task, by_quantity) in zip(axes, curves.items(), strict=True):
        for one_axes, quantity in zip(row, quantities, strict=True):
            bands = by_quantity.get(quantity, {})
            for encoder, band in bands.items():
                one_axes.plot(band.step, band.mean, color=looks[encoder], linewidth=1.2)
                one_axes.fill_between(band.step, band.low, band.high, color=looks[encoder], alpha=0.15, linewidth=0)
            if bands and all((band.low > 0).all() for band in bands.values()) and "success" not in quantity:
                one_axes.set_yscale("log")
            if row is axes[0]:
                one_axes.set_title(quantity, fontsize="medium")
        row[0].set_ylabel(short(task, 18))
    for one_axes in axes[-1]:
        one_axes.set_xlabel("gradient step")
    for encoder in encoders:
        axes[0, 0].plot([], [], color=looks[encoder], label=short(encoder))
    drawn.legend(frameon=False, loc="outside upper left", ncols=2)
    save_svg(drawn, path)
