"""The power of a comparison, and the number of episodes that it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit
from scipy.stats import binom, norm

from fibopolicy.errors import UserError
from fibopolicy.statistics.differences import Estimate

#: Power that planned experiments are sized for.
POWER = 0.8
#: Beyond this many episodes a difference counts as out of reach.
MAX_EPISODES = 20_000
#: `sample_size` adds training seeds instead of asking for more initial states than
#: this.
MAX_INIT_STATES, MAX_SEEDS = 2000, 50


def discordance(a: float, b: float, correlation: float) -> tuple[float, float]:
    """The shares of initial states that only the first and only the second policy
    solves: a - q and b - q, where both solve q = a b + r sqrt(a (1 - a) b (1 - b)).

    Args:
        a, b: true rates.
        correlation: r, of the two outcomes on an initial state. It is clipped to the
            range that these rates allow.

    Raises:
        UserError: a rate outside [0, 1].
    """
    for rate in (a, b):
        if not 0 <= rate <= 1:
            raise UserError(f"a success rate lies between 0 and 1, got {rate}")
    both = a * b + correlation * math.sqrt(a * (1 - a) * b * (1 - b))
    both = min(max(both, 0.0, a + b - 1), a, b)
    return a - both, b - both


def paired_power(
    a: float, b: float, episodes: int, correlation: float = 0.0, alpha: float = 0.05
) -> float:
    """Power of McNemar's exact test for true rates a and b on the same `episodes`
    initial states: the number of discordant ones is binomial, and given that number,
    those that b solved are binomial.

    >>> round(paired_power(0.85, 0.90, 300, correlation=0.6), 2)
    0.79
    """
    only_a, only_b = discordance(a, b, correlation)
    differ = only_a + only_b
    if differ <= 0:
        return 0.0
    # Numbers of discordant initial states with a probability worth counting.
    m = np.arange(
        int(binom.ppf(1e-9, episodes, differ)), int(binom.ppf(1 - 1e-9, episodes, differ)) + 1
    )
    edge = _rejected_up_to(int(m[-1]), alpha)[m]  # for each m, the largest rejected count
    share = only_b / differ
    rejects = binom.cdf(edge, m, share) + binom.cdf(edge, m, 1 - share)
    return float((binom.pmf(m, episodes, differ) * rejects).sum())


@lru_cache(maxsize=8)
def _rejected_up_to(most: int, alpha: float) -> NDArray[np.int64]:
    """For m = 0 .. most fair coins, the largest k such that k heads reject two-sided;
    -1 if none does.
    """
    m = np.arange(most + 1)
    k = binom.ppf(alpha / 2, m, 0.5).astype(np.int64)  # the smallest whose tail reaches alpha / 2
    k[0] = -1
    return np.where(binom.cdf(k, m, 0.5) > alpha / 2, k - 1, k)


def unpaired_power(a: float, b: float, episodes: int, alpha: float = 0.05) -> float:
    """Power of a two-sided z test for true rates a and b, on `episodes` different
    initial states for each policy.

    >>> round(unpaired_power(0.85, 0.90, 300), 2)
    0.46
    """
    mean = (a + b) / 2
    null_error = math.sqrt(2 * mean * (1 - mean) / episodes)
    error = math.sqrt((a * (1 - a) + b * (1 - b)) / episodes)
    if error == 0:
        return float(a != b)
    z = float(norm.ppf(1 - alpha / 2))
    return float(
        norm.cdf((abs(b - a) - z * null_error) / error)
        + norm.cdf((-abs(b - a) - z * null_error) / error)
    )


def episodes_needed(
    a: float, b: float, *, correlation: float | None, power: float = POWER, alpha: float = 0.05
) -> int | None:
    """The fewest episodes that show the difference of true rates a and b with this
    power; `None` if `MAX_EPISODES` do not.

    Args:
        correlation: correlation of the outcomes on the same initial states (McNemar's
            exact test); `None` for different initial states (z test).
        alpha: significance level of the two-sided test.
    """

    def reached(n: int) -> bool:
        found = (
            unpaired_power(a, b, n, alpha)
            if correlation is None
            else paired_power(a, b, n, correlation, alpha)
        )
        return found >= power

    if a == b or not reached(MAX_EPISODES):
        return None
    low, high = 1, 2
    while not reached(high):
        low, high = high, min(2 * high, MAX_EPISODES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


@dataclass(frozen=True)
class SampleSize:
    """Size of a study.

    Args:
        seeds: training seeds of each method.
        init_states: initial states of each task that every seed is evaluated on.
    """

    seeds: int
    init_states: int


def sample_size(
    found: Estimate, bound: float, *, alpha: float, power: float = POWER
) -> SampleSize | None:
    """The size of a study that would distinguish a difference from `bound` with this
    power, if the true difference is the one found and outcomes vary as they did.

    It has the fewest seeds, at least those of `found`, for which `MAX_INIT_STATES`
    initial states suffice, and then the fewest initial states. Single checkpoints
    remain single, since the variation between seeds is unknown.

    Args:
        found: the difference found.
        bound: in (-1, 1): 0 for a difference of any size, minus the margin for
            non-inferiority.
        alpha: significance level of the one-sided test, after any correction.

    Returns:
        `None` if `MAX_EPISODES` episodes, seeds times initial states, do not suffice.
    """

    def reached(seeds: int, init_states: int) -> bool:
        planned = found.expected(seeds, init_states)
        quantile = stdtrit(planned.df, 1 - alpha)
        effect = abs(found.value - bound) / planned.error
        return bool(stdtr(planned.df, effect - quantile) >= power)

    single = found.seeds == 1
    for seeds in range(found.seeds, 2 if single else MAX_SEEDS + 1):
        most = MAX_EPISODES if single else min(MAX_INIT_STATES, MAX_EPISODES // seeds)
        if reached(seeds, most):
            low, high = 1, most
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if reached(seeds, middle) else (middle, high)
            return SampleSize(seeds, high)
    return None
