"""Measure a trained policy: every start state once, one row each."""

from __future__ import annotations

import functools
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fibopolicy.envs import TaskEnv, from_env_args
from fibopolicy.envs.registry import is_robosuite, task_id_of, unavailable
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.episodes import (
    ROWS,
    EpisodeResult,
    append_row,
    read_rows,
    success_rate,
    write_rows,
)
from fibopolicy.evaluation.film import film
from fibopolicy.evaluation.init_states import Starts, default_starts, load_starts, save_starts
from fibopolicy.evaluation.measure import (
    Identity,
    check_view,
    default_workers,
    make_actor,
    measure,
    view_options,
    weights_digest,
)
from fibopolicy.evaluation.overlay import draw_look
from fibopolicy.evaluation.policy_runner import Actor
from fibopolicy.evaluation.scheduler import VectorRollout
from fibopolicy.evaluation.simulator import TaskInfo
from fibopolicy.evaluation.video import write_grid
from fibopolicy.policies.run_directory import Loaded, load_policy, suffix
from fibopolicy.statistics.rates import Rate
from fibopolicy.utils.files import check_resume_or_overwrite, directory_lock

#: Held while a run is being evaluated: two evaluations would write the same rows.
LOCK = ".evaluating"


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave."""

    rate: Rate
    rows: tuple[EpisodeResult, ...]
    seconds: float
    rows_path: Path
    starts_path: Path
    video_path: Path | None


def evaluate_run(
    config: EvaluateConfig, *, resume: bool = False, overwrite: bool = False
) -> Evaluation:
    """Roll a policy out over stored start states; rows go to `episodes.jsonl`, the
    video to `videos/` of the run.

    Rows depend on the policy, the start states, `config.batch` and `config.threads`,
    and on nothing else: not on the number of workers, nor on the order in which
    episodes run. Each is on disk as soon as its episode has ended.

    Raises:
        UserError: no such run; rows of this evaluation are there already and neither
            `resume` nor `overwrite` is given; the start states belong to another task
            or do not look as they did when they were stored; another process is
            evaluating this run.
    """
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    loaded = load_policy(config.run, weights=config.weights, device=config.device)
    camera = _video_camera(config, loaded)
    if loaded.step < loaded.total_steps and config.weights in ("ema", "model"):
        warnings.warn(
            f"{config.run}: its training stands at step {loaded.step} of {loaded.total_steps}",
            stacklevel=2,
        )
    with directory_lock(config.run, LOCK):
        return _evaluate(config, loaded, camera, resume=resume, overwrite=overwrite)


def _evaluate(
    config: EvaluateConfig, loaded: Loaded, camera: str | None, *, resume: bool, overwrite: bool
) -> Evaluation:
    began, rows_path = time.perf_counter(), config.run / ROWS
    env_maker = make_env(config, loaded)
    workers = config.workers or default_workers(task_id_of(loaded.env_args), config.episodes)
    if config.viewer and config.workers is None:
        workers = 1
    with VectorRollout(
        env_maker,
        loaded.policy.config.n_obs_steps,
        workers,
        step_limit=config.step_limit,
        tries=config.tries,
        viewer=config.viewer,
    ) as rollouts:
        info = rollouts.info()
        check_view(loaded.policy, info, f"{config.run}:")
        starts, starts_path = _starts(config, env_maker, info)
        identity = Identity(loaded.step, config.weights, weights_digest(loaded.policy))
        actor = make_actor(loaded.policy, config.batch, config.threads, info)
        evaluation = (
            info.task_id,
            loaded.step,
            config.weights,
            starts.seed,
            info.horizon,
            info.quality,
        )
        rows = _kept(
            rows_path, evaluation, starts, identity, actor, resume=resume, overwrite=overwrite
        )
        missing = [index for index in range(config.episodes) if index not in rows]
        kept = [row for index, row in rows.items() if index < config.episodes]
        for row in measure(
            rollouts,
            actor,
            starts,
            missing,
            identity,
            kept=kept,
            allow_mismatch=config.allow_mismatch,
            source=starts_path,
        ):
            append_row(rows_path, row)
            rows[row.index] = row
        _in_order(rows_path, evaluation)
        ordered = tuple(rows[index] for index in range(config.episodes))
        video_path = (
            _film(config, rollouts, actor, starts, ordered, camera, info) if camera else None
        )
    return Evaluation(
        success_rate(ordered),
        ordered,
        time.perf_counter() - began,
        rows_path,
        starts_path,
        video_path,
    )


def make_env(config: EvaluateConfig, loaded: Loaded) -> Callable[[], TaskEnv]:
    """Makes the task that the policy was trained on, seen by the same cameras at the
    same sizes; for any process.
    """
    if (reason := unavailable(loaded.env_args)) is not None:
        raise UserError(f"{config.run}: {reason}; the run itself keeps its env_args in config.json")
    options = view_options(loaded.policy)
    options |= {
        name: value
        for name in ("quality", "horizon")
        if (value := getattr(config, name)) is not None
    }
    if is_robosuite(loaded.env_args) and "render_quality" not in loaded.env_args:
        warnings.warn(
            f"{config.run}: its dataset does not say how its frames were rendered; other robosuite"
            " versions draw the same scene differently, and a policy trained on their frames may"
            " fail on these",
            stacklevel=2,
        )
    return functools.partial(from_env_args, loaded.env_args, **options)


def _video_camera(config: EvaluateConfig, loaded: Loaded) -> str | None:
    cameras = list(loaded.policy.shapes.images)
    if config.video < 1 or not cameras:
        return None
    if config.video_camera is None:
        return cameras[0]
    key = config.video_camera.removesuffix("_image") + "_image"
    if key not in cameras:
        raise UserError(
            f"video_camera {config.video_camera!r} is not one of the policy's: {', '.join(cameras)}"
        )
    return key


def default_starts_path(run: Path, seed: int, quality: str) -> Path:
    """Where an evaluation without a file of start states keeps those that it used."""
    return run / f"starts_seed{seed}_{quality}.npz"


def _starts(
    config: EvaluateConfig, make: Callable[[], TaskEnv], info: TaskInfo
) -> tuple[Starts, Path]:
    path = config.starts or default_starts_path(config.run, config.seed, info.quality)
    if config.starts is None:
        old = load_starts(path) if path.exists() else None
        if old is None or len(old) < config.episodes or old.env_args != info.env_args:
            with make() as env:
                save_starts(default_starts(env, config.episodes, config.seed), path, overwrite=True)
    starts = load_starts(path)
    if starts.env_args.get("env_name") != info.env_args["env_name"]:
        raise UserError(
            f"{path}: start states of {starts.env_args.get('env_name')}, the policy is for"
            f" {info.env_args['env_name']}"
        )
    if len(starts) < config.episodes:
        raise UserError(
            f"{path}: holds {len(starts)} start states, {config.episodes} were asked for"
        )
    return starts, path


def _kept(
    path: Path,
    evaluation: tuple[Any, ...],
    starts: Starts,
    identity: Identity,
    actor: Actor,
    *,
    resume: bool,
    overwrite: bool,
) -> dict[int, EpisodeResult]:
    """The rows that this evaluation has already, errors apart; those of others stay in
    the file in any case.
    """
    stored = read_rows(path)
    mine = {row.index: row for row in stored if row.evaluation == evaluation}
    if mine and not resume and not overwrite:
        raise UserError(
            f"{path}: holds this evaluation already; pass --resume to complete it or --overwrite to"
            " replace it"
        )
    if not overwrite:
        for index, row in mine.items():
            if index < len(starts) and row.start != starts.identity(index):
                raise UserError(
                    f"{path}: holds rows of other start states with the same seed; pass --overwrite"
                    " to replace them"
                )
            if row.policy != identity.policy:
                raise UserError(
                    f"{path}: holds rows of other weights at the same step; pass --overwrite to"
                    " replace them"
                )
            if (row.batch, row.threads) != (actor.batch, actor.threads):
                raise UserError(
                    f"{path}: holds rows made with batch {row.batch} and {row.threads} threads, now"
                    f" they are {actor.batch} and {actor.threads}, which gives other last bits;"
                    " pass the same or --overwrite"
                )
    others = [row for row in stored if row.evaluation != evaluation]
    kept = {} if overwrite else {index: row for index, row in mine.items() if not row.error}
    if path.exists():
        # also drops a line that a kill cut short, so that more can be appended
        write_rows(path, [*others, *kept.values()])
    return kept


def _in_order(path: Path, evaluation: tuple[Any, ...]) -> None:
    """Sort this evaluation's rows by index: they were written as episodes ended."""
    stored = read_rows(path)
    mine = [row for row in stored if row.evaluation == evaluation]
    if mine != (mine := sorted(mine, key=lambda row: row.index)):
        write_rows(path, [*(row for row in stored if row.evaluation != evaluation), *mine])


def _film(
    config: EvaluateConfig,
    rollouts: VectorRollout,
    actor: Actor,
    starts: Starts,
    rows: tuple[EpisodeResult, ...],
    camera: str,
    info: TaskInfo,
) -> Path | None:
    """Run the shown episodes once more, now with every frame: episodes repeat exactly,
    so these are the ones counted.
    """
    task = re.sub("[/:]", "_", info.task_id)
    path = config.run / "videos" / f"{task}_seed{starts.seed}{suffix(config.weights)}.mp4"
    shown = sorted(rows, key=lambda row: row.success) if config.failures_first else rows
    clips = list(
        film(
            rollouts, actor, starts, [row for row in shown if not row.error][: config.video], camera
        ).values()
    )
    if config.overlay:
        clips = [(draw_look(actor.policy, camera, frames), success) for frames, success in clips]
    write_grid(path, clips, info.control_hz)
    return path
