"""A copy of a study that is small enough to publish: what its report is made of,
without demonstrations, weights and videos.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fibopolicy.errors import UserError
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.cells import cells, runs
from fibopolicy.study.directory import STUDY, StudyDirectory, open_directory, refuse_foreign
from fibopolicy.study.growth import refuse_change
from fibopolicy.study.report import write_report
from fibopolicy.utils.files import directory_lock, is_locked, wrap_os_error


def publish(directory: Path, out: Path) -> Path:
    """Copy a study's settings, checks, costs, start states, rows and learning curves,
    and write its report there.

    The copy is a study's directory: it can be reported on, and gone on with where the
    files that the study names lie in the same place. Of a run that failed it holds the
    reason and the log; what is under way is left out. An earlier copy is replaced.

    Args:
        directory: of the study, finished or not.
        out: folder of the copy.

    Returns:
        the report's page.

    Raises:
        UserError: no study; a finished run lacks its rows; `out` lies in the study,
            holds something else, runs of its own, or a finished run that the study
            lacks.
    """
    study = open_directory(directory)
    if out.resolve().is_relative_to(directory.resolve()):
        raise UserError(f"{out}: lies in the study itself; name a folder outside of it")
    _refuse_loss(study, out)
    files = list(_files(study))
    aside = out.with_name(f"{out.name}.partial")
    with directory_lock(aside), wrap_os_error(out):
        for entry in aside.iterdir():  # of an attempt that was killed
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for path in files:
            to = aside / path.relative_to(directory)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
        page = write_report(aside)
        out.mkdir(exist_ok=True)
        for entry in sorted(aside.iterdir()):
            if (there := out / entry.name).is_dir():
                shutil.rmtree(there)
            os.replace(entry, there)
        aside.rmdir()
    return out / page.relative_to(aside)


def _files(study: StudyDirectory) -> Iterator[Path]:
    """What is copied. Not the calibration: its times are this machine's, and it says
    that the data are there.
    """
    yield study.path / STUDY
    yield from filter(Path.exists, (study.path / "environment.json", study.checks))
    yield from filter(Path.exists, (study.starts(task) for task in study.config.tasks))
    for cell in cells(study.config):
        yield from filter(Path.exists, (study.cell(cell) / "cell.json", study.cost(cell)))
    for run in runs(study.config):
        files = RunDirectory(study.run(run))
        if study.done(run).exists():
            if not files.episodes.exists():
                raise UserError(
                    f"{files.path}: is finished but has no {files.episodes.name}; remove the"
                    " folder, and the study does the run over"
                )
            yield from filter(Path.exists, (study.done(run), files.episodes, files.metrics))
        elif study.failed(run).exists():
            yield from filter(Path.exists, (study.failed(run), study.run_log(run)))


def _refuse_loss(study: StudyDirectory, out: Path) -> None:
    """Raise `UserError` unless `out` is new, or an earlier copy with nothing in it that
    would be lost.
    """
    if not (out / STUDY).exists():
        refuse_foreign(out)
        return
    there = open_directory(out)
    if is_locked(there.lock):
        raise UserError(f"{out}: is no mere copy, a study is at work there; name another folder")
    refuse_change(there, study.config)
    for run in runs(there.config):
        if RunDirectory(there.run(run)).config.exists() or is_locked(there.run_lock(run)):
            raise UserError(
                f"{out}: is no mere copy, {run.name} was begun there; name another folder"
            )
        if there.done(run).exists() and not study.done(run).exists():
            raise UserError(
                f"{out}: holds {run.name} finished, which {study.path} lacks; go on from a copy of"
                f" {out}, or name another folder"
            )
