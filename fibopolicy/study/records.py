"""The content of a study's directory: every condition with its costs, and every run
with its state and rows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from statistics import fmean
from typing import Any

from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import EpisodeResult, Selector, not_evaluated, read_rows
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.config import StudyConfig, to_json
from fibopolicy.study.directory import (
    ENVIRONMENT,
    STUDY,
    StudyDirectory,
    open_directory,
    read_json,
    write_json,
)
from fibopolicy.study.grid import Condition, Run, Trial, conditions, rung_trials

#: Key in the `done.json` of a trial whose training diverged: how.
DIVERGED = "diverged"


class State(Enum):
    """The state of a run."""

    DONE = "done"
    RUNNING = "running"
    FAILED = "failed"
    UNREADABLE = "unreadable"
    UNFINISHED = "unfinished"
    MISSING = "not started"


@dataclass(frozen=True)
class RunRecord:
    """One training seed of a condition.

    Args:
        seed: training seed.
        folder: run directory.
        state: only a run that is `DONE` counts.
        rows: rows of the study's evaluation, by index; empty unless the run is done.
        perturbed: rows of each of the study's perturbations, by index; likewise.
        costs: the content of `done.json`: seconds, samples per second, memory.
        error: why the run failed or cannot be read, in one line.
        log: path of its log, relative to the study; empty if there is none.
        attempts: how often it has failed.
        trial: trial of the search; `None` for a run that counts.
    """

    seed: int
    folder: Path
    state: State
    rows: tuple[EpisodeResult, ...] = ()
    perturbed: Mapping[str, tuple[EpisodeResult, ...]] = field(default_factory=dict)
    costs: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""
    log: str = ""
    attempts: int = 0
    trial: Trial | None = None

    @property
    def successes(self) -> int:
        return sum(row.success for row in self.rows)


@dataclass(frozen=True)
class ConditionRecord:
    """A condition with its runs.

    Args:
        condition: the combination of the grid.
        cost: the content of `cost.json`; empty before the encoders are measured.
        runs: one per seed of the study.
        rungs: the trials of its search, rung by rung, as far as it is known which take
            part; empty without a search.
        chosen: the setting that the search has chosen; `None` before that, or without a search.
        steps: gradient steps of its runs.
    """

    condition: Condition
    cost: Mapping[str, Any]
    runs: tuple[RunRecord, ...]
    rungs: tuple[tuple[RunRecord, ...], ...] = ()
    chosen: Mapping[str, Any] | None = None
    steps: int = 0

    @property
    def task(self) -> str:
        """Task id."""
        return self.condition.task.task

    @property
    def encoder(self) -> str:
        return self.condition.encoder.name

    @property
    def policy(self) -> str:
        return self.condition.policy.name

    @property
    def init(self) -> str:
        return self.condition.init

    @property
    def setting(self) -> tuple[str, str]:
        """Policy and the study's init; encoders are compared with the same setting."""
        return self.policy, self.condition.study_init

    @property
    def done(self) -> tuple[RunRecord, ...]:
        return tuple(run for run in self.runs if run.state is State.DONE)

    def at(self, seeds: int) -> ConditionRecord:
        """This condition with its first training seeds only."""
        return replace(self, runs=self.runs[:seeds])

    @property
    def trials(self) -> tuple[RunRecord, ...]:
        """All trials of its search."""
        return tuple(trial for rung in self.rungs for trial in rung)


@dataclass(frozen=True)
class Study:
    """A study, as read from its directory or its archive.

    Args:
        directory: its paths and configuration.
        conditions: every condition of the grid.
        environment: hardware and date.
        versions: versions of the packages that it was begun with.
        archived: whether it comes from an archive, so that links to its files would not
            work.
        seeds_before_extension: how many training seeds had results, each time that
            seeds were added to such a study.
    """

    directory: StudyDirectory
    conditions: tuple[ConditionRecord, ...]
    environment: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    archived: bool = False
    seeds_before_extension: tuple[int, ...] = ()

    @property
    def config(self) -> StudyConfig:
        return self.directory.config

    @property
    def path(self) -> Path:
        return self.directory.path

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task ids."""
        return tuple(task.task for task in self.config.tasks)

    @property
    def encoders(self) -> tuple[str, ...]:
        return tuple(encoder.name for encoder in self.config.encoders)

    @property
    def policies(self) -> tuple[str, ...]:
        return tuple(policy.name for policy in self.config.policies)

    @property
    def inits(self) -> tuple[str, ...]:
        return self.config.inits

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.config.seeds

    def label(self, encoder: str) -> str:
        """An encoder in print; marked if the study's search leaves it out."""
        untuned = any(one.untuned for one in self.config.encoders if one.name == encoder)
        return f"{encoder} (untuned)" if untuned else encoder

    def planned_trials(self, one: ConditionRecord) -> int:
        """Number of trials in the search of a condition."""
        search = self.config.search
        return sum(search.sizes) if search and not one.condition.encoder.untuned else 0

    @property
    def episodes(self) -> int:
        """Initial states that every run is evaluated on."""
        return self.config.episodes

    @property
    def init_seed(self) -> int:
        return self.config.init_seed

    @property
    def margin(self) -> float | None:
        return self.config.margin

    @property
    def baseline(self) -> str:
        """The encoder that all others are compared with."""
        return self.config.baseline

    @property
    def document(self) -> dict[str, Any]:
        """The configuration as plain JSON."""
        return to_json(self.config)

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Every combination of policy and init."""
        return list(dict.fromkeys(one.setting for one in self.conditions))

    def link(self, path: Path) -> str:
        """Link to a file or folder of the study from its folder `report`; empty if the
        reader lacks it.
        """
        if self.archived or not path.exists():
            return ""
        relative = path.relative_to(self.path).as_posix()
        return f"../{relative}{'/' * path.is_dir()}"


def read_study(path: Path) -> Study:
    """Read the directory of a study, finished or not. A run that cannot be read counts
    as not done, and a warning names the file.

    Raises:
        UserError: `path` is not a study, or a JSON file in it is corrupt.
    """
    directory = open_directory(path)
    found = []
    for condition in conditions(directory.config):
        cost, every = directory.cost(condition), [Run(condition, s) for s in directory.config.seeds]
        tuned = directory.config.is_tuned(condition.encoder)
        over = tuned and not directory.awaits_search(every[0])
        found.append(
            ConditionRecord(
                condition,
                read_json(cost) if cost.exists() else {},
                tuple(read_run(directory, run) for run in every),
                read_rungs(directory, condition) if tuned else (),
                directory.setting(every[0]) if over else None,
                directory.steps(every[0]),
            )
        )
    environment, document = path / ENVIRONMENT, read_json(path / STUDY)
    return Study(
        directory,
        tuple(found),
        read_json(environment) if environment.exists() else {},
        document.get("versions", {}),
        seeds_before_extension=tuple(document.get("seeds_before_extension", ())),
    )


def read_run(study: StudyDirectory, run: Run) -> RunRecord:
    """The state of a run, with its rows if it is done."""
    folder, log = study.run(run), study.run_log(run)
    record = RunRecord(
        run.seed,
        folder,
        State.UNFINISHED if folder.is_dir() else State.MISSING,
        log=log.relative_to(study.path).as_posix() if log.exists() else "",
        trial=run.trial,
    )
    try:
        if study.done(run).exists():
            costs = read_json(study.done(run))
            found: dict[str, tuple[EpisodeResult, ...]] = {"": ()}
            if DIVERGED not in costs:  # a trial that has diverged was not evaluated
                found = evaluated_rows(study, run, costs)
            rows = found.pop("")
            return replace(
                record, state=State.DONE, rows=rows, perturbed=found, costs=costs, log=""
            )
        if study.is_running(run):
            return replace(record, state=State.RUNNING)
        if study.failed(run).exists():
            failure = read_json(study.failed(run))
            error = " ".join(str(failure.get("error") or "no reason was recorded").split())
            attempts = int(failure.get("attempts", 0))
            return replace(record, state=State.FAILED, error=error, attempts=attempts)
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        reason = str(error).replace(f"{study.path}/", "")
        return replace(record, state=State.UNREADABLE, error=reason)
    return record


def evaluated_rows(
    study: StudyDirectory, run: Run, costs: Mapping[str, Any]
) -> dict[str, tuple[EpisodeResult, ...]]:
    """The rows of the study's evaluation of a run, by index, for each of its
    perturbations and, under the empty name, without one. The run may have been
    evaluated again, with other settings or on more initial states.

    Args:
        costs: the content of its `done.json`.

    Raises:
        UserError: there are none, or they are of another task.
    """
    folder, task = study.run(run), run.condition.task.task
    selector = Selector(
        step=study.steps(run),
        checkpoint="ema",
        init_seed=study.evaluate_config(run).init_seed,
        max_steps=costs.get("max_steps"),
        quality=costs.get("quality"),
    )
    path = RunDirectory(folder).episodes
    if not (every := read_rows(path)):
        raise not_evaluated(folder)
    found = {}
    for name in ("", *study.evaluate_config(run).perturb):
        selected = [row for row in every if row.perturbation == name]
        rows = replace(selector, perturb=name).select(selected, folder)
        if rows[0].task != task:
            raise UserError(f"{path}: holds episodes of {rows[0].task}, expected {task}")
        found[name] = tuple(row for row in rows if row.index < costs.get("episodes", len(rows)))
    return found


def read_rungs(study: StudyDirectory, condition: Condition) -> tuple[tuple[RunRecord, ...], ...]:
    """The trials of a condition, rung by rung. The last rung here is the first with an
    unfinished trial, or the last of the search.
    """
    assert study.config.search is not None
    sizes, found = study.config.search.sizes, []
    alive = list(range(sizes[0]))
    for rung in range(len(sizes)):
        trials = rung_trials(study.config, condition, rung)
        records = tuple(read_run(study, trials[number]) for number in alive)
        found.append(records)
        if any(record.state is not State.DONE for record in records) or rung + 1 == len(sizes):
            break
        alive = sorted(ranking(records)[: sizes[rung + 1]])
    return tuple(found)


def ranking(rung: Sequence[RunRecord]) -> list[int]:
    """The settings of finished trials by number, best first: by successes on the same
    initial states; ties are broken by the lower training loss, then by number. Settings
    whose training diverged come last.
    """

    def key(record: RunRecord) -> tuple[bool, int, float, int]:
        assert record.trial is not None
        diverged = DIVERGED in record.costs
        return diverged, -record.successes, final_loss(record), record.trial.number

    return [key(record)[-1] for record in sorted(rung, key=key)]


def final_loss(record: RunRecord) -> float:
    """Mean of the last ten logged training losses; infinite without any."""
    logged = RunDirectory(record.folder).read_metrics()
    losses = [float(row["loss"]) for row in logged if "loss" in row][-10:]
    return fmean(losses) if losses else math.inf


def record_failure(study: StudyDirectory, run: Run, error: str, attempts: int) -> None:
    """Write the `failed.json` of a run."""
    write_json(study.failed(run), {"error": error, "attempts": attempts})


def failed_attempts(study: StudyDirectory, run: Run) -> int:
    """How often a run has failed so far."""
    failed = study.failed(run)
    return int(read_json(failed).get("attempts", 0)) if failed.exists() else 0
