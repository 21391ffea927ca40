"""The success of a study's encoders with its perturbations, paired with the clean rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fibopolicy.report.tables import points, points_interval
from fibopolicy.statistics.compare import ALPHA
from fibopolicy.statistics.differences import Change, Difference
from fibopolicy.study.records import ConditionRecord, Study
from fibopolicy.study.results import StudyResults, task_name

#: Names of the rows without perturbation, and of their mean over all perturbations.
CLEAN, MEAN = "clean", "mean of all"


@dataclass(frozen=True)
class Robustness:
    """The outcomes of an encoder's finished runs on one task.

    Args:
        record: the condition.
        outcomes: success `(S, n)` of S training seeds on the n initial states without a
            simulator error, by perturbation with its level; `CLEAN` without one.
    """

    record: ConditionRecord
    outcomes: Mapping[str, NDArray[np.float64]]

    def change(self, name: str) -> Change:
        """Of a perturbation at a level, of the mean over its levels, or of `MEAN`."""
        return Change(self.mean(name) - self.outcomes[CLEAN])

    def mean(self, name: str) -> NDArray[np.float64]:
        """Mean success `(S, n)` over the perturbations that a name includes."""
        if name in self.outcomes:
            return self.outcomes[name]
        of_name = [
            value
            for each, value in self.outcomes.items()
            if each != CLEAN and name in (MEAN, each.partition(":")[0])
        ]
        return np.asarray(np.mean(of_name, axis=0))


def robustness(found: StudyResults, task: str, setting: tuple[str, str]) -> list[Robustness]:
    """Every encoder with finished runs that count on a task with a policy and init, in
    the study's order. Initial states with a simulator error in any run are left out.
    """
    study = found.study
    records = [
        one.record
        for one in found.conditions
        if (one.record.task, one.record.setting) == (task, setting) and one.record.done
    ]
    rows = [{CLEAN: run.rows, **run.perturbed} for record in records for run in record.done]
    shared = {row.init_state for row in rows[0][CLEAN]} if rows else set()
    for of_run in rows:
        for each in of_run.values():
            shared &= {row.init_state for row in each if not row.error}
    robust = []
    for record in records if len(shared) > 1 else ():
        outcomes = {}
        for name in (CLEAN, *study.config.perturbations):
            by_run = [run.rows if name == CLEAN else run.perturbed[name] for run in record.done]
            solved = [{row.init_state: row.success for row in each} for each in by_run]
            outcomes[name] = np.array(
                [[each[state] for state in sorted(shared)] for each in solved], dtype=float
            )
        robust.append(Robustness(record, outcomes))
    return robust


def names(study: Study) -> list[str]:
    """The perturbations without their levels."""
    return list(dict.fromkeys(one.partition(":")[0] for one in study.config.perturbations))


def by_level(study: Study, found: list[Robustness]) -> dict[str, dict[str, dict[int, float]]]:
    """Mean success in [0, 1] by perturbation, encoder and level; level 0 is clean."""
    return {
        name: {
            study.label(one.record.encoder): {
                0: float(one.mean(CLEAN).mean()),
                **{
                    int(each.partition(":")[2]): float(one.mean(each).mean())
                    for each in study.config.perturbations
                    if each.partition(":")[0] == name
                },
            }
            for one in found
        }
        for name in names(study)
    }


def level_table(study: Study, found: list[Robustness]) -> list[list[str]]:
    """Success of each encoder (columns) at each level of each perturbation (rows), in
    percent, and the change of their mean from the clean rate.
    """
    table = [["success, %", *(study.label(one.record.encoder) for one in found)]]
    table.append([CLEAN, *(f"{100 * one.outcomes[CLEAN].mean():.1f}" for one in found)])
    for name in [*names(study), MEAN]:
        levels = [one for one in study.config.perturbations if one.partition(":")[0] == name]
        title = f"{name} {', '.join(one.partition(':')[2] for one in levels)}".strip()
        row = [title]
        for one in found:
            shown = levels or [MEAN]
            rates = " / ".join(f"{100 * one.mean(each).mean():.1f}" for each in shown)
            change = one.change(name)
            row.append(f"{rates} ({points(change.value)} {_interval(change)})")
        table.append(row)
    return table


def ranking_table(study: Study, found: list[Robustness]) -> list[list[str]]:
    """Encoders by their mean success over all perturbations, best first, with the
    difference from the baseline, and whether some other encoder is shown to be better.
    """
    titles = ["encoder", "mean, %", "change from clean", f"minus {study.baseline}", "rank"]
    table = [titles]
    means = {one.record.encoder: one.mean(MEAN) for one in found}
    ordered = sorted(found, key=lambda one: -float(means[one.record.encoder].mean()))
    for one in ordered:
        encoder = one.record.encoder
        others = [other for other in means if other != encoder]
        better = [other for other in others if _worse(means[encoder], means[other], len(others))]
        worse = [other for other in others if _worse(means[other], means[encoder], len(others))]
        low, high = 1 + len(better), len(means) - len(worse)
        single = any(len(mean) == 1 for mean in means.values())
        against = "-"
        if encoder != study.baseline and study.baseline in means:
            difference = _difference(means[study.baseline], means[encoder])
            against = f"{points(difference.value)} {points_interval(difference)}"
        change = one.change(MEAN)
        table.append(
            [
                study.label(encoder),
                f"{100 * means[encoder].mean():.1f}",
                f"{points(change.value)} {_interval(change)}",
                against,
                "-" if single else f"{low}" if low == high else f"{low} to {high}",
            ]
        )
    return table


def csv_rows(found: StudyResults) -> list[dict[str, object]]:
    """A row for each encoder and perturbation at a level, unrounded."""
    study = found.study
    rows: list[dict[str, object]] = []
    for task in study.tasks:
        for setting in study.settings:
            for one in robustness(found, task, setting):
                for name in study.config.perturbations:
                    change, outcomes = one.change(name), one.outcomes[name]
                    rows.append(
                        {
                            "task": task,
                            "encoder": one.record.encoder,
                            "policy": setting[0],
                            "init": setting[1],
                            "perturbation": name.partition(":")[0],
                            "level": name.partition(":")[2],
                            "seeds": len(outcomes),
                            "init_states": outcomes.shape[1],
                            "success_rate": float(outcomes.mean()),
                            "clean_rate": float(one.outcomes[CLEAN].mean()),
                            "change": change.value,
                            "low_95": change.low,
                            "high_95": change.high,
                        }
                    )
    return rows


def title(study: Study, task: str, setting: tuple[str, str]) -> str:
    """For example `Lift`, with policy and init if there are several."""
    parts = [task_name(task), *(setting if len(study.settings) > 1 else ())]
    return ", ".join(parts)


def _worse(a: NDArray[np.float64], b: NDArray[np.float64], comparisons: int) -> bool:
    """Whether a's mean is shown to be lower than b's, at a two-sided level of 5 %, by
    Bonferroni divided by the number of comparisons.
    """
    return _difference(b, a, 1 - ALPHA / comparisons).high < 0


def _difference(
    a: NDArray[np.float64], b: NDArray[np.float64], confidence: float = 0.95
) -> Difference:
    """Of mean successes, whose interval has the same formula as that of single ones."""
    return Difference(a, b, confidence)  # type: ignore[arg-type]


def _interval(change: Change) -> str:
    return f"[{points(change.low)}, {points(change.high)}]"
