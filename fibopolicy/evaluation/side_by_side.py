"""Two checkpoints on the same initial states in one video."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.registry import named_task
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import VIDEO_SIZE, EvaluateConfig, Quality
from fibopolicy.evaluation.evaluate import make_evaluator, weights_digest
from fibopolicy.evaluation.init_states import load_init_states
from fibopolicy.evaluation.video import episode_clips
from fibopolicy.policies.run_directory import RunDirectory, load_policy
from fibopolicy.report.video import Clip, write_video
from fibopolicy.statistics.compare import Comparison, Method
from fibopolicy.utils.system import device_name


def write_side_by_side(
    comparison: Comparison,
    path: Path,
    episodes: int,
    init_states: Path | None = None,
    *,
    size: int = VIDEO_SIZE,
) -> None:
    """Write an mp4 of the baseline's and the candidate's first checkpoint, one row per
    initial state. Initial states that only one of them solves come first.

    Args:
        init_states: file of the initial states; by default the one that `fibopolicy
            evaluate` left in the run directory.
        size: height of each view, pixels.

    Raises:
        UserError: a checkpoint has changed since its evaluation; the initial states
            cannot be found.
    """
    methods = comparison.methods[:2]
    order = alternate(*(method.outcomes(comparison.init_states)[0] for method in methods))
    shown = [comparison.init_states[i] for i in order[:episodes]]
    (left, fps), (right, _) = (
        _checkpoint_clips(method, shown, init_states, size) for method in methods
    )
    both = [digest for digest in shown if digest in left and digest in right]
    clips = [clip for digest in both for clip in (left[digest], right[digest])]
    write_video(path, clips, fps, columns=2, headings=[method.name for method in methods])


def alternate(baseline: NDArray[np.bool_], candidate: NDArray[np.bool_]) -> list[int]:
    """Indices of paired outcomes `(n,)`: first those that only one method solves, the
    baseline and the candidate in turn, then the others.
    """
    only_baseline = np.flatnonzero(baseline > candidate).tolist()
    only_candidate = np.flatnonzero(candidate > baseline).tolist()
    turns = itertools.zip_longest(only_baseline, only_candidate)
    different = [index for turn in turns for index in turn if index is not None]
    return [*different, *np.flatnonzero(baseline == candidate).tolist()]


def _checkpoint_clips(
    method: Method, shown: Sequence[str], init_states: Path | None, size: int
) -> tuple[dict[str, Clip], float]:
    """Clips by digest of the initial state, and frames per second."""
    run = method.runs[0]
    rows = {row.init_state: row for row in method.rows[0] if row.init_state in shown}
    first = next(iter(rows.values()))
    device = "cpu" if first.device == "cpu" else None
    files = RunDirectory(run)
    task = first.task if files.read_tasks() else None
    loaded = load_policy(run, checkpoint=first.checkpoint, device=device, task=task)
    if (loaded.step, weights_digest(loaded.policy)) != (first.checkpoint_step, first.policy):
        raise UserError(
            f"{run}: its weights, of step {loaded.step}, differ from those of the compared rows, of"
            f" step {first.checkpoint_step}; evaluate it again, or leave --video out"
        )
    named = named_task(first.task, files.read_config())
    path = init_states or files.init_states(first.init_seed, first.quality, named)
    stored = load_init_states(path)
    position = {stored.identity(i): i for i in range(len(stored))}
    if missing := [row.index for row in rows.values() if row.init_state not in position]:
        raise UserError(
            f"{path}: lacks initial state {missing[0]} of {run}; pass the file of its evaluation"
            " with --init-states"
        )
    config = EvaluateConfig(
        run,
        task=None if task else named or None,
        episodes=len(shown),
        max_steps=first.max_steps,
        quality=cast(Quality, first.quality),
        batch_size=first.batch_size,
        threads=first.threads,
    )
    with make_evaluator(config, loaded) as evaluator:
        if (device := device_name(evaluator.runner.device)) != first.device:
            raise UserError(
                f"{run}: its rows were computed on {first.device}, and on {device} episodes may end"
                " differently; evaluate it again, or leave --video out"
            )
        to_record = [replace(rows[digest], index=position[digest]) for digest in shown]
        clips, fps = episode_clips(evaluator, stored, to_record, camera=None, size=size)
    found = {digest: clips[position[digest]] for digest in shown if position[digest] in clips}
    return found, fps
