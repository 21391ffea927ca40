"""A study that is read at planned looks, and stops as soon as it is decided."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from made_study import begin, describe, finish
from simulated import outcomes

from fibopolicy.errors import UserError
from fibopolicy.statistics.differences import Difference
from fibopolicy.statistics.sequential import LookPlan
from fibopolicy.study import StudyConfig, StudyEncoder, StudyTask
from fibopolicy.study.directory import open_directory
from fibopolicy.study.grid import runs
from fibopolicy.study.records import read_study
from fibopolicy.study.report import write_report
from fibopolicy.study.results import StudyResults, Verdict, results
from fibopolicy.study.runner import _Queue

LIFT = "fibopolicy/Lift-v0"
SEEDS, LOOKS = (0, 1, 2, 3, 4), (2, 3, 5)


def made(
    directory: Path, finished: int, *, gap: float = 0.0, looks: tuple[int, ...] = LOOKS
) -> tuple[Path, np.ndarray, np.ndarray]:
    """A study of which the first training seeds are finished; the candidate's logit of
    success is `gap` above the baseline's.
    """
    rng, difficulty = np.random.default_rng(4), np.random.default_rng(5).normal(size=60)
    a, b = outcomes(rng, 5, difficulty, 0.0, 0.2), outcomes(rng, 5, difficulty, gap, 0.2)
    describe(directory, [LIFT], ["dense", "fib"], seeds=SEEDS, episodes=60, looks=list(looks))
    for encoder, successes in (("dense", a), ("fib", b)):
        for seed in range(finished):
            finish(begin(directory, LIFT, encoder), seed, successes[seed])
    return directory, a, b


def read(directory: Path) -> StudyResults:
    return results(read_study(directory))


def test_p_values_and_intervals_pay_for_the_looks_so_far(tmp_path: Path) -> None:
    directory, a, b = made(tmp_path / "study", 3, gap=1.0)
    found, plan = read(directory), LookPlan((0.4, 0.6, 1.0))
    (one,) = found.comparisons
    p = [Difference(a[:seeds], b[:seeds]).p for seeds in (2, 3)]
    at_look = Difference(a[:3], b[:3], confidence=1 - plan.nominal(1))
    assert one.p == pytest.approx(plan.p(p))
    assert one.p > p[1]
    assert (one.difference.low, one.difference.high) == (at_look.low, at_look.high)
    inferior = [2 * Difference(a[:seeds], b[:seeds]).p_inferior(0.05) for seeds in (2, 3)]
    assert one.p_inferior == pytest.approx(plan.p(inferior) / 2)


def test_seeds_after_the_last_complete_look_do_not_count(tmp_path: Path) -> None:
    at_three, *_ = made(tmp_path / "three", 3, gap=1.0)
    at_four, *_ = made(tmp_path / "four", 4, gap=1.0)
    three, four = read(at_three), read(at_four)
    assert four.looks == three.looks == 2
    assert [one.p for one in four.comparisons] == [one.p for one in three.comparisons]
    assert [one.rate for one in four.conditions] == [one.rate for one in three.conditions]


def test_nothing_is_compared_before_the_first_look(tmp_path: Path) -> None:
    directory, *_ = made(tmp_path / "study", 1, gap=1.0)
    found = read(directory)
    assert found.comparisons == ()
    assert found.unpaired == ("verdicts are read after 2 training seeds of every condition",)
    write_report(directory)
    assert "None is complete" in (directory / "report" / "report.md").read_text()


def test_a_decision_stands_when_later_seeds_look_different(tmp_path: Path) -> None:
    directory, *_ = made(tmp_path / "study", 3, gap=3.0)
    before = read(directory)
    assert before.comparisons[0].verdict is Verdict.NOT_INFERIOR
    for seed in (3, 4):
        finish(begin(directory, LIFT, "fib"), seed, np.zeros(60, dtype=bool))
        finish(begin(directory, LIFT, "dense"), seed, np.ones(60, dtype=bool))
    after = read(directory)
    assert after.looks == 3
    assert after.comparisons[0].difference.value < before.comparisons[0].difference.value
    assert after.comparisons[0].verdict is Verdict.NOT_INFERIOR


def test_a_shown_direction_stands_when_later_seeds_point_the_other_way(tmp_path: Path) -> None:
    directory, *_ = made(tmp_path / "study", 0)
    for seed in SEEDS:
        lead, behind = np.arange(60) < 50, np.arange(60) < 5
        fib, dense = (lead, behind) if seed < 2 else (behind, lead)
        finish(begin(directory, LIFT, "fib"), seed, fib)
        finish(begin(directory, LIFT, "dense"), seed, dense)
    (one,) = read(directory).comparisons
    assert one.differs
    assert one.difference.value < 0
    assert one.direction == "better"


def handed_out(directory: Path) -> tuple[set[int], int | None]:
    """Training seeds of the runs that a runner executes now, and when it is decided."""
    study = open_directory(directory)
    queue = _Queue(study, (), runs(study.config), study.config.looks)
    return {run.seed for run in iter(queue, None)}, queue.decided_after


@pytest.mark.parametrize(
    ("finished", "gap", "expected"),
    [
        (0, 0.0, ({0, 1}, None)),
        (2, 0.0, ({2}, None)),
        (3, 0.0, ({3, 4}, None)),
        (5, 0.0, (set(), None)),
        (3, 3.0, (set(), 3)),
    ],
)
def test_a_runner_goes_from_look_to_look_until_the_study_is_decided(
    tmp_path: Path, finished: int, gap: float, expected: tuple[set[int], int | None]
) -> None:
    directory, *_ = made(tmp_path / "study", finished, gap=gap)
    assert handed_out(directory) == expected


def test_a_baseline_that_solves_nothing_at_first_does_not_end_the_study(tmp_path: Path) -> None:
    directory, *_ = made(tmp_path / "study", 0)
    for encoder in ("dense", "fib"):
        for seed in (0, 1):
            finish(begin(directory, LIFT, encoder), seed, np.zeros(60, dtype=bool))
    assert read(directory).comparisons[0].verdict is Verdict.UNTESTABLE
    assert handed_out(directory) == ({2}, None)


def test_a_look_waits_for_all_of_its_runs(tmp_path: Path) -> None:
    directory, *_ = made(tmp_path / "study", 3, gap=3.0)
    shutil.rmtree(begin(directory, LIFT, "fib") / "seed2")
    assert handed_out(directory) == ({2}, None)


def test_the_report_says_which_look_it_shows(tmp_path: Path) -> None:
    directory, *_ = made(tmp_path / "study", 3, gap=3.0)
    write_report(directory)
    text = (directory / "report" / "report.md").read_text()
    assert "planned after 2, 3 and 5 training seeds; the looks share the 5 %" in text
    assert "look 2, after 3 seeds, where the study was decided" in text
    confidence = 100 * (1 - LookPlan((0.4, 0.6, 1)).nominal(1))
    assert f"{confidence:.4g} % intervals" in text


@pytest.mark.parametrize("looks", [(1, 5), (3, 2, 5), (2, 4), (2, 2, 5)])
def test_looks_that_do_not_rise_to_all_seeds_are_refused(looks: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"looks must rise from at least 2 to .* 5, got"):
        StudyConfig(
            "s", (StudyTask("lift"),), (StudyEncoder("vit_tiny"),), seeds=SEEDS, looks=looks
        )
