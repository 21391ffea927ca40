"""Planned interim looks at a growing experiment, without more false positives.

If you test at 5 % after every few training seeds, you will find a difference that does
not exist in far more than 5 % of experiments. A plan names the looks beforehand and
spends the 5 % over them (Lan and DeMets, 1983), little at the first looks and most at
the last (the spending function that resembles O'Brien and Fleming's boundaries).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from fibopolicy.errors import UserError

#: Points of the grid on which a statistic between its boundaries is integrated.
_POINTS = 201
#: Levels of significance for which the boundaries of a plan are computed; the values
#: between them are interpolated.
_LEVELS = np.concatenate([np.logspace(-10, -2, 33), np.linspace(0.02, 0.8, 40)])


@dataclass(frozen=True)
class LookPlan:
    """The looks at an experiment that were planned before it began.

    With information fractions t_k, the looks up to k may spend 2 - 2 Phi(z_{a/4} /
    sqrt(t_k)) of a two-sided level a on each side. From it follows the level at which
    look k tests: the joint distribution of the statistics of the looks is normal, with
    correlations sqrt(t_j / t_k) (Armitage, McPherson and Rowe, 1969).

    Args:
        fractions: share of the planned episodes that each look has seen, in (0, 1],
            rising to 1. The share of the information is at least as large, because all
            looks share initial states or training seeds; the test is then conservative.

    Raises:
        UserError: the fractions do not rise to 1.
    """

    fractions: tuple[float, ...]

    def __post_init__(self) -> None:
        rises = all(a < b for a, b in zip((0.0, *self.fractions), self.fractions, strict=False))
        if not self.fractions or not rises or self.fractions[-1] != 1:
            raise UserError(
                "the fractions of planned looks must rise from above 0 to 1, got"
                f" {', '.join(map(str, self.fractions)) or 'none'}"
            )

    def nominal(self, look: int, alpha: float = 0.05) -> float:
        """The two-sided level at which a look tests, if all looks together are to have
        at most `alpha` false positives. Its complement is the confidence of an interval
        that may be read at every look.

        Args:
            look: from 0.

        >>> plan = LookPlan((1 / 3, 2 / 3, 1))
        >>> [round(plan.nominal(look), 4) for look in range(3)]
        [0.0002, 0.012, 0.0463]
        """
        return float(_nominal_levels(self.fractions, alpha)[look])

    def p(self, p_values: Sequence[float]) -> float:
        """The p value of an experiment from those of the looks so far: the smallest
        level at which one of these looks would have rejected (Liu and Anderson, 2008).
        It never rises with further looks, so a decision stands. It may be corrected for
        several comparisons like any other p value.

        Args:
            p_values: two-sided, at most one for each look, in their order.

        >>> LookPlan((0.5, 1)).p([0.04])  # far from decided after half of the episodes
        0.199...
        """
        overall = [
            np.interp(np.log(max(p, 1e-300)), nominal, np.log(_LEVELS), right=0.0)
            for p, nominal in zip(p_values, self._table, strict=False)
        ]
        return float(np.exp(min(overall)))

    @cached_property
    def _table(self) -> NDArray[np.float64]:
        """Logarithm of the nominal level `(looks, levels)` for every overall level in
        `_LEVELS`.
        """
        nominal = np.array([_nominal_levels(self.fractions, float(a)) for a in _LEVELS]).T
        logs: NDArray[np.float64] = np.log(np.maximum(nominal, 1e-300))
        return logs


def _nominal_levels(fractions: tuple[float, ...], alpha: float) -> NDArray[np.float64]:
    """The nominal two-sided level of every look."""
    spent = 4 * ndtr(ndtri(alpha / 4) / np.sqrt(fractions))
    levels = []
    # The scores z sqrt(t) of the looks have independent increments. `density` is that
    # of a score which has not crossed a boundary so far, times the width of its cell.
    scores, density = np.zeros(1), np.ones(1)
    steps, shares = np.diff(fractions, prepend=0), np.diff(spent, prepend=0)
    for t, step, left in zip(fractions, steps, shares, strict=True):
        bound = brentq(_excess, 0.0, 40.0, args=(t**0.5, step**0.5, scores, density, left))
        levels.append(2 * ndtr(-bound))
        inside = np.linspace(-bound, bound, _POINTS) * t**0.5
        arriving = np.exp(-((inside[:, None] - scores) ** 2) / (2 * step)) @ density
        density = arriving / np.sqrt(2 * np.pi * step) * (inside[1] - inside[0])
        density[[0, -1]] /= 2
        scores = inside
    return np.array(levels)


def _excess(
    bound: float,
    root_t: float,
    root_step: float,
    scores: NDArray[np.float64],
    density: NDArray[np.float64],
    left: float,
) -> float:
    """The probability of crossing `bound` at this look for the first time, minus what
    may be spent at it.
    """
    edge = bound * root_t
    crossing = ndtr((scores - edge) / root_step) + ndtr((-edge - scores) / root_step)
    return float(density @ crossing) - left
