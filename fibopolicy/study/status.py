"""`fibopolicy study status`: the state of every run, and the time that is left."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.directory import LOCK
from fibopolicy.study.records import ConditionRecord, RunRecord, State, Study
from fibopolicy.utils.files import is_locked


def status(study: Study) -> str:
    """A line per condition with a column per seed, then the errors, then a summary."""
    table = [["", *(f"seed {seed}" for seed in study.seeds)]]
    for one in study.conditions:
        table.append([one.condition.name, *(_state(study, one, run) for run in one.runs)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = (f"{text:<{width}}" for text, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
    for one in study.conditions:
        for run in one.runs:
            if run.error:
                attempt = f" (attempt {run.attempts})" if run.attempts else ""
                log = f"; log {study.path / run.log}" if run.log else ""
                name = f"{one.condition.name}/seed{run.seed}"
                lines.append(f"{run.state.value} {name}{attempt}: {run.error}{log}")
    counts = Counter(run.state for one in study.conditions for run in one.runs)
    summary = ", ".join(f"{counts[state]} {state.value}" for state in State if counts[state])
    runner = "a runner is" if is_locked(study.path / LOCK) else "no runner is"
    lines.append(f"{counts.total()} runs: {summary}; {runner} active")
    if seconds := seconds_left(study, 1):
        lines.append(
            f"about {duration(seconds)} left, one run at a time, estimated from the finished runs"
        )
    return "\n".join(lines)


def _state(study: Study, one: ConditionRecord, run: RunRecord) -> str:
    if run.state is State.DONE:
        return f"{sum(row.success for row in run.rows)}/{len(run.rows)} successes"
    if run.state in (State.RUNNING, State.UNFINISHED):
        step, episodes = _progress(run)
        if episodes:
            return f"{run.state.value}, {episodes}/{study.episodes} episodes"
        if step:
            return f"{run.state.value}, step {step}/{study.steps[one.policy]}"
    return str(run.state.value)


def _progress(run: RunRecord) -> tuple[int, int]:
    """Gradient steps logged, and episodes recorded."""
    metrics, rows = RunDirectory(run.folder).read_metrics(), RunDirectory(run.folder).episodes
    episodes = rows.read_text(encoding="utf-8").count("\n") if rows.exists() else 0
    return int(metrics[-1]["step"]) + 1 if metrics else 0, episodes


def seconds_left(study: Study, slots: int) -> float:
    """Estimated seconds until all runs are done; 0 before the first run is done.

    A run is expected to take as long as the finished runs of its condition, or else of
    its task and policy, or else as all finished runs. Its progress counts.

    Args:
        slots: number of runs at a time.
    """
    left = []
    for one in study.conditions:
        if not (spent := _similar(study, one)):
            return 0.0
        train, evaluate = (fmean(times) for times in zip(*spent, strict=True))
        for run in one.runs:
            if run.state is not State.DONE:
                step, episodes = _progress(run)
                to_train = 1 - min(step / study.steps[one.policy], 1.0)
                to_evaluate = 1 - min(episodes / study.episodes, 1.0)
                left.append(to_train * train + to_evaluate * evaluate)
    return max(sum(left) / slots, max(left, default=0.0))


def _similar(study: Study, one: ConditionRecord) -> list[tuple[float, float]]:
    """Seconds of training and evaluation of the finished runs that are most like those
    of a condition.
    """
    same_task = [c for c in study.conditions if (c.task, c.policy) == (one.task, one.policy)]
    for group in ([one], same_task, study.conditions):
        if runs := [run for condition in group for run in condition.done]:
            return [(run.costs["train_s"], run.costs["evaluate_s"]) for run in runs]
    return []


def duration(seconds: float) -> str:
    """ "35 s", "12 min" or "3 h 20 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
