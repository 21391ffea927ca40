"""Pictures of results, wide enough for a phone and no wider."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fibopolicy.report.figures import COLOURS, colours, figure, legend, save_png, short
from fibopolicy.statistics.rates import Rate, pooled

if TYPE_CHECKING:
    from fibopolicy.evaluation.episodes import EpisodeResult


def success_by_step(
    runs: Sequence[Sequence[EpisodeResult]],
) -> tuple[NDArray[np.int64], list[Rate]]:
    """Control steps from 0 to the horizon, where something changes, and the share of
    episodes solved by then.

    Args:
        runs: per training seed its rows on the same start states, errors left out.
    """
    solved_at = np.array(
        [[row.steps if row.success else row.horizon + 1 for row in rows] for rows in runs]
    )
    horizon = runs[0][0].horizon
    steps = np.union1d([0, horizon], solved_at[solved_at <= horizon])
    return steps, [pooled(solved_at <= step) for step in steps]


def plot_success_by_step(
    sides: Mapping[str, Sequence[Sequence[EpisodeResult]]], path: Path
) -> None:
    """A PNG of success against time: per side the share of episodes solved by each
    control step, with its 95 % band.

    Args:
        sides: per name the rows of each training seed, as `success_by_step` takes them.
    """
    drawn, axes = figure(1)
    for colour, (name, runs) in zip(colours(len(sides)), sides.items(), strict=True):
        steps, rates = success_by_step(runs)
        axes[0, 0].step(
            steps, [100 * rate.value for rate in rates], where="post", color=colour, label=name
        )
        low, high = ([100 * getattr(rate, end) for rate in rates] for end in ("low", "high"))
        axes[0, 0].fill_between(
            steps, low, high, step="post", color=colour, alpha=0.15, linewidth=0
        )
    axes[0, 0].set(xlabel="control step", ylabel="solved, %", ylim=(0, 101), xlim=(0, None))
    if len(sides) > 1:
        legend(drawn)
    save_png(drawn, path)


def plot_differences(
    differences: Mapping[str, tuple[float, float, float]],
    baseline: str,
    margin: float | None,
    path: Path,
) -> None:
    """A PNG of differences from the baseline with their intervals.

    Args:
        differences: per candidate its difference and the interval's ends, in [-1, 1].
        margin: of non-inferiority, drawn as a line.
    """
    drawn, axes = figure(1, height=1.1 + 0.35 * len(differences))
    for y, (value, low, high) in enumerate(differences.values()):
        axes[0, 0].plot([100 * low, 100 * high], [y, y], color=COLOURS[0], linewidth=2)
        axes[0, 0].plot(100 * value, y, "o", color=COLOURS[0])
    axes[0, 0].axvline(0, color="#59636e", linewidth=1)
    if margin is not None:
        axes[0, 0].axvline(-100 * margin, color=COLOURS[1], linewidth=1, linestyle="--")
    axes[0, 0].set(
        yticks=range(len(differences)),
        yticklabels=[short(name) for name in differences],
        ylim=(len(differences) - 0.5, -0.5),
    )
    axes[0, 0].set_xlabel(f"points more than {short(baseline)}")
    save_png(drawn, path)


def plot_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """A PNG of loss and learning rate over the gradient steps, from rows with these three."""
    steps = [row["step"] for row in rows]
    drawn, axes = figure(2)
    losses = [row["loss"] for row in rows]
    axes[0, 0].plot(steps, losses, color=COLOURS[0], linewidth=1)
    # A likelihood's loss may be below zero.
    axes[0, 0].set(ylabel="training loss, by batch", yscale="log" if min(losses) > 0 else "linear")
    axes[1, 0].plot(steps, [row["learning_rate"] for row in rows], color=COLOURS[0])
    axes[1, 0].set(ylabel="learning rate", xlabel="gradient step", ylim=(0, None))
    save_png(drawn, path)
