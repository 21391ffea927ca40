"""A copy of a study that is small enough to publish: what its report is made of, without demonstrations, weights and videos."""

from __future__ import annotations

import shutil
from pathlib import Path

from fibopolicy.errors import UserError
from fibopolicy.evaluation.rows import ROWS
from fibopolicy.files import claimed, written_aside
from fibopolicy.study.cells import Run, runs
from fibopolicy.study.directory import STUDY, StudyDirectory, open_directory, refuse_foreign
from fibopolicy.study.growth import refuse_change
from fibopolicy.study.report import write_report

#: Of the study, and of each run that is done; `done.json` last, since it says that the others are there.
SHARED = (STUDY, "environment.json", "checks.txt", "calibration.json", "starts/*.npz", "cells/*/cell.json", "cells/*/cost.json")
OF_A_RUN = (ROWS, "metrics.jsonl", "done.json")


def publish(directory: Path, out: Path) -> Path:
    """Copy a study's settings, checks, costs, start states, rows and learning curves, and write its report there.

    The copy is a study's directory: it can be reported on and gone on with anywhere. Runs that are not done are left out; a copy
    that was made before is brought up to date.

    Args:
        directory: of the study, finished or not.
        out: folder of the copy.

    Returns:
        the report's page.

    Raises:
        UserError: no study; `out` lies in it, or holds something else, or a run that the study lacks.
    """
    study = open_directory(directory)
    if out.resolve().is_relative_to(directory.resolve()):
        raise UserError(f"{out}: lies in the study itself; name a folder outside of it")
    done = [run for run in runs(study.config) if study.done(run).exists()]
    _refuse_loss(study, done, out)
    with claimed(out):
        for pattern in SHARED:
            for path in sorted(directory.glob(pattern)):
                _copy(path, out / path.relative_to(directory))
        for run in done:
            for name in OF_A_RUN:
                path = study.run(run) / name
                _copy(path, out / path.relative_to(directory))
    return write_report(out)


def _refuse_loss(study: StudyDirectory, done: list[Run], out: Path) -> None:
    if not (out / STUDY).exists():
        refuse_foreign(out)
        return
    there = open_directory(out)
    refuse_change(there, study.config)
    names = {run.name for run in done}
    for run in runs(there.config):
        if there.done(run).exists() and run.name not in names:
            raise UserError(
                f"{out}: holds {run.name} finished, which {study.path} lacks; go on from a copy of {out}, or name another folder"
            )


def _copy(path: Path, to: Path) -> None:
    with written_aside(to) as aside:
        shutil.copyfile(path, aside)
