"""How many episodes a difference of success rates needs to be seen."""

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
#: Rather than on more start states than this, several training seeds are continued by
#: further ones, up to so many.
MOST_STARTS, MOST_SEEDS = 2000, 50


def discordance(a: float, b: float, correlation: float) -> tuple[float, float]:
    """The shares of start states that only the first and only the second policy solves.

    Args:
        a, b: true rates.
        correlation: of the two outcomes on a start state; brought to the nearest value
            that such rates allow.
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
    """The chance that McNemar's exact test tells rates a and b apart, on the same
    `episodes` start states.

    >>> round(paired_power(0.85, 0.90, 300, correlation=0.6), 2)
    0.79
    """
    only_a, only_b = discordance(a, b, correlation)
    differ = only_a + only_b
    if differ <= 0:
        return 0.0
    # Only numbers of differing start states with a chance worth counting.
    m = np.arange(
        int(binom.ppf(1e-9, episodes, differ)), int(binom.ppf(1 - 1e-9, episodes, differ)) + 1
    )
    edge = _rejected_up_to(int(m[-1]), alpha)[m]  # of m, at most so many on one side reject
    share = only_b / differ
    rejects = binom.cdf(edge, m, share) + binom.cdf(edge, m, 1 - share)
    return float((binom.pmf(m, episodes, differ) * rejects).sum())


@lru_cache(maxsize=8)
def _rejected_up_to(most: int, alpha: float) -> NDArray[np.int64]:
    """For m = 0 .. most fair coins, the largest k so that at most k heads reject on two
    sides; -1 if none does.
    """
    m = np.arange(most + 1)
    k = binom.ppf(alpha / 2, m, 0.5).astype(np.int64)  # the smallest whose tail reaches alpha / 2
    k[0] = -1
    return np.where(binom.cdf(k, m, 0.5) > alpha / 2, k - 1, k)


def unpaired_power(a: float, b: float, episodes: int, alpha: float = 0.05) -> float:
    """The chance that a z test tells rates a and b apart, on `episodes` start states
    each that are not the same.

    >>> round(unpaired_power(0.85, 0.90, 300), 2)
    0.46
    """
    mean = (a + b) / 2
    under_none = math.sqrt(2 * mean * (1 - mean) / episodes)
    spread = math.sqrt((a * (1 - a) + b * (1 - b)) / episodes)
    if spread == 0:
        return float(a != b)
    z = float(norm.ppf(1 - alpha / 2))
    return float(
        norm.cdf((abs(b - a) - z * under_none) / spread)
        + norm.cdf((-abs(b - a) - z * under_none) / spread)
    )


def episodes_needed(
    a: float, b: float, *, correlation: float | None, power: float = 0.8, alpha: float = 0.05
) -> int | None:
    """Episodes until rates a and b are told apart with a chance of `power`; `None`
    beyond `MAX_EPISODES`.

    Args:
        correlation: of the outcomes on the same start states (McNemar's exact test);
            `None` for other start states (z test).
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
class Needed:
    """Training seeds of either side, and start states (of each task) that each of them
    is measured on.
    """

    seeds: int
    starts: int


def needed(found: Estimate, bound: float, *, alpha: float, power: float = 0.8) -> Needed | None:
    """What would tell a difference from `bound` with a chance of `power`, if it is the
    one found and varies as it did.

    The fewest seeds, not fewer than there are, for which `MOST_STARTS` start states are
    enough, and with these the fewest start states. Single checkpoints stay single: how
    seeds would differ is unknown.

    Args:
        bound: 0 to see a difference at all, minus the margin to see whether the
            candidate is inferior by it; in (-1, 1).
        alpha: of the one-sided test, after any correction.

    Returns:
        `None` where `MAX_EPISODES` episodes, start states times seeds, are not enough.
    """

    def reached(seeds: int, starts: int) -> bool:
        left = found.expected(seeds, starts)
        return bool(
            stdtr(left.df, abs(found.value - bound) / left.error - stdtrit(left.df, 1 - alpha))
            >= power
        )

    single = found.seeds == 1
    for seeds in range(found.seeds, 2 if single else MOST_SEEDS + 1):
        most = MAX_EPISODES if single else min(MOST_STARTS, MAX_EPISODES // seeds)
        if reached(seeds, most):
            low, high = 1, most
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (low, middle) if reached(seeds, middle) else (middle, high)
            return Needed(seeds, high)
    return None
