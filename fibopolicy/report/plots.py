"""Plots of results as SVG files, as wide as a phone, with colours for light and dark mode."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.statistics.rates import Rate, pooled
from fibopolicy.utils.files import atomic_write

if TYPE_CHECKING:
    from fibopolicy.evaluation.episodes import EpisodeResult

#: What `plot_success_by_step` shows.
SUCCESS_BY_STEP = "Share of episodes solved by each control step, with its 95 % interval."
#: Width of a figure, inches.
WIDTH = 5.2
#: Colours of text and axes, and their counterparts in dark mode.
INK, FAINT = "#1f2328", "#59636e"
_ON_DARK = {INK: "#e6edf3", FAINT: "#9198a1"}
#: Distinct for readers with any colour vision (Okabe and Ito), and in grey.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
#: Colour and marker of an interval, by the verdict on it.
_VERDICT_STYLES = {
    "": (COLOURS[0], "o"),
    "not inferior": (COLOURS[2], "o"),
    "inferior": (COLOURS[1], "s"),
    "undecided": (FAINT, "D"),
    "untestable": (FAINT, "X"),
}


def plot_success_by_step(
    methods: Mapping[str, Sequence[Sequence[EpisodeResult]]], path: Path
) -> None:
    """Success against time: the share of episodes solved by each control step, with its
    95 % band.

    Args:
        methods: for each name the results of its training seeds, without errors.
    """
    drawn, axes = figure(1)
    ax = axes[0, 0]
    for colour, (name, runs) in zip(_colours(methods), methods.items(), strict=True):
        steps, rates = success_by_step(runs)
        low, value, high = _percent(rates)
        ax.step(steps, value, where="post", color=colour, label=shortened(name, 48))
        ax.fill_between(steps, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
    ax.set(xlabel="control step", ylabel="solved, %", ylim=(0, 101), xlim=(0, None))
    if len(methods) > 1:
        figure_legend(drawn)
    save_figure(drawn, path)


def success_by_step(
    runs: Sequence[Sequence[EpisodeResult]],
) -> tuple[NDArray[np.int64], list[Rate]]:
    """The control steps from 0 to `max_steps` at which the share of solved episodes
    changes, and that share.

    Args:
        runs: for each training seed the results on the same initial states, without
            errors.
    """
    max_steps = runs[0][0].max_steps
    solved_at = np.array(
        [[row.steps if row.success else max_steps + 1 for row in rows] for rows in runs]
    )
    steps = np.union1d([0, max_steps], solved_at[solved_at <= max_steps])
    return steps, [pooled(solved_at <= step) for step in steps]


def plot_training(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Training loss and learning rate over the gradient steps.

    Args:
        rows: with `step`, `loss` and `lr`.
    """
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    drawn, axes = figure(2)
    axes[0, 0].plot(steps, losses, color=COLOURS[0], linewidth=1)
    # A negative log likelihood may be below zero.
    axes[0, 0].set(ylabel="training loss, by batch", yscale="log" if min(losses) > 0 else "linear")
    axes[1, 0].plot(steps, [row["lr"] for row in rows], color=COLOURS[0])
    axes[1, 0].set(ylabel="learning rate", xlabel="gradient step", ylim=(0, None))
    save_figure(drawn, path)


@dataclass(frozen=True)
class Interval:
    """A difference from the baseline with its 95 % interval, each in [-1, 1].

    Args:
        verdict: on the difference, as in `fibopolicy.study.results.Verdict`, or empty.
    """

    name: str
    value: float
    low: float
    high: float
    verdict: str = ""

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2


def plot_forest(
    groups: Mapping[str, Sequence[Interval]], baseline: str, margin: float | None, path: Path
) -> None:
    """Differences from the baseline with their intervals, group by group.

    Args:
        groups: intervals below the name of each group; an empty name is not shown.
        margin: margin of non-inferiority, drawn as a line.
    """
    lines: list[tuple[str, Interval | None]] = []
    for group, intervals in groups.items():
        lines += [(group, None)] if group else []
        lines += [(one.name, one) for one in intervals]
    placed = [(y, one) for y, (_, one) in enumerate(lines) if one is not None]
    edge = _edge([one for _, one in placed], margin)
    drawn, axes = figure(1, height=0.9 + 0.24 * len(lines))
    ax = axes[0, 0]
    for verdict, (colour, marker) in _VERDICT_STYLES.items():
        if not (shown := [(y, one) for y, one in placed if one.verdict == verdict]):
            continue
        y = np.array([y for y, _ in shown])
        low, value, high = _percent([one for _, one in shown])
        ax.hlines(y, np.maximum(low, -edge), np.minimum(high, edge), color=colour, linewidth=2)
        label = verdict or None
        ax.scatter(
            np.clip(value, -edge, edge), y, 30, color=colour, marker=marker, label=label, zorder=3
        )
        for beyond, end, arrow in ((low < -edge, -edge, "<"), (high > edge, edge, ">")):
            cut = y[beyond]  # intervals that continue beyond the edge
            ax.scatter(np.full(len(cut), end), cut, 36, color=colour, marker=arrow)
    ax.axvline(0, color=FAINT, linewidth=1)
    if margin is not None:
        ax.axvline(-100 * margin, color=COLOURS[1], linewidth=1, linestyle="--", label="margin")
    ax.set(yticks=range(len(lines)), ylim=(len(lines) - 0.5, -0.7))
    ax.set_yticklabels([shortened(name, 30) for name, _ in lines])
    for label, (_, one) in zip(ax.get_yticklabels(), lines, strict=True):
        label.set_fontweight("bold" if one is None else "normal")
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    # To the right, where it fits however wide the names are.
    ax.set_xlabel(f"percentage points above {shortened(baseline)}", loc="right")
    if ax.get_legend_handles_labels()[1]:
        figure_legend(drawn, columns=3)
    save_figure(drawn, path)


def _edge(intervals: Sequence[Interval], margin: float | None) -> float:
    """How many points a forest shows to either side. A single wide interval, of few
    seeds, must not squeeze the others.
    """
    usual = 4 * float(np.median([one.half for one in intervals]))
    ends = [max(abs(one.low), abs(one.high)) for one in intervals if one.half <= usual]
    return 105 * max(*ends, 2 * (margin or 0.0))


@dataclass(frozen=True)
class Tradeoff:
    """A method's success and its costs.

    Args:
        costs: one for each column of panels; `None` where it was not measured.
    """

    name: str
    rate: Rate
    costs: tuple[float | None, ...]


def plot_tradeoffs(
    panels: Mapping[str, Sequence[Tradeoff]],
    columns: Mapping[str, bool],
    names: Sequence[str],
    path: Path,
) -> None:
    """Success against each cost, a row of panels for each task. A step line joins the
    methods that no other beats in both.

    Args:
        panels: the methods of each task.
        columns: each cost as printed, and whether less of it is better.
        names: all methods, in the order of their colours.
    """
    colour_of = dict(zip(names, _colours(names), strict=True))
    drawn, axes = figure(len(panels), len(columns), height=2.1, sharex="col", sharey="row")
    for row, (task, methods) in zip(axes, panels.items(), strict=True):
        for i, (ax, less_is_better) in enumerate(zip(row, columns.values(), strict=True)):
            few_ticks(ax)
            shown = [(one, cost) for one in methods if (cost := one.costs[i]) is not None]
            costs, tints = [cost for _, cost in shown], [colour_of[one.name] for one, _ in shown]
            low, value, high = _percent([one.rate for one, _ in shown])
            ax.vlines(costs, low, high, colors=tints, linewidth=1.5, alpha=0.6)
            ax.scatter(costs, value, 36, color=tints, zorder=3)
            front = pareto_front(
                list(zip(costs, value.tolist(), strict=True)), less_is_better=less_is_better
            )
            x, y = [x for x, _ in front], [y for _, y in front]
            ax.plot(x, y, color=FAINT, linewidth=1, drawstyle="steps-post", zorder=0)
        row[0].set_ylabel(f"{shortened(task, 18)}\nsuccess, %")
    for ax, title in zip(axes[-1], columns, strict=True):
        ax.set_xlabel(title)
    present = {one.name for methods in panels.values() for one in methods}
    _name_colours(drawn, axes[0, 0], {name: colour_of[name] for name in names if name in present})
    save_figure(drawn, path)


def pareto_front(
    points: Sequence[tuple[float, float]], *, less_is_better: bool
) -> list[tuple[float, float]]:
    """The pairs (cost, success) that no other pair beats in one without losing in the
    other, from the cheapest on.
    """
    sign = 1 if less_is_better else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (sign * point[0], -point[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


@dataclass(frozen=True)
class Band:
    """A curve over gradient steps, over several training seeds: each `(n,)`."""

    step: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def band(curves: Sequence[NDArray[np.float64]], steps: int, points: int = 60) -> Band | None:
    """Reduce the curves `(n, 2)` of several seeds, of step and value, to few points:
    the mean, lowest and highest seed in each of `points` equal intervals of 0 ..
    `steps`.

    Returns:
        `None` if all curves are empty.
    """
    sums, counts = np.zeros((2, len(curves), points))
    for i, curve in enumerate(curves):
        if len(curve):
            place = np.clip(curve[:, 0] * points / max(1, steps), 0, points - 1).astype(int)
            np.add.at(sums[i], place, curve[:, 1])
            np.add.at(counts[i], place, 1)
    seen = (counts > 0).any(axis=0)
    if not seen.any():
        return None
    with np.errstate(invalid="ignore"):
        values = (sums / np.where(counts > 0, counts, np.nan))[:, seen]
    centres = (np.arange(points)[seen] + 0.5) * steps / points
    low, mean, high = (f(values, axis=0) for f in (np.nanmin, np.nanmean, np.nanmax))
    return Band(centres, mean, low, high)


def plot_learning_curves(
    curves: Mapping[str, Mapping[str, Mapping[str, Band]]], names: Sequence[str], path: Path
) -> None:
    """Learning curves: a row of panels for each task, a column for each quantity, a
    line for each method with the range over its seeds.

    Args:
        curves: by task, quantity and method.
        names: all methods, in the order of their colours.
    """
    quantities = list(dict.fromkeys(name for row in curves.values() for name in row))
    colour_of = dict(zip(names, _colours(names), strict=True))
    height = 2.1 if len(curves) > 1 else 2.6
    drawn, axes = figure(len(curves), len(quantities), height=height, sharex=True)
    for row, (task, by_quantity) in zip(axes, curves.items(), strict=True):
        for ax, quantity in zip(row, quantities, strict=True):
            bands = by_quantity.get(quantity, {})
            for name, one in bands.items():
                ax.plot(one.step, one.mean, color=colour_of[name], linewidth=1.2)
                ax.fill_between(
                    one.step, one.low, one.high, color=colour_of[name], alpha=0.15, linewidth=0
                )
            lows = [float(one.low.min()) for one in bands.values()]
            highs = [float(one.high.max()) for one in bands.values()]
            if bands and min(lows) > 0 and max(highs) > 10 * min(lows):
                ax.set_yscale("log")
            few_ticks(ax)
        row[0].set_ylabel(shortened(task, 18))
    for ax, quantity in zip(axes[0], quantities, strict=True):
        ax.set_title(quantity, fontsize="medium")
    for ax in axes[-1]:
        ax.set_xlabel("gradient step")
    present = {name for row in curves.values() for bands in row.values() for name in bands}
    _name_colours(drawn, axes[0, 0], {name: colour_of[name] for name in names if name in present})
    save_figure(drawn, path)


def plot_levels(
    panels: Mapping[str, Mapping[str, Mapping[int, float]]], names: Sequence[str], path: Path
) -> None:
    """Success against the level of perturbations: a panel for each, a line for each
    method.

    Args:
        panels: by perturbation and method, the success in [0, 1] at each level, from 0,
            without the perturbation.
        names: all methods, in the order of their colours.
    """
    colour_of = dict(zip(names, _colours(names), strict=True))
    columns = min(4, len(panels))
    drawn, axes = figure(-(-len(panels) // columns), columns, height=1.8, sharey=True)
    for ax, (perturbation, lines) in zip(axes.flat, panels.items(), strict=False):
        for name, by_level in lines.items():
            success = [100 * rate for rate in by_level.values()]
            ax.plot([*by_level], success, "o-", color=colour_of[name], linewidth=1.2, markersize=3)
        ax.set_title(perturbation, fontsize="medium")
        few_ticks(ax)
        ax.set(xticks=sorted({level for one in lines.values() for level in one}), xlabel="level")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel("success, %")
    present = {name for lines in panels.values() for name in lines}
    _name_colours(drawn, axes[0, 0], {name: colour_of[name] for name in names if name in present})
    save_figure(drawn, path)


def figure(rows: int, columns: int = 1, *, height: float = 2.8, **options: Any) -> tuple[Any, Any]:
    """A figure with panels of `height` inches, and its axes `(rows, columns)`;
    `options` as in `pyplot.subplots`.
    """
    import matplotlib  # imported here, since it takes a second

    matplotlib.use("Agg")
    from matplotlib import pyplot

    inked = "text.color axes.edgecolor axes.labelcolor axes.titlecolor xtick.color ytick.color"
    colours: Any = dict.fromkeys(inked.split(), INK)
    with pyplot.rc_context(colours):
        size = (WIDTH, rows * height)
        drawn, axes = pyplot.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False, **options
        )
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return drawn, axes


def few_ticks(ax: Any, most: int = 4) -> None:
    """Few labels, which fit a small panel and take less time to draw."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    for axis in (ax.xaxis, ax.yaxis):
        log = axis.get_scale() == "log"
        axis.set_major_locator(
            LogLocator(numticks=most) if log else MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])
        )
        axis.set_minor_locator(NullLocator())


def _name_colours(drawn: Any, ax: Any, colours: Mapping[str, str]) -> None:
    """A legend of colours only, for methods that several panels show."""
    for name, colour in colours.items():
        ax.scatter([], [], color=colour, label=shortened(name))
    figure_legend(drawn, columns=2)


def figure_legend(drawn: Any, columns: int = 1) -> None:
    drawn.legend(frameon=False, loc="outside upper left", ncols=columns, labelcolor=INK)


def shortened(name: str, most: int = 24) -> str:
    """At most `most` characters of a name as a label; its end is more specific than its
    beginning.
    """
    text = name if len(name) <= most else "…" + name[1 - most :]
    # A pair of $ encloses a formula, and a legend leaves out a label that begins with _.
    return "\N{ZERO WIDTH SPACE}" * text.startswith("_") + text.replace("$", r"\$")


def _colours(names: Iterable[str]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i, _ in enumerate(names)]


def _percent(
    found: Sequence[Rate] | Sequence[Interval],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Low ends, values and high ends, in percent."""
    low, value, high = (
        np.array([100 * getattr(one, name) for one in found]) for name in ("low", "value", "high")
    )
    return low, value, high


def save_figure(drawn: Any, path: Path) -> None:
    """Save without a background and with text that turns light in dark mode. The same
    plot gives the same bytes. Text stays text, in the reader's fonts, since matplotlib's
    own lacks many scripts.
    """
    import matplotlib
    from matplotlib import pyplot

    text = io.StringIO()
    as_text: Any = {"svg.hashsalt": path.name, "svg.fonttype": "none"}
    with matplotlib.rc_context(as_text), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        drawn.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(drawn)
    rules = "".join(
        f'[style*="{kind}: {ink}"] {{ {kind}: {light} !important }} '
        for ink, light in _ON_DARK.items()
        for kind in ("fill", "stroke")
    )
    style = f"<style>@media (prefers-color-scheme: dark) {{ {rules}}}</style>"
    svg = re.sub(r"(<svg\b[^>]*>)", lambda found: found[1] + style, text.getvalue(), count=1)
    with atomic_write(path) as partial:
        partial.write_text(svg, encoding="utf-8")
