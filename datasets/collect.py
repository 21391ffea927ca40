"""Demonstrations from a task's scripted expert."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fibopolicy.datasets.parts import opened_parts, parts_folder, remove_parts
from fibopolicy.datasets.shards import Arrays, add_episode, made_ahead
from fibopolicy.datasets.writer import DemoWriter
from fibopolicy.envs import TaskEnv, make, resolve
from fibopolicy.envs.base import episode_seed
from fibopolicy.envs.registry import check_observation
from fibopolicy.envs.rendering import DEFAULT_IMAGE_SIZE, ImageSize
from fibopolicy.errors import UserError
from fibopolicy.utils.files import StrPath, check_output, check_resume_or_overwrite, expanded
from fibopolicy.utils.imports import is_import_path
from fibopolicy.utils.processes import checked_workers

#: Episodes per shard: what a killed collection loses at most, per worker.
SHARD = 5
#: Attempts before an expert that never succeeds is given up.
HOPELESS = 100
#: How demos and files of a scripted expert are labelled.
GENERATOR = "scripted expert"


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is collected.

    Args:
        task: its id.
        cameras, image_size, quality: how the frames are rendered; stored with the data.
            `cameras=None` is the task's own, and `()` records states and vectors alone.
        seed: with an episode's index, gives its layout and noise.
        noise: standard deviation of the Gaussian noise added to the executed actions,
            in action units; the recorded `actions` are the expert's own, so that the
            data show how to recover (Laskey et al., DART). What was executed is stored
            as `executed_actions`. `None` is what suits the task, its `expert_noise`.
    """

    task: str
    cameras: tuple[str, ...] | None = None
    image_size: ImageSize = DEFAULT_IMAGE_SIZE
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


def collect(
    plan: Plan,
    episodes: int,
    out: StrPath,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Collected:
    """Write `episodes` successful episodes of the scripted expert to a robomimic HDF5
    file.

    The file depends on `plan` and `episodes` alone, not on `workers`. A collection that
    was stopped goes on where it was with `resume=True`: finished shards lie in a folder
    beside `out`, which is removed at the end.

    Raises:
        UserError: the task is unknown or has no expert, `out` exists, or another
            collection was under way there.
    """
    plan = Plan(**{**asdict(plan), "task": resolve(plan.task)})
    out = expanded(out)
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, got {episodes}")
    if plan.noise is not None and not 0 <= plan.noise <= 2:
        raise UserError(f"noise must be between 0 and 2 (action units), got {plan.noise}")
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    checked_workers(workers, episodes)
    if not 0 <= plan.seed < 1 << 63:
        raise UserError(f"seed must be between 0 and 2^63 - 1, got {plan.seed}")
    check_output(out, overwrite)
    env = plan.make_env()
    try:
        obs, _ = env.reset(seed=0)  # fails here, once and clearly, where nothing can be rendered
        if is_import_path(plan.task):
            check_observation(env, obs)
        env.expert_action()  # and here, where the task has no expert
        env_args = env.env_args
        if plan.noise is None:
            plan = replace(plan, noise=env.expert_noise)
    finally:
        env.close()

    parts = parts_folder(out)
    workers = checked_workers(workers, -(-episodes // SHARD))
    kept = tried = steps = 0
    with (
        tqdm(total=episodes, desc=f"collect {plan.task}", unit="demo", disable=None) as bar,
        DemoWriter(
            out, env_args, attrs={"generator": GENERATOR, **_flat(plan)}, overwrite=overwrite
        ) as writer,
        # The writer holds the output by now, so no other collection is at work on these
        # shards.
        opened_parts(parts, asdict(plan), resume=resume, overwrite=overwrite),
    ):
        names: list[str] = []
        for episode in made_ahead(
            parts, functools.partial(_start, plan), needed=episodes, size=SHARD, workers=workers
        ):
            tried += 1
            if episode["success"]:
                names.append(add_episode(writer, episode, {"generator": GENERATOR}))
                kept, steps = kept + 1, steps + len(episode["actions"])
                bar.update()
            if kept == episodes:
                break
            if tried >= HOPELESS and kept < tried // 10:
                advice = "lower it" if plan.noise else "it does not solve its task"
                raise UserError(
                    f"the expert of {plan.task} succeeded in {kept} of {tried} episodes with noise"
                    f" {plan.noise}; {advice}"
                )
        # Every tenth demo is held out, the same ones whatever the number of workers.
        if valid := names[9::10]:
            writer.add_filter_key("train", [n for n in names if n not in set(valid)])
            writer.add_filter_key("valid", valid)
    remove_parts(parts)
    return Collected(out, kept, tried, steps)


def _flat(plan: Plan) -> dict[str, str | int | float]:
    assert plan.noise is not None
    return {"seed": plan.seed, "noise": plan.noise, "quality": plan.quality}


def _start(plan: Plan) -> Callable[[int], Arrays]:
    """What a worker process makes episodes with."""
    return functools.partial(run_expert, plan.make_env(), plan)


def perturbed(
    action: NDArray[np.float32], noise: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """An action `(A,)` in [-1, 1] with Gaussian noise of standard deviation `noise` on
    all but the gripper's command.
    """
    # Noise on the gripper would drop what is held, not show how to recover.
    # abs: numpy refuses -0.0.
    executed = action + np.array([*rng.normal(0, abs(noise), len(action) - 1), 0], dtype=np.float32)
    return np.clip(executed, -1, 1).astype(np.float32)


def run_expert(env: TaskEnv, plan: Plan, index: int) -> Arrays:
    """One episode.

    Returns:
        `actions`, `executed_actions` `(N, A)`, `states` `(N, S)`, `rewards`, `dones`
        `(N,)`, `obs/*` `(N, ...)`, `last_obs/*` `(1, ...)`, and the scalars `success`,
        `seed` and `model`, the MJCF of this episode's scene in UTF-8.
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
    return {
        **arrays,
        "success": np.array(info["success"]),
        "seed": np.array(seed),
        "model": np.array(model.encode()),
    }
