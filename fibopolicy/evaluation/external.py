"""Read episode results that other programs wrote, for `compare` and `results`.

- A table, CSV with a header or JSON lines, one episode per row. Columns: `method`,
  `seed` (the training seed), `init_state` (any name of the initial state), `success`;
  if known also `task`, `steps` and `max_steps`. The names of robostats' records are
  read too: `policy_id`, which stands for one checkpoint, `scenario_id` and `task_id`.
- `eval_info.json` of LeRobot's `lerobot-eval`: one checkpoint. Episodes are named by
  their seed, or by task and number where the file does not hold seeds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fibopolicy.errors import UserError
from fibopolicy.evaluation.episodes import EpisodeResult
from fibopolicy.utils.files import expanded

#: LeRobot's file of results.
EVAL_INFO = "eval_info.json"
#: Columns of robostats' records, and what they are called here.
_ROBOSTATS = {"policy_id": "method", "scenario_id": "init_state", "task_id": "task"}
_SUCCESS = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}

#: Results of each training seed of each method.
Table = dict[str, dict[str, list[EpisodeResult]]]


def external_file(path: Path) -> Path | None:
    """The file of external results that a path stands for; `None` for a run directory."""
    path = expanded(path)
    if path.is_dir() and (path / EVAL_INFO).is_file():
        return path / EVAL_INFO
    return path if path.suffix in (".csv", ".json", ".jsonl") else None


def read_external(path: Path) -> Table:
    """The results in a table, or in LeRobot's `eval_info.json`. The method of the
    latter has the name of its folder.

    Raises:
        UserError: the file is missing or not one of these; a column is missing or
            empty; a value is not a success; an initial state appears twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from error
    try:
        if path.suffix == ".json":
            return {path.absolute().parent.name: {"0": _eval_info(path, json.loads(text))}}
        if path.suffix == ".jsonl":
            lines = filter(str.strip, text.splitlines())
            rows: Iterable[Mapping[str, Any]] = [json.loads(line) for line in lines]
        else:
            rows = csv.DictReader(text.splitlines())
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from error
    return _table(path, rows)


def _table(path: Path, rows: Iterable[Mapping[str, Any]]) -> Table:
    found: Table = {}
    seen: set[tuple[str, str, str, str]] = set()
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        values = {_ROBOSTATS.get(name, name): value for name, value in row.items()}
        if "policy_id" in row:  # where `seed` is that of the episode
            values["seed"] = "0"
        for name in ("method", "seed", "init_state", "success"):
            if values.get(name) in (None, ""):
                hint = "; write 0 if every method is a single checkpoint" * (name == "seed")
                raise UserError(f"{where} has no {name}, expected in every row{hint}")
        task = str(values.get("task") or "")
        method, seed, init_state = (str(values[name]) for name in ("method", "seed", "init_state"))
        if (task, method, seed, init_state) in seen:
            raise UserError(
                f"{where}: initial state {init_state} appears twice for {method}, seed {seed};"
                " expected one episode for each"
            )
        seen.add((task, method, seed, init_state))
        results = found.setdefault(method, {}).setdefault(seed, [])
        results.append(
            _result(
                task,
                len(results),
                init_state,
                _success(where, values["success"]),
                _count(where, values, "steps"),
                _count(where, values, "max_steps"),
            )
        )
    if not found:
        raise UserError(f"{path}: holds no row")
    return found


def _eval_info(path: Path, document: Any) -> list[EpisodeResult]:
    """The episodes of both layouts: one task with `per_episode`, or `per_task`."""
    return [
        _result(task, index, init_state, _success(f"{path}: episode {index}", success))
        for index, (task, init_state, success) in enumerate(_episodes(path, document))
    ]


def _episodes(path: Path, document: Any) -> Iterator[tuple[str, str, object]]:
    """Task, name of the initial state, and success of each episode."""
    try:
        if "per_episode" in document:
            for episode in document["per_episode"]:
                seed = episode.get("seed")
                number = f"episode {episode['episode_ix']}" if seed is None else f"seed {seed}"
                yield "", number, episode["success"]
        else:
            for task in document["per_task"]:
                for index, success in enumerate(task["metrics"]["successes"]):
                    name = f"task {task['task_id']} episode {index}"
                    yield task["task_group"], name, success
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: is not LeRobot's {EVAL_INFO} (no per_episode or per_task: {error!r})"
        ) from error


def _success(where: str, value: object) -> bool:
    if (success := _SUCCESS.get(str(value).strip().lower())) is None:
        raise UserError(f"{where}: success is {value!r}, expected 0, 1, true or false")
    return success


def _count(where: str, values: Mapping[str, Any], name: str) -> int:
    """A number of steps; 0 if it is unknown."""
    try:
        return int(values.get(name) or 0)
    except ValueError as error:
        raise UserError(f"{where}: {name} is {values[name]!r}, expected an integer") from error


def _result(
    task: str, index: int, init_state: str, success: bool, steps: int = 0, max_steps: int = 0
) -> EpisodeResult:
    return EpisodeResult(
        task=task,
        index=index,
        seed=0,
        success=success,
        steps=steps,
        total_reward=0.0,
        wall_s=0.0,
        checkpoint_step=0,
        checkpoint="",
        init_seed=0,
        max_steps=max_steps,
        quality="",
        init_state=init_state,
    )
