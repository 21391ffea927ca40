"""Compare methods on the initial states that all of them were evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.errors import UserError
from fibopolicy.statistics.differences import Difference, holm
from fibopolicy.statistics.rates import Rate, pooled

if TYPE_CHECKING:
    from fibopolicy.evaluation.episodes import EpisodeResult

#: Two-sided level of significance; one-sided tests of non-inferiority use half of it.
ALPHA = 0.05


@dataclass(frozen=True)
class Method:
    """One run, or the runs of several training seeds of one method.

    Args:
        name: as printed.
        runs: run directories.
        rows: episode results of each run.

    Raises:
        UserError: two runs hold the same weights.
    """

    name: str
    runs: tuple[Path, ...]
    rows: tuple[tuple[EpisodeResult, ...], ...]

    def __post_init__(self) -> None:
        digests: dict[str, Path] = {}
        for run, (first, *_) in zip(self.runs, self.rows, strict=True):
            if first.policy and first.policy in digests:
                raise UserError(
                    f"{self.name}: {digests[first.policy]} and {run} hold the same weights;"
                    " expected different training seeds"
                )
            digests[first.policy] = run

    @property
    def errors(self) -> int:
        """Number of episodes that ended in a simulator error."""
        return sum(bool(row.error) for rows in self.rows for row in rows)

    @property
    def steps(self) -> str:
        """Gradient steps of the checkpoints, as printed: `1000` or `500, 1000`."""
        return ", ".join(map(str, sorted({rows[0].checkpoint_step for rows in self.rows})))

    def outcomes(self, init_states: Sequence[str]) -> NDArray[np.bool_]:
        """Success `(S, n)` of the S runs on n initial states, named by their digests."""
        return np.array([[row.success for row in rows] for rows in self.results(init_states)])

    def results(self, init_states: Sequence[str]) -> list[list[EpisodeResult]]:
        """The results of each run on these initial states, in their order."""
        by_init_state = [{row.init_state: row for row in rows} for rows in self.rows]
        return [[found[digest] for digest in init_states] for found in by_init_state]


@dataclass(frozen=True)
class Candidate:
    """A method compared with the baseline.

    Args:
        name: name of the method.
        difference: candidate minus baseline.
        p: two-sided p value of no difference, adjusted by Holm for the number of
            candidates.
        p_inferior: one-sided p value of being worse by the margin or more, adjusted
            in the same way; `None` without a margin.
        p_within: p value of being worse by less than the margin, or better; likewise.
        testable: whether the baseline solves more than the margin. If not, nothing can
            be worse by the margin.
    """

    name: str
    difference: Difference
    p: float
    p_inferior: float | None = None
    p_within: float | None = None
    testable: bool = True

    @property
    def better(self) -> bool:
        return self.p <= ALPHA and self.difference.value > 0

    @property
    def not_inferior(self) -> bool:
        """Whether it is shown to be worse by less than the margin, or better."""
        shown = self.p_inferior is not None and self.p_inferior <= ALPHA / 2
        return shown and (self.testable or self.better)

    @property
    def inferior(self) -> bool:
        """Whether it is shown to be worse by more than the margin."""
        return self.p_within is not None and self.p_within <= ALPHA / 2

    @property
    def verdict(self) -> str:
        """For example `better; not inferior`."""
        direction = "better" if self.better else "worse"
        shown = "no difference shown" if self.p > ALPHA else direction
        if self.p_inferior is None:
            return shown
        if self.not_inferior:
            return f"{shown}; not inferior"
        if self.inferior:
            return f"{shown}; inferior"
        return f"{shown}; {'non-inferiority not shown' if self.testable else 'untestable'}"


@dataclass(frozen=True)
class Comparison:
    """Methods on the initial states that they share.

    Args:
        task, max_steps: the same for all methods.
        methods: all methods, the baseline first.
        init_states: digests of the shared initial states, without simulator errors.
        left_out: number of initial states that some run lacks.
        faulty: number of shared initial states with a simulator error in some run.
        margin: margin of non-inferiority, or `None`.
        rates: rates of each method on `init_states`.
        candidates: each further method against the baseline.
        best: see `best_set`.
    """

    task: str
    max_steps: int
    methods: tuple[Method, ...]
    init_states: tuple[str, ...]
    left_out: int
    faulty: int
    margin: float | None
    rates: tuple[Rate, ...]
    candidates: tuple[Candidate, ...]
    best: tuple[str, ...]

    @property
    def baseline(self) -> Method:
        return self.methods[0]

    @property
    def verdict(self) -> str:
        """With a margin: `inferior` if any candidate is worse by more, `not inferior`
        if all are shown not to be, else `undecided`.
        """
        if any(one.inferior for one in self.candidates):
            return "inferior"
        shown = all(one.not_inferior for one in self.candidates)
        return "not inferior" if shown else "undecided"

    @property
    def correlation(self) -> float:
        """Correlation of the outcomes of a baseline and a candidate checkpoint on the
        same initial state: mean over pairs, at least 0; 0 where all outcomes are equal.
        """
        found = []
        baseline, *others = (method.outcomes(self.init_states) for method in self.methods)
        for other in others:
            for a in baseline:
                for b in other:
                    if 0 < a.mean() < 1 and 0 < b.mean() < 1:
                        found.append(float(np.corrcoef(a, b)[0, 1]))
        return max(0.0, sum(found) / len(found)) if found else 0.0


def best_set(names: Sequence[str], outcomes: Sequence[NDArray[np.bool_]]) -> tuple[str, ...]:
    """The methods that cannot be distinguished from the best one. With 95 % confidence,
    the truly best method is among them.

    A method is left out if it is worse than some other one at a one-sided level of 5 %,
    by Bonferroni divided by the number of others.

    Args:
        outcomes: success `(S, n)` of each method on the same initial states.
    """

    def worse(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> bool:
        difference = Difference(b, a)
        return difference.value < 0 and difference.p / 2 <= ALPHA / (len(names) - 1)

    return tuple(
        name
        for i, (name, a) in enumerate(zip(names, outcomes, strict=True))
        if not any(worse(a, b) for j, b in enumerate(outcomes) if i != j)
    )


def compare(
    methods: Sequence[Method], margin: float | None = None, confidence: float = 0.95
) -> Comparison:
    """Compare every further method with the first, on the initial states they share.

    Args:
        margin: how much worse a candidate may be and still count as not inferior, in
            (0, 1). Choose it before you see the results.
        confidence: confidence level of the intervals of differences.

    Raises:
        UserError: the methods differ in task or max_steps, or share fewer than two
            initial states.
    """
    runs = [(method.name, rows) for method in methods for rows in method.rows]
    for name in ("task", "max_steps"):
        values = {getattr(rows[0], name): method for method, rows in runs}
        if len(values) > 1:
            found = ", ".join(f"{method} has {name} {value}" for value, method in values.items())
            raise UserError(f"{found}; compare evaluations of one task and max_steps")
    init_states_of = [{row.init_state for row in rows} for _, rows in runs]
    shared, every = set.intersection(*init_states_of), set.union(*init_states_of)
    faulty = {row.init_state for _, rows in runs for row in rows if row.error} & shared
    in_order = (row.init_state for row in runs[0][1])
    init_states = tuple(dict.fromkeys(digest for digest in in_order if digest in shared - faulty))
    if len(init_states) < 2:
        sets = "; ".join(f"{name}: {len(rows)} of seed {rows[0].init_seed}" for name, rows in runs)
        faults = f" without a simulator error, and {len(faulty)} with one" if faulty else ""
        raise UserError(
            f"{len(init_states)} initial states are shared{faults}, expected 2 or more"
            f" ({sets}); evaluate all runs with the same --init-states or --init-seed"
        )
    outcomes = [method.outcomes(init_states) for method in methods]
    differences = [Difference(outcomes[0], other, confidence) for other in outcomes[1:]]
    p = holm([d.p for d in differences])
    rates = tuple(map(pooled, outcomes))
    of_margin: list[tuple[Any, ...]] = [() for _ in p]
    if margin is not None:
        inferior, testable = [d.p_inferior(margin) for d in differences], rates[0].value > margin
        within = holm([1 - each for each in inferior])
        of_margin = [(*each, testable) for each in zip(holm(inferior), within, strict=True)]
    names = (method.name for method in methods[1:])
    candidates = [
        Candidate(name, difference, adjusted, *more)
        for name, difference, adjusted, more in zip(names, differences, p, of_margin, strict=True)
    ]
    return Comparison(
        task=runs[0][1][0].task,
        max_steps=runs[0][1][0].max_steps,
        methods=tuple(methods),
        init_states=init_states,
        left_out=len(every - shared),
        faulty=len(faulty),
        margin=margin,
        rates=rates,
        candidates=tuple(candidates),
        best=best_set([method.name for method in methods], outcomes),
    )
