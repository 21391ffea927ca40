from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from fibopolicy.errors import UserError
from fibopolicy.evaluation.differences import mcnemar
from fibopolicy.evaluation.power import discordance, episodes_needed, paired_power, unpaired_power

#: Found by Monte Carlo elsewhere: rates, episodes, power of the paired exact McNemar test and of the unpaired z test, at an
#: outcome correlation of 0.6.
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
    ("a", "b", "episodes", "correlation"), [(0.7, 0.85, 60, 0.3), (0.9, 0.97, 120, 0.0), (0.4, 0.6, 30, 0.8)]
)
def test_paired_power_agrees_with_simulation(a: float, b: float, episodes: int, correlation: float) -> None:
    rng = np.random.default_rng(0)
    only_a, only_b = discordance(a, b, correlation)
    draws = rng.multinomial(episodes, [only_a, only_b, 1 - only_a - only_b], size=4000)[:, :2]
    different, times = np.unique(draws, axis=0, return_counts=True)
    simulated = np.average([mcnemar(int(x), int(y)) <= 0.05 for x, y in different], weights=times)
    assert paired_power(a, b, episodes, correlation) == pytest.approx(simulated, abs=3 * 0.5 / np.sqrt(4000))


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
