"""Demonstrations from a task's scripted expert."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fibopolicy.datasets.writer import DemoWriter
from fibopolicy.envs import TaskEnv, make, resolve
from fibopolicy.envs.seeding import episode_seed
from fibopolicy.errors import UserError
from fibopolicy.files import StrPath, failure_told, refuse_both, refuse_existing, written_aside

#: Episodes per shard: what a killed collection loses at most, per worker.
SHARD = 5
#: Attempts before an expert that never succeeds is given up.
HOPELESS = 100
#: The settings of the shards beside it.
PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is collected.

    Args:
        task: its id.
        cameras, image_size, quality: how the frames are rendered; stored with the data. `cameras=None` is the task's own,
            and `()` records states and vectors alone.
        seed: with an episode's index, gives its layout and noise.
        noise: standard deviation of the Gaussian noise added to the executed actions, in action units; the recorded
            `actions` are the expert's own, so that the data show how to recover (Laskey et al., DART). What was
            executed is stored as `executed_actions`. `None` is what suits the task, its `expert_noise`.
    """

    task: str
    cameras: tuple[str, ...] | None = None
    image_size: int = 84
    quality: str = "fast"
    seed: int = 0
    noise: float | None = None

    def make_env(self) -> TaskEnv:
        options = {} if self.cameras is None else {"cameras": self.cameras}
        return make(self.task, image_size=self.image_size, quality=self.quality, **options)


@dataclass(frozen=True)
class Collected:
    """What a collection gave: demos kept, episodes tried for them, control steps kept."""

    path: Path
    demos: int
    tried: int
    steps: int


Arrays = dict[str, NDArray[Any]]


def collect(
    plan: Plan, episodes: int, out: StrPath, *, workers: int | None = None, overwrite: bool = False, resume: bool = False
) -> Collected:
    """Write `episodes` successful episodes of the scripted expert to a robomimic HDF5 file.

    The file depends on `plan` and `episodes` alone, not on `workers`. A collection that was stopped goes on where it was
    with `resume=True`: finished shards lie in a folder beside `out`, which is removed at the end.

    Raises:
        UserError: the task is unknown or has no expert, `out` exists, or another collection was under way there.
    """
    plan = Plan(**{**asdict(plan), "task": resolve(plan.task)})
    out = Path(out).expanduser()
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, got {episodes}")
    if plan.noise is not None and not 0 <= plan.noise <= 2:
        raise UserError(f"noise must be between 0 and 2 (action units), got {plan.noise}")
    refuse_both(resume=resume, overwrite=overwrite)
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    if not 0 <= plan.seed < 1 << 63:
        raise UserError(f"seed must be between 0 and 2^63 - 1, got {plan.seed}")
    refuse_existing(out, overwrite)
    env = plan.make_env()
    try:
        env.reset(seed=0)  # fails here, once and clearly, where nothing can be rendered
        env.expert_action()  # and here, where the task has no expert
        env_args = env.env_args
        if plan.noise is None:
            plan = replace(plan, noise=env.expert_noise)
    finally:
        env.close()

    parts = out.with_name(out.name + ".parts")
    workers = min(workers or os.cpu_count() or 1, -(-episodes // SHARD))
    kept = tried = steps = 0
    with (
        tqdm(total=episodes, desc=f"collect {plan.task}", unit="demo", disable=None) as bar,
        DemoWriter(out, env_args, attrs={"generator": "scripted expert", **_flat(plan)}, overwrite=overwrite) as writer,
    ):
        # The writer holds the output by now, so no other collection is at work on these shards.
        _open_parts(parts, plan, resume=resume, overwrite=overwrite)
        names: list[str] = []
        for episode in _episodes(plan, episodes, parts, workers):
            tried += 1
            if episode["success"]:
                names.append(_add(writer, episode))
                kept, steps = kept + 1, steps + len(episode["actions"])
                bar.update()
            if kept == episodes:
                break
            if tried >= HOPELESS and kept < tried // 10:
                raise UserError(
                    f"the expert of {plan.task} succeeded in {kept} of {tried} episodes with noise {plan.noise}; lower it"
                )
        # Every tenth demo is held out, the same ones whatever the number of workers.
        if valid := names[9::10]:
            writer.add_filter_key("train", [n for n in names if n not in set(valid)])
            writer.add_filter_key("valid", valid)
    _remove_parts(parts)
    return Collected(out, kept, tried, steps)


def _flat(plan: Plan) -> dict[str, str | int | float]:
    assert plan.noise is not None
    return {"seed": plan.seed, "noise": plan.noise, "quality": plan.quality}


def _open_parts(parts: Path, plan: Plan, *, resume: bool, overwrite: bool) -> None:
    """Make the folder of shards, or check that the one there is of the same plan."""
    wanted = json.loads(json.dumps(asdict(plan)))
    file = parts / PLAN
    if file.exists():
        if overwrite:
            _remove_parts(parts)
        elif not resume:
            raise UserError(
                f"{parts}: holds an unfinished collection; pass --resume to go on with it or --overwrite to start again"
            )
        elif json.loads(file.read_text()) != wanted:
            raise UserError(
                f"{parts}: holds a collection with other settings ({file.read_text()}); pass --overwrite to start again"
            )
    elif parts.exists() and any(parts.iterdir()):
        raise UserError(f"{parts}: is in the way and no collection's; choose another --out")
    with failure_told(parts):
        parts.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        aside.write_text(json.dumps(wanted))


def _remove_parts(parts: Path) -> None:
    """Delete the shards and their plan, and nothing else."""
    for path in (*parts.glob("shard_*.npz*"), parts / PLAN):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        parts.rmdir()


def _episodes(plan: Plan, episodes: int, parts: Path, workers: int) -> Iterator[Arrays]:
    """All episodes from index 0 on, in order; shards are made ahead in spawned processes, one simulator each.

    `episodes` is how many are needed if none fails; more are made only once these are used up.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(plan,)) as pool:
        pending: deque[Future[Path]] = deque()
        started, enough = 0, -(-episodes // SHARD)
        try:
            while True:
                while len(pending) < 2 * workers and started < enough:
                    pending.append(pool.submit(_make_shard, parts, started))
                    started += 1
                if pending:
                    yield from _load_shard(pending.popleft().result())
                else:
                    enough += workers
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Plan, TaskEnv] | None = None


def _start_worker(plan: Plan) -> None:
    global _worker
    # Should the parent be killed, nobody would ever tell this process to end.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = (plan, plan.make_env())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _make_shard(parts: Path, k: int) -> Path:
    assert _worker is not None
    plan, env = _worker
    path = parts / f"shard_{k:05d}.npz"
    if not path.exists():
        episodes = [run_expert(env, plan, index) for index in range(k * SHARD, (k + 1) * SHARD)]
        flat = {f"{i}/{key}": value for i, episode in enumerate(episodes) for key, value in episode.items()}
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **flat)
    return path


def _load_shard(path: Path) -> Iterator[Arrays]:
    with np.load(path, allow_pickle=False) as arrays:
        for i in range(SHARD):
            prefix = f"{i}/"
            yield {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}


def perturbed(action: NDArray[np.float32], noise: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """An action `(A,)` in [-1, 1] with Gaussian noise of standard deviation `noise` on all but the gripper's command."""
    # Noise on the gripper would drop what is held, not show how to recover.
    executed = action + np.array([*rng.normal(0, noise, len(action) - 1), 0], dtype=np.float32)
    return np.clip(executed, -1, 1).astype(np.float32)


def run_expert(env: TaskEnv, plan: Plan, index: int) -> Arrays:
    """One episode.

    Returns:
        `actions`, `executed_actions` `(N, A)`, `states` `(N, S)`, `rewards`, `dones` `(N,)`, `obs/*` `(N, ...)`,
        `last_obs/*` `(1, ...)`, and the scalars `success`, `seed` and `model`, the MJCF of this episode's scene.
    """
    noise = env.expert_noise if plan.noise is None else plan.noise
    seed = episode_seed("collect", plan.seed, index)
    rng = np.random.default_rng(seed)
    obs, info = env.reset(seed=seed)
    model = env.get_state().model
    rows: dict[str, list[Any]] = {}
    done = False
    while not done:
        action = env.expert_action()
        executed = perturbed(action, noise, rng)
        row = {"actions": action, "executed_actions": executed, "states": env.get_state().state}
        row |= {f"obs/{key}": value for key, value in obs.items()}
        obs, reward, terminated, truncated, info = env.step(executed)
        done = terminated or truncated
        for key, value in {**row, "rewards": reward, "dones": done}.items():
            rows.setdefault(key, []).append(value)
    arrays = {key: np.stack(values) for key, values in rows.items()}
    arrays |= {f"last_obs/{key}": value[None] for key, value in obs.items()}
    return {**arrays, "success": np.array(info["success"]), "seed": np.array(seed), "model": np.array(model)}


def _add(writer: DemoWriter, episode: Arrays) -> str:
    obs = {key.removeprefix("obs/"): value for key, value in episode.items() if key.startswith("obs/")}
    next_obs = {key: np.concatenate([value[1:], episode[f"last_obs/{key}"]]) for key, value in obs.items()}
    return writer.add(
        obs,
        episode["actions"],
        episode["states"],
        episode["rewards"],
        episode["dones"],
        next_obs=next_obs,
        model_file=str(episode["model"]),
        extra={"executed_actions": episode["executed_actions"]},
        attrs={"seed": int(episode["seed"]), "generator": "scripted expert"},
    )
