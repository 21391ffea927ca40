"""The numbers of a study: a success rate for each condition, the difference of each
encoder from the baseline with a verdict, and costs.

    from pathlib import Path
    from fibopolicy.study.records import read_study
    from fibopolicy.study.results import results

    for one in results(read_study(Path("studies/encoders"))).comparisons:
        print(one.subject, one.candidate, one.difference.value, one.p, one.verdict)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from fibopolicy.errors import UserError
from fibopolicy.report.tables import counted
from fibopolicy.statistics.compare import ALPHA, Comparison, Method, compare
from fibopolicy.statistics.differences import Difference, Estimate, MeanDifference, holm
from fibopolicy.statistics.power import POWER, SampleSize, sample_size
from fibopolicy.statistics.rates import Rate
from fibopolicy.statistics.sequential import LookPlan
from fibopolicy.study.records import ConditionRecord, Study

#: Costs of an encoder, and costs of a run.
ENCODER_COSTS = (
    "parameters",  # of the policy
    "encoder_parameters",
    "encoder_macs",  # multiply-accumulates of one forward pass of one frame
    "attention_pairs",  # share of token pairs that attention keeps, in [0, 1]
    "encoder_ms_1",  # forward pass of a batch of 1, milliseconds
    "encoder_ms_64",  # of a batch of 64
)
RUN_COSTS = (
    "samples_per_s",  # windows trained on per second
    "peak_mb",  # memory of the process
    "rollout_steps_per_s",  # control steps of evaluation per second
    "train_s",
    "evaluate_s",
)


@dataclass(frozen=True)
class ConditionResult:
    """The success of a condition.

    Args:
        record: the condition.
        method: its finished runs; `None` if there are none.
        rate: on the initial states that all finished runs have without a simulator
            error, with the interval over training seeds and initial states.
        init_states: number of these initial states.
        problem: why there is no rate although runs are finished; empty otherwise.
    """

    record: ConditionRecord
    method: Method | None = None
    rate: Rate | None = None
    init_states: int = 0
    problem: str = ""

    @property
    def errors(self) -> int:
        """Number of episodes that ended in a simulator error."""
        return 0 if self.method is None else self.method.errors


class Verdict(Enum):
    """The result of a comparison with the baseline, after Holm's correction for all
    comparisons of the study.
    """

    NOT_INFERIOR = "not inferior"
    INFERIOR = "inferior"
    UNDECIDED = "undecided"
    UNTESTABLE = "untestable"

    @property
    def mark(self) -> str:
        """How a page marks it: "good", "bad" or "open"."""
        return {"not inferior": "good", "inferior": "bad"}.get(self.value, "open")


@dataclass(frozen=True)
class EncoderComparison:
    """An encoder compared with the baseline: same task, policy, init and initial
    states.

    Args:
        task: `None` for the mean over several.
        policy, init: policy and init of both sides.
        baseline, candidate: names of the encoders.
        difference: candidate minus baseline, in shares of episodes.
        pairs: for each task the comparison on the same initial states.
        p: p value of no difference, adjusted by Holm for all comparisons of the study.
        p_inferior: p value of being worse by the margin or more, adjusted in the same
            way; `None` without a margin.
        p_within: p value of being worse by at most the margin, or better, adjusted in
            the same way.
        testable: whether the baseline solves more than the margin on every task. If
            not, nothing can be worse by the margin there, and a mean would hide losses
            on other tasks.
        needed: the size of a study that would decide, if the true difference is the one
            found; `None` if it is decided or out of reach.
        candidate_leads: whether the candidate is the better one if `p` is small; with
            looks, at the look that gave `p`.
    """

    task: str | None
    policy: str
    init: str
    baseline: str
    candidate: str
    difference: Estimate
    pairs: tuple[Comparison, ...]
    p: float = 1.0
    p_inferior: float | None = None
    p_within: float | None = None
    testable: bool = True
    needed: SampleSize | None = None
    candidate_leads: bool = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that count."""
        return tuple(pair.task for pair in self.pairs)

    @property
    def setting(self) -> tuple[str, str]:
        return self.policy, self.init

    @property
    def key(self) -> tuple[str | None, str, str, str]:
        """Identifies the comparison at every look."""
        return self.task, self.candidate, *self.setting

    @property
    def subject(self) -> str:
        """The task in print."""
        return f"mean of {len(self.pairs)} tasks" if self.task is None else task_name(self.task)

    @property
    def lacks_seeds(self) -> bool:
        """Whether one side has a single training seed on some task and the other several:
        the variance between the seeds of the single one would count as 0.
        """
        sides = [[len(method.runs) for method in pair.methods] for pair in self.pairs]
        return any(min(seeds) == 1 < max(seeds) for seeds in sides)

    @property
    def differs(self) -> bool:
        return self.p <= ALPHA and not self.lacks_seeds

    @property
    def verdict(self) -> Verdict:
        """The verdict with regard to the margin. Without a margin: not inferior means
        better, and inferior means worse.
        """
        if self.lacks_seeds:
            return Verdict.UNDECIDED
        better = self.differs and self.candidate_leads
        if self.p_inferior is None or self.p_within is None:
            if not self.differs:
                return Verdict.UNDECIDED
            return Verdict.NOT_INFERIOR if better else Verdict.INFERIOR
        if self.p_inferior <= ALPHA / 2 and (self.testable or better):
            return Verdict.NOT_INFERIOR
        if not self.testable:
            return Verdict.UNTESTABLE
        return Verdict.INFERIOR if self.p_within <= ALPHA / 2 else Verdict.UNDECIDED

    @property
    def direction(self) -> str:
        """ "better" or "worse", if that is shown and the verdict does not say it."""
        if not self.differs or self.p_inferior is None or self.verdict is Verdict.INFERIOR:
            return ""
        return "better" if self.candidate_leads else "worse"

    @property
    def seeds(self) -> tuple[int, int]:
        """Training seeds of baseline and candidate, of the task with the fewest."""
        baseline, candidate = (
            min(len(pair.methods[i].runs) for pair in self.pairs) for i in (0, 1)
        )
        return baseline, candidate

    @property
    def init_states(self) -> int:
        """Shared initial states without simulator errors, of the task with the fewest."""
        return min(len(pair.init_states) for pair in self.pairs)

    @property
    def correlation(self) -> float:
        """Mean over tasks of `Comparison.correlation`."""
        return sum(pair.correlation for pair in self.pairs) / len(self.pairs)


@dataclass(frozen=True)
class StudyResults:
    """All numbers of a study.

    Args:
        conditions: in the order of the study.
        comparisons: every encoder but the baseline, for each policy and init: task by
            task, then the mean over tasks.
        unpaired: why other comparisons could not be made, in one line each.
        looks: how many of the study's planned looks are complete.
    """

    study: Study
    conditions: tuple[ConditionResult, ...]
    comparisons: tuple[EncoderComparison, ...]
    unpaired: tuple[str, ...]
    looks: int = 0

    @property
    def decided(self) -> bool:
        """Whether every comparison has a verdict that further seeds do not change."""
        return bool(self.comparisons) and not any(
            one.verdict in (Verdict.UNDECIDED, Verdict.UNTESTABLE) for one in self.comparisons
        )

    def condition(self, task: str, encoder: str, setting: tuple[str, str]) -> ConditionResult:
        for one in self.conditions:
            record = one.record
            if (record.task, record.encoder, record.setting) == (task, encoder, setting):
                return one
        raise KeyError((task, encoder, setting))

    def of(self, setting: tuple[str, str]) -> list[EncoderComparison]:
        """The comparisons of a policy and init."""
        return [one for one in self.comparisons if one.setting == setting]


def results(study: Study) -> StudyResults:
    """Compute all numbers of a study from the rows of its finished runs.

    Holm's correction counts all comparisons that could be made, the means over tasks
    included, separately for differences, for non-inferiority and for inferiority.

    A study with looks is read as it was at its last complete look: only the training
    seeds up to there count. Before the first look, nothing is compared.

    Raises:
        UserError: two training seeds of a condition hold the same weights.
    """
    if (plan := study.config.look_plan) is None:
        found = _uncorrected(study, None)
        return replace(found, comparisons=_corrected([found.comparisons], study.margin, None))
    looks = [
        _uncorrected(study, seeds, 1 - plan.nominal(look))
        for look, seeds in enumerate(study.config.looks)
        if all(len(one.at(seeds).done) == seeds for one in study.conditions)
    ]
    if not looks:
        first = f"verdicts are read after {study.config.looks[0]} training seeds of every condition"
        return replace(_uncorrected(study, None), comparisons=(), unpaired=(first,))
    comparisons = _corrected([found.comparisons for found in looks], study.margin, plan)
    return replace(looks[-1], comparisons=comparisons, looks=len(looks))


def _uncorrected(study: Study, seeds: int | None, confidence: float = 0.95) -> StudyResults:
    """The results from the first training seeds of every condition, or from all
    finished ones, with uncorrected comparisons.
    """
    conditions = [one if seeds is None else one.at(seeds) for one in study.conditions]
    found = StudyResults(study, tuple(map(_condition_result, conditions)), (), ())
    comparisons: list[EncoderComparison] = []
    unpaired: list[str] = []
    for setting in study.settings:
        for candidate in study.encoders:
            if candidate == study.baseline:
                continue
            pairs: dict[str, Comparison] = {}
            for task in study.tasks:
                sides = [found.condition(task, e, setting) for e in (study.baseline, candidate)]
                methods = [
                    one.method for one in sides if one.method is not None and one.rate is not None
                ]
                if len(methods) < 2:
                    continue
                try:
                    pairs[task] = compare(methods, confidence=confidence)
                except UserError as error:
                    where = f"{task_name(task)}, {', '.join(setting)}"
                    unpaired.append(f"{candidate} against {study.baseline} on {where}: {error}")
            comparisons += _comparisons(pairs, setting, study.baseline, candidate)
    return replace(found, comparisons=tuple(comparisons), unpaired=tuple(unpaired))


def _condition_result(record: ConditionRecord) -> ConditionResult:
    if not record.done:
        return ConditionResult(record)
    method = Method(
        record.encoder,
        tuple(run.folder for run in record.done),
        tuple(run.rows for run in record.done),
    )
    try:
        found = compare([method])
    except UserError:
        seeds = counted(len(record.done), "seed")
        problem = f"fewer than two initial states without simulator errors in {seeds}"
        return ConditionResult(record, method, problem=problem)
    return ConditionResult(record, method, found.rates[0], len(found.init_states))


def _comparisons(
    pairs: dict[str, Comparison], setting: tuple[str, str], baseline: str, candidate: str
) -> list[EncoderComparison]:
    """The comparisons of an encoder: task by task, and their mean if there are several."""
    differences: list[Difference] = [pair.candidates[0].difference for pair in pairs.values()]
    found = [
        EncoderComparison(task, *setting, baseline, candidate, difference, (pairs[task],))
        for task, difference in zip(pairs, differences, strict=True)
    ]
    if len(found) > 1:
        mean = MeanDifference(tuple(differences), differences[0].confidence)
        every = tuple(pairs.values())
        found.append(EncoderComparison(None, *setting, baseline, candidate, mean, every))
    return found


def _corrected(
    looks: Sequence[Sequence[EncoderComparison]], margin: float | None, plan: LookPlan | None
) -> tuple[EncoderComparison, ...]:
    """The comparisons of the last look with their corrected p values, and the sizes
    that would decide.

    Args:
        looks: the comparisons of every look so far; of the only one without a plan.
    """
    at_look = [{one.key: one for one in comparisons} for comparisons in looks]

    def one_sided(p_value: Callable[[Estimate], float]) -> list[float]:
        found = []
        for one in looks[-1]:
            # One that could not be made at an earlier look decided nothing there.
            seen = [look.get(one.key) for look in at_look]
            p = [1.0 if each is None else p_value(each.difference) for each in seen]
            found.append(p[0] if plan is None else plan.p([min(1.0, 2 * each) for each in p]) / 2)
        return found

    found = list(looks[-1])
    not_better, not_worse = one_sided(_p_not_better), one_sided(lambda d: 1 - _p_not_better(d))
    smaller = [2 * min(sides) for sides in zip(not_better, not_worse, strict=True)]
    for i, p in enumerate(holm(smaller)):
        found[i] = replace(found[i], p=p, candidate_leads=not_better[i] < not_worse[i])
    if margin is not None:
        inferior = holm(one_sided(lambda difference: difference.p_inferior(margin)))
        within = holm(one_sided(lambda difference: 1 - difference.p_inferior(margin)))
        found = [
            replace(
                one,
                p_inferior=inferior[i],
                p_within=within[i],
                testable=min(pair.rates[0].value for pair in one.pairs) > margin,
            )
            for i, one in enumerate(found)
        ]
    bound, alpha = (0.0 if margin is None else -margin), ALPHA / 2 / max(1, len(found))
    return tuple(
        replace(one, needed=sample_size(one.difference, bound, alpha=alpha, power=POWER))
        if one.verdict is Verdict.UNDECIDED and not one.lacks_seeds
        else one
        for one in found
    )


def _p_not_better(difference: Estimate) -> float:
    """One-sided p value of the candidate being no better than the baseline."""
    return difference.p / 2 if difference.value > 0 else 1 - difference.p / 2


def task_name(task: str) -> str:
    """A task in print: "Lift" for "fibopolicy/Lift-v0"; other tasks by their id."""
    suite, _, name = task.partition("/")
    return re.sub(r"-v\d+$", "", name) if suite == "fibopolicy" else task


def measured(conditions: Iterable[ConditionRecord], name: str) -> list[float]:
    """The values of a cost, one for each condition (`ENCODER_COSTS`) or for each
    finished run (`RUN_COSTS`), where it was measured.
    """
    found: list[object] = []
    for one in conditions:
        if name in RUN_COSTS:
            found += [run.costs.get(name) for run in one.done]
        elif "_ms_" in name:
            timed = one.cost.get(name.replace("_ms_", "_ms_batch_"))
            found.append(timed.get("median") if isinstance(timed, dict) else None)
        else:
            found.append(one.cost.get(name))
    return [float(value) for value in found if isinstance(value, int | float)]
