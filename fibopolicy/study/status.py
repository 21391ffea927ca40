"""`fibopolicy study status`: what is done, under way, failed and to do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from fibopolicy.evaluation.rows import ROWS
from fibopolicy.study.calibration import duration, estimate
from fibopolicy.study.cells import Run, cells, runs
from fibopolicy.study.directory import StudyDirectory, read_json, state_of
from fibopolicy.study.lock import held
from fibopolicy.study.records import own_rows


def status(study: StudyDirectory) -> str:
    """A line per cell with a column per seed, then what failed and why, then the sum."""
    config = study.config
    every = {run.name: state_of(study, run) for run in runs(config)}
    width = max(len(cell.name) for cell in cells(config))
    lines = [" " * width + "".join(f"  {f'seed {seed}':<20}" for seed in config.seeds)]
    for cell in cells(config):
        shown = [_told(study, run, every[run.name]) for run in (Run(cell, seed) for seed in config.seeds)]
        lines.append(f"{cell.name:<{width}}" + "".join(f"  {text:<20}" for text in shown))
    lines = [line.rstrip() for line in lines]
    for run in runs(config):
        if every[run.name] == "failed":
            told = read_json(study.failed(run))
            lines.append(f"failed {run.name} ({told['attempts']} times): {told['error']}; log {study.path / told['log']}")
    count = Counter(every.values())
    summed = ", ".join(f"{count[state]} {state}" for state in ("done", "running", "failed", "waiting") if count[state])
    at_work = "a runner is at work" if held(study.lock) else "no runner is at work"
    lines.append(f"{len(every)} runs: {summed}; {at_work}")
    if study.calibration.exists():
        seconds, left = estimate(study, read_json(study.calibration)["cells"], 1)
        if left:
            lines.append(f"about {duration(seconds)} of work left, as calibrated before the start")
    return "\n".join(lines)


def _told(study: StudyDirectory, run: Run, state: str) -> str:
    folder, steps = study.run(run), study.config.optimizer_config(run.cell.head).steps
    if state == "done":
        rows = own_rows(folder, read_json(study.done(run)), steps, study.config.starts_seed)
        return f"{sum(row.success for row in rows)}/{len(rows)} successes"
    if state == "failed":
        return state
    step, episodes = _last_step(folder / "metrics.jsonl"), _lines(folder / ROWS)
    if episodes:
        return f"{state}, {episodes}/{study.config.episodes} episodes"
    return f"{state}, step {step}/{steps}" if step else state


def _last_step(path: Path) -> int:
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"]) + 1
        except ValueError:  # cut short by a kill
            continue
    return 0


def _lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0
