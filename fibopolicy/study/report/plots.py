"""The pictures of a study's report; SVG, whose ink turns light on a dark screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from fibopolicy.report.figures import (
    COLOURS,
    FAINT,
    colours,
    few_ticks,
    figure,
    legend,
    save_svg,
    short,
)
from fibopolicy.statistics.rates import Rate
from fibopolicy.study.report.costs import cost
from fibopolicy.study.report.curves import Band
from fibopolicy.study.report.results import Compared, Results, Verdict, printed

#: Told apart in grey, too: by shape.
_LOOKS = {
    Verdict.NOT_INFERIOR: (COLOURS[2], "o"),
    Verdict.INFERIOR: (COLOURS[1], "s"),
    Verdict.UNDECIDED: (FAINT, "D"),
    Verdict.UNTESTABLE: (FAINT, "X"),
}


def plot_forest(
    comparisons: Sequence[Compared], control: str, margin: float | None, path: Path
) -> None:
    """Differences from the control with their 95 % intervals, task by task, and the
    mean over tasks last.

    Args:
        comparisons: of one head and init.
    """
    subjects = dict.fromkeys(
        one.subject for one in sorted(comparisons, key=lambda one: one.task is None)
    )
    lines: list[tuple[str, Compared | None]] = []
    for subject in subjects:
        lines.append((subject, None))
        lines += [(one.candidate, one) for one in comparisons if one.subject == subject]
    drawn, axes = figure(1, height=0.9 + 0.24 * len(lines))
    one_axes = axes[0, 0]
    edge = _edge(comparisons, margin)
    drawn_lines = [(y, one) for y, (_, one) in enumerate(lines) if one is not None]
    for verdict, (colour, marker) in _LOOKS.items():
        if not (mine := [(y, one) for y, one in drawn_lines if one.verdict is verdict]):
            continue
        places = [y for y, _ in mine]
        low, value, high = (
            np.array([100 * getattr(one.difference, end) for _, one in mine])
            for end in ("low", "value", "high")
        )
        one_axes.hlines(
            places, np.maximum(low, -edge), np.minimum(high, edge), color=colour, linewidth=2
        )
        sizes = [52 if one.task is None else 30 for _, one in mine]
        one_axes.scatter(
            np.clip(value, -edge, edge),
            places,
            sizes,
            color=colour,
            marker=marker,
            label=verdict.value,
            zorder=3,
        )
        # an interval that goes on
        for beyond, end, arrow in ((low < -edge, -edge, "<"), (high > edge, edge, ">")):
            shown = np.array(places)[beyond]
            one_axes.scatter(np.full(len(shown), end), shown, 36, color=colour, marker=arrow)
    one_axes.axvline(0, color=FAINT, linewidth=1)
    if margin is not None:
        one_axes.axvline(
            -100 * margin, color=COLOURS[1], linewidth=1, linestyle="--", label="margin"
        )
    labels = [short(label, 30) for label, _ in lines]
    one_axes.set(yticks=range(len(lines)), ylim=(len(lines) - 0.5, -0.7))
    one_axes.set_yticklabels(labels)
    for label, (_, one) in zip(one_axes.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if one is None else "normal")
    one_axes.tick_params(axis="y", length=0)
    one_axes.grid(visible=False, axis="y")
    one_axes.set_xlabel(f"points above {short(control)}")
    legend(drawn, columns=3)
    save_svg(drawn, path)


def _edge(comparisons: Sequence[Compared], margin: float | None) -> float:
    """How many points the forest shows to either side: one interval, wide because seeds
    are few, must not squeeze the others.
    """
    halves = [(one.difference.high - one.difference.low) / 2 for one in comparisons]
    usual = [
        one.difference
        for one, half in zip(comparisons, halves, strict=True)
        if half <= 4 * float(np.median(halves))
    ]
    ends = [abs(x) for d in usual for x in (d.low, d.high)]
    return 105 * max(*ends, 2 * (margin or 0.0))


def plot_pareto(found: Results, setting: tuple[str, str], path: Path) -> bool:
    """Success against the encoder's latency and against training throughput, a row of
    panels per task.

    A step line joins the encoders that no other beats in both. Returns whether there
    was anything to draw.
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
        for column, one_axes in enumerate(row):
            few_ticks(one_axes)
            placed = [
                (encoder, rate, x) for encoder, rate, *xs in points if (x := xs[column]) is not None
            ]
            places, tints = [x for _, _, x in placed], [looks[encoder] for encoder, _, _ in placed]
            low, value, high = (
                [100 * getattr(rate, end) for _, rate, _ in placed]
                for end in ("low", "value", "high")
            )
            one_axes.vlines(places, low, high, colors=tints, linewidth=1.5, alpha=0.6)
            one_axes.scatter(places, value, 36, color=tints, zorder=3)
            front = pareto_front(
                [(x, rate.value) for _, rate, x in placed], lower_is_better=column == 0
            )
            one_axes.plot(
                [x for x, _ in front],
                [100 * y for _, y in front],
                color=FAINT,
                linewidth=1,
                drawstyle="steps-post",
                zorder=0,
            )
        row[0].set_ylabel(f"{short(printed(task), 18)}\nsuccess, %")
    axes[-1, 0].set_xlabel("encoder, ms (batch 1)")
    axes[-1, 1].set_xlabel("training samples/s")
    shown = {encoder for _, points in panels for encoder, *_ in points}
    for encoder in (one for one in study.encoders if one in shown):
        axes[0, 0].scatter([], [], color=looks[encoder], label=short(encoder))
    legend(drawn, columns=2)
    save_svg(drawn, path)
    return True


def pareto_front(
    points: Sequence[tuple[float, float]], *, lower_is_better: bool
) -> list[tuple[float, float]]:
    """Of (cost, success) those that no other point beats in one without losing in the
    other, from the cheapest on.
    """
    front: list[tuple[float, float]] = []
    for x, y in sorted(
        points, key=lambda point: (point[0] if lower_is_better else -point[0], -point[1])
    ):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def plot_curves(
    curves: Mapping[str, Mapping[str, Mapping[str, Band]]], encoders: Sequence[str], path: Path
) -> None:
    """Learning curves: a row of panels per task, a column per quantity, a line per
    encoder with the range over seeds.

    Args:
        curves: per task (as it is printed), quantity and encoder.
    """
    quantities = list(
        dict.fromkeys(name for by_quantity in curves.values() for name in by_quantity)
    )
    looks = dict(zip(encoders, colours(len(encoders)), strict=True))
    drawn, axes = figure(
        len(curves), len(quantities), height=2.1 if len(curves) > 1 else 2.6, sharex=True
    )
    for row, (task, by_quantity) in zip(axes, curves.items(), strict=True):
        for one_axes, quantity in zip(row, quantities, strict=True):
            bands = by_quantity.get(quantity, {})
            for encoder, band in bands.items():
                one_axes.plot(band.step, band.mean, color=looks[encoder], linewidth=1.2)
                one_axes.fill_between(
                    band.step, band.low, band.high, color=looks[encoder], alpha=0.15, linewidth=0
                )
            ends = [end for band in bands.values() for end in (band.low.min(), band.high.max())]
            if ends and min(ends) > 0 and max(ends) > 10 * min(ends):
                one_axes.set_yscale("log")
            few_ticks(one_axes)
            one_axes.set_title(quantity if task == next(iter(curves)) else "", fontsize="medium")
        row[0].set_ylabel(short(task, 18))
    for one_axes in axes[-1]:
        one_axes.set_xlabel("gradient step")
    shown = {
        encoder
        for by_quantity in curves.values()
        for bands in by_quantity.values()
        for encoder in bands
    }
    for encoder in (one for one in encoders if one in shown):
        axes[0, 0].plot([], [], color=looks[encoder], label=short(encoder))
    legend(drawn, columns=2)
    save_svg(drawn, path)
