from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import norm
from simulated import outcomes, rate
from statsmodels.stats.contingency_tables import mcnemar as oracle_mcnemar
from statsmodels.stats.multitest import multipletests

from fibopolicy.errors import UserError
from fibopolicy.statistics.differences import Difference, MeanDifference, holm, mcnemar


@settings(max_examples=25)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_agrees_with_statsmodels(only_a: int, only_b: int) -> None:
    expected = (
        oracle_mcnemar([[7, only_a], [only_b, 9]], exact=True).pvalue if only_a + only_b else 1.0
    )
    assert mcnemar(only_a, only_b) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=10)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_agrees_with_statsmodels(p_values: list[float]) -> None:
    assert holm(p_values) == pytest.approx(list(multipletests(p_values, method="holm")[1]))


def pair(both: int, only_a: int, only_b: int, neither: int) -> Difference:
    a = [True] * (both + only_a) + [False] * (only_b + neither)
    b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    return Difference(np.array([a]), np.array([b]))


def test_a_pairs_interval_is_bonett_and_prices() -> None:
    found, n = pair(800, 60, 100, 40), 1000
    p12, p21 = (100 + 1) / (n + 2), (60 + 1) / (n + 2)
    half = norm.ppf(0.975) * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / (n + 2))
    assert found.value == pytest.approx(0.04)
    assert found.discordant == (60, 100)
    assert found.low == pytest.approx(p12 - p21 - half, abs=1e-4)
    assert found.high == pytest.approx(p12 - p21 + half, abs=1e-4)
    assert found.p == mcnemar(60, 100)


def test_equal_outcomes_leave_some_uncertainty() -> None:
    found = pair(50, 0, 0, 0)
    assert found.low < 0 < found.high
    assert found.high < 0.06
    assert found.p == 1


def test_swapping_the_sides_changes_the_sign_alone() -> None:
    rng = np.random.default_rng(0)
    a, b = (outcomes(rng, s, np.zeros(40), 1, 0.5) for s in (3, 2))
    one, other = Difference(a, b), Difference(b, a)
    assert (one.value, one.low, one.high) == pytest.approx((-other.value, -other.high, -other.low))
    assert one.p == pytest.approx(other.p)


CASES = [
    (1, 0.0, 2.0, 2.0),
    (1, 0.0, 4.0, 4.0),
    (1, 0.0, 2.0, 3.0),
    (3, 0.5, 2.0, 2.0),
    (3, 1.0, 2.0, 2.0),
    (3, 0.5, 4.0, 4.0),
]


@pytest.mark.parametrize(("seeds", "seed_sd", "baseline", "candidate"), CASES)
def test_the_interval_covers_and_false_positives_are_rare(
    seeds: int, seed_sd: float, baseline: float, candidate: float
) -> None:
    rng, total = np.random.default_rng(2), float(np.hypot(seed_sd, 1.5))
    true = rate(candidate, total) - rate(baseline, total)
    covered, alarms = [], []
    for _ in range(500):
        init_states = 1.5 * rng.normal(size=80)
        found = Difference(
            outcomes(rng, seeds, init_states, baseline, seed_sd),
            outcomes(rng, seeds, init_states, candidate, seed_sd),
        )
        covered.append(found.low <= true <= found.high)
        alarms.append(found.p <= 0.05)
    assert np.mean(covered) >= 0.92
    if baseline == candidate:
        assert np.mean(alarms) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 500)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "seed_sd"), [(3, 0.0), (3, 0.5), (3, 1.0), (5, 0.5)])
def test_a_method_worse_by_the_margin_is_rarely_called_not_inferior(
    seeds: int, seed_sd: float
) -> None:
    rng, total = np.random.default_rng(3), float(np.hypot(seed_sd, 1.5))
    margin = rate(2.5, total) - rate(1.5, total)
    granted = []
    for _ in range(1500):
        init_states = 1.5 * rng.normal(size=100)
        found = Difference(
            outcomes(rng, seeds, init_states, 2.5, seed_sd),
            outcomes(rng, seeds, init_states, 1.5, seed_sd),
        )
        granted.append(found.p_inferior(margin) <= 0.025)
    assert np.mean(granted) <= 0.035


def test_the_share_of_the_variance_between_seeds() -> None:
    rng = np.random.default_rng(4)
    alike = outcomes(rng, 3, np.zeros(200), 1, 0)
    different = np.stack([np.arange(200) < k for k in (60, 120, 190)])
    assert Difference(alike, different).seed_share > 0.8
    assert Difference(alike, outcomes(rng, 3, np.zeros(200), 1, 0)).seed_share < 0.5


def test_outcomes_that_cannot_be_paired_are_refused() -> None:
    with pytest.raises(UserError, match="the same initial states"):
        Difference(np.ones((1, 3), dtype=bool), np.ones((1, 4), dtype=bool))
    for margin in (0.0, 1.0, 5.0):
        with pytest.raises(UserError, match="margin must lie between 0 and 1"):
            pair(5, 1, 1, 1).p_inferior(margin)


def test_the_mean_over_one_task_is_that_task() -> None:
    rng = np.random.default_rng(5)
    one = Difference(*(outcomes(rng, 3, np.zeros(50), 1, 0.5) for _ in range(2)))
    mean = MeanDifference((one,))
    assert (mean.value, mean.low, mean.high, mean.p) == pytest.approx(
        (one.value, one.low, one.high, one.p)
    )
    assert (mean.p_inferior(0.05), mean.seed_share) == pytest.approx(
        (one.p_inferior(0.05), one.seed_share)
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_mean_over_tasks_covers_and_finds_more_than_one_task(seeds: int) -> None:
    rng = np.random.default_rng(6)
    logits = [(1.0, 1.6), (0.0, 0.6), (2.0, 2.6)]
    sd = float(np.hypot(0.4, 1.5))
    true = float(np.mean([rate(b, sd) - rate(a, sd) for a, b in logits]))
    covered, widths = [], []
    for _ in range(400):
        parts = []
        for a, b in logits:
            init_states = 1.5 * rng.normal(size=60)
            parts.append(
                Difference(
                    outcomes(rng, seeds, init_states, a, 0.4),
                    outcomes(rng, seeds, init_states, b, 0.4),
                )
            )
        mean = MeanDifference(tuple(parts))
        covered.append(mean.low <= true <= mean.high)
        widths.append((mean.high - mean.low) / np.mean([part.high - part.low for part in parts]))
    # One seed estimates the rate of its checkpoint, not of the method.
    assert np.mean(covered) >= (0.92 if seeds > 1 else 0.85)
    assert np.mean(widths) < 0.75


def test_the_expected_precision_of_the_same_study_is_the_one_found() -> None:
    rng = np.random.default_rng(7)
    init_states = rng.normal(size=80)
    one, other = (
        Difference(outcomes(rng, 3, init_states, 1, 0.8), outcomes(rng, 3, init_states, 1, 0.8))
        for _ in range(2)
    )
    for found in (one, MeanDifference((one, other))):
        left = found.expected(3, 80)
        assert 2 * stats.t.ppf(0.975, left.df) * left.error == pytest.approx(found.high - found.low)
        assert found.expected(3, 8000).error < left.error
        # the variance between seeds stays
        assert found.expected(30, 8000).error < 0.5 * found.expected(3, 8000).error
