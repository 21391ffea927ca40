"""A study that becomes larger: what has begun stays what it is."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from fibopolicy.datasets.parts import parts_folder, remove_parts
from fibopolicy.study.cells import cells, runs
from fibopolicy.study.config import StudyConfig, from_json, to_json
from fibopolicy.study.directory import (
    STUDY,
    StudyDirectory,
    open_directory,
    other_study,
    read_json,
    write_json,
)
from fibopolicy.utils.files import is_locked
from fibopolicy.utils.settings import first_difference

#: What of a study's configuration may change while it is under way.
GRID = ("tasks", "encoders", "heads", "regimes", "seeds")


def refuse_change(study: StudyDirectory, config: StudyConfig) -> None:
    """Raise `UserError` unless the study may become `config`: its grid alone differs,
    and each run that has begun, and each task's data, stay what they are.
    """
    there, now = to_json(study.config), to_json(config)
    if fixed := first_difference({**there, **{name: now[name] for name in GRID}}, now):
        raise other_study(study.path, fixed)
    difference = first_difference(there, now)
    config = from_json(now)  # lists where the other has lists
    after = StudyDirectory(study.path, config)
    known = {run.name: run for run in runs(config)}
    for run in runs(study.config):
        if not (study.run(run).exists() or is_locked(study.run_lock(run))):
            continue
        if run.name not in known:
            raise other_study(
                study.path, difference, f"{run.name} has begun, and would be left out"
            )
        same = known[run.name]
        change = first_difference(
            asdict(study.train_config(run)), asdict(after.train_config(same))
        ) or first_difference(
            asdict(study.evaluate_config(run)), asdict(after.evaluate_config(same))
        )
        if change:
            raise other_study(study.path, difference, f"{run.name} has begun with {change}")
    tasks = {task.short: task for task in config.tasks}
    for task in study.config.tasks:
        made = study.starts(task).exists() or (
            task.dataset is None and study.dataset(task).exists()
        )
        if made and tasks.get(task.short) != task:
            raise other_study(study.path, difference, f"the data of {task.short} are there already")


def grow(path: Path, config: StudyConfig) -> None:
    """Put `config` in the place of an earlier configuration of the study that lies
    there, if one does.

    What was found out about the whole grid, its checks and times, is removed, to be
    found out again.

    Raises:
        UserError: what `refuse_change` raises.
    """
    if not (path / STUDY).exists():
        return
    study = open_directory(path)
    if not (difference := first_difference(to_json(study.config), to_json(config))):
        return
    refuse_change(study, config)
    study.checks.unlink(missing_ok=True)
    study.calibration.unlink(missing_ok=True)
    kept = {cell.name for cell in cells(config)}
    for cell in cells(study.config):
        if cell.name not in kept:
            shutil.rmtree(study.cell(cell), ignore_errors=True)
    for task in study.config.tasks:
        if task.dataset is None and task not in config.tasks:
            remove_parts(parts_folder(study.dataset(task)))  # of a collection that was stopped
    write_json(
        path / STUDY, {**to_json(config), "versions": read_json(path / STUDY).get("versions", {})}
    )
    with study.log.open("a", encoding="utf-8") as log:
        log.write(f"the study changes: {difference}\n")
