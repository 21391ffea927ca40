"""What a number of successes says about a success rate."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import norm

from fibopolicy.errors import UserError


@dataclass(frozen=True)
class Rate:
    """A success rate with its interval.

    Args:
        successes, episodes: the counts.
        low, high: the interval's ends, in [0, 1].
        errors: further episodes, which the simulator could not run to their end; they count nowhere else.
    """

    successes: int
    episodes: int
    low: float
    high: float
    errors: int = 0

    @property
    def value(self) -> float:
        return self.successes / self.episodes

    def __str__(self) -> str:
        """As it is printed: `47/50 = 94.0 % [83.8, 97.9]`."""
        errors = f", {self.errors} errors" if self.errors else ""
        return (
            f"{self.successes}/{self.episodes} = {100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]{errors}"
        )


def wilson(successes: int, episodes: int, confidence: float = 0.95) -> Rate:
    """Wilson's score interval for a binomial rate (Wilson, 1927).

    Unlike the textbook interval it stays within [0, 1] and does not shrink to a point at 0 or all successes.

    >>> print(wilson(47, 50))
    47/50 = 94.0 % [83.8, 97.9]
    """
    if episodes < 1 or not 0 <= successes <= episodes:
        raise UserError(f"a rate needs 0 <= successes <= episodes and at least one episode, got {successes} of {episodes}")
    z = float(norm.ppf((1 + confidence) / 2))
    p, n = successes / episodes, episodes
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At the ends the formula gives exactly 0 or 1; rounding must not.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Rate(successes, episodes, low, high)
