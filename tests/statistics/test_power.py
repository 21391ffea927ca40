from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest
from simulated import outcomes, rate

from fibopolicy.errors import UserError
from fibopolicy.statistics.differences import Difference, mcnemar
from fibopolicy.statistics.power import (
    MAX_EPISODES,
    discordance,
    episodes_needed,
    paired_power,
    sample_size,
    unpaired_power,
)

#: From an independent Monte Carlo simulation: rates, episodes, power of the paired exact McNemar
#: test and of the unpaired z test, at an outcome correlation of 0.6.
TABLE = [
    (0.85, 0.90, 50, 0.06, 0.11),
    (0.85, 0.90, 150, 0.45, 0.29),
    (0.85, 0.90, 300, 0.82, 0.46),
    (0.85, 0.90, 500, 0.95, 0.68),
    (0.80, 0.90, 50, 0.35, 0.33),
    (0.80, 0.90, 150, 0.98, 0.67),
    (0.80, 0.90, 300, 1.00, 0.93),
    (0.80, 0.90, 500, 1.00, 0.99),
]


@pytest.mark.parametrize(("a", "b", "episodes", "paired", "unpaired"), TABLE)
def test_known_power(a: float, b: float, episodes: int, paired: float, unpaired: float) -> None:
    assert paired_power(a, b, episodes, correlation=0.6) == pytest.approx(paired, abs=0.04)
    assert unpaired_power(a, b, episodes) == pytest.approx(unpaired, abs=0.05)


@pytest.mark.parametrize(
    ("a", "b", "episodes", "correlation"),
    [(0.7, 0.85, 60, 0.3), (0.9, 0.97, 120, 0.0), (0.4, 0.6, 30, 0.8)],
)
def test_paired_power_agrees_with_simulation(
    a: float, b: float, episodes: int, correlation: float
) -> None:
    rng = np.random.default_rng(0)
    only_a, only_b = discordance(a, b, correlation)
    draws = rng.multinomial(episodes, [only_a, only_b, 1 - only_a - only_b], size=4000)[:, :2]
    different, times = np.unique(draws, axis=0, return_counts=True)
    simulated = np.average([mcnemar(int(x), int(y)) <= 0.05 for x, y in different], weights=times)
    assert paired_power(a, b, episodes, correlation) == pytest.approx(
        simulated, abs=3 * 0.5 / np.sqrt(4000)
    )


def test_discordance_keeps_the_rates_and_the_correlation() -> None:
    only_a, only_b = discordance(0.8, 0.9, 0.5)
    both = 0.8 - only_a
    assert both + only_b == pytest.approx(0.9)
    assert (both - 0.72) / np.sqrt(0.16 * 0.09) == pytest.approx(0.5)
    assert min(discordance(0.5, 0.99, 1.0)) == 0  # as correlated as such rates allow


def test_the_episodes_needed_are_the_fewest_that_reach_the_power() -> None:
    n = episodes_needed(0.85, 0.90, correlation=None)
    assert n is not None
    assert unpaired_power(0.85, 0.90, n) >= 0.8 > unpaired_power(0.85, 0.90, n - 1)
    paired = episodes_needed(0.85, 0.90, correlation=0.6)
    assert paired is not None
    assert paired < n / 2
    assert paired_power(0.85, 0.90, paired, 0.6) >= 0.8
    assert episodes_needed(0.9, 0.9, correlation=0.5) is None
    assert episodes_needed(0.9, 0.9001, correlation=None) is None


def test_a_test_that_cannot_reject_has_no_power() -> None:
    assert paired_power(0.0, 1.0, 5) == 0  # five of five gives p = 0.0625
    assert paired_power(0.0, 1.0, 6) == pytest.approx(float(binomtest(0, 6).pvalue <= 0.05))
    with pytest.raises(UserError, match="between 0 and 1"):
        paired_power(0.9, 1.1, 10)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (3, 0.5)])
def test_the_sample_size_shows_non_inferiority(seeds: int, seed_sd: float) -> None:
    """A pilot study whose difference is close to the true one, then studies of the size
    that it asks for.
    """
    rng, logits, margin, alpha = np.random.default_rng(3), (1.0, 1.1), 0.08, 0.025
    true = rate(logits[1], float(np.hypot(seed_sd, 1.5))) - rate(
        logits[0], float(np.hypot(seed_sd, 1.5))
    )

    def study(seeds: int, n: int) -> Difference:
        init_states = 1.5 * rng.normal(size=n)
        first, second = (outcomes(rng, seeds, init_states, logit, seed_sd) for logit in logits)
        return Difference(first, second)

    sizes = []
    while len(sizes) < 15:
        pilot = study(max(seeds, 1), 150)
        if abs(pilot.value - true) < 0.01:
            sizes.append(sample_size(pilot, -margin, alpha=alpha))
    known = [size for size in sizes if size is not None]
    assert len(known) >= 10
    reached = [
        study(size.seeds, size.init_states).p_inferior(margin) <= alpha
        for size in known
        for _ in range(30)
    ]
    assert 0.65 <= np.mean(reached) <= 0.95


def test_the_sample_size_has_no_fewer_seeds_and_is_none_at_the_bound() -> None:
    rng = np.random.default_rng(4)
    a, b = (outcomes(rng, 3, rng.normal(size=60), 1, 0.5) for _ in range(2))
    found = Difference(a, b)
    wanted = sample_size(found, found.value - 0.05, alpha=0.025)
    assert wanted is not None
    assert wanted.seeds >= 3
    assert wanted.seeds * wanted.init_states <= MAX_EPISODES
    easier = sample_size(found, found.value - 0.2, alpha=0.025)
    assert easier is not None
    assert easier.seeds * easier.init_states < wanted.seeds * wanted.init_states
    assert sample_size(found, found.value - 1e-5, alpha=0.025) is None
    single = sample_size(Difference(a[:1], b[:1]), 0.5, alpha=0.025)
    assert single is not None
    assert single.seeds == 1


@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_the_sample_size_of_equal_outcomes_is_close_to_the_fewest_needed(seeds: int) -> None:
    def passes(n: int) -> bool:
        same = np.ones((seeds, n), dtype=bool)
        return Difference(same, same).p_inferior(0.05) <= 0.002

    enough = next(n for n in range(8, 400) if passes(n))
    seen = np.ones((seeds, 20), dtype=bool)
    wanted = sample_size(Difference(seen, seen), -0.05, alpha=0.002)
    assert wanted is not None
    assert wanted.seeds == seeds
    assert enough <= wanted.init_states <= 1.4 * enough
