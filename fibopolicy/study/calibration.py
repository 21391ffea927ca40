"""How long a study will take, from a few steps of every cell."""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from fibopolicy.evaluation.episodes import Episode
from fibopolicy.evaluation.init_states import load_starts
from fibopolicy.evaluation.policy_runner import BATCH, PolicyRunner
from fibopolicy.evaluation.simulator import EpisodeRunner
from fibopolicy.policies import Policy
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.study.cells import Cell, cells, runs, train_config
from fibopolicy.study.directory import StudyDirectory, progress_of
from fibopolicy.study.prepare import task_env
from fibopolicy.training.trainer import train
from fibopolicy.utils.system import torch_threads

#: Gradient steps and policy calls of a calibration; the first ones do not count, since
#: they compile and fill caches.
STEPS, CALLS = 6, 4
WARM_UP = 2


def calibrate(
    study: StudyDirectory, known: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Seconds that one run of each cell is expected to take: `train_s`, and
    `evaluate_s`, at most, as if all episodes failed.

    They are those of the quickest step seen, so of a machine with nothing else to do.

    A cell that fails already here has its `error` instead: it is told, and the others
    go on.

    Args:
        known: what was found before; cells that did not fail then are not timed again.
    """
    found = {name: one for name, one in known.items() if "error" not in one}
    with torch_threads(study.config.threads):
        for cell in tqdm(cells(study.config), desc="calibrate", unit="cell", disable=None):
            if cell.name in found:
                continue
            try:
                found[cell.name] = _cell(study, cell)
            except Exception as error:
                found[cell.name] = {"error": " ".join(f"{type(error).__name__}: {error}".split())}
    return found


def _cell(study: StudyDirectory, cell: Cell) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="fibopolicy-calibration-") as folder, _quiet():
        out = Path(folder) / "run"
        config = train_config(study.config, cell, 0, study.dataset(cell.task), out)
        policy = train(
            replace(config, optimizer=replace(config.optimizer, steps=STEPS), log_every=1)
        ).policy
        rows = [
            json.loads(line)
            for line in RunDirectory(out).metrics.read_text(encoding="utf-8").splitlines()
        ]
    step_s = min(config.optimizer.batch_size / row["samples_per_s"] for row in rows[WARM_UP:])
    control_step_s, horizon = _control_step(study, cell, policy.eval())
    return {
        "train_s": config.optimizer.steps * step_s,
        "evaluate_s": study.config.episodes * horizon * control_step_s,
    }


def _control_step(study: StudyDirectory, cell: Cell, policy: Policy) -> tuple[float, int]:
    """Seconds of a control step, its share of the policy's call included, and the steps
    of a whole episode.
    """
    actor = PolicyRunner(policy, batch=BATCH)
    calls: list[float] = []
    simulated: list[float] = []
    with task_env(study, cell.task) as env:
        horizon = env.horizon
        observation = env.set_state(load_starts(study.starts(cell.task)).states[0])
        episode, requests = (
            EpisodeRunner(env, observation, actor.n_obs_steps),
            [Episode(i) for i in range(BATCH)],
        )
        while len(calls) < CALLS and not episode.done:
            for request in requests:
                request.window = {
                    key: np.stack([o[key] for o in episode.window]) for key in observation
                }
            began = time.perf_counter()
            actions = actor.act(requests)[0]
            called, before = time.perf_counter(), episode.steps
            episode.execute(actions)
            calls.append((called - began) / BATCH / len(actions))
            simulated.append((time.perf_counter() - called) / (episode.steps - before))
    return min(calls) + min(simulated), horizon


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it, training does not announce itself."""
    logger = logging.getLogger("fibopolicy.training")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def estimate(
    study: StudyDirectory, calibrated: Mapping[str, Mapping[str, Any]], slots: int
) -> tuple[float, int]:
    """Seconds that the runs which are not done will still take, `slots` at a time, and
    their number.
    """
    left: list[float] = []
    for run in runs(study.config):
        if not study.done(run).exists():
            found, (steps, episodes) = calibrated.get(run.cell.name, {}), progress_of(study, run)
            training = 1 - min(steps / study.config.optimizer_config(run.cell.head).steps, 1.0)
            measuring = 1 - min(episodes / study.config.episodes, 1.0)
            left.append(
                training * found.get("train_s", 0.0) + measuring * found.get("evaluate_s", 0.0)
            )
    return max(sum(left) / slots, max(left, default=0.0)), len(left)


def told(
    study: StudyDirectory, calibrated: Mapping[str, Mapping[str, Any]], slots: int
) -> list[str]:
    """The estimate in words, cell by cell and in all."""
    lines = [f"{name}: {_cell_told(found)}" for name, found in calibrated.items()]
    seconds, left = estimate(study, calibrated, slots)
    return [
        *lines,
        (
            f"{left} runs to do, {slots} at a time: about {duration(seconds)}, and what each run"
            " takes to start up"
        ),
    ]


def _cell_told(found: Mapping[str, Any]) -> str:
    if "error" in found:
        return f"fails already while it is calibrated: {found['error']}"
    return f"train {duration(found['train_s'])}, evaluate up to {duration(found['evaluate_s'])}"


def duration(seconds: float) -> str:
    """ "35 s", "12 min" or "3 h 20 min"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
