"""`fibopolicy study status`: what is done, under way, failed and to do."""

from __future__ import annotations

from collections import Counter

from fibopolicy.study.calibration import duration, estimate
from fibopolicy.study.cells import Run, cells, runs
from fibopolicy.study.directory import StudyDirectory, progress_of, read_json, state_of
from fibopolicy.study.records import own_rows
from fibopolicy.utils.files import is_locked


def status(study: StudyDirectory) -> str:
    """A line per cell with a column per seed, then what failed and why, then the sum."""
    config = study.config
    every = {run.name: state_of(study, run) for run in runs(config)}
    table = [["", *(f"seed {seed}" for seed in config.seeds)]]
    for cell in cells(config):
        told = [
            _told(study, run, every[run.name]) for run in (Run(cell, seed) for seed in config.seeds)
        ]
        table.append([cell.name, *told])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    for run in runs(config):
        if every[run.name] == "failed":
            failed = read_json(study.failed(run))
            lines.append(
                f"failed {run.name} (attempt {failed['attempts']}): {failed['error']}; log"
                f" {study.path / failed['log']}"
            )
    count = Counter(every.values())
    summed = ", ".join(
        f"{count[state]} {state}"
        for state in ("done", "running", "failed", "waiting")
        if count[state]
    )
    at_work = "a runner is at work" if is_locked(study.lock) else "no runner is at work"
    lines.append(f"{len(every)} runs: {summed}; {at_work}")
    if study.calibration.exists():
        seconds, left = estimate(study, read_json(study.calibration)["cells"], 1)
        if left:
            lines.append(
                f"about {duration(seconds)} left, one run at a time and start-up aside, as"
                " calibrated at the beginning"
            )
    return "\n".join(lines)


def _told(study: StudyDirectory, run: Run, state: str) -> str:
    folder, steps = study.run(run), study.config.optimizer_config(run.cell.head).steps
    if state == "done":
        rows = own_rows(folder, read_json(study.done(run)), steps, study.config.starts_seed)
        return f"{sum(row.success for row in rows)}/{len(rows)} successes"
    if state == "failed":
        return state
    step, episodes = progress_of(study, run)
    if episodes:
        return f"{state}, {episodes}/{study.config.episodes} episodes"
    return f"{state}, step {step}/{steps}" if step else state
