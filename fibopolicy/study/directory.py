"""The directory of one study: its state, all of it. Whatever is killed, the next start
reads here what is done.
"""

from __future__ import annotations

import json
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError, unknown
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.cells import Cell, Run, cells, evaluate_config, runs, train_config
from fibopolicy.study.config import StudyConfig, StudyTask, from_json, to_json
from fibopolicy.training.config import TrainConfig
from fibopolicy.utils.files import atomic_write, is_locked
from fibopolicy.utils.settings import first_difference
from fibopolicy.utils.system import environment, usable_cores, versions

STUDY, LOCK = "study.json", "study.lock"


@dataclass(frozen=True)
class StudyDirectory:
    """Where everything of a study lies.

    Args:
        path: of the directory.
        config: of the study.
    """

    path: Path
    config: StudyConfig

    @property
    def lock(self) -> Path:
        return self.path / LOCK

    @property
    def log(self) -> Path:
        return self.path / "study.log"

    @property
    def calibration(self) -> Path:
        """What each cell is expected to take; see `fibopolicy.study.calibration`."""
        return self.path / "calibration.json"

    @property
    def checks(self) -> Path:
        """What was checked before the first run, in words."""
        return self.path / "checks.txt"

    def dataset(self, task: StudyTask) -> Path:
        return self.path / "data" / f"{task.short}.hdf5" if task.dataset is None else task.dataset

    def starts(self, task: StudyTask) -> Path:
        return self.path / "starts" / f"{task.short}.npz"

    def cell(self, cell: Cell) -> Path:
        return self.path / "cells" / cell.name

    def cost(self, cell: Cell) -> Path:
        return self.cell(cell) / "cost.json"

    def run(self, run: Run) -> Path:
        """The run directory, an ordinary one."""
        return self.cell(run.cell) / f"seed{run.seed}"

    def run_log(self, run: Run) -> Path:
        """What the run's process printed."""
        return self.cell(run.cell) / f"seed{run.seed}.log"

    def run_lock(self, run: Run) -> Path:
        return self.cell(run.cell) / f"seed{run.seed}.lock"

    def done(self, run: Run) -> Path:
        return self.run(run) / "done.json"

    def failed(self, run: Run) -> Path:
        return self.run(run) / "failed.json"

    def train_config(self, run: Run) -> TrainConfig:
        return train_config(
            self.config, run.cell, run.seed, self.dataset(run.cell.task), self.run(run)
        )

    def evaluate_config(self, run: Run) -> EvaluateConfig:
        return evaluate_config(self.config, run.cell, self.run(run), self.starts(run.cell.task))

    def find(self, name: str) -> Run:
        """The run of a name such as `lift__vit_tiny__bc__scratch/seed0`.

        Raises:
            UserError: no such run.
        """
        known = {run.name: run for run in runs(self.config)}
        if name not in known:
            raise unknown("run of the study", name, known)
        return known[name]


def open_directory(path: Path) -> StudyDirectory:
    """The study that lies in a directory.

    Raises:
        UserError: none does, or its `study.json` is damaged.
    """
    file = path / STUDY
    if not file.is_file():
        raise UserError(
            f"{path}: is no study, it has no {STUDY}; name the --out of a `fibopolicy study run`"
        )
    try:
        return StudyDirectory(path, from_json(json.loads(file.read_text(encoding="utf-8"))))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file}: is not a study's configuration ({' '.join(str(error).split())})"
        ) from error


def create_directory(path: Path, config: StudyConfig) -> StudyDirectory:
    """The directory of a study: made now, or found with this very study in it.

    Raises:
        UserError: something else lies there, or another study, with the first
            difference named.
    """
    if (path / STUDY).exists():
        found = open_directory(path)
        if difference := first_difference(to_json(found.config), to_json(config)):
            raise other_study(path, difference)
        then, now = read_json(path / STUDY).get("versions", {}), dict(versions())
        differing = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        if differing:
            told = ", ".join(
                f"{name} {then.get(name, 'none')}, now {now.get(name, 'none')}"
                for name in differing
            )
            warnings.warn(f"{path}: was begun with {told}; rows of both may differ", stacklevel=2)
        return _described(found)
    refuse_foreign(path)
    write_json(path / STUDY, {**to_json(config), "versions": dict(versions())})
    return _described(StudyDirectory(path, config))


def other_study(path: Path, difference: str, why: str = "") -> UserError:
    """The error of a directory that holds another study, and why it may not become this one."""
    told = f"{path}: holds a study of another configuration: {difference}"
    return UserError(f"{told}{f'; {why}' if why else ''}; use that value or another directory")


def refuse_foreign(path: Path) -> None:
    """Raise `UserError` where something lies that is no study."""
    leftover = {LOCK, f"{STUDY}.partial"}
    if (path / STUDY).exists() or not path.exists():
        return
    if not path.is_dir() or any(p.name not in leftover for p in path.iterdir()):
        raise UserError(f"{path}: is not empty and holds no study; choose another directory")


def _described(study: StudyDirectory) -> StudyDirectory:
    """The same, with its small descriptions in place: a kill may have come before all
    of them were written.
    """
    if not (study.path / "environment.json").exists():
        write_json(
            study.path / "environment.json",
            {**environment(), "host": platform.node(), "cores": usable_cores()},
        )
    for cell in cells(study.config):
        if not (file := study.cell(cell) / "cell.json").exists():
            document = {"cell": cell.name, "task": cell.task.task, "encoder": cell.encoder.name}
            write_json(file, {**document, "head": cell.head.name, "regime": cell.regime})
    return study


def write_json(path: Path, document: Any) -> None:
    with atomic_write(path) as aside:
        aside.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """A document that this package wrote.

    Raises:
        UserError: it is damaged.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); remove it, and it is made again"
        ) from error
    return document


def state_of(study: StudyDirectory, run: Run) -> str:
    """ "done", "failed", "running" or "waiting"."""
    if study.done(run).exists():
        return "done"
    if is_locked(study.run_lock(run)):
        return "running"
    return "failed" if study.failed(run).exists() else "waiting"


def progress_of(study: StudyDirectory, run: Run) -> tuple[int, int]:
    """Gradient steps logged and episodes recorded so far."""
    files = RunDirectory(study.run(run))
    metrics, rows = files.metrics, files.episodes
    episodes = rows.read_text(encoding="utf-8").count("\n") if rows.exists() else 0
    for line in reversed(
        metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    ):
        try:
            return int(json.loads(line)["step"]) + 1, episodes
        except ValueError:  # cut short by a kill
            continue
    return 0, episodes
