"""Open-loop replay of demonstrations: do data and simulator match?"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.restore import (
    Corrupt,
    Restorer,
    Trajectory,
    by_model,
    read_trajectory,
    require_task,
    warn_of_scenes,
)
from fibopolicy.envs import SimState, TaskEnv
from fibopolicy.envs.registry import warn_of_version
from fibopolicy.errors import UserError, quoted
from fibopolicy.utils.files import StrPath, atomic_write
from fibopolicy.utils.processes import checked_workers, simulator_pool
from fibopolicy.utils.system import environment


@dataclass(frozen=True)
class ReplayedDemo:
    """One demonstration, replayed.

    Args:
        demo: its name.
        steps: control steps.
        success: whether the goal was met after some step.
        success_step: the first such step, counted from 1.
        max_drift_cm, final_drift_cm: distance of the end effector from its recorded
            position, at worst and before the last action; of two, that of the farther one.
            `None` where the task observes no such position.
    """

    demo: str
    steps: int
    success: bool
    success_step: int | None
    max_drift_cm: float | None
    final_drift_cm: float | None


@dataclass(frozen=True)
class FrameMatch:
    """Mean absolute difference between a stored frame and the rendered one, 0 to 255.

    Args:
        upright: as stored.
        flipped: with the stored frame turned upside down.
    """

    upright: float
    flipped: float

    @property
    def upside_down(self) -> bool:
        # In Lift, frames of old and new robosuite versions differ by 4 in the wrist camera and by
        # 24 in the front one; flipped ones by over 70.
        return self.flipped < 0.7 * self.upright


@dataclass(frozen=True)
class ReplayResult:
    """A file's demonstrations, replayed.

    Args:
        path: the file.
        env_name: its task.
        demos: one row each.
        skipped: what could not be replayed, with the reason.
        frames: match of each camera's first stored frame; empty where there is none.
    """

    path: Path
    env_name: str
    demos: tuple[ReplayedDemo, ...]
    skipped: dict[str, str]
    frames: dict[str, FrameMatch] = field(default_factory=dict)

    @property
    def successes(self) -> int:
        return sum(row.success for row in self.demos)


def replay(
    path: StrPath,
    *,
    filter_key: str | None = None,
    workers: int | None = None,
    skip_corrupt: bool = False,
) -> ReplayResult:
    """Execute each demonstration's actions from its first state, without correction.

    The actions are `executed_actions` where a file has them, else `actions`. The recorded
    positions of the end effector come from the recorded states, so that a file needs no
    observations. The first demo's first frames are compared with those that the simulator
    renders of its first state; a warning names cameras whose frames are upside down.

    Args:
        path: a robomimic HDF5 file with states.
        filter_key: only these demos.
        workers: processes, one simulator each; as many as cores by default.
        skip_corrupt: leave out demos that cannot be read or restored, and list them in
            `skipped`.

    Raises:
        UserError: the file or one of its demos cannot be read or restored; the task
            cannot be made.
    """
    with DemoFile(path, skip_corrupt=skip_corrupt) as file:
        require_task(file)
        demos = file.select(filter_key)
        jobs = by_model(file, demos)
        env_args, skipped = file.env_args, dict(file.corrupt)
        warn_of_scenes(file, demos)
    warn_of_version(env_args)
    rows: dict[str, ReplayedDemo] = {}
    with (
        simulator_pool(
            checked_workers(workers, len(jobs)), _start_worker, Path(path), skip_corrupt
        ) as pool,
        tqdm(
            total=len(jobs), desc=f"replay {env_args['env_name']}", unit="demo", disable=None
        ) as bar,
    ):
        comparison = pool.submit(_compare_frames, jobs[0])
        for done in as_completed([pool.submit(_replay_one, demo) for demo in jobs]):
            demo, outcome = done.result()
            if isinstance(outcome, ReplayedDemo):
                rows[demo] = outcome
            elif skip_corrupt:
                skipped[demo] = outcome.reason
            else:
                raise UserError(f"{outcome.reason}; --skip-corrupt leaves such demos out")
            bar.update()
        frames = comparison.result()
    if isinstance(frames, str):
        warnings.warn(
            f"{path}: the frames are not compared with the simulator's: {frames}", stacklevel=2
        )
        frames = {}
    if wrong := [key for key, match in frames.items() if match.upside_down]:
        warnings.warn(
            f"{path}: the frames of {', '.join(wrong)} are upside down; make upright ones with"
            f" `fibopolicy render {quoted(path)} --out NEW.hdf5`",
            stacklevel=2,
        )
    if not rows:
        raise UserError(f"{path}: no demo could be replayed; {next(iter(skipped.values()))}")
    return ReplayResult(
        Path(path),
        env_args["env_name"],
        tuple(rows[demo] for demo in demos if demo in rows),
        skipped,
        frames,
    )


def replay_table(done: ReplayResult) -> str:
    """A plain-text table: one line per demo, what was skipped, and the drift over all."""
    width = max(len("demo"), *(len(row.demo) for row in done.demos))
    lines = [f"{'demo':<{width}}  steps  success at  max drift  final drift"]
    for row in done.demos:
        reached = "never" if row.success_step is None else str(row.success_step)
        drifts = [
            f"{d:.2f} cm" if d is not None else "-" for d in (row.max_drift_cm, row.final_drift_cm)
        ]
        lines.append(
            f"{row.demo:<{width}}  {row.steps:>5}  {reached:>10}  {drifts[0]:>9}  {drifts[1]:>11}"
        )
    lines += [f"skipped {demo}: {reason}" for demo, reason in done.skipped.items()]
    drifts_cm = [row.max_drift_cm for row in done.demos if row.max_drift_cm is not None]
    if drifts_cm:
        lines.append(
            f"gripper drift: median {np.median(drifts_cm):.2f} cm, largest {max(drifts_cm):.2f} cm"
        )
    for key, match in done.frames.items():
        found = (
            f"{match.upright:.1f} of 255 from the rendered one, {match.flipped:.1f} if turned"
            " upside down"
        )
        lines.append(f"first frame of {key}: differs by {found}")
    return "\n".join(lines)


def write_replay(path: Path, done: ReplayResult, rate: Mapping[str, float]) -> None:
    """A JSON file of the rows and the success rate, with hardware and versions."""
    document = {
        "file": done.path.name,
        "task": done.env_name,
        "success_rate": {"successes": done.successes, "demos": len(done.demos), **rate},
        "demos": [asdict(row) for row in done.demos],
        "skipped": done.skipped,
        "first_frames": {key: asdict(match) for key, match in done.frames.items()},
        "environment": environment(),
    }
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


_restorer: Restorer


def _start_worker(path: Path, skip_corrupt: bool) -> None:
    global _restorer
    _restorer = Restorer(path, skip_corrupt, cameras=())


def _replay_one(demo: str) -> tuple[str, ReplayedDemo | Corrupt]:
    return demo, _restorer.attempt(
        demo, lambda trajectory: replay_trajectory(_restorer.env, trajectory)
    )


def _compare_frames(demo: str) -> dict[str, FrameMatch] | str:
    """The match of a demo's first frames, of all cameras of one size; or why there is none."""
    file = _restorer.file
    cameras = {key: key.removesuffix("_image").removesuffix("_rgb") for key in file.image_keys}
    cameras = {key: camera for key, camera in cameras.items() if camera != key}
    if not cameras:
        return {}
    height, width, _ = file.image_shape(next(iter(cameras)))
    cameras = {
        key: camera
        for key, camera in cameras.items()
        if file.image_shape(key)[:2] == (height, width)
    }
    size = height if height == width else (height, width)
    compared = _restorer.with_cameras(tuple(cameras.values()), size)
    try:
        trajectory = read_trajectory(file, demo)
        with compared.env as env:
            obs = env.set_state(trajectory.state(env, 0))
        return {
            key: _match(file.read(demo, f"obs/{key}", 0, 1)[0], obs[f"{cameras[key]}_image"])
            for key in cameras
        }
    except UserError as error:
        return str(error).removeprefix(f"{file.path}: ")


def _match(stored: NDArray[np.uint8], rendered: NDArray[np.uint8]) -> FrameMatch:
    if stored.shape != rendered.shape:
        raise UserError(f"stored frames are {stored.shape}, rendered ones {rendered.shape}")
    upright, flipped = (
        float(np.abs(a - rendered.astype(np.float64)).mean()) for a in (stored, stored[::-1])
    )
    return FrameMatch(round(upright, 2), round(flipped, 2))


def replay_trajectory(env: TaskEnv, trajectory: Trajectory) -> ReplayedDemo:
    """Replay one demonstration in a task's environment."""
    start = trajectory.state(env, 0)
    recorded = []
    if env.eef_keys:
        observed = (env.set_state(SimState(start.model, state)) for state in trajectory.states)
        recorded = [_eef_positions(obs, env) for obs in observed]
    obs = env.set_state(start)
    drift, success_step = [], None
    for step, action in enumerate(trajectory.actions):
        if env.eef_keys:
            distances = np.linalg.norm(_eef_positions(obs, env) - recorded[step], axis=1)
            drift.append(100 * float(distances.max()))
        _, _, _, info = env.advance(action)
        if info["success"] and success_step is None:
            success_step = step + 1
        obs = env.observe()
    return ReplayedDemo(
        trajectory.demo,
        len(trajectory.actions),
        success_step is not None,
        success_step,
        round(max(drift), 4) if drift else None,
        round(drift[-1], 4) if drift else None,
    )


def _eef_positions(obs: dict[str, Any], env: TaskEnv) -> NDArray[np.floating[Any]]:
    return np.stack([obs[key] for key in env.eef_keys])  # (E, 3), metres
