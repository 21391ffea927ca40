from __future__ import annotations

import re
import warnings
from pathlib import Path

from made_rows import row

from fibopolicy.report.plots import pareto_front, plot_success_by_step, success_by_step


def test_success_against_time_counts_what_is_solved_by_then() -> None:
    rows = [row(0, True, steps=10), row(1, True, steps=40), row(2, False)]
    steps, rates = success_by_step([rows])
    assert steps.tolist() == [0, 10, 40, 100]
    assert [rate.successes for rate in rates] == [0, 1, 2, 2]


def test_the_pareto_line_joins_what_no_other_beats_in_both() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (2.5, 0.9), (4.0, 0.8)]
    assert pareto_front(points, less_is_better=True) == [(1.0, 0.5), (2.5, 0.9)]
    assert pareto_front(points, less_is_better=False) == [(4.0, 0.8), (3.0, 0.9)]


def test_a_plot_names_every_method_as_it_is_called(tmp_path: Path) -> None:
    names = [r"$\frac{$", "$a$", "_hidden", "日本語", "a/path" * 20 + "/seed0"]
    rows = [[row(0, True), row(1, False)]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_success_by_step(dict.fromkeys(names, rows), tmp_path / "plot.svg")
    plot = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    shown = [text.strip("\u200b") for text in re.findall("<text [^>]*>([^<]*)</text>", plot)]
    assert set(names[:-1]) < set(shown)
    assert [text[-6:] for text in shown if text.startswith("…")] == ["/seed0"]
