"""`fibopolicy study run`: prepare, then carry out every run that is not done."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fibopolicy.study.cells import Run, runs
from fibopolicy.study.config import StudyConfig
from fibopolicy.study.directory import StudyDirectory, create_directory, locked, read_json
from fibopolicy.study.executors import Executor
from fibopolicy.study.prepare import prepare_task

_log = logging.getLogger("fibopolicy.study")
#: How long one run of an array job waits while another prepares the study, seconds.
PREPARATION = 12 * 3600.0


@dataclass(frozen=True)
class Outcome:
    """How many runs the study has, how many are done, which failed now, and seconds that this took."""

    total: int
    done: int
    failed: tuple[Run, ...]
    seconds: float


def prepare_study(config: StudyConfig, out: Path) -> StudyDirectory:
    """Check the study, collect its data, store its start states, measure its encoders, estimate its time.

    What is there already is not made again. Only one process at a time may do so.
    """
    study = create_directory(out, config)
    with logged(study):
        for task in config.tasks:
            prepare_task(study, task)
    return study


def prepare_alone(config: StudyConfig, out: Path) -> StudyDirectory:
    """`prepare_study`, refused while another process runs the study."""
    with locked(out / "study.lock", "running this study", wait_s=1.0):
        return prepare_study(config, out)


def run_study(config: StudyConfig, out: Path, executor: Executor, folder: Path) -> Outcome:
    """Carry out everything that is not done yet; a second start goes on where the first was stopped.

    Args:
        folder: where "module:function" encoders are found, that of the study's file.

    Raises:
        UserError: another process runs this study; `out` holds something else; a check failed.
    """
    with locked(out / "study.lock", "running this study", wait_s=1.0):
        study = prepare_study(config, out)
        with logged(study):
            return _carry_out(study, runs(config), executor, folder)


def run_some(config: StudyConfig, out: Path, chosen: Sequence[str], executor: Executor, folder: Path) -> Outcome:
    """Carry out the runs of these names, as one job of several that share the directory; the first to come prepares it.

    Args:
        chosen: names of runs or of whole cells.

    Raises:
        UserError: no such run; a check failed.
    """
    with locked(out / "study.lock", "running this study", wait_s=PREPARATION):
        study = prepare_study(config, out)
    wanted = [run for run in runs(config) if run.name in chosen or run.cell.name in chosen]
    known = {name for run in wanted for name in (run.name, run.cell.name)}
    for name in chosen:
        if name not in known:
            study.find(name)
    with logged(study):
        return _carry_out(study, wanted, executor, folder)


def _carry_out(study: StudyDirectory, chosen: Sequence[Run], executor: Executor, folder: Path) -> Outcome:
    began = time.perf_counter()
    waiting = [run for run in chosen if not study.done(run).exists()]
    done, failed = len(chosen) - len(waiting), []
    _log.info("study %s: %d of %d runs to do, %d at a time", study.config.name, len(waiting), len(chosen), executor.slots)
    with tqdm(total=len(chosen), initial=done, desc="study", unit="run", disable=None) as bar:
        for ended in executor.carry_out(study, waiting, folder):
            if ended.done:
                done += 1
                _log.info("done    %s in %.0f s", ended.run.name, ended.wall_s)
            else:
                failed.append(ended.run)
                _log.warning("failed  %s: %s; its log: %s", ended.run.name, _reason(study, ended.run), study.run_log(ended.run))
            bar.update()
    return Outcome(len(chosen), done, tuple(failed), time.perf_counter() - began)


def _reason(study: StudyDirectory, run: Run) -> str:
    failed = study.failed(run)
    return str(read_json(failed).get("error")) if failed.exists() else "it was interrupted"


@contextmanager
def logged(study: StudyDirectory) -> Iterator[None]:
    """Within it, what this package tells goes to the study's log, too."""
    handler = logging.FileHandler(study.log)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    root = logging.getLogger("fibopolicy")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
