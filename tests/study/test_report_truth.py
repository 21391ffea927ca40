"""Reports of studies whose truth is known: how often the intervals cover it, and how
often a verdict is wrong.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from simulated import outcomes, rate

from fibopolicy.evaluation.episodes import EpisodeResult
from fibopolicy.study import StudyConfig
from fibopolicy.study.directory import StudyDirectory
from fibopolicy.study.grid import Run, conditions
from fibopolicy.study.records import ConditionRecord, RunRecord, State, Study
from fibopolicy.study.report import answers
from fibopolicy.study.results import StudyResults, Verdict, results

INIT_STATES, SEEDS, INIT_STATE_SD, SEED_SD = 60, 3, 1.5, 0.4


def study(logits: dict[str, dict[str, float]], rng: np.random.Generator, margin: float) -> Study:
    """A finished study in memory; see `made_study.simulate`."""
    encoders = tuple(next(iter(logits.values())))
    config = StudyConfig(
        "study",
        tuple(logits),
        encoders,
        baseline=encoders[0],
        steps=9,
        episodes=INIT_STATES,
        margin=margin,
    )
    directory = StudyDirectory(Path("study"), config)
    difficulties: dict[str, np.ndarray] = {}
    found = []
    for condition in conditions(config):
        task, encoder = condition.task.task, condition.encoder.name
        if task not in difficulties:
            difficulties[task] = INIT_STATE_SD * rng.normal(size=INIT_STATES)
        solved = outcomes(rng, SEEDS, difficulties[task], logits[task][encoder], SEED_SD)
        runs = []
        for seed in range(SEEDS):
            identity = (9, "ema", 0, 99, "fast")
            rows = tuple(
                EpisodeResult(
                    *(task, i, i, bool(x), 50, 0, 0.5, *identity), f"s{i}", f"{task}{encoder}{seed}"
                )
                for i, x in enumerate(solved[seed])
            )
            folder = directory.run(Run(condition, seed))
            runs.append(RunRecord(seed, folder, State.DONE, rows))
        found.append(ConditionRecord(condition, {}, tuple(runs)))
    return Study(directory, tuple(found))


def found(logits: dict[str, dict[str, float]], studies: int, margin: float) -> list[StudyResults]:
    rng = np.random.default_rng(1)
    return [results(study(logits, rng, margin)) for _ in range(studies)]


def truth(logit: float) -> float:
    return rate(logit, float(np.hypot(SEED_SD, INIT_STATE_SD)))


@pytest.mark.slow
def test_where_encoders_are_equal_a_study_rarely_finds_a_difference() -> None:
    """Any difference among all comparisons of a study counts as a false alarm; and the
    intervals of rates and means cover.
    """
    alike = {
        task: {"dense": 1.5, "fib": 1.5, "local": 1.5}
        for task in ("fibopolicy/Lift-v0", "fibopolicy/Push-v0")
    }
    studies = found(alike, 150, 0.05)
    alarms = [any(one.differs for one in each.comparisons) for each in studies]
    assert np.mean(alarms) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / len(studies))
    rates = [one.rate for each in studies for one in each.conditions if one.rate is not None]
    assert len(rates) == 6 * len(studies)
    assert np.mean([one.low <= truth(1.5) <= one.high for one in rates]) >= 0.92
    assert (
        np.mean(
            [
                one.difference.low <= 0 <= one.difference.high
                for each in studies
                for one in each.comparisons
            ]
        )
        >= 0.93
    )


@pytest.mark.slow
def test_an_encoder_worse_by_exactly_the_margin_is_rarely_decided() -> None:
    logits = {"fibopolicy/Lift-v0": {"dense": 2.5, "fib": 1.5, "local": 1.5}}
    margin = truth(2.5) - truth(1.5)
    studies = found(logits, 150, margin)
    wrong = [
        any(one.verdict is not Verdict.UNDECIDED for one in each.comparisons) for each in studies
    ]
    assert np.mean(wrong) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / len(studies))


def test_clear_cases_are_answered_in_the_first_lines() -> None:
    logits = {
        "fibopolicy/Lift-v0": {"dense": 9.0, "fib": 9.0, "local": -2.0},
        "fibopolicy/Push-v0": {"dense": 1.0, "fib": 0.9, "local": -4.0},
    }
    (each,) = found(logits, 1, 0.15)
    (good, fib), (bad, local) = answers(each)
    verdicts = {(one.subject, one.candidate): one.verdict for one in each.comparisons}
    assert verdicts["Lift", "fib"] is Verdict.NOT_INFERIOR
    assert verdicts["Lift", "local"] is Verdict.INFERIOR
    assert (good, bad) == (
        "open" if verdicts["Push", "fib"] is Verdict.UNDECIDED else "good",
        "bad",
    )
    assert fib.startswith("fib against dense: **not inferior** (margin 15 points) on ")
    assert "3 seeds x 60 initial states each." in fib
    assert local.startswith("local against dense: **inferior** (by more than 15 points) on ")
