"""`fibopolicy study run`: prepare, then carry out every run that is not done."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fibopolicy.errors import unknown
from fibopolicy.study.built import Built, build_cells
from fibopolicy.study.calibration import calibrate, told
from fibopolicy.study.cells import Run, runs
from fibopolicy.study.checks import check
from fibopolicy.study.config import StudyConfig, to_json
from fibopolicy.study.costs import encoder_costs
from fibopolicy.study.directory import (
    LOCK,
    STUDY,
    StudyDirectory,
    create_directory,
    open_directory,
    read_json,
    refuse_foreign,
    write_json,
)
from fibopolicy.study.executors import Executor
from fibopolicy.study.growth import grow, refuse_change
from fibopolicy.study.prepare import prepare_task
from fibopolicy.utils.files import atomic_write, directory_lock
from fibopolicy.utils.system import torch_threads

_log = logging.getLogger("fibopolicy.study")
AT_WORK = "running this study"
#: How long one run of an array job waits while another prepares the study, seconds.
PREPARATION = 12 * 3600.0


@dataclass(frozen=True)
class Outcome:
    """How many runs the study has, how many are done, which failed now, and seconds
    that this took.
    """

    total: int
    done: int
    failed: tuple[Run, ...]
    seconds: float


def prepare_study(
    config: StudyConfig, out: Path, slots: int, *, wait_s: float = 1.0
) -> StudyDirectory:
    """Check the study, measure its encoders, collect its data, store its start states,
    estimate its time.

    What is there already is not made again. Nothing is written before every policy of
    the study has been built once.

    Args:
        slots: runs at a time, for the estimate.
        wait_s: how long to wait for another process that prepares it, seconds.
    """
    built = _first_look(config, out)
    with directory_lock(out, LOCK, activity=AT_WORK, max_wait=wait_s):
        return _prepare(config, out, slots, built)


def run_study(config: StudyConfig, out: Path, executor: Executor, folder: Path) -> Outcome:
    """Carry out everything that is not done yet; a second start goes on where the first
    was stopped, with a larger grid, too.

    Args:
        folder: where "module:function" encoders are found, that of the study's file.

    Raises:
        UserError: another process runs this study; `out` holds something else; a check
            failed.
    """
    built = _first_look(config, out)
    with directory_lock(out, LOCK, activity=AT_WORK, max_wait=1.0):
        study = _prepare(config, out, executor.slots, built)
        with logged(study):
            return _carry_out(study, runs(config), executor, folder)


def run_some(
    config: StudyConfig, out: Path, chosen: Sequence[str], executor: Executor, folder: Path
) -> Outcome:
    """Carry out the runs of these names, as one job of several that share the
    directory; the first to come prepares it.

    Args:
        chosen: names of runs or of whole cells.

    Raises:
        UserError: no such run; a check failed.
    """
    wanted = [run for run in runs(config) if run.name in chosen or run.cell.name in chosen]
    known = {name for run in wanted for name in (run.name, run.cell.name)}
    for name in chosen:
        if name not in known:
            raise unknown("run of the study", name, [run.name for run in runs(config)])
    if (out / STUDY).exists() and open_directory(out).calibration.exists():
        # a whole study may be under way: each run has a lock of its own
        study = create_directory(out, config)
    else:
        study = prepare_study(config, out, executor.slots, wait_s=PREPARATION)
    with logged(study):
        return _carry_out(study, wanted, executor, folder)


def _first_look(config: StudyConfig, out: Path) -> list[Built] | None:
    """Build every policy of a new or changed study, before anything is written; `None`
    for one that is there already.
    """
    if (out / STUDY).exists():
        found = open_directory(out)
        if to_json(found.config) == to_json(config):
            return None
        refuse_change(found, config)
    else:
        refuse_foreign(out)
    return build_cells(config)


def _prepare(
    config: StudyConfig, out: Path, slots: int, built: list[Built] | None
) -> StudyDirectory:
    grow(out, config)
    study = create_directory(out, config)
    with logged(study):
        _check_and_measure(study, built)
        for task in config.tasks:
            prepare_task(study, task)
        known = read_json(study.calibration)["cells"] if study.calibration.exists() else {}
        if not known or any("error" in found for found in known.values()):
            _log.info("calibrating: a few steps of each cell")
            write_json(study.calibration, {"cells": calibrate(study, known)})
        for line in told(study, read_json(study.calibration)["cells"], slots):
            _log.info("%s", line)
    return study


def _check_and_measure(study: StudyDirectory, built: list[Built] | None) -> None:
    """What can be known before there is any data: that the cells are comparable, and
    what their encoders cost.
    """
    if study.checks.exists():
        return
    built = built or build_cells(study.config)
    lines, doubts = check(study.config, built)
    for line in lines:
        _log.info("%s", line)
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=2)
    _log.info("measuring %d encoders side by side", len(study.config.encoders))
    with torch_threads(study.config.threads):
        for one, cost in zip(built, encoder_costs(built, study.config.device), strict=True):
            write_json(study.cost(one.cell), cost)
    with atomic_write(study.checks) as aside:  # last, since it marks that all of this is done
        aside.write_text(
            "".join(f"{line}\n" for line in (*lines, *(f"warning: {doubt}" for doubt in doubts))),
            encoding="utf-8",
        )


def _carry_out(
    study: StudyDirectory, chosen: Sequence[Run], executor: Executor, folder: Path
) -> Outcome:
    began = time.perf_counter()
    waiting = [run for run in chosen if not study.done(run).exists()]
    done, failed = len(chosen) - len(waiting), []
    _log.info(
        "study %s: %d of %d runs to do, %d at a time",
        study.config.name,
        len(waiting),
        len(chosen),
        executor.slots,
    )
    with tqdm(total=len(chosen), initial=done, desc="study", unit="run", disable=None) as bar:
        for ended in executor.carry_out(study, waiting, folder):
            if ended.done:
                done += 1
                _log.info("done    %s in %.0f s", ended.run.name, ended.wall_s)
            else:
                failed.append(ended.run)
                _log.warning(
                    "failed  %s: %s; its log: %s",
                    ended.run.name,
                    _reason(study, ended.run),
                    study.run_log(ended.run),
                )
            bar.update()
    return Outcome(len(chosen), done, tuple(failed), time.perf_counter() - began)


def _reason(study: StudyDirectory, run: Run) -> str:
    failed = study.failed(run)
    return (
        str(read_json(failed).get("error"))
        if failed.exists()
        else "it was interrupted, or another process is at work on it"
    )


@contextmanager
def logged(study: StudyDirectory) -> Iterator[None]:
    """Within it, what this package tells goes to the study's log, too."""
    handler = logging.FileHandler(study.log, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    package = logging.getLogger("fibopolicy")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)
        handler.close()
