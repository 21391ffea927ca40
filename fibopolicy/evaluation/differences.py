"""What episodes on the same start states say about the difference of two success rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest, t

from fibopolicy.errors import UserError
from fibopolicy.evaluation.statistics import Variation, degrees_of_freedom, quantile, variation


@dataclass(frozen=True)
class Difference:
    """Candidate minus baseline, on the same n start states.

    Args:
        baseline, candidate: outcomes `(S, n)` of S training seeds each, whose columns are the same start states.
        confidence: of the interval.

    With one seed each the interval is Bonett and Price's (2012): of the mean paired difference, as if two more start states
    had been seen, one solved by the baseline alone and one by the candidate alone, so that even equal outcomes leave a doubt.
    It speaks of these two checkpoints. With several seeds it also holds what they differ by beyond chance, with Student's
    quantile for their number, and speaks of the two methods.

    In simulation (see `pooled`; 1, 3 and 5 seeds each) the 95 % interval covers 94 to 100 % where both methods' seeds differ
    alike, and at least 89 % for 3 seeds where one method is near 100 % and the other's seeds differ by tens of points.
    """

    baseline: NDArray[np.bool_]
    candidate: NDArray[np.bool_]
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for side in (self.baseline, self.candidate):
            if side.ndim != 2 or not side.size or side.shape[1] != self.baseline.shape[1]:
                raise UserError(
                    "a difference needs outcomes (seeds, start states) on the same start states, got shapes"
                    f" {self.baseline.shape} and {self.candidate.shape}"
                )

    @property
    def value(self) -> float:
        """In [-1, 1]."""
        return float(self.candidate.mean() - self.baseline.mean())

    @property
    def checkpoint_pair(self) -> bool:
        """Whether each side is a single checkpoint."""
        return len(self.baseline) == len(self.candidate) == 1

    @property
    def low(self) -> float:
        return max(-1.0, self._centre - self._half)

    @property
    def high(self) -> float:
        return min(1.0, self._centre + self._half)

    @property
    def discordant(self) -> tuple[int, int]:
        """Of a checkpoint pair: start states that only the baseline solved, and that only the candidate solved."""
        a, b = self.baseline[0], self.candidate[0]
        return int((a & ~b).sum()), int((b & ~a).sum())

    @cached_property
    def p(self) -> float:
        """Two-sided p value of no difference: exact McNemar for a checkpoint pair, Student's for several seeds."""
        if self.checkpoint_pair:
            return mcnemar(*self.discordant)
        return float(2 * t.sf(abs(self._centre) / self._error, self._df))

    def p_inferior(self, margin: float) -> float:
        """One-sided p value of the candidate being worse than the baseline by `margin`, in (0, 1), or more."""
        if not 0 < margin < 1:
            raise UserError(f"margin must lie between 0 and 1, e.g. 0.05 for five percentage points, got {margin}")
        return float(t.sf((self._centre + margin) / self._error, self._df))

    @property
    def seed_share(self) -> float:
        """The share of the variance, in [0, 1], that training seeds cause beyond chance: more episodes do not reduce it."""
        return (self._parts[1].beyond_chance + self._parts[2].beyond_chance) / self._error**2

    @cached_property
    def _padded(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        a, b = self.baseline.astype(float), self.candidate.astype(float)
        return (
            np.column_stack([a, np.ones(len(a)), np.zeros(len(a))]),
            np.column_stack([b, np.zeros(len(b)), np.ones(len(b))]),
        )

    @cached_property
    def _parts(self) -> tuple[Variation, Variation, Variation]:
        """Of the difference by start state, and of either side."""
        a, b = self._padded
        return variation((b.mean(axis=0) - a.mean(axis=0))[None]), variation(a), variation(b)

    @property
    def _centre(self) -> float:
        a, b = self._padded
        return float(b.mean() - a.mean())

    @property
    def _error(self) -> float:
        starts, a, b = self._parts
        return float((starts.starts + a.beyond_chance + b.beyond_chance) ** 0.5)

    @property
    def _degrees(self) -> tuple[tuple[float, int], ...]:
        starts, a, b = self._parts
        n = self._padded[0].shape[1]
        return (starts.starts, n - 1), (a.seeds, len(self.baseline) - 1), (b.seeds, len(self.candidate) - 1)

    @property
    def _df(self) -> float:
        return degrees_of_freedom(self._error**2, self._degrees)

    @property
    def _half(self) -> float:
        return self._error * quantile(self._error**2, self._degrees, self.confidence)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p value of McNemar's test: are start states that only one side solved as often its as the other's?

    >>> round(mcnemar(1, 8), 4)
    0.0391
    """
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the given order: below 5 %, the chance of any false alarm among them stays so.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
