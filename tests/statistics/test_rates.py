from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import outcomes, rate
from statsmodels.stats.proportion import proportion_confint

from fibopolicy.errors import UserError
from fibopolicy.statistics.rates import pooled, variance_components, wilson


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_statsmodels(counts: tuple[int, int]) -> None:
    rate = wilson(*counts)
    low, high = proportion_confint(*counts, alpha=0.05, method="wilson")
    assert rate.low == pytest.approx(low, abs=1e-9)
    assert rate.high == pytest.approx(high, abs=1e-9)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_impossible_counts_are_refused() -> None:
    for counts in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(UserError):
            wilson(*counts)


def test_one_seed_pools_to_wilson() -> None:
    assert pooled(np.array([[True] * 47 + [False] * 3])) == wilson(47, 50)


def test_the_variance_is_where_a_two_level_bootstrap_converges() -> None:
    """Drawn literally: S - 1 seeds and n initial states, whose crossing counts chance
    three times instead of once.
    """
    rng = np.random.default_rng(0)
    y = outcomes(rng, 4, 1.5 * rng.normal(size=60), 1.0, 0.8).astype(float)
    drawn = [y[rng.integers(4, size=3)][:, rng.integers(60, size=60)].mean() for _ in range(20_000)]
    found = variance_components(y)
    assert np.var(drawn) == pytest.approx(found.seeds + found.init_states + found.chance, rel=0.05)
    assert 0 < found.chance < min(found.seeds, found.init_states)


@pytest.mark.parametrize(
    ("mean", "seed_sd", "init_state_sd"),
    [(0, 0, 0), (2, 0.5, 2), (2, 1, 0), (4, 1, 2), (4, 0.5, 0)],
)
def test_three_seeds_cover_the_methods_rate(
    mean: float, seed_sd: float, init_state_sd: float
) -> None:
    rng = np.random.default_rng(1)
    true = rate(mean, float(np.hypot(seed_sd, init_state_sd)))
    intervals = [
        pooled(outcomes(rng, 3, init_state_sd * rng.normal(size=100), mean, seed_sd))
        for _ in range(600)
    ]
    assert np.mean([found.low <= true <= found.high for found in intervals]) >= 0.90
    assert all(0 <= found.low <= found.value <= found.high <= 1 for found in intervals)


def test_all_successes_of_all_seeds_leave_no_less_uncertainty_than_one_seed() -> None:
    found = pooled(np.ones((3, 200), dtype=bool))
    assert found.high == 1
    assert found.low <= wilson(200, 200).low + 0.002
    assert found.low > 0.97
    with pytest.raises(UserError, match="outcomes"):
        pooled(np.ones((0, 3), dtype=bool))
