"""Carries out the runs of a study in the process of the test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fibopolicy.study.directory import StudyDirectory
from fibopolicy.study.executors import NextRun
from fibopolicy.study.grid import Run
from fibopolicy.study.worker import execute


@dataclass
class Here:
    """An executor that saves the imports, and keeps the names of runs."""

    executed: list[str] = field(default_factory=list)
    slots: int = 1

    def execute(
        self, study: StudyDirectory, next_run: NextRun, folder: Path
    ) -> Iterator[tuple[Run, float]]:
        for run in iter(next_run, None):
            self.executed.append(run.name)
            execute(study, run)
            yield run, 0.0
