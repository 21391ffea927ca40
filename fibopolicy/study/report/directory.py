"""What lies in a study directory: the grid, and of each cell its costs and its runs,
finished, failed or missing.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import EpisodeResult
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.records import own_rows


class State(Enum):
    """How far a run is."""

    DONE = "done"
    FAILED = "failed"
    UNREADABLE = "unreadable"
    UNFINISHED = "unfinished"
    MISSING = "not started"


@dataclass(frozen=True)
class SeedRun:
    """One training seed of a cell.

    Args:
        seed: of the training.
        folder: its run directory; `None` where the study has not begun the cell.
        state: only a run that is `DONE` counts.
        rows: of its evaluation, by index; none unless it is done.
        figures: what `done.json` holds: seconds, samples per second, ...
        error: why it failed or cannot be read, one line.
        log: path of its log, within the study.
    """

    seed: int
    folder: Path | None
    state: State
    rows: tuple[EpisodeResult, ...] = ()
    figures: Mapping[str, float] | None = None
    error: str = ""
    log: str = ""


@dataclass(frozen=True)
class Cell:
    """One combination, trained with several seeds.

    Args:
        task, encoder, head, regime: what it is.
        folder: `None` where the study has not begun it.
        cost: what `cost.json` holds; empty before it was measured.
        runs: one per seed of the study.
    """

    task: str
    encoder: str
    head: str
    regime: str
    folder: Path | None
    cost: Mapping[str, Any]
    runs: tuple[SeedRun, ...]

    @property
    def done(self) -> tuple[SeedRun, ...]:
        return tuple(run for run in self.runs if run.state is State.DONE)

    @property
    def setting(self) -> tuple[str, str]:
        """What stays the same where encoders are compared: head and regime."""
        return self.head, self.regime


@dataclass(frozen=True)
class Study:
    """A study as its directory tells it.

    Args:
        directory: where it lies.
        name: its own.
        tasks, encoders, heads, regimes: what it crosses, in its order; tasks by their
            ids.
        seeds: of the trainings.
        steps: gradient steps of the runs of each head.
        episodes: start states per run.
        starts_seed: of their set.
        margin: by how much a candidate may be worse and still count as not inferior, in
            (0, 1); `None` where none was fixed.
        control: the encoder that all others are compared with.
        document: all of `study.json`, each head with its settings.
        environment: hardware and versions.
        cells: every combination, in the order of the axes.
    """

    directory: Path
    name: str
    tasks: tuple[str, ...]
    encoders: tuple[str, ...]
    heads: tuple[str, ...]
    regimes: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: Mapping[str, int]
    episodes: int
    starts_seed: int
    margin: float | None
    control: str
    document: Mapping[str, Any]
    environment: Mapping[str, Any]
    cells: tuple[Cell, ...]

    @property
    def settings(self) -> list[tuple[str, str]]:
        """Every head and regime that some cell has."""
        return list(dict.fromkeys(cell.setting for cell in self.cells))


def read_study(directory: Path) -> Study:
    """Read a study directory. A run that cannot be read counts as not done, and a
    warning names the file.

    Raises:
        UserError: it is none, or its description is damaged.
    """
    path = directory / "study.json"
    if not path.is_file():
        raise UserError(
            f"{directory}: is no study directory, it has no study.json; name the folder of a"
            " fibopolicy study run"
        )
    document = _object(path)
    try:
        axes = {
            "task": [str(one["task"]) for one in document["tasks"]],
            "encoder": [str(one["name"]) for one in document["encoders"]],
            "head": [str(one["name"]) for one in _heads(document)],
            "regime": [str(one) for one in document["regimes"]],
        }
        seeds = tuple(int(seed) for seed in document["seeds"])
        steps, episodes, starts_seed = (
            int(document[name]) for name in ("steps", "episodes", "starts_seed")
        )
        own_steps = {
            str(one["name"]): int(one["steps"])
            for one in _heads(document)
            if one.get("steps") is not None
        }
        margin = None if document.get("margin") is None else float(document["margin"])
        control = str(document["control"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path}: is not the description of a study ({' '.join(repr(error).split())})"
        ) from error
    if margin is not None and not 0 < margin < 1:
        raise UserError(
            f"{path}: margin must lie between 0 and 1, e.g. 0.05 for five percentage points, got"
            f" {margin}"
        )
    if control not in axes["encoder"]:
        raise UserError(
            f"{path}: control {control} is none of its encoders: {', '.join(axes['encoder'])}"
        )
    found = _cells(directory, axes)
    steps_of = {head: own_steps.get(head, steps) for head in axes["head"]}
    environment = directory / "environment.json"
    return Study(
        directory,
        str(document.get("name") or directory.resolve().name),
        tasks=tuple(axes["task"]),
        encoders=tuple(axes["encoder"]),
        heads=tuple(axes["head"]),
        regimes=tuple(axes["regime"]),
        seeds=seeds,
        steps=steps_of,
        episodes=episodes,
        starts_seed=starts_seed,
        margin=margin,
        control=control,
        document={**document, "heads": _heads(document)},
        environment=_object(environment) if environment.is_file() else {},
        cells=tuple(
            _cell(directory, key, found[key], seeds, steps_of[key[2]], starts_seed) for key in found
        ),
    )


def _heads(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of `study.json`, where heads are names alone in studies of before they could have
    settings.
    """
    return [one if isinstance(one, dict) else {"name": one} for one in document["heads"]]


def _cells(directory: Path, axes: dict[str, list[str]]) -> dict[tuple[str, ...], Path | None]:
    """The folder of every combination, `None` where it has none, in the order of the
    axes, which grow by what lies there.
    """
    found: dict[tuple[str, ...], Path | None] = dict.fromkeys(itertools.product(*axes.values()))
    for description in sorted((directory / "cells").glob("*/cell.json")):
        told = _object(description)
        if lacking := [name for name in axes if not isinstance(told.get(name), str)]:
            raise UserError(
                f"{description}: lacks {', '.join(lacking)}; run the study again to restore it"
            )
        key = tuple(told[name] for name in axes)
        for name, value in zip(axes, key, strict=True):
            if value not in axes[name]:
                axes[name].append(value)
        found[key] = description.parent
    order = [{value: i for i, value in enumerate(values)} for values in axes.values()]
    return {
        key: found[key]
        for key in sorted(found, key=lambda key: [o[v] for o, v in zip(order, key, strict=True)])
    }


def _cell(
    directory: Path,
    key: tuple[str, ...],
    folder: Path | None,
    seeds: Sequence[int],
    steps: int,
    starts_seed: int,
) -> Cell:
    cost: Mapping[str, Any] = {}
    if folder is not None and (folder / "cost.json").is_file():
        cost = _object(folder / "cost.json")
    runs = tuple(
        (
            SeedRun(seed, None, State.MISSING)
            if folder is None
            else _run(directory, folder / f"seed{seed}", key[0], seed, steps, starts_seed)
        )
        for seed in seeds
    )
    task, encoder, head, regime = key
    return Cell(task, encoder, head, regime, folder, cost, runs)


def _run(
    directory: Path, folder: Path, task: str, seed: int, steps: int, starts_seed: int
) -> SeedRun:
    try:
        if (folder / "done.json").is_file():
            done = _object(folder / "done.json")
            rows = own_rows(folder, done, steps, starts_seed)
            if rows[0].task != task:
                raise UserError(
                    f"{RunDirectory(folder).episodes}: holds episodes of {rows[0].task},"
                    f" expected {task}"
                )
            return SeedRun(seed, folder, State.DONE, rows, done)
        if (folder / "failed.json").is_file():
            told = _object(folder / "failed.json")
            error, log = (" ".join(str(told.get(name) or "").split()) for name in ("error", "log"))
            return SeedRun(
                seed, folder, State.FAILED, error=error or "no reason was recorded", log=log
            )
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        return SeedRun(
            seed,
            folder,
            State.UNREADABLE,
            error=str(error).replace(f"{directory}/", ""),
            log=_log(directory, folder),
        )
    if not folder.is_dir():
        return SeedRun(seed, folder, State.MISSING)
    return SeedRun(seed, folder, State.UNFINISHED, log=_log(directory, folder))


def _log(directory: Path, folder: Path) -> str:
    """Of a run that does not name its log: the file beside its directory, where there is one."""
    path = folder.with_name(f"{folder.name}.log")
    return path.relative_to(directory).as_posix() if path.is_file() else ""


def _object(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: is not whole JSON ({' '.join(str(error).split())}); run the study again to"
            " restore it"
        ) from error
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(document).__name__}")
    return document


def printed(task: str) -> str:
    """A task as it is printed: "Lift" of "fibopolicy/Lift-v0", "robosuite/Lift" of robosuite's."""
    suite, _, name = task.partition("/")
    return re.sub(r"-v\d+$", "", name) if suite == "fibopolicy" else task
