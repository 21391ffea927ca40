"""The numbers of a report, computed once more from the rows alone."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from made_study import begin, describe, finish, simulate
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from fibopolicy.study.report import write_report

LIFT, PUSH = "fibopolicy/Lift-v0", "fibopolicy/Push-v0"
LOGITS = {
    LIFT: {"dense": 2.0, "fib": 2.1, "local": 0.3},
    PUSH: {"dense": 0.5, "fib": 0.4, "local": -0.4},
}


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def outcomes(study: Path, task: str, encoder: str) -> NDArray[np.float64]:
    """`(seeds, initial states)`, read from the rows' JSON."""
    folder = begin(study, task, encoder)
    files = sorted(folder.glob("seed*/episodes.jsonl"))
    rows = [
        sorted(map(json.loads, file.read_text().splitlines()), key=lambda row: row["index"])
        for file in files
    ]
    return np.array([[row["success"] for row in one] for one in rows], dtype=float)


def variances(y: NDArray[np.float64]) -> tuple[float, float]:
    """Of the mean over seeds: what seeds differ by, and what of it is chance (two-way
    analysis of variance).
    """
    s, n = y.shape
    rest = y - y.mean(1, keepdims=True) - y.mean(0, keepdims=True) + y.mean()
    return y.mean(1).var(ddof=1) / s, (rest**2).sum() / ((s - 1) * (n - 1)) / (s * n)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = simulate(
        tmp_path_factory.mktemp("numbers") / "study",
        LOGITS,
        rng=np.random.default_rng(3),
        episodes=60,
        curves=False,
    )
    write_report(directory)
    return directory


def test_rates_are_those_of_the_rows(study: Path) -> None:
    for line in lines(study / "report" / "conditions.csv"):
        y = outcomes(study, line["task"], line["encoder"])
        assert (int(line["successes"]), int(line["episodes"])) == (y.sum(), y.size)
        assert float(line["success_rate"]) == pytest.approx(y.mean())
        padded = np.hstack([y, np.ones((3, 1)), np.zeros((3, 1))])
        seeds, chance = variances(padded)
        init_states = padded.mean(0).var(ddof=1) / 62
        total = init_states + max(0, seeds - chance)
        z = stats.t.ppf(0.975, total**2 / (init_states**2 / 61 + seeds**2 / 2))
        p, n = y.mean(), min(padded.mean() * (1 - padded.mean()) / total, y.size)
        centre, half = (
            (p + z**2 / (2 * n)) / (1 + z**2 / n),
            z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)),
        )
        assert (float(line["low_95"]), float(line["high_95"])) == pytest.approx(
            (centre - half, centre + half)
        )


def test_a_seeds_own_interval_is_wilsons(study: Path) -> None:
    found = lines(study / "report" / "seeds.csv")
    assert len(found) == 18
    for line in found:
        low, high = proportion_confint(
            int(line["successes"]), int(line["episodes"]), method="wilson"
        )
        assert (float(line["low_95_wilson"]), float(line["high_95_wilson"])) == pytest.approx(
            (low, high)
        )


def test_differences_their_intervals_and_p_values(study: Path) -> None:
    found = lines(study / "report" / "comparisons.csv")
    assert [(line["task"], line["candidate"]) for line in found] == [
        (task, candidate)
        for candidate in ("fib", "local")
        for task in (LIFT, PUSH, "mean over tasks")
    ]
    for line in found:
        centres, totals, degrees = [], [], []
        for task in line["tasks"].split():
            a, b = outcomes(study, task, "dense"), outcomes(study, task, line["candidate"])
            assert len(a) == int(line["baseline_seeds"]) == int(line["candidate_seeds"])
            a = np.hstack([a, np.ones((3, 1)), np.zeros((3, 1))])
            b = np.hstack([b, np.zeros((3, 1)), np.ones((3, 1))])
            by_init_state = (b.mean(0) - a.mean(0)).var(ddof=1) / a.shape[1]
            parts = [variances(side) for side in (a, b)]
            centres.append(b.mean() - a.mean())
            totals.append(by_init_state + sum(max(0, seeds - chance) for seeds, chance in parts))
            degrees.append(
                by_init_state**2 / (a.shape[1] - 1) + sum(seeds**2 / 2 for seeds, _ in parts)
            )
        error, df = np.sqrt(sum(totals)) / len(totals), sum(totals) ** 2 / sum(degrees)
        centre, half = np.mean(centres), stats.t.ppf(0.975, df) * error
        assert (float(line["low_95"]), float(line["high_95"])) == pytest.approx(
            (centre - half, centre + half)
        )
        assert float(line["p"]) == pytest.approx(2 * stats.t.sf(abs(centre) / error, df))
        assert float(line["p_inferior"]) == pytest.approx(stats.t.sf((centre + 0.05) / error, df))
        raw = [
            outcomes(study, task, line["candidate"]).mean() - outcomes(study, task, "dense").mean()
            for task in line["tasks"].split()
        ]
        assert float(line["difference"]) == pytest.approx(np.mean(raw))


def test_holm_counts_every_comparison_of_the_study(study: Path) -> None:
    found = lines(study / "report" / "comparisons.csv")
    for name, raw in (("p_holm", "p"), ("p_inferior_holm", "p_inferior")):
        expected = multipletests([float(line[raw]) for line in found], method="holm")[1]
        assert [float(line[name]) for line in found] == pytest.approx(list(expected))
    within = multipletests([1 - float(line["p_inferior"]) for line in found], method="holm")[1]
    assert [float(line["p_within_holm"]) for line in found] == pytest.approx(list(within))
    for line in found:
        inferior, not_inferior = (
            float(line["p_within_holm"]) <= 0.025,
            float(line["p_inferior_holm"]) <= 0.025,
        )
        assert line["verdict"] == (
            "inferior" if inferior else "not inferior" if not_inferior else "undecided"
        )
        assert (line["needed_init_states"] == "") <= (
            line["verdict"] != "undecided" or line["needed_seeds"] == ""
        )


def test_single_checkpoints_get_mcnemars_exact_test(tmp_path: Path) -> None:
    study = describe(tmp_path / "one", [LIFT], ["dense", "fib"], seeds=[0], episodes=50)
    rng = np.random.default_rng(0)
    a, b = rng.random(50) < 0.5, rng.random(50) < 0.9
    finish(begin(study, LIFT, "dense"), 0, a)
    finish(begin(study, LIFT, "fib"), 0, b)
    page = write_report(study)
    (line,) = lines(study / "report" / "comparisons.csv")
    expected = mcnemar(
        [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]], exact=True
    ).pvalue
    assert float(line["p"]) == float(line["p_holm"]) == pytest.approx(expected)
    assert "single checkpoints" in page.read_text()


def test_costs_are_medians_of_what_was_measured(study: Path) -> None:
    dense, fib, _ = (
        line for line in lines(study / "report" / "conditions.csv") if line["task"] == LIFT
    )
    assert float(fib["samples_per_s"]) == pytest.approx(1.3 * float(dense["samples_per_s"]))
    assert (float(dense["encoder_ms_1"]), float(dense["encoder_parameters"])) == (4.0, 5_400_000)
    assert "(1.30x)" in (study / "report" / "report.md").read_text()
