"""What episodes on the same start states say about the difference of two success rates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr
from scipy.stats import binomtest

from fibopolicy.errors import UserError
from fibopolicy.statistics.rates import Variation, degrees_of_freedom, quantile, variation

#: A variance and the degrees of freedom that it was estimated with.
Part = tuple[float, int]


@dataclass(frozen=True)
class Expected:
    """What another number of training seeds and start states would leave to doubt.

    Args:
        error: standard error of the difference, in [0, 1].
        df: degrees of freedom of its estimate.
    """

    error: float
    df: float


class Estimate(ABC):
    """A difference of success rates, candidate minus baseline, with what is uncertain about it."""

    confidence: float

    @property
    @abstractmethod
    def value(self) -> float:
        """In [-1, 1]."""

    @property
    @abstractmethod
    def p(self) -> float:
        """Two-sided p value of no difference."""

    @property
    def low(self) -> float:
        return max(-1.0, self._centre - self._half)

    @property
    def high(self) -> float:
        return min(1.0, self._centre + self._half)

    def p_inferior(self, margin: float) -> float:
        """One-sided p value of the candidate being worse than the baseline by `margin`,
        in (0, 1), or more.
        """
        if not 0 < margin < 1:
            raise UserError(
                "margin must lie between 0 and 1, e.g. 0.05 for five percentage points, got"
                f" {margin}"
            )
        return float(stdtr(self._df, -(self._centre + margin) / self._error))

    @property
    def seed_share(self) -> float:
        """The share of the variance, in [0, 1], that training seeds cause beyond
        chance: more episodes do not reduce it.
        """
        return self._beyond_chance / self._error**2

    @abstractmethod
    def expected(self, seeds: int, starts: int) -> Expected:
        """What `seeds` training seeds of either side on `starts` start states (of each
        task) would leave, varying as these do.

        Variation that a single seed cannot tell counts as none.
        """

    @property
    @abstractmethod
    def seeds(self) -> int:
        """Training seeds of the side with more."""

    @property
    @abstractmethod
    def starts(self) -> int:
        """Start states, of the task with most."""

    @property
    @abstractmethod
    def checkpoint_pair(self) -> bool:
        """Whether each side is a single checkpoint (per task)."""

    @property
    @abstractmethod
    def _centre(self) -> float: ...

    @property
    @abstractmethod
    def _beyond_chance(self) -> float: ...

    @cached_property
    @abstractmethod
    def _error(self) -> float: ...

    @cached_property
    @abstractmethod
    def _degrees(self) -> tuple[Part, ...]: ...

    @cached_property
    def _df(self) -> float:
        return degrees_of_freedom(self._error**2, self._degrees)

    @property
    def _half(self) -> float:
        return self._error * quantile(self._error**2, self._degrees, self.confidence)

    def _student(self) -> float:
        return float(2 * stdtr(self._df, -abs(self._centre) / self._error))


@dataclass(frozen=True)
class Difference(Estimate):
    """Candidate minus baseline, on the same n start states.

    Args:
        baseline, candidate: outcomes `(S, n)` of S training seeds each, whose columns
            are the same start states.
        confidence: of the interval.

    With one seed each the interval is Bonett and Price's (2012): of the mean paired
    difference, as if two more start states had been seen, one solved by the baseline
    alone and one by the candidate alone, so that even equal outcomes leave a doubt. It
    speaks of these two checkpoints. With several seeds it also holds what they differ
    by beyond chance, with Student's quantile for their number, and speaks of the two
    methods.

    In simulation (see `pooled`; 1, 3 and 5 seeds each) the 95 % interval covers 94 to
    100 % where both methods' seeds differ alike, by a standard deviation of up to 1
    logit. It is too good where one method is near 100 % and some of the other's seeds
    train badly, because 3 seeds often miss those: with true rates of 95 and 90 % and a
    standard deviation of 1 it covers 87 to 91 % and grants 8 to 12 % of false
    non-inferiority instead of 2.5 %; with 99 and 94 % and 1.5 (one seed in twenty below
    78 %) it covers 78 to 81 % and grants 19 to 22 %. Only more seeds would show them.
    """

    baseline: NDArray[np.bool_]
    candidate: NDArray[np.bool_]
    confidence: float = 0.95

    def __post_init__(self) -> None:
        for side in (self.baseline, self.candidate):
            if side.ndim != 2 or not side.size or side.shape[1] != self.baseline.shape[1]:
                raise UserError(
                    "a difference needs outcomes (seeds, start states) on the same start states,"
                    f" got shapes {self.baseline.shape} and {self.candidate.shape}"
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
    def discordant(self) -> tuple[int, int]:
        """Of a checkpoint pair: start states that only the baseline solved, and that
        only the candidate solved.
        """
        a, b = self.baseline[0], self.candidate[0]
        return int((a & ~b).sum()), int((b & ~a).sum())

    @cached_property
    def p(self) -> float:
        """Two-sided p value of no difference: exact McNemar for a checkpoint pair,
        Student's for several seeds.
        """
        if self.checkpoint_pair:
            return mcnemar(*self.discordant)
        return self._student()

    @property
    def seeds(self) -> int:
        return max(len(self.baseline), len(self.candidate))

    @property
    def starts(self) -> int:
        return int(self.baseline.shape[1])

    def expected(self, seeds: int, starts: int) -> Expected:
        variance, degrees = self.planned(seeds, starts)
        return Expected(variance**0.5, degrees_of_freedom(variance, degrees))

    def planned(self, seeds: int, starts: int) -> tuple[float, tuple[Part, ...]]:
        """The variance of the difference with so many training seeds and start states,
        and the parts that it consists of.
        """
        # As if each start state had been seen more often; the two that nobody has seen
        # remain two.
        weights = np.array([*[starts / self.starts] * self.starts, 1.0, 1.0])
        by_start, *sides = self._varying(weights)
        # Repeated start states vary less than as many new ones.
        new = (1 - 1 / max(starts, 2)) / (1 - 1 / max(self.starts, 2))
        chance = new * sum(side.chance for side in sides)
        chances, beyond, apart = 0.0, 0.0, []
        for side, seen, trained in zip(
            sides, self._parts[1:], (self.baseline, self.candidate), strict=True
        ):
            left = new * side.chance * len(trained) / seeds
            between = seen.beyond_chance * len(trained) / seeds
            chances, beyond = chances + left, beyond + between
            apart.append((between + left, seeds - 1))
        varying = max(0.0, new * by_start.starts - chance) + chances
        return varying + beyond, ((varying, starts + 1), *apart)

    @cached_property
    def _padded(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        a, b = self.baseline.astype(float), self.candidate.astype(float)
        return (
            np.column_stack([a, np.ones(len(a)), np.zeros(len(a))]),
            np.column_stack([b, np.zeros(len(b)), np.ones(len(b))]),
        )

    @cached_property
    def _parts(self) -> tuple[Variation, Variation, Variation]:
        return self._varying(None)

    def _varying(
        self, weights: NDArray[np.float64] | None
    ) -> tuple[Variation, Variation, Variation]:
        """Of the difference by start state, and of either side."""
        a, b = self._padded
        return (
            variation((b.mean(axis=0) - a.mean(axis=0))[None], weights),
            variation(a, weights),
            variation(b, weights),
        )

    @property
    def _centre(self) -> float:
        a, b = self._padded
        return float(b.mean() - a.mean())

    @property
    def _beyond_chance(self) -> float:
        return self._parts[1].beyond_chance + self._parts[2].beyond_chance

    @cached_property
    def _error(self) -> float:
        starts, a, b = self._parts
        return float((starts.starts + a.beyond_chance + b.beyond_chance) ** 0.5)

    @cached_property
    def _degrees(self) -> tuple[Part, ...]:
        starts, a, b = self._parts
        n = self._padded[0].shape[1]
        return (
            (starts.starts, n - 1),
            (a.seeds, len(self.baseline) - 1),
            (b.seeds, len(self.candidate) - 1),
        )


@dataclass(frozen=True)
class MeanDifference(Estimate):
    """The mean of differences on several tasks, each task counted alike, whose runs and
    start states are independent.

    It speaks of these tasks, not of others like them: tasks are no random draw.

    Args:
        parts: per task.
        confidence: of the interval.
    """

    parts: tuple[Difference, ...]
    confidence: float = 0.95

    @property
    def value(self) -> float:
        return sum(part.value for part in self.parts) / len(self.parts)

    @property
    def p(self) -> float:
        """Two-sided p value of no difference on average: Student's, for single checkpoints too."""
        return self._student()

    @property
    def seeds(self) -> int:
        return max(part.seeds for part in self.parts)

    @property
    def starts(self) -> int:
        return max(part.starts for part in self.parts)

    @property
    def checkpoint_pair(self) -> bool:
        return all(part.checkpoint_pair for part in self.parts)

    def expected(self, seeds: int, starts: int) -> Expected:
        degrees: list[Part] = []
        total = 0.0
        for part in self.parts:
            variance, parts = part.planned(seeds, starts)
            total += variance
            degrees += parts
        return Expected(total**0.5 / len(self.parts), degrees_of_freedom(total, tuple(degrees)))

    @property
    def _centre(self) -> float:
        return sum(part._centre for part in self.parts) / len(self.parts)

    @property
    def _beyond_chance(self) -> float:
        return float(sum(part._beyond_chance for part in self.parts)) / len(self.parts) ** 2

    @cached_property
    def _error(self) -> float:
        return float(sum(part._error**2 for part in self.parts) ** 0.5) / len(self.parts)

    @cached_property
    def _degrees(self) -> tuple[Part, ...]:
        return tuple(
            (variance / len(self.parts) ** 2, df)
            for part in self.parts
            for variance, df in part._degrees
        )


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p value of McNemar's test: are start states that only one side
    solved as often its as the other's?

    >>> round(mcnemar(1, 8), 4)
    0.0391
    """
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p values, in the given order: below 5 %, the chance of any
    false alarm among them stays so.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
