"""A study's numbers as CSV, unrounded: shares in [0, 1], seconds, milliseconds, megabytes."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fibopolicy.statistics.rates import wilson
from fibopolicy.study.records import State
from fibopolicy.study.report.costs import cost
from fibopolicy.study.report.results import Results
from fibopolicy.utils.files import atomic_write

Row = dict[str, object]


def write_cells(found: Results, path: Path) -> None:
    """One line per cell: success over its finished seeds with the interval over seeds
    and initial states, and its costs.
    """
    rows: list[Row] = []
    for one in found.cells:
        cell, rate = one.cell, one.rate
        rows.append(
            {
                "task": cell.task,
                "encoder": cell.encoder,
                "head": cell.head,
                "init": cell.init,
                "seeds_planned": len(cell.runs),
                **{
                    f"seeds_{state.value.replace(' ', '_')}": sum(
                        r.state is state for r in cell.runs
                    )
                    for state in State
                },
                "init_states": one.init_states,
                "episodes": None if rate is None else rate.episodes,
                "successes": None if rate is None else rate.successes,
                "success_rate": None if rate is None else rate.value,
                "low_95": None if rate is None else rate.low,
                "high_95": None if rate is None else rate.high,
                "simulator_errors": one.errors,
                **asdict(cost([cell])),
                "error": next((run.error for run in cell.runs if run.error), one.problem),
            }
        )
    _write(rows, path)


def write_seeds(found: Results, path: Path) -> None:
    """One line per run: its own rate with Wilson's interval, which says how good this
    checkpoint is.
    """
    rows: list[Row] = []
    for cell in found.study.conditions:
        for run in cell.runs:
            ended = [row for row in run.rows if not row.error]
            rate = wilson(sum(row.success for row in ended), len(ended)) if ended else None
            figures = run.costs
            rows.append(
                {
                    "task": cell.task,
                    "encoder": cell.encoder,
                    "head": cell.head,
                    "init": cell.init,
                    "seed": run.seed,
                    "state": run.state.value,
                    "step": run.rows[0].checkpoint_step if run.rows else None,
                    "episodes": None if rate is None else rate.episodes,
                    "successes": None if rate is None else rate.successes,
                    "success_rate": None if rate is None else rate.value,
                    "low_95_wilson": None if rate is None else rate.low,
                    "high_95_wilson": None if rate is None else rate.high,
                    "simulator_errors": len(run.rows) - len(ended),
                    **{name: figures.get(name) for name in _FIGURES},
                    "run": run.folder.relative_to(found.study.path).as_posix(),
                    "error": run.error,
                    "log": run.log,
                }
            )
    _write(rows, path)


_FIGURES = ("train_s", "evaluate_s", "samples_per_s", "peak_mb", "rollout_steps_per_s")


def write_comparisons(found: Results, path: Path) -> None:
    """One line per comparison with the control; p values raw and adjusted by Holm over
    all lines.
    """
    margin = found.study.margin
    rows: list[Row] = []
    for one in found.comparisons:
        d, (control, candidate) = one.difference, one.seeds
        rows.append(
            {
                "task": one.task or "mean over tasks",
                "tasks": " ".join(one.tasks),
                "head": one.head,
                "init": one.init,
                "control": one.control,
                "candidate": one.candidate,
                "control_seeds": control,
                "candidate_seeds": candidate,
                "init_states": one.init_states,
                "difference": d.value,
                "low_95": d.low,
                "high_95": d.high,
                "p": d.p,
                "p_holm": one.p,
                "margin": margin,
                "p_inferior": None if margin is None else d.p_inferior(margin),
                "p_inferior_holm": one.p_inferior,
                "p_within_holm": one.p_within,
                "differs": int(one.differs),
                "verdict": one.verdict.value,
                "seed_share_of_variance": d.seed_share,
                "correlation": one.correlation,
                "needed_seeds": one.needed.seeds if one.needed else None,
                "needed_init_states": one.needed.init_states if one.needed else None,
            }
        )
    _write(rows, path, _COMPARED)


#: Named here, so that a study without a finished pair still has a whole file.
_COMPARED = (
    *(
        "task",
        "tasks",
        "head",
        "init",
        "control",
        "candidate",
        "control_seeds",
        "candidate_seeds",
        "init_states",
    ),
    *(
        "difference",
        "low_95",
        "high_95",
        "p",
        "p_holm",
        "margin",
        "p_inferior",
        "p_inferior_holm",
        "p_within_holm",
    ),
    *(
        "differs",
        "verdict",
        "seed_share_of_variance",
        "correlation",
        "needed_seeds",
        "needed_init_states",
    ),
)


def _write(rows: Sequence[Row], path: Path, columns: Sequence[str] = ()) -> None:
    with atomic_write(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
