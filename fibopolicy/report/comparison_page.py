"""A comparison as one self-contained HTML page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from fibopolicy.report import page
from fibopolicy.report.comparison import (
    POWER,
    difference_rows,
    notes,
    power_rows,
    rate_rows,
    summary,
)
from fibopolicy.report.plots import plot_differences, plot_success_by_step
from fibopolicy.statistics.compare import ALPHA, Comparison


def write_comparison_page(
    comparison: Comparison, differences: Sequence[float], path: Path, video: Path | None = None
) -> None:
    """Write the page of a comparison.

    Args:
        differences: of rates, whose needed episodes are listed.
        video: of two checkpoints side by side, to embed.
    """
    with tempfile.TemporaryDirectory() as folder:
        found, success = Path(folder) / "differences.png", Path(folder) / "success_by_step.png"
        intervals = {
            v.name: (v.difference.value, v.difference.low, v.difference.high)
            for v in comparison.candidates
        }
        plot_differences(intervals, comparison.methods[0].name, comparison.margin, found)
        plot_success_by_step(
            {side.name: side.results(comparison.starts) for side in comparison.methods}, success
        )
        parts = [
            page.note(summary(comparison)),
            page.heading("Differences"),
            page.table(difference_rows(comparison), words=("verdict",)),
            page.picture(found, "differences from the baseline with 95 % intervals"),
            *map(page.note, notes(comparison)),
            page.heading("Success rates"),
            page.table(rate_rows(comparison)),
            page.heading("Success against time"),
            page.picture(success, "share of episodes solved by each control step, with 95 % bands"),
            page.note("The share of episodes solved by each control step, with its 95 % interval."),
        ]
        if video is not None:
            both = " and ".join(side.name for side in comparison.methods[:2])
            parts += [
                page.heading("Side by side"),
                page.video(video),
                page.note(
                    f"{both} on the same start states, those first where they differ. Grey frame:"
                    " running. Green: success. Red: not solved within the horizon."
                ),
            ]
        parts += [
            page.heading("Episodes needed"),
            page.table(power_rows(comparison, differences)),
            page.note(
                f"For {100 * POWER:.0f} % power at {100 * ALPHA:.0f} %, one checkpoint against"
                " another: exact McNemar on the same start states, z test on different ones."
            ),
            page.heading("How it was made"),
            page.pairs({side.name: ", ".join(map(str, side.runs)) for side in comparison.methods}),
        ]
        names = [side.name for side in comparison.methods]
        verdict = f": {comparison.candidates[0].verdict}" if len(comparison.candidates) == 1 else ""
        page.write_page(path, f"{', '.join(names[1:])} against {names[0]}{verdict}", parts)
