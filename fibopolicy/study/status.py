"""`fibopolicy study status`: the state of every run, and the time that is left."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import fmean

from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.directory import LOCK
from fibopolicy.study.grid import Run
from fibopolicy.study.records import ConditionRecord, RunRecord, State, Study
from fibopolicy.study.tables import options_text
from fibopolicy.utils.files import is_locked


def status(study: Study) -> str:
    """A line per condition with a column per seed, then the errors, then a summary."""
    search = study.config.search
    table = [["", *["search"] * bool(search), *(f"seed {seed}" for seed in study.seeds)]]
    for one in study.conditions:
        cells = [_search(study, one)] if search else []
        cells += [_state(study, one, run) for run in one.runs]
        table.append([one.condition.name, *cells])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        padded = (f"{text:<{width}}" for text, width in zip(row, widths, strict=True))
        lines.append("  ".join(padded).rstrip())
    for one in study.conditions:
        for run in (*one.trials, *one.runs):
            if run.error:
                attempt = f" (attempt {run.attempts})" if run.attempts else ""
                log = f"; log {study.path / run.log}" if run.log else ""
                name = Run(one.condition, run.seed, run.trial).name
                lines.append(f"{run.state.value} {name}{attempt}: {run.error}{log}")
    counts = Counter(run.state for one in study.conditions for run in one.runs)
    summary = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    runner = "a runner is" if is_locked(study.path / LOCK) else "no runner is"
    if search:
        trials = [trial for one in study.conditions for trial in one.trials]
        done = sum(trial.state is State.DONE for trial in trials)
        planned = sum(map(study.planned_trials, study.conditions))
        lines.append(f"{planned} trials: {done} done")
    lines.append(f"{counts.total()} runs: {summary}; {runner} active")
    if seconds := seconds_left(study, 1):
        lines.append(
            f"about {duration(seconds)} left, one run at a time, estimated from the finished runs"
        )
    return "\n".join(lines)


def _search(study: Study, one: ConditionRecord) -> str:
    """The choice of the search, or its progress."""
    if one.condition.encoder.untuned:
        return "untuned"
    if one.chosen is not None:
        return options_text(one.chosen)
    done = sum(trial.state is State.DONE for trial in one.trials)
    return f"{done}/{study.planned_trials(one)} trials"


def _state(study: Study, one: ConditionRecord, run: RunRecord) -> str:
    if run.state is State.DONE:
        return f"{run.successes}/{len(run.rows)} successes"
    if run.state in (State.RUNNING, State.UNFINISHED):
        step, episodes = _progress(run)
        if episodes:
            return f"{run.state.value}, {episodes}/{_episodes(study)} episodes"
        if step:
            return f"{run.state.value}, step {step}/{one.steps}"
    return str(run.state.value)


def _progress(run: RunRecord) -> tuple[int, int]:
    """Gradient steps logged, and episodes recorded."""
    metrics, rows = RunDirectory(run.folder).read_metrics(), RunDirectory(run.folder).episodes
    episodes = rows.read_text(encoding="utf-8").count("\n") if rows.exists() else 0
    return int(metrics[-1]["step"]) + 1 if metrics else 0, episodes


def seconds_left(study: Study, slots: int) -> float:
    """Estimated seconds until all trials and runs are done; 0 before the first is done.

    A gradient step and an episode are expected to take as long as in what is finished
    of its condition, or else of its task and policy, or else of the study. The progress
    of a run counts.

    Args:
        slots: number of runs at a time.
    """
    left = []
    for one in study.conditions:
        if not (finished := _similar(study, one)):
            return 0.0
        step_s = fmean(run.costs["train_s"] / run.costs["steps"] for run in finished)
        episode_s = fmean(run.costs["evaluate_s"] / run.costs["episodes"] for run in finished)
        for run, steps, episodes in _planned(study, one):
            if run is None:
                left.append(steps * step_s + episodes * episode_s)
            elif run.state is not State.DONE:
                step, ended = _progress(run)
                to_train, to_evaluate = max(steps - step, 0), max(episodes - ended, 0)
                left.append(to_train * step_s + to_evaluate * episode_s)
    return max(sum(left) / slots, max(left, default=0.0))


def _planned(study: Study, one: ConditionRecord) -> Iterator[tuple[RunRecord | None, int, int]]:
    """Every run of a condition with its steps and episodes, and while its search is not
    over every trial; `None` for a trial whose setting is not known yet.
    """
    search = study.config.search
    if search is not None and one.rungs and one.chosen is None:
        for rung, (share, episodes) in enumerate(search.rungs):
            known = one.rungs[rung] if rung < len(one.rungs) else ()
            for trial in known:
                run = Run(one.condition, trial.seed, trial.trial)
                yield trial, study.directory.steps(run), episodes
            for _ in range(search.sizes[rung] - len(known)):
                yield None, round(share * one.steps), episodes
    for record in one.runs:
        yield record, one.steps, _episodes(study)


def _episodes(study: Study) -> int:
    """Episodes of a run: without and with each perturbation."""
    return study.episodes * (1 + len(study.config.perturbations))


def _similar(study: Study, one: ConditionRecord) -> list[RunRecord]:
    """The finished runs, or else trials, that are most like those of a condition."""
    same_task = [c for c in study.conditions if (c.task, c.policy) == (one.task, one.policy)]
    for group in ([one], same_task, study.conditions):
        for kind in ("runs", "trials"):
            every = [run for condition in group for run in getattr(condition, kind)]
            if runs := [run for run in every if run.rows]:
                return runs
    return []


def duration(seconds: float) -> str:
    """ "35 s", "12 min" or "3 h 20 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
