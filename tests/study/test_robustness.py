"""Perturbations of a study, from its rows to its report."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_study import begin, describe, finish
from tiny_study import Here

from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import read_rows, write_rows
from fibopolicy.statistics.differences import Change, Difference
from fibopolicy.study import StudyConfig
from fibopolicy.study.records import State, read_study
from fibopolicy.study.report import write_report
from fibopolicy.study.results import results
from fibopolicy.study.robustness import by_level, level_table, ranking_table, robustness
from fibopolicy.study.runner import run_study
from fibopolicy.study.status import seconds_left, status

LIFT = "fibopolicy/Lift-v0"
PERTURBATIONS = ("blur:1", "blur:3", "noise:2")
#: Success with each perturbation, clean first.
RATES = {"dense": (0.9, 0.8, 0.5, 0.2), "fib": (0.9, 0.85, 0.8, 0.75), "twin": (0.9, 0.8, 0.5, 0.2)}
EPISODES = 200


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of three encoders, whose successes are drawn with known rates."""
    study = describe(
        tmp_path_factory.mktemp("made") / "robust",
        [LIFT],
        list(RATES),
        episodes=EPISODES,
        perturbations=PERTURBATIONS,
    )
    rng = np.random.default_rng(0)
    for encoder, rates in RATES.items():
        condition = begin(study, LIFT, encoder)
        for seed in range(3):
            path = None
            every = []
            for name, rate in zip(("", *PERTURBATIONS), rates, strict=True):
                drawn = rng.uniform(size=EPISODES) < rate
                path = finish(condition, seed, drawn, perturbation=name) / "episodes.jsonl"
                every += read_rows(path)
            assert path is not None
            write_rows(path, every)
    return study


def test_the_progress_of_a_run_counts_the_episodes_of_every_perturbation(
    made: Path, tmp_path: Path
) -> None:
    study = Path(shutil.copytree(made, tmp_path / "robust"))
    run = next((study / "conditions").glob("*dense*")) / "seed0"
    costs = json.loads((run / "done.json").read_text())
    (run / "done.json").unlink()
    rows = read_rows(run / "episodes.jsonl")
    write_rows(run / "episodes.jsonl", rows[: EPISODES + 1])
    assert f"unfinished, {EPISODES + 1}/{4 * EPISODES} episodes" in status(read_study(study))
    left = costs["train_s"] + (3 * EPISODES - 1) * costs["evaluate_s"] / EPISODES
    assert seconds_left(read_study(study), 1) == pytest.approx(left)


def test_the_tables_have_the_rates_and_changes_of_the_rows(made: Path) -> None:
    page = write_report(made)
    assert "Robustness" in page.read_text(encoding="utf-8")
    plot = (page.parent / "levels_Lift.svg").read_text(encoding="utf-8")
    assert all(text in plot for text in ("blur", "noise", *RATES))
    with (made / "report" / "robustness.csv").open(newline="") as file:
        found = {
            (row["encoder"], row["perturbation"], row["level"]): row for row in csv.DictReader(file)
        }
    assert len(found) == 9
    for encoder in RATES:
        rows = [
            row
            for path in sorted(begin(made, LIFT, encoder).glob("seed*/episodes.jsonl"))
            for row in read_rows(path)
        ]
        mean = {
            name: np.mean([row.success for row in rows if row.perturbation == name])
            for name in ("", *PERTURBATIONS)
        }
        for name in PERTURBATIONS:
            row = found[encoder, *name.split(":")]
            assert float(row["success_rate"]) == pytest.approx(mean[name])
            assert float(row["change"]) == pytest.approx(mean[name] - mean[""])
            assert float(row["low_95"]) < float(row["change"]) < float(row["high_95"])
            assert (row["seeds"], row["init_states"]) == ("3", str(EPISODES))


def test_the_plot_has_the_rates_of_the_rows_by_level(made: Path) -> None:
    study = read_study(made)
    found = robustness(results(study), LIFT, ("bc", "scratch"))
    lines = by_level(study, found)
    assert {name: [*levels["fib"]] for name, levels in lines.items()} == {
        "blur": [0, 1, 3],
        "noise": [0, 2],
    }
    rates = [*lines["blur"]["fib"].values(), lines["noise"]["fib"][2]]
    assert rates == pytest.approx(RATES["fib"], abs=0.05)


def test_encoders_are_ranked_by_their_mean_and_share_ranks_without_a_difference(made: Path) -> None:
    study = read_study(made)
    found = robustness(results(study), LIFT, ("bc", "scratch"))
    _, first, *others = ranking_table(study, found)
    assert (first[0], first[-1]) == ("fib", "1")
    assert {row[0] for row in others} == {"dense", "twin"}
    assert {row[-1] for row in others} == {"2 to 3"}
    assert first[3].startswith("+")
    titles = [row[0] for row in level_table(study, found)]
    assert titles == ["success, %", "clean", "blur 1, 3", "noise 2", "mean of all"]


def test_a_single_training_seed_has_no_rank(made: Path) -> None:
    study = read_study(made)
    first = replace(study, conditions=tuple(one.at(1) for one in study.conditions))
    ranked = ranking_table(study, robustness(results(first), LIFT, ("bc", "scratch")))
    assert {row[-1] for row in ranked[1:]} == {"-"}


def test_a_run_without_its_perturbed_rows_does_not_count(made: Path, tmp_path: Path) -> None:
    study = describe(tmp_path / "lacks", [LIFT], ["dense"], perturbations=PERTURBATIONS)
    finish(begin(study, LIFT, "dense"), 0, [True] * 100)
    with pytest.warns(UserWarning, match="holds no evaluation"):
        (condition,) = read_study(study).conditions
    assert condition.runs[0].state is State.UNREADABLE


def test_a_study_evaluates_every_run_with_its_perturbations(
    with_data: StudyConfig, tmp_path: Path
) -> None:
    encoder, two = with_data.encoders[:1], ("noise:1", "action-delay:1")
    one = replace(with_data, encoders=encoder, baseline="", perturbations=two)
    run_study(one, tmp_path / "study", Here(), tmp_path)
    (condition,) = read_study(tmp_path / "study").conditions
    assert condition.done
    assert {name: len(rows) for name, rows in condition.done[0].perturbed.items()} == {
        "noise:1": 2,
        "action-delay:1": 2,
    }
    assert len(condition.done[0].rows) == 2


def test_perturbations_of_a_study_are_checked_when_it_is_read(config: StudyConfig) -> None:
    assert replace(config, perturbations=("blur",)).perturbations == ("blur:1", "blur:2", "blur:3")
    with pytest.raises(UserError, match="unknown perturbation 'fog'"):
        replace(config, perturbations=("fog",))
    with pytest.raises(UserError, match="perturbations expected a sequence"):
        replace(config, perturbations="blur")


def test_the_change_of_one_checkpoint_is_the_difference_of_its_pairs() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.uniform(size=(2, 1, 60)) < [[[0.8]], [[0.6]]]
    change, difference = Change(after * 1.0 - before), Difference(before, after)
    assert change.value == pytest.approx(difference.value)
    assert (change.low, change.high) == pytest.approx((difference.low, difference.high))


def test_intervals_of_a_change_hold_over_seeds_and_initial_states() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        seeds, states = rng.normal(0, 0.5, (3, 1)), rng.normal(0, 1, (1, 50))
        drop = rng.normal(1, 0.5, (3, 1))  # seeds lose differently

        def rate(logit: np.ndarray) -> np.ndarray:
            return 1 / (1 + np.exp(-logit))

        before = rng.uniform(size=(3, 50)) < rate(1.5 + seeds + states)
        after = rng.uniform(size=(3, 50)) < rate(1.5 + seeds + states - drop)
        change = Change(after * 1.0 - before)
        covered += change.low <= TRUTH <= change.high
    assert covered >= 0.93 * 400


#: Expected change in that simulation, by 8 million draws.
TRUTH = -0.1755
