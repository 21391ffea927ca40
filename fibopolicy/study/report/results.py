"""What a study's rows say: a rate per cell, differences from the control, verdicts
corrected for their number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum

from fibopolicy.errors import UserError
from fibopolicy.statistics.compare import ALPHA, Comparison, Method, compare
from fibopolicy.statistics.differences import Difference, Estimate, MeanDifference, holm
from fibopolicy.statistics.power import POWER, SampleSize, sample_size
from fibopolicy.statistics.rates import Rate
from fibopolicy.study.records import ConditionRecord, Study


@dataclass(frozen=True)
class CellResult:
    """A cell's success.

    Args:
        side: its finished runs; `None` where there is none.
        rate: over the initial states that all of them ran to their end, with the interval
            over training seeds and initial states.
        init_states: how many these are.
        errors: episodes that the simulator could not run to their end; they count
            nowhere.
        problem: why there is no rate although runs are finished; empty otherwise.
    """

    cell: ConditionRecord
    side: Method | None
    rate: Rate | None
    init_states: int = 0
    errors: int = 0
    problem: str = ""


class Verdict(Enum):
    """What a comparison with the control shows, after Holm's correction over all
    comparisons of the study.
    """

    NOT_INFERIOR = "not inferior"
    INFERIOR = "inferior"
    UNDECIDED = "undecided"
    UNTESTABLE = "untestable"


@dataclass(frozen=True)
class Compared:
    """An encoder against the control: same task, head, init and initial states.

    Args:
        task: `None` for the mean over several.
        tasks: those that count.
        head, init, control, candidate: what is compared.
        difference: candidate minus control, in shares of episodes.
        pairs: per task the comparison on the same initial states.
        p: adjusted by Holm over all comparisons of the study, of no difference.
        p_inferior: likewise, of being worse by the margin or more; `None` without a
            margin.
        p_within: likewise, of being worse by less than the margin, or better.
        testable: whether the control solves more than the margin, on every task that
            counts; below it nothing can be worse by as much, and a mean would hide what
            others lose.
        needed: seeds and initial states that would decide, if the difference is the one
            found; `None` where it is decided or out of reach.
    """

    task: str | None
    tasks: tuple[str, ...]
    head: str
    init: str
    control: str
    candidate: str
    difference: Estimate
    pairs: tuple[Comparison, ...]
    p: float = 1.0
    p_inferior: float | None = None
    p_within: float | None = None
    testable: bool = True
    needed: SampleSize | None = None

    @property
    def subject(self) -> str:
        """The task as it is printed."""
        return printed(self.task) if self.task is not None else f"mean of {len(self.tasks)} tasks"

    @property
    def differs(self) -> bool:
        return self.p <= ALPHA

    @property
    def verdict(self) -> Verdict:
        """Against the margin; without one, whether the candidate is shown to be worse,
        or not to be.
        """
        if self.p_inferior is None or self.p_within is None:
            if not self.differs:
                return Verdict.UNDECIDED
            return Verdict.NOT_INFERIOR if self.difference.value > 0 else Verdict.INFERIOR
        if self.p_inferior <= ALPHA / 2 and (
            self.testable or (self.differs and self.difference.value > 0)
        ):
            return Verdict.NOT_INFERIOR
        if not self.testable:
            return Verdict.UNTESTABLE
        return Verdict.INFERIOR if self.p_within <= ALPHA / 2 else Verdict.UNDECIDED

    @property
    def seeds(self) -> tuple[int, int]:
        """Training seeds of control and candidate, fewest over the tasks."""
        first, second = (min(len(pair.methods[i].runs) for pair in self.pairs) for i in (0, 1))
        return first, second

    @property
    def lowest_control(self) -> float:
        """The control's success, on the task where it is lowest."""
        return min(pair.rates[0].value for pair in self.pairs)

    @property
    def init_states(self) -> int:
        """Initial states that both ran to their end, fewest over the tasks."""
        return min(len(pair.init_states) for pair in self.pairs)

    @property
    def correlation(self) -> float:
        """Of the outcomes of two checkpoints on the same initial state, mean over tasks."""
        return sum(pair.correlation for pair in self.pairs) / len(self.pairs)


@dataclass(frozen=True)
class Results:
    """All of a study.

    Args:
        cells: in the study's order.
        comparisons: every encoder but the control, per head and init: task by task,
            then the mean over tasks.
        unpaired: comparisons that could not be made, and why, one line each.
    """

    study: Study
    cells: tuple[CellResult, ...]
    comparisons: tuple[Compared, ...]
    unpaired: tuple[str, ...]

    def cell(self, task: str, encoder: str, setting: tuple[str, str]) -> CellResult | None:
        key = (task, encoder, setting)
        return next(
            (
                one
                for one in self.cells
                if (one.cell.task, one.cell.encoder, one.cell.setting) == key
            ),
            None,
        )

    def of(self, setting: tuple[str, str]) -> list[Compared]:
        return [one for one in self.comparisons if (one.head, one.init) == setting]


def results(study: Study) -> Results:
    """Everything that the rows of a study say; missing cells are simply not compared.

    Holm's correction counts every comparison that could be made, the means over tasks
    included: separately for differences, for non-inferiority, and for inferiority by
    more than the margin.

    Raises:
        UserError: two training seeds of a cell hold the same weights.
    """
    cells = [_result(cell) for cell in study.conditions]
    sides = {
        (one.cell.task, one.cell.encoder, one.cell.setting): one.side
        for one in cells
        if one.rate is not None
    }
    comparisons: list[Compared] = []
    unpaired: list[str] = []
    for setting in study.settings:
        for candidate in study.encoders:
            if candidate == study.baseline:
                continue
            pairs: dict[str, Comparison] = {}
            for task in study.tasks:
                control, other = (
                    sides.get((task, encoder, setting)) for encoder in (study.baseline, candidate)
                )
                if control is None or other is None:
                    continue
                try:
                    pairs[task] = compare([control, other])
                except UserError as error:
                    unpaired.append(
                        f"{candidate} against {study.baseline} on {printed(task)},"
                        f" {', '.join(setting)}: {error}"
                    )
            comparisons += _compared(pairs, setting, study.baseline, candidate)
    return Results(study, tuple(cells), tuple(_judged(comparisons, study.margin)), tuple(unpaired))


def _result(cell: ConditionRecord) -> CellResult:
    runs = [(run.folder, run.rows) for run in cell.done]
    if not runs:
        return CellResult(cell, None, None)
    side = Method(cell.encoder, *map(tuple, zip(*runs, strict=True)))
    try:
        found = compare([side])
    except UserError:
        problem = f"fewer than two initial states were run to their end by all of {len(runs)} seeds"
        return CellResult(cell, side, None, errors=side.errors, problem=problem)
    return CellResult(cell, side, found.rates[0], len(found.init_states), side.errors)


def _compared(
    pairs: dict[str, Comparison], setting: tuple[str, str], control: str, candidate: str
) -> list[Compared]:
    """The comparisons of one encoder: per task, and their mean where there are several."""
    differences: dict[str, Difference] = {
        task: pair.candidates[0].difference for task, pair in pairs.items()
    }
    found = [
        Compared(task, (task,), *setting, control, candidate, difference, (pairs[task],))
        for task, difference in differences.items()
    ]
    if len(found) > 1:
        mean = MeanDifference(tuple(differences.values()))
        found.append(
            Compared(None, tuple(pairs), *setting, control, candidate, mean, tuple(pairs.values()))
        )
    return found


def _judged(comparisons: Sequence[Compared], margin: float | None) -> list[Compared]:
    p = holm([one.difference.p for one in comparisons])
    inferior: list[float | None] = [None] * len(p)
    within: list[float | None] = [None] * len(p)
    if margin is not None:
        raw = [one.difference.p_inferior(margin) for one in comparisons]
        inferior, within = [*holm(raw)], [*holm([1 - each for each in raw])]
    judged = [
        replace(
            one,
            p=p[i],
            p_inferior=inferior[i],
            p_within=within[i],
            testable=margin is None or one.lowest_control > margin,
        )
        for i, one in enumerate(comparisons)
    ]
    bound, alpha = (0.0 if margin is None else -margin), ALPHA / 2 / max(1, len(judged))
    return [
        (
            replace(one, needed=sample_size(one.difference, bound, alpha=alpha, power=POWER))
            if one.verdict is Verdict.UNDECIDED
            else one
        )
        for one in judged
    ]


def printed(task: str) -> str:
    """A task in print: "Lift" for "fibopolicy/Lift-v0", else its id."""
    suite, _, name = task.partition("/")
    return re.sub(r"-v\d+$", "", name) if suite == "fibopolicy" else task
