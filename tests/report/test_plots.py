from __future__ import annotations

from made_rows import row

from fibopolicy.report.plots import pareto_front, success_by_step


def test_success_against_time_counts_what_is_solved_by_then() -> None:
    rows = [row(0, True, steps=10), row(1, True, steps=40), row(2, False)]
    steps, rates = success_by_step([rows])
    assert steps.tolist() == [0, 10, 40, 100]
    assert [rate.successes for rate in rates] == [0, 1, 2, 2]


def test_the_pareto_line_joins_what_no_other_beats_in_both() -> None:
    points = [(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (2.5, 0.9), (4.0, 0.8)]
    assert pareto_front(points, less_is_better=True) == [(1.0, 0.5), (2.5, 0.9)]
    assert pareto_front(points, less_is_better=False) == [(4.0, 0.8), (3.0, 0.9)]
