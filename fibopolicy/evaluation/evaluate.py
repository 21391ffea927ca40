"""Measure a trained policy: every start state once, one row each."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import gymnasium
from tqdm import tqdm

from fibopolicy.envs import Observation, TaskEnv, from_env_args
from fibopolicy.errors import UserError
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.evaluation.rollout import rollout
from fibopolicy.evaluation.rows import ROWS, Row, append_row, read_rows, success_rate, write_rows
from fibopolicy.evaluation.starts import Starts, frames_hash, load_starts, make_starts, save_starts
from fibopolicy.evaluation.statistics import Rate
from fibopolicy.evaluation.video import write_grid
from fibopolicy.files import refuse_both
from fibopolicy.policies.run_directory import Loaded
from fibopolicy.robomimic.run_directory import load_policy


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation gave."""

    rate: Rate
    rows: tuple[Row, ...]
    seconds: float
    rows_path: Path
    starts_path: Path
    video_path: Path | None


def evaluate(config: EvaluateConfig, *, resume: bool = False, overwrite: bool = False) -> Evaluation:
    """Roll a policy out over stored start states; rows go to `episodes.jsonl`, the video to `videos/` of the run.

    The policy acts on one episode at a time, so rows depend on the policy and the start states alone.

    Raises:
        UserError: no such run; rows of this evaluation are there already and neither `resume` nor `overwrite` is given;
            the start states belong to another task or do not look as they did when they were stored.
    """
    refuse_both(resume=resume, overwrite=overwrite)
    began = time.perf_counter()
    loaded = load_policy(config.run, weights=config.weights, device=config.device)
    rows_path = config.run / ROWS
    camera = _video_camera(config, loaded)
    if loaded.step < loaded.total_steps:
        warnings.warn(f"{config.run}: its training stands at step {loaded.step} of {loaded.total_steps}", stacklevel=2)
    with make_env(config, loaded) as env:
        _check_vectors(config, loaded, env)
        starts, starts_path = _starts(config, env)
        evaluation = (env.task_id, loaded.step, config.weights, starts.seed, env.horizon, env.quality)
        rows = _kept(rows_path, evaluation, starts, resume=resume, overwrite=overwrite)
        _run(config, loaded, env, starts, rows, rows_path)
        ordered = tuple(rows[i] for i in range(config.episodes))
        video_path = _film(config, loaded, env, starts, ordered, camera) if camera else None
    return Evaluation(success_rate(ordered), ordered, time.perf_counter() - began, rows_path, starts_path, video_path)


def make_env(config: EvaluateConfig, loaded: Loaded) -> TaskEnv:
    """The task that the policy was trained on, seen by the same cameras at the same size."""
    images = loaded.policy.shapes.images
    options: dict[str, Any] = {"cameras": tuple(camera.removesuffix("_image") for camera in images)}
    if sizes := set(images.values()):
        height, width = sizes.pop()
        if sizes or height != width:
            raise UserError(f"{config.run}: cameras of several or non-square sizes cannot be rendered: {dict(images)}")
        options["image_size"] = height
    options |= {name: value for name in ("quality", "horizon") if (value := getattr(config, name)) is not None}
    if loaded.env_args.get("type") == 1 and "render_quality" not in loaded.env_args:
        warnings.warn(
            f"{config.run}: its dataset does not say how its frames were rendered; other robosuite versions draw the same scene"
            " differently, and a policy trained on their frames may fail on these",
            stacklevel=2,
        )
    return from_env_args(loaded.env_args, **options)


def _video_camera(config: EvaluateConfig, loaded: Loaded) -> str | None:
    cameras = list(loaded.policy.shapes.images)
    if config.video < 1 or not cameras:
        return None
    if config.video_camera is None:
        return cameras[0]
    key = config.video_camera.removesuffix("_image") + "_image"
    if key not in cameras:
        raise UserError(f"video_camera {config.video_camera!r} is not one of the policy's: {', '.join(cameras)}")
    return key


def _starts(config: EvaluateConfig, env: TaskEnv) -> tuple[Starts, Path]:
    path = config.starts or config.run / f"starts_seed{config.seed}_{env.quality}.npz"
    if config.starts is None:
        old = load_starts(path) if path.exists() else None
        if old is None or len(old) < config.episodes or old.env_args != env.env_args:
            save_starts(make_starts(env, config.episodes, config.seed), path, overwrite=True)
    starts = load_starts(path)
    if starts.env_args.get("env_name") != env.env_args["env_name"]:
        raise UserError(
            f"{path}: start states of {starts.env_args.get('env_name')}, the policy is for {env.env_args['env_name']}"
        )
    if len(starts) < config.episodes:
        raise UserError(f"{path}: holds {len(starts)} start states, {config.episodes} were asked for")
    return starts, path


def _check_vectors(config: EvaluateConfig, loaded: Loaded, env: TaskEnv) -> None:
    observations = cast("gymnasium.spaces.Dict", env.observation_space).spaces
    if lacking := [key for key in loaded.policy.shapes.vectors if key not in observations]:
        known = ", ".join(key for key, space in observations.items() if len(space.shape or ()) == 1)
        raise UserError(f"{config.run}: was trained on {', '.join(lacking)}, which {env.task_id} does not give; it gives {known}")


def _kept(path: Path, evaluation: tuple[Any, ...], starts: Starts, *, resume: bool, overwrite: bool) -> dict[int, Row]:
    """The rows that this evaluation has already; those of others stay in the file in any case."""
    stored = read_rows(path)
    mine = {row.index: row for row in stored if row.evaluation == evaluation}
    if mine and not resume and not overwrite:
        raise UserError(f"{path}: holds this evaluation already; pass --resume to complete it or --overwrite to replace it")
    if not overwrite and any(row.start != starts.hashes[i] for i, row in mine.items() if i < len(starts)):
        raise UserError(f"{path}: holds rows of other start states with the same seed; pass --overwrite to replace them")
    others = [row for row in stored if row.evaluation != evaluation]
    kept = {} if overwrite else mine
    if path.exists():
        write_rows(path, [*others, *kept.values()])  # also drops a line that a kill cut short, so that more can be appended
    return kept


def _run(config: EvaluateConfig, loaded: Loaded, env: TaskEnv, starts: Starts, rows: dict[int, Row], path: Path) -> None:
    """Run the episodes that have no row yet; each row is on disk before the next episode begins."""
    missing = [i for i in range(config.episodes) if i not in rows]
    with tqdm(
        total=config.episodes, initial=config.episodes - len(missing), desc="evaluate", unit="episode", disable=None
    ) as bar:
        for index in missing:
            began = time.perf_counter()
            episode = rollout(loaded.policy, env, _restore(env, starts, index))
            rows[index] = Row(
                task=env.task_id,
                index=index,
                seed=starts.seeds[index],
                success=episode.success,
                steps=episode.steps,
                total_reward=episode.total_reward,
                wall_s=round(time.perf_counter() - began, 4),
                checkpoint_step=loaded.step,
                weights=config.weights,
                starts_seed=starts.seed,
                horizon=env.horizon,
                quality=env.quality,
                start=starts.hashes[index],
            )
            append_row(path, rows[index])
            bar.set_postfix_str(str(success_rate(list(rows.values()))), refresh=False)
            bar.update()


def _restore(env: TaskEnv, starts: Starts, index: int) -> Observation:
    """Put the environment into a start state, which must look as it did when it was stored."""
    obs = env.set_state(starts.states[index])
    if frames_hash(obs) != starts.hashes[index]:
        raise UserError(
            f"start state {index} of {env.task_id} does not look as it did when it was stored: other cameras, image size, render"
            " quality or simulator version; make the start states anew"
        )
    return obs


def _film(config: EvaluateConfig, loaded: Loaded, env: TaskEnv, starts: Starts, rows: tuple[Row, ...], camera: str) -> Path:
    """Run the first episodes once more, now with every frame: episodes repeat exactly, so these are the ones counted."""
    path = config.run / "videos" / f"{env.task_id.replace('/', '_')}_seed{starts.seed}.mp4"
    clips = []
    for row in tqdm(rows[: config.video], desc="film", unit="episode", disable=None):
        episode = rollout(loaded.policy, env, _restore(env, starts, row.index), frames_from=camera)
        if (episode.success, episode.steps) != (row.success, row.steps):
            raise RuntimeError(f"episode {row.index} did not repeat: {episode.steps} steps, its row says {row.steps}")
        clips.append((episode.frames, episode.success))
    write_grid(path, clips, env.control_hz)
    return path
