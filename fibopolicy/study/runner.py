"""`fibopolicy study run`: prepare a study, then execute every run that is not done."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fibopolicy.datasets import DemoFile
from fibopolicy.datasets.collect import collect
from fibopolicy.envs import from_env_args
from fibopolicy.envs.perturbations import unsupported_reason
from fibopolicy.errors import UserError, unknown
from fibopolicy.evaluation.init_states import (
    InitStates,
    default_init_states,
    load_init_states,
    save_init_states,
)
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
from fibopolicy.study.grid import Condition, Run, runs, selectable, tuned_conditions, tuning_name
from fibopolicy.study.preflight import ModelSize, check, collection_plan, model_sizes
from fibopolicy.study.records import State, ranking, read_run, read_rungs, read_study
from fibopolicy.study.results import results
from fibopolicy.study.status import duration, seconds_left
from fibopolicy.study.tables import options_text
from fibopolicy.utils.files import Locked, atomic_write, directory_lock
from fibopolicy.utils.settings import first_difference
from fibopolicy.utils.system import torch_threads

_log = logging.getLogger("fibopolicy.study")
ACTIVITY = "running this study"
#: Seconds that a job of an array waits while another one prepares the study.
MAX_PREPARATION = 12 * 3600.0


@dataclass(frozen=True)
class Outcome:
    """The number of runs, how many are done, and which failed in this call; and with
    looks, after how many training seeds the study was decided.
    """

    total: int
    done: int
    failed: tuple[Run, ...]
    decided_after: int | None = None


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
        selected = runs(config)
        return _execute(study, tuned_conditions(config), selected, executor, folder, config.looks)


def run_selected(
    config: StudyConfig, out: Path, names: Sequence[str], executor: Executor, folder: Path
) -> Outcome:
    """Execute the runs with these names, as one of several jobs that share the
    directory. The first job prepares the study.

    Args:
        names: names of runs, of searches (`CONDITION/tuning`), or of whole conditions.

    Raises:
        UserError: no such run; a check failed; a run's search is neither finished nor
            selected.
    """
    every, tuned = runs(config), tuned_conditions(config)
    known = [*selectable(config), *(run.condition.name for run in every)]
    for name in names:
        if name not in known:
            raise unknown("run of the study", name, selectable(config))
    selected = [run for run in every if run.name in names or run.condition.name in names]
    tuned = tuple(one for one in tuned if one.name in names or tuning_name(one) in names)
    study = open_directory(out) if (out / STUDY).exists() else None
    if study is None or not study.is_prepared():
        study = prepare_study(config, out, max_wait=MAX_PREPARATION)
    elif difference := first_difference(to_json(study.config), to_json(config)):
        raise other_study(out, difference)  # other jobs may be running, so it is not extended
    else:
        warn_of_other_versions(study)
    for run in selected:
        if run.condition not in tuned and study.awaits_search(run):
            search = tuning_name(run.condition)
            raise UserError(
                f"{run.name}: waits for the search of its condition; run that first, with --only"
                f" {search}"
            )
    return _execute(study, tuned, selected, executor, folder)


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
        UserError: the task has no expert; the dataset is of another task; the task
            cannot have one of the study's perturbations.
    """
    dataset, init_states, config = study.dataset(task), study.init_states(task), study.config
    search, tuning_states = config.search, study.tuning_states(task)
    if not dataset.exists() and task.dataset is None:
        _log.info("collecting %d demonstrations of %s", task.demos, task.task)
        collect(collection_plan(task), task.demos, dataset, workers=workers, resume=True)
    if init_states.exists() and (search is None or tuning_states.exists()):
        return
    options = {} if task.max_steps is None else {"horizon": task.max_steps}
    with DemoFile(dataset) as file:
        env = from_env_args(file.env_args, **options)
    with env:
        if env.task_id != task.task:
            raise UserError(
                f"{dataset}: holds demonstrations of {env.task_id}, the study's task is {task.task}"
            )
        for name in dict.fromkeys(text.partition(":")[0] for text in config.perturbations):
            if reason := unsupported_reason(env, name):
                raise UserError(f"{reason}; leave it out of the study's perturbations")
        if not init_states.exists():
            _log.info("storing %d initial states of %s", config.episodes, task.task)
            stored = default_init_states(env, config.episodes, config.init_seed)
            save_init_states(stored, init_states)
        if search is not None and not tuning_states.exists():
            _log.info("storing %d initial states of %s for trials", search.episodes, task.task)
            stored = default_init_states(env, search.episodes, search.init_seed)
            check_disjoint(load_init_states(init_states), stored, task)
            save_init_states(stored, tuning_states)


def check_disjoint(result: InitStates, tuning: InitStates, task: StudyTask) -> None:
    """Raise `UserError` if trials would be judged on an initial state of the result."""
    index_of = {result.identity(index): index for index in range(len(result))}
    for index in range(len(tuning)):
        if (same := index_of.get(tuning.identity(index))) is not None:
            raise UserError(
                f"{task.task}: initial state {index} of the search is initial state {same} of the"
                " result; trials must be judged on others: choose another init_seed for the"
                " search, or fewer initial states"
            )


class _Queue:
    """The runs to execute, one per call: those of searches first, then those that
    count, seed by seed. None that is done, and none twice.

    With looks, the runs of the next one are handed out when all of this one are done
    and have not decided the study.
    """

    def __init__(
        self,
        study: StudyDirectory,
        tuned: Sequence[Condition],
        selected: Sequence[Run],
        looks: Sequence[int],
    ) -> None:
        self._study, self._searching, self._given = study, list(tuned), set[str]()
        self._waiting = [run for run in selected if not study.done(run).exists()]
        self._looks = list(looks)
        self.decided_after: int | None = None

    def _up_to_this_look(self) -> set[int]:
        """The training seeds that may run now. Reads the verdicts of a complete look."""
        study, seeds, complete = self._study, self._study.config.seeds, None
        every = runs(study.config)
        while self._looks:
            current = seeds[: self._looks[0]]
            if not all(study.done(run).exists() for run in every if run.seed in current):
                break
            complete = self._looks.pop(0)
        if complete and self._looks and results(read_study(study.path)).decided:
            self.decided_after, self._looks, self._waiting = complete, [], []
        return set(seeds[: self._looks[0]] if self._looks else seeds)

    def __call__(self) -> Run | None:
        study = self._study
        for condition in list(self._searching):
            if not (trials := next_trials(study, condition)):
                self._searching.remove(condition)
            for run in trials:
                if run.name not in self._given:
                    self._given.add(run.name)
                    return run
        seeds = self._up_to_this_look()
        for run in self._waiting:
            if run.seed in seeds and not study.awaits_search(run):
                self._waiting.remove(run)
                return run
        return None


def next_trials(study: StudyDirectory, condition: Condition) -> list[Run]:
    """The trials of a condition that can be executed, running ones included. Without
    any, the search is over, and its choice is written.
    """
    if study.choice(condition).exists():
        return []
    rung = read_rungs(study, condition)[-1]
    if waiting := [one for one in rung if one.state is not State.DONE]:
        return [Run(condition, one.seed, one.trial) for one in waiting]
    assert study.config.search is not None
    best = ranking(rung)[0]
    setting = study.config.search.settings[best]
    with suppress(Locked):  # another process has come to the same choice
        write_json(study.choice(condition), {"trial": best, "setting": setting})
    _log.info("chosen  %s: trial %d, %s", condition.name, best, options_text(setting))
    return []


def _num_done(
    study: StudyDirectory, tuned: Sequence[Condition], selected: Sequence[Run]
) -> tuple[int, int]:
    """How many of the trials and runs are done, and their number."""
    planned = sum(study.config.search.sizes) if study.config.search else 0
    done = sum(study.done(run).exists() for run in selected)
    for condition in tuned:
        trials = [trial for rung in read_rungs(study, condition) for trial in rung]
        over = study.choice(condition).exists()
        done += planned if over else sum(trial.state is State.DONE for trial in trials)
    return done, planned * len(tuned) + len(selected)


def _execute(
    study: StudyDirectory,
    tuned: Sequence[Condition],
    selected: Sequence[Run],
    executor: Executor,
    folder: Path,
    looks: Sequence[int] = (),
) -> Outcome:
    (done, total), failed = _num_done(study, tuned, selected), []
    with (
        _log_file(study),
        tqdm(total=total, initial=done, desc="study", unit="run", disable=None) as bar,
    ):
        _log.info(
            "study %s: %d of %d runs to do, %d at a time",
            *(study.config.name, total - done, total, executor.slots),
        )
        queue = _Queue(study, tuned, selected, looks)
        for run, wall_s in executor.execute(study, queue, folder):
            if read_run(study, run).state is State.DONE:
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
    done, _ = _num_done(study, tuned, selected)
    return Outcome(total, done, tuple(failed), queue.decided_after)


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
