"""Plots of demonstrations: lengths and scores, actions and positions, still and
saturated steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fibopolicy.datasets.quality import DemoQuality
from fibopolicy.report.plots import (
    COLOURS,
    FAINT,
    few_ticks,
    figure,
    figure_legend,
    save_figure,
    shortened,
)

#: Points at which demonstrations of different lengths are compared.
POINTS = 60
STILL_COLOUR, SATURATED_COLOUR = COLOURS[0], COLOURS[1]


def plot_lengths_and_scores(qualities: Sequence[DemoQuality], path: Path) -> None:
    """Histograms of the demonstrations' lengths and of their quality scores."""
    drawn, axes = figure(1, 2, height=1.9)
    lengths = [quality.steps for quality in qualities]
    axes[0, 0].hist(lengths, bins=min(30, max(5, len(set(lengths)))), color=COLOURS[0])
    axes[0, 0].set(xlabel="steps", ylabel="demonstrations")
    axes[0, 1].hist([q.score for q in qualities], bins=20, range=(0, 1), color=COLOURS[0])
    axes[0, 1].set(xlabel="quality score", xlim=(0, 1))
    for ax in axes[0]:
        few_ticks(ax)
    save_figure(drawn, path)


def plot_dimensions(
    values: Sequence[NDArray[np.float64]],
    worst: Sequence[NDArray[np.float64]],
    names: Sequence[str],
    path: Path,
) -> None:
    """Each dimension against the share of the demonstration that has passed: the median
    over the demonstrations, the band of 90 % of them, and the worst as lines.

    Args:
        values: `(N, D)` of each demonstration.
        worst: those of the worst ones.
        names: names of the D dimensions.
    """
    columns = 2
    rows = -(-len(names) // columns)
    drawn, axes = figure(rows, columns, height=1.25, sharex=True)
    at = np.linspace(0, 100, POINTS)
    low, median, high = np.percentile([_resampled(one) for one in values], [5, 50, 95], axis=0)
    lines = [_resampled(one) for one in worst]
    for d, ax in enumerate(axes.flat):
        if d >= len(names):
            ax.set_visible(False)
            continue
        for i, line in enumerate(lines):
            label = "worst" if d == i == 0 else None
            ax.plot(at, line[:, d], color=COLOURS[1], linewidth=0.8, alpha=0.8, label=label)
        band = "90 % of all" if d == 0 else None
        ax.fill_between(at, low[:, d], high[:, d], color=COLOURS[0], alpha=0.2, lw=0, label=band)
        middle = "median" if d == 0 else None
        ax.plot(at, median[:, d], color=COLOURS[0], linewidth=1.3, label=middle)
        ax.set_title(shortened(names[d], 28), fontsize="small", loc="left")
        few_ticks(ax, 3)
    for ax in axes[-1]:
        ax.set_xlabel("% of the demonstration")
    figure_legend(drawn, columns=3)
    save_figure(drawn, path)


def plot_activity(
    qualities: Sequence[DemoQuality], worst: Sequence[DemoQuality], path: Path
) -> None:
    """Where demonstrations stand still or saturate: the share of all at each part of a
    demonstration, and below it the steps of the worst, one row each.
    """
    drawn, axes = figure(
        2,
        height=1.3 + 0.1 * len(worst),
        gridspec_kw={"height_ratios": [1.3, 0.2 * len(worst) + 0.4]},
    )
    at = np.linspace(0, 100, POINTS)
    kinds = (("still", STILL_COLOUR), ("saturated", SATURATED_COLOUR))
    for name, colour in kinds:
        masks = [getattr(quality, name).astype(float)[:, None] for quality in qualities]
        share = 100 * np.mean([_resampled(mask)[:, 0] for mask in masks], axis=0)
        axes[0, 0].plot(at, share, color=colour, label=name)
    axes[0, 0].set(xlabel="% of the demonstration", ylabel="% of all", ylim=(0, 101))
    ax = axes[1, 0]
    for row, quality in enumerate(worst):
        ax.barh(row, quality.steps, height=0.7, color=FAINT, alpha=0.2)
        for name, colour in kinds:
            ax.broken_barh(_runs(getattr(quality, name)), (row - 0.35, 0.7), color=colour)
    ax.set(xlabel="step", yticks=range(len(worst)), ylim=(len(worst) - 0.4, -0.6), xlim=(0, None))
    ax.set_yticklabels([shortened(quality.demo, 16) for quality in worst])
    ax.tick_params(axis="y", length=0)
    ax.grid(visible=False, axis="y")
    figure_legend(drawn, columns=2)
    save_figure(drawn, path)


def _resampled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values `(N, D)` at `POINTS` equal parts of their length, `(POINTS, D)`."""
    at, known = np.linspace(0, 1, POINTS), np.linspace(0, 1, len(values))
    return np.stack([np.interp(at, known, column) for column in values.T], axis=1)


def _runs(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Start and length of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(int)))
    return [(int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True)]
