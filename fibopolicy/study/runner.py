"""`fibopolicy study run`: prepare a study, then execute every run that is not done."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.collect import collect
from fibopolicy.envs import from_env_args
from fibopolicy.errors import UserError, unknown
from fibopolicy.evaluation.init_states import default_init_states, save_init_states
from fibopolicy.study.config import StudyConfig, StudyTask, to_json
from fibopolicy.study.costs import encoder_costs
from fibopolicy.study.directory import (
    LOCK,
    STUDY,
    StudyDirectory,
    check_change,
    check_no_other_content,
    create_or_extend,
    open_directory,
    other_study,
    warn_of_other_versions,
    write_json,
)
from fibopolicy.study.executors import Executor
from fibopolicy.study.grid import Run, runs
from fibopolicy.study.preflight import ModelSize, check, collection_plan, model_sizes
from fibopolicy.study.records import read_run, read_study
from fibopolicy.study.status import duration, seconds_left
from fibopolicy.utils.files import atomic_write, directory_lock
from fibopolicy.utils.settings import first_difference
from fibopolicy.utils.system import torch_threads

_log = logging.getLogger("fibopolicy.study")
ACTIVITY = "running this study"
#: Seconds that a job of an array waits while another one prepares the study.
MAX_PREPARATION = 12 * 3600.0


@dataclass(frozen=True)
class Outcome:
    """The number of runs, how many are done, and which failed in this call."""

    total: int
    done: int
    failed: tuple[Run, ...]


def run_study(config: StudyConfig, out: Path, executor: Executor, folder: Path) -> Outcome:
    """Execute everything that is not done. A second call resumes the study, also with a
    larger grid.

    Args:
        folder: folder that "module:function" encoders are imported from, the one of the
            study's file.

    Raises:
        UserError: another process runs this study; `out` holds something else; a check
            failed.
    """
    sizes = _check_before_writing(config, out)
    with directory_lock(out, LOCK, activity=ACTIVITY, max_wait=1.0):
        study = _prepare(config, out, sizes)
        return _execute(study, runs(config), executor, folder)


def run_selected(
    config: StudyConfig, out: Path, names: Sequence[str], executor: Executor, folder: Path
) -> Outcome:
    """Execute the runs with these names, as one of several jobs that share the
    directory. The first job prepares the study.

    Args:
        names: names of runs or of whole conditions.

    Raises:
        UserError: no such run; a check failed.
    """
    every = runs(config)
    for name in names:
        if not any(name in (run.name, run.condition.name) for run in every):
            raise unknown("run of the study", name, [run.name for run in every])
    selected = [run for run in every if run.name in names or run.condition.name in names]
    study = open_directory(out) if (out / STUDY).exists() else None
    if study is None or not study.is_prepared():
        study = prepare_study(config, out, max_wait=MAX_PREPARATION)
    elif difference := first_difference(to_json(study.config), to_json(config)):
        raise other_study(out, difference)  # other jobs may be running, so it is not extended
    else:
        warn_of_other_versions(study)
    return _execute(study, selected, executor, folder)


def prepare_study(config: StudyConfig, out: Path, *, max_wait: float = 1.0) -> StudyDirectory:
    """Check the study, measure its encoders, collect its data and store its initial
    states, unless that is done. Nothing is written before every policy has been built
    once.

    Args:
        max_wait: seconds to wait for another process that prepares it.
    """
    sizes = _check_before_writing(config, out)
    with directory_lock(out, LOCK, activity=ACTIVITY, max_wait=max_wait):
        return _prepare(config, out, sizes)


def _check_before_writing(config: StudyConfig, out: Path) -> list[ModelSize] | None:
    """Build every policy of a new or changed study; `None` for an unchanged one."""
    check_no_other_content(out)
    if (out / STUDY).exists():
        study = open_directory(out)
        if to_json(study.config) == to_json(config):
            return None
        check_change(study, config)
    return model_sizes(config)


def _prepare(config: StudyConfig, out: Path, sizes: list[ModelSize] | None) -> StudyDirectory:
    study = create_or_extend(out, config)
    with _log_file(study):
        if not study.checks.exists():
            _check_and_measure(study, sizes or model_sizes(config))
        for task in config.tasks:
            prepare_task(study, task)
    return study


def _check_and_measure(study: StudyDirectory, sizes: list[ModelSize]) -> None:
    lines, cautions = check(study.config, sizes)
    for line in lines:
        _log.info("%s", line)
    for caution in cautions:
        warnings.warn(caution, stacklevel=2)
    _log.info("timing %d encoders, interleaved", len(study.config.encoders))
    with torch_threads(study.config.threads):
        costs = encoder_costs(sizes, study.config.device)
    for size, cost in zip(sizes, costs, strict=True):
        write_json(study.cost(size.condition), cost)
    lines += [f"warning: {caution}" for caution in cautions]
    with atomic_write(study.checks) as partial:  # last, since it marks that all of this is done
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def prepare_task(study: StudyDirectory, task: StudyTask, workers: int | None = None) -> None:
    """Collect the demonstrations of a task unless it has a dataset, and store the
    initial states that every condition is evaluated on.

    Raises:
        UserError: the task has no expert; the dataset is of another task.
    """
    dataset, init_states, config = study.dataset(task), study.init_states(task), study.config
    if not dataset.exists() and task.dataset is None:
        _log.info("collecting %d demonstrations of %s", task.demos, task.task)
        collect(collection_plan(task), task.demos, dataset, workers=workers, resume=True)
    if init_states.exists():
        return
    options = {} if task.max_steps is None else {"horizon": task.max_steps}
    with DemoFile(dataset) as file:
        env = from_env_args(file.env_args, **options)
    with env:
        if env.task_id != task.task:
            raise UserError(
                f"{dataset}: holds demonstrations of {env.task_id}, the study's task is {task.task}"
            )
        _log.info("storing %d initial states of %s", config.episodes, task.task)
        save_init_states(default_init_states(env, config.episodes, config.init_seed), init_states)


def _execute(
    study: StudyDirectory, selected: Sequence[Run], executor: Executor, folder: Path
) -> Outcome:
    waiting = [run for run in selected if not study.done(run).exists()]
    total, done, failed = len(selected), len(selected) - len(waiting), []
    with (
        _log_file(study),
        tqdm(total=total, initial=done, desc="study", unit="run", disable=None) as bar,
    ):
        _log.info(
            "study %s: %d of %d runs to do, %d at a time",
            *(study.config.name, len(waiting), total, executor.slots),
        )
        for run, wall_s in executor.execute(study, waiting, folder):
            if study.done(run).exists():
                done += 1
                _log.info("done    %s in %.0f s", run.name, wall_s)
                if seconds := seconds_left(read_study(study.path), executor.slots):
                    _log.info("about %s left", duration(seconds))
            else:
                failed.append(run)
                error = read_run(study, run).error or (
                    "it was interrupted, or another process executes it"
                )
                _log.warning("failed  %s: %s; log %s", run.name, error, study.run_log(run))
            bar.update()
    return Outcome(total, done, tuple(failed))


@contextmanager
def _log_file(study: StudyDirectory) -> Iterator[None]:
    """Send the log of this package to the study's log, too."""
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
