"""The directory of a study. It holds the whole state, so a killed study resumes from it."""

from __future__ import annotations

import json
import platform
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fibopolicy.datasets.shards import remove_shards, shards_folder
from fibopolicy.errors import UserError, message_of, one_line, unknown
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.study.config import StudyConfig, StudyTask, from_json, to_json
from fibopolicy.study.grid import (
    Condition,
    Run,
    conditions,
    evaluate_config,
    possible_runs,
    runs,
    train_config,
    trial_setting,
    tuning_name,
)
from fibopolicy.training.config import TrainConfig
from fibopolicy.utils.files import atomic_write, is_locked
from fibopolicy.utils.settings import first_difference
from fibopolicy.utils.system import environment, usable_cores, versions

STUDY, ENVIRONMENT, LOCK = "study.json", "environment.json", "study.lock"
#: The parts of a configuration that may change after the study has begun.
GRID = ("tasks", "encoders", "policies", "inits", "seeds", "tuned_for")


@dataclass(frozen=True)
class StudyDirectory:
    """The paths of a study.

    Args:
        path: directory of the study.
        config: the study.
    """

    path: Path
    config: StudyConfig

    @property
    def log(self) -> Path:
        return self.path / "study.log"

    @property
    def checks(self) -> Path:
        """The results of the checks before the first run, as text."""
        return self.path / "checks.txt"

    def dataset(self, task: StudyTask) -> Path:
        return task.dataset or self.path / "data" / f"{task.short}.hdf5"

    def init_states(self, task: StudyTask) -> Path:
        return self.path / "init_states" / f"{task.short}.npz"

    def tuning_states(self, task: StudyTask) -> Path:
        """The initial states of the trials of a search."""
        return self.path / "init_states" / "tuning" / f"{task.short}.npz"

    def condition(self, condition: Condition) -> Path:
        return self.path / "conditions" / condition.name

    def choice(self, condition: Condition) -> Path:
        """The setting that the search has chosen; exists only if the search is over."""
        return self.path / "conditions" / tuning_name(condition) / "choice.json"

    def cost(self, condition: Condition) -> Path:
        """What the encoder costs: parameters, multiply-accumulates, latency."""
        return self.condition(condition) / "cost.json"

    def run(self, run: Run) -> Path:
        """The run directory, which every command that takes one accepts."""
        return self.path / "conditions" / run.name

    def run_log(self, run: Run) -> Path:
        """Output of the run's process."""
        return self.run(run).with_suffix(".log")

    def run_lock(self, run: Run) -> Path:
        return self.run(run).with_suffix(".lock")

    def done(self, run: Run) -> Path:
        """Exists only if the run is complete; holds its times and memory."""
        return self.run(run) / "done.json"

    def failed(self, run: Run) -> Path:
        """Exists only if the last attempt failed; holds the error."""
        return self.run(run) / "failed.json"

    def is_running(self, run: Run) -> bool:
        return is_locked(self.run_lock(run))

    def is_prepared(self) -> bool:
        """Whether the checks are done, and the demonstrations and initial states are
        stored.
        """
        needed = [self.checks]
        for task in self.config.tasks:
            needed += [self.dataset(task), self.init_states(task)]
            needed += [self.tuning_states(task)] if self.config.search else []
        return all(path.exists() for path in needed)

    def awaits_search(self, run: Run) -> bool:
        """Whether a run cannot start because the search of its condition is not over."""
        condition = run.condition
        tuned = run.trial is None and self.config.is_tuned(condition.encoder)
        return tuned and not self.choice(condition).exists()

    def setting(self, run: Run) -> Mapping[str, Any]:
        """The optimizer settings of a run that the search decides, if it is over.

        Raises:
            UserError: the file with the choice is corrupt.
        """
        config, choice = self.config, self.choice(run.condition)
        if run.trial is not None:
            return trial_setting(config, run)
        if not config.is_tuned(run.condition.encoder) or not choice.exists():
            return {}
        assert config.search is not None
        trial, settings = read_json(choice).get("trial"), config.search.settings
        if not isinstance(trial, int) or not 0 <= trial < len(settings):
            raise UserError(
                f"{choice}: names no trial of the search; remove it and run the study again"
            )
        return settings[trial]

    def steps(self, run: Run) -> int:
        """Gradient steps of a run."""
        return self.config.optimizer_config(run.condition.policy, self.setting(run)).steps

    def train_config(self, run: Run) -> TrainConfig:
        """The training of a run.

        Raises:
            UserError: the file with the choice of its search is corrupt.
        """
        dataset = self.dataset(run.condition.task)
        return train_config(self.config, run, dataset, self.run(run), self.setting(run))

    def evaluate_config(self, run: Run) -> EvaluateConfig:
        task = run.condition.task
        init_states = self.init_states(task) if run.trial is None else self.tuning_states(task)
        return evaluate_config(self.config, run, self.run(run), init_states)

    def find(self, name: str) -> Run:
        """The run of a name such as `lift__vit_tiny__bc__scratch/seed0`.

        Raises:
            UserError: no such run.
        """
        known = {run.name: run for run in possible_runs(self.config)}
        if name not in known:
            raise unknown("run of the study", name, known)
        return known[name]


def open_directory(path: Path) -> StudyDirectory:
    """The study of a directory.

    Raises:
        UserError: it holds no study, or its `study.json` is corrupt.
    """
    file = path / STUDY
    if not file.is_file():
        raise UserError(
            f"{path}: is not a study, it has no {STUDY}; name the --out of a `fibopolicy study run`"
        )
    try:
        return StudyDirectory(path, from_json(read_json(file)))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = one_line(error)
        raise UserError(f"{file}: is not the configuration of a study ({reason})") from error


def create_or_extend(path: Path, config: StudyConfig) -> StudyDirectory:
    """Create the directory of a study, or extend the one there to a larger grid. The
    caller holds the study's lock.

    An extension removes the checks and costs, which compare all conditions of the grid,
    and the removed conditions, none of whose runs has begun.

    Raises:
        UserError: the directory holds something else, or a study that cannot be
            extended to this one, see `check_change`.
    """
    check_no_other_content(path)
    if not (path / STUDY).exists():
        facts = {**environment(), "host": platform.node(), "cores": usable_cores()}
        write_json(path / ENVIRONMENT, facts)
        write_json(path / STUDY, {**to_json(config), "versions": dict(versions())})
        return StudyDirectory(path, config)
    old, new = open_directory(path), StudyDirectory(path, config)
    warn_of_other_versions(old)
    if difference := first_difference(to_json(old.config), to_json(config)):
        check_change(old, config)
        old.checks.unlink(missing_ok=True)
        kept = {condition.name for condition in conditions(config)}
        for condition in conditions(old.config):
            old.cost(condition).unlink(missing_ok=True)
            if condition.name not in kept:
                shutil.rmtree(old.condition(condition), ignore_errors=True)
        for task in old.config.tasks:
            if task.dataset is None and task not in config.tasks:
                remove_shards(shards_folder(old.dataset(task)))  # of an interrupted collection
        document = read_json(path / STUDY)
        history: dict[str, Any] = {"versions": document.get("versions", {})}
        read = document.get("seeds_before_extension", [])
        complete = _complete_seeds(old)
        if complete and complete not in read and len(config.seeds) > len(old.config.seeds):
            read = [*read, complete]
        if read:
            history["seeds_before_extension"] = read
        write_json(path / STUDY, {**to_json(config), **history})
        with new.log.open("a", encoding="utf-8") as log:
            log.write(f"the study changes: {difference}\n")
    return new


def _complete_seeds(study: StudyDirectory) -> int:
    """Number of training seeds with results of every condition."""
    seeds = [run.seed for run in runs(study.config) if study.done(run).exists()]
    return sum(seeds.count(seed) == len(conditions(study.config)) for seed in set(seeds))


def check_change(study: StudyDirectory, config: StudyConfig) -> None:
    """Raise `UserError` unless the study may become `config`: only the grid differs,
    every run that has begun keeps its settings, and the data of every task stay valid.
    """
    old, new = to_json(study.config), to_json(config)
    if fixed := first_difference({**old, **{axis: new[axis] for axis in GRID}}, new):
        raise other_study(study.path, fixed)
    difference = first_difference(old, new)
    after = StudyDirectory(study.path, from_json(new))  # tuples become lists, as in study.json
    remaining = {run.name: run for run in possible_runs(after.config)}
    for run in possible_runs(study.config):
        if not (study.run(run).exists() or study.is_running(run)):
            continue
        if run.name not in remaining:
            reason = f"{run.name} has begun, and would be left out"
            raise other_study(study.path, difference, reason)
        if change := first_difference(_settings(study, run), _settings(after, remaining[run.name])):
            raise other_study(study.path, difference, f"{run.name} has begun with {change}")
    tasks = {task.short: task for task in after.config.tasks}
    for task in study.config.tasks:
        collected = task.dataset is None and study.dataset(task).exists()
        if (collected or study.init_states(task).exists()) and tasks.get(task.short) != task:
            reason = f"the data of {task.short} exist already"
            raise other_study(study.path, difference, reason)


def _settings(study: StudyDirectory, run: Run) -> dict[str, Any]:
    evaluation = asdict(study.evaluate_config(run))
    tuned = study.config.is_tuned(run.condition.encoder)
    return {**asdict(study.train_config(run)), "evaluation": evaluation, "tuned": tuned}


def other_study(path: Path, difference: str, reason: str = "") -> UserError:
    """The error for a directory or an archive of another study."""
    reason = reason and f"; {reason}"
    return UserError(
        f"{path}: holds a study of another configuration: {difference}{reason}; use that value or"
        " another --out"
    )


def check_no_other_content(path: Path) -> None:
    """Raise `UserError` for a directory with content that is not a study."""
    if (path / STUDY).exists() or not path.exists():
        return
    unfinished = {LOCK, ENVIRONMENT, f"{ENVIRONMENT}.partial", f"{STUDY}.partial"}
    if not path.is_dir() or any(p.name not in unfinished for p in path.iterdir()):
        raise UserError(f"{path}: is not empty and holds no study; choose another directory")


def warn_of_other_versions(study: StudyDirectory) -> None:
    """Warn if the study was begun with other versions than those installed."""
    before, now = read_json(study.path / STUDY).get("versions", {}), dict(versions())
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if names:
        changes = ", ".join(
            f"{name} {before.get(name, 'none')}, now {now.get(name, 'none')}" for name in names
        )
        warnings.warn(
            f"{study.path}: was begun with {changes}; rows may differ between versions",
            stacklevel=2,
        )


def write_json(path: Path, document: Any) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is corrupt.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = message_of(error)
        raise UserError(
            f"{path}: is not valid JSON ({reason}); restore it, or remove it and run the"
            " study again"
        ) from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document
