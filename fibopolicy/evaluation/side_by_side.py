"""Two checkpoints on the same start states in one video."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.registry import task_id_of
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.evaluate_run import default_starts_path, make_env
from fibopolicy.evaluation.film import Clip, film
from fibopolicy.evaluation.init_states import load_starts
from fibopolicy.evaluation.measure import default_workers, make_actor, weights_digest
from fibopolicy.evaluation.scheduler import VectorRollout
from fibopolicy.evaluation.video import write_grid
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.statistics.compare import Comparison, Method


def film_side_by_side(
    comparison: Comparison, path: Path, episodes: int, starts: Path | None = None
) -> None:
    """Write an mp4 of the baseline's and the candidate's first checkpoint, one row per
    start state.

    Start states come first that one of them alone solves, the baseline's and the
    candidate's by turns.

    Args:
        starts: file of the start states; by default, what `fibopolicy evaluate` left in
            the baseline's run directory.

    Raises:
        UserError: a checkpoint is not the evaluated one any more; the start states
            cannot be found.
    """
    sides = comparison.methods[:2]
    shown = [
        comparison.starts[i]
        for i in by_turns(*(side.outcomes(comparison.starts)[0] for side in sides))[:episodes]
    ]
    (left, fps), (right, _) = (_film_checkpoint(side, shown, starts) for side in sides)
    clips = [
        clip
        for start in shown
        if start in left and start in right
        for clip in (left[start], right[start])
    ]
    write_grid(path, clips, fps, columns=2, headings=[side.name for side in sides])


def by_turns(baseline: NDArray[np.bool_], candidate: NDArray[np.bool_]) -> list[int]:
    """Indices of paired outcomes `(n,)`: solved by one alone, now the baseline, now the
    candidate; then the others in order.
    """
    first, second, rest = (
        np.flatnonzero(one).tolist()
        for one in (baseline > candidate, candidate > baseline, baseline == candidate)
    )
    turns = itertools.zip_longest(first, second)
    return [*(index for turn in turns for index in turn if index is not None), *rest]


def _film_checkpoint(
    side: Method, shown: Sequence[str], starts: Path | None
) -> tuple[dict[str, Clip], float]:
    """Clips by identity of the start state, and frames per second."""
    run = side.runs[0]
    rows = {row.start: row for row in side.rows[0] if row.start in shown}
    first = next(iter(rows.values()))
    config = EvaluateConfig(
        run, weights=first.weights, horizon=first.horizon, quality=first.quality, starts=starts
    )
    loaded = load_policy(run, weights=first.weights)
    if (loaded.step, weights_digest(loaded.policy)) != (first.checkpoint_step, first.policy):
        raise UserError(
            f"{run}: its weights, now of step {loaded.step}, are not those that the compared rows"
            f" of step {first.checkpoint_step} are of; evaluate it again, or leave --video out"
        )
    cameras = list(loaded.policy.shapes.images)
    if not cameras:
        raise UserError(
            f"{run}: its policy sees no camera, so there is nothing to film; leave --video out"
        )
    path = starts or default_starts_path(run, first.starts_seed, first.quality)
    stored = load_starts(path)
    place = {stored.identity(i): i for i in range(len(stored))}
    if missing := [row.index for row in rows.values() if row.start not in place]:
        raise UserError(
            f"{path}: lacks start state {missing[0]} of {run}; name the file that it was evaluated"
            " on with --starts"
        )
    workers = default_workers(task_id_of(loaded.env_args), len(shown))
    with VectorRollout(
        make_env(config, loaded), loaded.policy.config.n_obs_steps, workers
    ) as rollouts:
        info = rollouts.info()
        actor = make_actor(loaded.policy, first.batch, first.threads, info)
        wanted = [replace(rows[start], index=place[start]) for start in shown]
        clips = film(rollouts, actor, stored, wanted, cameras[0])
    return {start: clips[place[start]] for start in shown if place[start] in clips}, info.control_hz
