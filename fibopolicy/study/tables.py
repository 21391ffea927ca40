"""The tables of a study's report, and its numbers as CSV files."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, geometric_mean, median
from typing import Any

from fibopolicy.report.document import Cell
from fibopolicy.report.tables import counted, interval, p_value, points, points_interval
from fibopolicy.statistics.power import MAX_EPISODES
from fibopolicy.statistics.rates import wilson
from fibopolicy.study.records import (
    DIVERGED,
    ConditionRecord,
    RunRecord,
    State,
    Study,
    final_loss,
)
from fibopolicy.study.results import (
    ENCODER_COSTS,
    RUN_COSTS,
    ConditionResult,
    EncoderComparison,
    StudyResults,
    Verdict,
    measured,
    task_name,
)
from fibopolicy.study.robustness import csv_rows
from fibopolicy.utils.files import atomic_write

Row = Sequence[str | Cell]
#: The content of a cell without a value.
NONE = "-"


def success_table(found: StudyResults, setting: tuple[str, str]) -> list[Row]:
    """Success rate of each encoder (rows) on each task (columns)."""
    study = found.study
    several = len(study.tasks) > 1
    table: list[Row] = [["success, %", *map(task_name, study.tasks), *["mean"] * several]]
    for encoder in study.encoders:
        row = [found.condition(task, encoder, setting) for task in study.tasks]
        rates = [_success(one, study) for one in row]
        table.append([_marked(encoder, study), *rates, *[_mean(row)] * several])
    return table


def success_by_policy_table(found: StudyResults, task: str | None, init: str) -> list[Row]:
    """Success rate of each policy (rows) with each encoder (columns) on a task, or the
    mean over all tasks.
    """
    study = found.study
    table: list[Row] = [["success, %", *(_marked(encoder, study) for encoder in study.encoders)]]
    for policy in study.policies:
        row = [policy]
        for encoder in study.encoders:
            tasks = study.tasks if task is None else (task,)
            cells = [found.condition(one, encoder, (policy, init)) for one in tasks]
            row.append(_mean(cells) if task is None else _success(cells[0], study))
        table.append(row)
    return table


def _marked(encoder: str, study: Study) -> str:
    label = study.label(encoder)
    return f"{label} (baseline)" if encoder == study.baseline else label


def _mean(row: Sequence[ConditionResult]) -> str:
    """The mean rate over tasks, in percent, if all tasks have one."""
    rates = [one.rate.value for one in row if one.rate is not None]
    return f"{100 * fmean(rates):.1f}" if len(rates) == len(row) else NONE


def _success(one: ConditionResult, study: Study) -> str:
    """For example `93.3 [88.1, 96.4], 2 of 3 seeds`."""
    if one.rate is None:
        return one.problem or _progress(one.record)
    text = f"{100 * one.rate.value:.1f} {interval(one.rate)}"
    if len(one.record.done) < len(study.seeds):
        text += f", {len(one.record.done)} of {len(study.seeds)} seeds"
    if one.init_states < study.episodes:
        text += f", {one.init_states} of {study.episodes} initial states"
    return text


def _progress(record: ConditionRecord) -> str:
    """The states of the runs, for example `1 failed, 2 not started`."""
    counts = Counter(run.state for run in record.runs)
    if len(counts) == 1:
        return str(next(iter(counts)).value)
    return ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])


def difference_table(study: Study, comparisons: Sequence[EncoderComparison]) -> list[Row]:
    """The difference of each encoder from the baseline on each task, with the verdict."""
    table: list[Row] = [["", "points", "95 % interval", "p (Holm)", "verdict", "to decide"]]
    for one in by_task(comparisons):
        d, verdict = one.difference, one.verdict
        shown = f"{verdict.value}, {one.direction}" if one.direction else verdict.value
        table.append(
            [
                f"{one.subject}: {study.label(one.candidate)}",
                points(d.value),
                points_interval(d),
                p_value(one.p),
                Cell(shown, mark=verdict.mark),
                _to_decide(one) if verdict is Verdict.UNDECIDED else NONE,
            ]
        )
    return table


def by_task(comparisons: Sequence[EncoderComparison]) -> list[EncoderComparison]:
    """Sorted by task; the means over tasks last."""
    tasks = list(dict.fromkeys(one.task for one in comparisons if one.task is not None))
    return sorted(
        comparisons, key=lambda one: len(tasks) if one.task is None else tasks.index(one.task)
    )


def _to_decide(one: EncoderComparison) -> str:
    """For example `412 episodes: 4 seeds x 103 initial states`."""
    if one.lacks_seeds:
        return "more training seeds: one side has a single one"
    if one.needed is None:
        return f"more than {MAX_EPISODES:,} episodes"
    seeds, init_states = one.needed.seeds, one.needed.init_states
    return (
        f"{seeds * init_states:,} episodes: {counted(seeds, 'seed')} x {init_states} initial states"
    )


#: Title, cost, and its kind: a size of the encoder, or a time of an encoder or a run.
_COSTS = (
    ("parameters", "encoder_parameters", "size"),
    ("MACs", "encoder_macs", "size"),
    ("pairs kept", "attention_pairs", "size"),
    ("ms, batch 1", "encoder_ms_1", "encoder"),
    ("ms, batch 64", "encoder_ms_64", "encoder"),
    ("training samples/s", "samples_per_s", "run"),
    ("peak MB", "peak_mb", "run"),
    ("rollout steps/s", "rollout_steps_per_s", "run"),
)
#: Costs that are also shown as a multiple of the baseline's.
_RELATIVE = ("encoder_ms_1", "encoder_ms_64", "samples_per_s")


def cost_table(study: Study, setting: tuple[str, str]) -> list[Row]:
    """The costs of each encoder: its sizes, for each task if they differ, and medians
    of times, with the range over runs.
    """
    table: list[Row] = [["encoder", *(title for title, _, _ in _COSTS)]]
    conditions = {
        encoder: [c for c in study.conditions if (c.encoder, c.setting) == (encoder, setting)]
        for encoder in study.encoders
    }
    for encoder, records in conditions.items():
        row = [study.label(encoder)]
        for _, name, kind in _COSTS:
            if not (values := measured(records, name)):
                row.append(NONE)
            elif kind == "size":
                shown = (
                    f"{100 * value:.3g} %" if name == "attention_pairs" else _rounded(value)
                    for value in values
                )
                row.append(" / ".join(dict.fromkeys(shown)))
            else:
                text = _rounded(median(values))
                if kind == "run" and len(values) > 1:
                    text += f" [{_rounded(min(values))}, {_rounded(max(values))}]"
                if name in _RELATIVE and encoder != study.baseline:
                    ratio = _ratio(records, conditions[study.baseline], name)
                    text += "" if ratio is None else f" ({ratio:.2f}x)"
                row.append(text)
        table.append(row)
    return table


def _ratio(
    conditions: Sequence[ConditionRecord], baseline: Sequence[ConditionRecord], name: str
) -> float | None:
    """A cost as a multiple of the baseline's on the same task, geometric mean over
    tasks, since one task may take longer than another.
    """
    costs, base = (
        {one.task: median(values) for one in side if (values := measured([one], name))}
        for side in (conditions, baseline)
    )
    ratios = [costs[task] / value for task, value in base.items() if task in costs and value]
    return geometric_mean(ratios) if ratios else None


def _rounded(value: float) -> str:
    """Three digits, with the prefix of a unit: `5.53M`."""
    for limit, scale, prefix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / scale:.3g}{prefix}"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def run_table(study: Study) -> list[Row]:
    """Every run: its state, success and times, with a link to its folder."""
    table: list[Row] = [["run", "state", "solved", "step", "training", "evaluation", "video"]]
    for record in study.conditions:
        for run in record.runs:
            cells = [NONE] * 4
            if run.state is State.DONE:
                ended = [row for row in run.rows if not row.error]
                seconds = [run.costs.get(name) for name in ("train_s", "evaluate_s")]
                cells = [
                    f"{sum(row.success for row in ended)}/{len(ended)}",
                    str(run.rows[0].checkpoint_step),
                    *(NONE if value is None else f"{value:.0f} s" for value in seconds),
                ]
            videos = sorted((run.folder / "videos").glob("*.mp4"))
            video = Cell("episodes", study.link(videos[0])) if videos else NONE
            table.append([_linked(study, record, run), run.state.value, *cells, video])
    return table


def search_table(study: Study) -> list[Row]:
    """What the search chose for each condition, and what it took."""
    titles = ("search", "chosen", "trials", "steps", "episodes", "training", "evaluation")
    table: list[Row] = [titles]
    for one in study.conditions:
        if one.condition.encoder.untuned:
            table.append([_name(one), f"untuned: {one.condition.encoder.untuned}", *[NONE] * 5])
            continue
        done = [trial for trial in one.trials if trial.state is State.DONE]
        totals = {name: _total(done, name) for name in _SEARCH_COSTS}
        table.append(
            [
                _name(one),
                "not yet" if one.chosen is None else options_text(one.chosen),
                f"{len(done)} of {study.planned_trials(one)}",
                *(f"{totals[name]:.0f}" for name in ("steps", "episodes")),
                *(f"{totals[name]:.0f} s" for name in ("train_s", "evaluate_s")),
            ]
        )
    return table


#: What a trial costs, as named in its `done.json`.
_SEARCH_COSTS = ("steps", "episodes", "train_s", "evaluate_s")


def _total(trials: Sequence[RunRecord], name: str) -> float:
    return sum(float(trial.costs.get(name, 0)) for trial in trials)


def trial_table(study: Study) -> list[Row]:
    """Every setting of the search for each condition, with its successes by rung."""
    search = study.config.search
    assert search is not None
    rungs = [f"{100 * share:.3g} % of the steps" for share, _ in search.rungs]
    table: list[Row] = [["trial", "setting", *rungs]]
    for one in study.conditions:
        for number, setting in enumerate(search.settings if one.rungs else ()):
            row: list[str | Cell] = [f"{_name(one)}, {number}", options_text(setting)]
            for rung in one.rungs:
                found = [trial for trial in rung if trial.trial and trial.trial.number == number]
                row.append(_trial_cell(found[0]) if found else NONE)
            if one.chosen == setting:
                row[1] = Cell(f"{options_text(setting)} (chosen)", mark="good")
            table.append([*row, *[NONE] * (len(rungs) + 2 - len(row))])
    return table


def _trial_cell(trial: RunRecord) -> str:
    """For example `4/10, loss 0.0123`."""
    if DIVERGED in trial.costs:
        return DIVERGED
    if trial.state is not State.DONE:
        return str(trial.state.value)
    return f"{trial.successes}/{len(trial.rows)}, loss {final_loss(trial):.3g}"


def missing_table(study: Study) -> list[Row]:
    """Every run that is not done, with its error and log; only the titles if all are."""
    table: list[Row] = [["run", "state", "error", "log"]]
    for record in study.conditions:
        missing = [trial for trial in record.trials if trial.state is not State.MISSING]
        if all(run.state is State.MISSING for run in record.runs):
            table.append([f"{_name(record)}, all seeds", State.MISSING.value, NONE, NONE])
        else:
            missing += record.runs
        for run in missing:
            if run.state is not State.DONE:
                href = study.link(study.path / run.log) if run.log else ""
                cells = [run.state.value, run.error or NONE, Cell(run.log or NONE, href)]
                table.append([_linked(study, record, run), *cells])
    return table


def _linked(study: Study, record: ConditionRecord, run: RunRecord) -> Cell:
    which = f"seed {run.seed}"
    if run.trial is not None:
        which = f"trial {run.trial.number} of rung {run.trial.rung}"
    return Cell(f"{_name(record)}, {which}", study.link(run.folder))


def _name(record: ConditionRecord) -> str:
    return f"{task_name(record.task)}, {record.encoder}, {record.policy}, {record.init}"


def policy_settings_table(study: Study) -> list[Row]:
    """The gradient steps of each policy, and the options that the study sets."""
    document = study.document
    policies = {one["name"]: one for one in document["policies"]}
    table: list[Row] = [["policy", "steps", "settings", "optimizer"]]
    for name in study.policies:
        policy = policies[name]
        options = [
            options_text({**document[kind], **policy[kind]})
            for kind in ("policy_config", "optimizer")
        ]
        title = name if name == policy["policy"] else f"{name} = {policy['policy']}"
        table.append([title, steps_text(study, name), *options])
    return table


def steps_text(study: Study, policy: str) -> str:
    """The gradient steps of a policy's runs; a range if a search has chosen different
    ones.
    """
    steps = sorted({one.steps for one in study.conditions if one.policy == policy})
    return f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"


def options_text(options: Mapping[str, Any]) -> str:
    """For example `horizon 8, min_std 0.05`."""
    parts = [
        options_text(value) if isinstance(value, dict) else f"{name} {value}"
        for name, value in options.items()
    ]
    return ", ".join(part for part in parts if part != NONE) or NONE


def write_csv(found: StudyResults, folder: Path) -> None:
    """Write `conditions.csv`, `seeds.csv`, `comparisons.csv`, for a search `trials.csv`
    and with perturbations `robustness.csv`, unrounded: shares in [0, 1], seconds,
    milliseconds, megabytes.
    """
    _write(folder / "conditions.csv", [_condition_row(one) for one in found.conditions])
    seeds = [
        _seed_row(found.study, record, run)
        for record in found.study.conditions
        for run in record.runs
    ]
    _write(folder / "seeds.csv", seeds)
    if found.study.config.search is not None:
        trials = [
            _trial_row(found.study, record, trial)
            for record in found.study.conditions
            for trial in record.trials
        ]
        _write(folder / "trials.csv", trials)
    if robust := csv_rows(found):
        _write(folder / "robustness.csv", robust)
    comparisons = [_comparison_row(one, found.study.margin) for one in found.comparisons]
    _write(folder / "comparisons.csv", comparisons, _COMPARISON_COLUMNS)


def _condition_row(one: ConditionResult) -> dict[str, object]:
    """Success over the finished seeds, and medians of costs."""
    record, rate = one.record, one.rate
    states = Counter(run.state for run in record.runs)
    costs = {name: measured([record], name) for name in (*ENCODER_COSTS, *RUN_COSTS)}
    return {
        **_axes(record),
        "seeds_planned": len(record.runs),
        **{f"seeds_{state.value.replace(' ', '_')}": states[state] for state in State},
        "init_states": one.init_states,
        "episodes": rate and rate.episodes,
        "successes": rate and rate.successes,
        "success_rate": rate and rate.value,
        "low_95": rate and rate.low,
        "high_95": rate and rate.high,
        "simulator_errors": one.errors,
        **{name: median(values) if values else None for name, values in costs.items()},
        "error": next((run.error for run in record.runs if run.error), one.problem),
    }


def _seed_row(study: Study, record: ConditionRecord, run: RunRecord) -> dict[str, object]:
    """Success of one checkpoint, with Wilson's interval."""
    ended = [row for row in run.rows if not row.error]
    rate = wilson(sum(row.success for row in ended), len(ended)) if ended else None
    return {
        **_axes(record),
        "seed": run.seed,
        "state": run.state.value,
        "step": run.rows[0].checkpoint_step if run.rows else None,
        "episodes": rate and rate.episodes,
        "successes": rate and rate.successes,
        "success_rate": rate and rate.value,
        "low_95_wilson": rate and rate.low,
        "high_95_wilson": rate and rate.high,
        "simulator_errors": len(run.rows) - len(ended),
        **{name: run.costs.get(name) for name in RUN_COSTS},
        "run": run.folder.relative_to(study.path).as_posix(),
        "error": run.error,
        "log": run.log,
    }


def _trial_row(study: Study, record: ConditionRecord, trial: RunRecord) -> dict[str, object]:
    """A trial: its setting, and successes and loss by which the search chooses."""
    search = study.config.search
    assert search is not None
    assert trial.trial is not None
    setting = search.settings[trial.trial.number]
    done = trial.state is State.DONE
    return {
        **_axes(record),
        "rung": trial.trial.rung,
        "trial": trial.trial.number,
        **{f"setting_{name}": setting.get(name) for name in search.searched},
        "state": DIVERGED if DIVERGED in trial.costs else trial.state.value,
        "seed": trial.seed,
        "init_seed": search.init_seed,
        "successes": trial.successes if done else None,
        "loss": final_loss(trial) if done else None,
        **{name: trial.costs.get(name) for name in _SEARCH_COSTS},
        "chosen": int(record.chosen == setting),
        "run": trial.folder.relative_to(study.path).as_posix(),
        "error": trial.error,
    }


def _axes(record: ConditionRecord) -> dict[str, object]:
    return {name: getattr(record, name) for name in ("task", "encoder", "policy", "init")}


def _comparison_row(one: EncoderComparison, margin: float | None) -> dict[str, object]:
    """p values are raw, and adjusted by Holm for all rows of the file."""
    d, (baseline_seeds, candidate_seeds) = one.difference, one.seeds
    values = (
        *(one.task or "mean over tasks", " ".join(one.tasks), one.policy, one.init),
        *(one.baseline, one.candidate, baseline_seeds, candidate_seeds, one.init_states),
        *(d.value, d.low, d.high, d.p, one.p),
        *(margin, None if margin is None else d.p_inferior(margin), one.p_inferior, one.p_within),
        *(int(one.differs), one.verdict.value, d.seed_share, one.correlation),
        *(one.needed and one.needed.seeds, one.needed and one.needed.init_states),
    )
    return dict(zip(_COMPARISON_COLUMNS, values, strict=True))


#: Columns of `comparisons.csv`, which has no rows if no pair of conditions is finished.
_COMPARISON_COLUMNS = (
    *("task", "tasks", "policy", "init", "baseline", "candidate"),
    *("baseline_seeds", "candidate_seeds", "init_states"),
    *("difference", "low_95", "high_95", "p", "p_holm"),
    *("margin", "p_inferior", "p_inferior_holm", "p_within_holm"),
    *("differs", "verdict", "seed_share_of_variance", "correlation"),
    *("needed_seeds", "needed_init_states"),
)


def _write(path: Path, rows: Sequence[Mapping[str, object]], columns: Sequence[str] = ()) -> None:
    with atomic_write(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
