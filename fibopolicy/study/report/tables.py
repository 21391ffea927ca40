"""The tables of a study's report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean, geometric_mean, median
from typing import Any

from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.report.page import Cell as TableCell
from fibopolicy.report.page import Link, Marked
from fibopolicy.report.tables import p_value
from fibopolicy.study.records import ConditionRecord, RunRecord, State, Study
from fibopolicy.study.report.answer import MARKS, beside_verdict, to_decide
from fibopolicy.study.report.costs import values
from fibopolicy.study.report.results import CellResult, Compared, Results, Verdict, printed

Table = list[list[TableCell]]
#: Where there is nothing to tell.
NONE = "-"


def success_table(found: Results, setting: tuple[str, str]) -> Table:
    """Encoders against tasks: percent of episodes solved, with the interval; how many
    seeds, where some are missing.
    """
    study = found.study
    several = len(study.tasks) > 1
    table: Table = [["success, %", *map(printed, study.tasks), *["mean"] * several]]
    for encoder in study.encoders:
        cells = [found.cell(task, encoder, setting) for task in study.tasks]
        table.append(
            [
                _named(encoder, study),
                *(_success(one, study) for one in cells),
                *[_mean(cells)] * several,
            ]
        )
    return table


def success_by_head_table(found: Results, task: str | None, init: str) -> Table:
    """Heads against encoders: percent of a task's episodes solved, with the interval;
    without a task the mean over all.
    """
    study = found.study
    table: Table = [["success, %", *(_named(encoder, study) for encoder in study.encoders)]]
    for head in study.heads:
        row: list[TableCell] = [head]
        for encoder in study.encoders:
            cells = [
                found.cell(one, encoder, (head, init)) for one in study.tasks if task in (one, None)
            ]
            row.append(_mean(cells) if task is None else _success(cells[0], study))
        table.append(row)
    return table


def _named(encoder: str, study: Study) -> str:
    return f"{encoder} (control)" if encoder == study.baseline else encoder


def _mean(cells: Sequence[CellResult | None]) -> str:
    """The mean of all tasks' rates, in percent; none before all are there."""
    rates = [one.rate.value for one in cells if one is not None and one.rate is not None]
    return f"{100 * fmean(rates):.1f}" if len(rates) == len(cells) else NONE


def _success(one: CellResult | None, study: Study) -> str:
    if one is None:
        return "not in the study"
    if one.rate is None:
        return one.problem or states(one.cell)
    told = f"{100 * one.rate.value:.1f} [{100 * one.rate.low:.1f}, {100 * one.rate.high:.1f}]"
    if len(one.cell.done) < len(study.seeds):
        told += f", {len(one.cell.done)} of {len(study.seeds)} seeds"
    if one.init_states < study.episodes:
        told += f", {one.init_states} of {study.episodes} initial states"
    return told


def states(cell: ConditionRecord) -> str:
    """How far the runs of a cell are: `1 failed, 2 not started`."""
    counts = Counter(run.state for run in cell.runs)
    if len(counts) == 1:
        return next(iter(counts)).value
    return ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])


def difference_table(comparisons: list[Compared], study: Study) -> Table:
    """Per task and encoder the difference from the control, and what it shows."""
    table: Table = [["", "points", "95 % interval", "p (Holm)", "verdict", "to decide"]]
    subjects = list(
        dict.fromkeys(one.subject for one in sorted(comparisons, key=lambda one: one.task is None))
    )
    for one in sorted(comparisons, key=lambda one: subjects.index(one.subject)):
        d = one.difference
        beside = beside_verdict(one, study)
        table.append(
            [
                f"{one.subject}: {one.candidate}",
                f"{100 * d.value:+.1f}",
                f"[{100 * d.low:+.1f}, {100 * d.high:+.1f}]",
                p_value(one.p),
                Marked(
                    f"{one.verdict.value}, {beside}" if beside else one.verdict.value,
                    MARKS[one.verdict],
                ),
                to_decide(one) if one.verdict is Verdict.UNDECIDED else NONE,
            ]
        )
    return table


def cost_table(study: Study, setting: tuple[str, str]) -> Table:
    """Per encoder its costs: what it has, by task where tasks differ, and medians of
    what was timed, with those of runs from the lowest to the highest; times also as a
    multiple of the control's.
    """
    table: Table = [["encoder", *(title for title, _, _ in _COSTS)]]
    cells = {
        encoder: [c for c in study.conditions if c.encoder == encoder and c.setting == setting]
        for encoder in study.encoders
    }
    for encoder in study.encoders:
        row: list[TableCell] = [encoder]
        for _, name, kind in _COSTS:
            found = values(cells[encoder], name)
            if not found:
                row.append(NONE)
            elif kind == "has":
                shown = (
                    f"{100 * value:.3g} %" if name == "attention_pairs" else _short(value)
                    for value in found
                )
                row.append(" / ".join(dict.fromkeys(shown)))
            else:
                told = _short(median(found))
                if kind == "run" and len(found) > 1:
                    told += f" [{_short(min(found))}, {_short(max(found))}]"
                compared = name in _RELATIVE and encoder != study.baseline
                ratio = _ratio(cells[encoder], cells[study.baseline], name) if compared else None
                row.append(told if ratio is None else f"{told} ({ratio:.2f}x)")
        table.append(row)
    return table


def _ratio(
    cells: Sequence[ConditionRecord], control: Sequence[ConditionRecord], name: str
) -> float | None:
    """How many times the control's on the same task, geometric mean over tasks, since
    one task may take longer than another.
    """
    medians = [
        {cell.task: median(found) for cell in side if (found := values([cell], name))}
        for side in (cells, control)
    ]
    ratios = [
        medians[0][task] / base for task, base in medians[1].items() if task in medians[0] and base
    ]
    return geometric_mean(ratios) if ratios else None


#: Title, field of `Cost`, and whether an encoder has it, or it was timed for an encoder
#: or for a run.
_COSTS = (
    ("parameters", "encoder_parameters", "has"),
    ("MACs", "encoder_macs", "has"),
    ("pairs kept", "attention_pairs", "has"),
    ("ms, batch 1", "encoder_ms_1", "encoder"),
    ("ms, batch 64", "encoder_ms_64", "encoder"),
    ("training samples/s", "samples_per_s", "run"),
    ("peak MB", "peak_mb", "run"),
    ("rollout steps/s", "rollout_steps_per_s", "run"),
)
_RELATIVE = ("encoder_ms_1", "encoder_ms_64", "samples_per_s")


def _short(value: float) -> str:
    """Three figures, with the unit's prefix: 5.53M."""
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= power:
            return f"{value / (1e3 if prefix == 'k' else power):.3g}{prefix}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def run_table(study: Study) -> Table:
    """Every run: how far it is, its own rate, its times, and where it lies."""
    table: Table = [["run", "state", "solved", "step", "training", "evaluation", "video"]]
    for cell in study.conditions:
        for run in cell.runs:
            table.append(
                [_linked(study, cell, run), run.state.value, *_figures(run), _video(study, run)]
            )
    return table


def _video(study: Study, run: RunRecord) -> TableCell:
    """A link to what the evaluation filmed."""
    found = sorted(RunDirectory(run.folder).videos.glob("*.mp4"))
    return Link("episodes", study.link(found[0])) if found else NONE


def _linked(study: Study, cell: ConditionRecord, run: RunRecord) -> TableCell:
    name = f"{printed(cell.task)}, {cell.encoder}, {cell.head}, {cell.init}, seed {run.seed}"
    link = study.link(run.folder)
    return Link(name, link) if link else name


def _figures(run: RunRecord) -> list[str]:
    if run.state is not State.DONE:
        return [NONE] * 4
    ended = [row for row in run.rows if not row.error]
    seconds = [run.costs.get(name) for name in ("train_s", "evaluate_s")]
    return [
        f"{sum(row.success for row in ended)}/{len(ended)}",
        str(run.rows[0].checkpoint_step),
        *(NONE if value is None else f"{value:.0f} s" for value in seconds),
    ]


def head_settings_table(study: Study) -> Table:
    """Per head its gradient steps, and what the study sets of policy and optimiser for
    it; the rest is as by default.
    """
    document = study.document
    own = {one["name"]: one for one in document["heads"]}
    table: Table = [["policy head", "steps", "policy", "optimiser"]]
    for head in study.heads:
        one = own.get(head, {})
        built = one.get("head", head)
        settings = [
            _settings({**(document.get(kind) or {}), **one.get(kind, {})})
            for kind in ("policy", "optimizer")
        ]
        table.append(
            [head if built == head else f"{head} = {built}", str(study.steps[head]), *settings]
        )
    return table


def _settings(options: Mapping[str, Any]) -> str:
    """`horizon 8, min_std 0.05`."""
    told = [
        _settings(value) if isinstance(value, dict) else f"{name} {value}"
        for name, value in options.items()
    ]
    return ", ".join(one for one in told if one != NONE) or NONE


def missing_table(study: Study) -> Table:
    """Every run that does not count, why, and where its log is; only the heading where
    all count.
    """
    table: Table = [["run", "state", "error", "log"]]
    for cell in study.conditions:
        if all(run.state is State.MISSING for run in cell.runs):
            table.append(
                [
                    f"{printed(cell.task)}, {cell.encoder}, {cell.head}, {cell.init}, all seeds",
                    State.MISSING.value,
                    NONE,
                    NONE,
                ]
            )
            continue
        for run in cell.runs:
            if run.state is not State.DONE:
                link = study.link(study.path / run.log) if run.log else ""
                log = Link(run.log, link) if link else run.log or NONE
                table.append([_linked(study, cell, run), run.state.value, run.error or NONE, log])
    return table
