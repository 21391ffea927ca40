"""Demonstrations from a task's scripted expert."""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fibopolicy.datasets.conventions import INSTRUCTION
from fibopolicy.datasets.shards import (
    Arrays,
    RecordEpisode,
    Recording,
    record_demos,
    remove_shards,
    resume_folder,
    shards_folder,
)
from fibopolicy.datasets.writer import Attribute, DemoWriter
from fibopolicy.envs import TaskEnv, make, resolve
from fibopolicy.envs.base import episode_seed
from fibopolicy.envs.registry import check_observation
from fibopolicy.envs.rendering import DEFAULT_IMAGE_SIZE, ImageSize
from fibopolicy.errors import UserError
from fibopolicy.utils.files import StrPath, check_output, check_resume_or_overwrite, expanded
from fibopolicy.utils.imports import is_import_path
from fibopolicy.utils.processes import checked_workers

#: Episodes per shard.
SHARD_SIZE = 5
#: Episodes after which an expert that hardly ever succeeds is abandoned.
GIVE_UP_AFTER = 100
#: How demos and files of a scripted expert are labelled.
GENERATOR = "scripted expert"


@dataclass(frozen=True)
class Plan:
    """Everything that determines what is collected.

    Args:
        task: its id.
        cameras, image_size, quality: how the frames are rendered; stored with the data.
            `cameras=None` is the task's own, and `()` records states and vectors alone.
        seed: with an episode's index, decides its layout and noise.
        noise: standard deviation of the Gaussian noise added to the executed actions,
            in action units; the recorded `actions` are the expert's own, so that the
            data show how to recover (Laskey et al., DART). The executed ones are stored
            as `executed_actions`. `None` is the task's `expert_noise`.
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
    """The result of a collection: demos kept, attempts at them, control steps kept."""

    path: Path
    demos: int
    attempts: int
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

    The file depends on `plan` and `episodes` alone, not on `workers`. `resume=True`
    completes an interrupted collection: finished shards lie in a folder beside `out`,
    which is removed at the end.

    Raises:
        UserError: the task is unknown or has no expert, `out` exists, or another
            collection is unfinished there.
    """
    plan = replace(plan, task=resolve(plan.task))
    out = expanded(out)
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, got {episodes}")
    check_noise_and_seed(plan.noise or 0.0, plan.seed)
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    checked_workers(workers, episodes)
    check_output(out, overwrite)
    env = plan.make_env()
    try:
        obs, _ = env.reset(seed=0)  # fails here, once and clearly, if rendering is impossible
        if is_import_path(plan.task):
            check_observation(env, obs)
        env.expert_action()  # and here, if the task has no expert
        env_args = env.env_args
        labels: dict[str, Attribute] = {"generator": GENERATOR}
        if env.instruction is not None:
            labels[INSTRUCTION] = env.instruction
        noise = env.expert_noise if plan.noise is None else plan.noise
        plan = replace(plan, noise=noise)
    finally:
        env.close()

    def give_up(kept: int, attempts: int) -> UserError | None:
        if attempts < GIVE_UP_AFTER or kept >= attempts // 10:
            return None
        advice = "lower it" if noise else "it does not solve its task"
        return UserError(
            f"the expert of {plan.task} succeeded in {kept} of {attempts} episodes with noise"
            f" {noise}; {advice}"
        )

    folder = shards_folder(out)
    attrs: dict[str, Attribute] = {"generator": GENERATOR, "seed": plan.seed, "noise": noise}
    attrs["quality"] = plan.quality
    with (
        DemoWriter(out, env_args, attrs=attrs, overwrite=overwrite) as writer,
        # The writer has locked the output, so no other collection uses these shards.
        resume_folder(folder, asdict(plan), resume=resume, overwrite=overwrite),
    ):
        attempts, steps = record_demos(
            writer,
            folder,
            functools.partial(_start, plan),
            demos=episodes,
            shard_size=SHARD_SIZE,
            workers=checked_workers(workers, -(-episodes // SHARD_SIZE)),
            attrs=lambda episode: labels,
            give_up=give_up,
            description=f"collect {plan.task}",
        )
    remove_shards(folder)
    return Collected(out, episodes, attempts, steps)


def check_noise_and_seed(noise: float, seed: int) -> None:
    if not 0 <= noise <= 2:
        raise UserError(f"noise must be between 0 and 2 (action units), got {noise}")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"seed must be between 0 and 2^63 - 1, got {seed}")


def _start(plan: Plan) -> RecordEpisode:
    return functools.partial(run_expert, plan.make_env(), plan)


def run_expert(env: TaskEnv, plan: Plan, index: int) -> Arrays:
    """One episode, see `Recording.arrays`; its `success` may be false."""
    noise = env.expert_noise if plan.noise is None else plan.noise
    seed = episode_seed("collect", plan.seed, index)
    rng = np.random.default_rng([seed, 1])  # `seed` alone draws the layout
    recording = Recording(env, seed)
    done = False
    while not done:
        action = env.expert_action()
        done = any(recording.step(action, perturbed(action, noise, rng)))
    return recording.arrays()


def perturbed(
    action: NDArray[np.float32], noise: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """An action `(A,)` in [-1, 1] with Gaussian noise on all but the gripper's command."""
    # Noise on the gripper would drop the object, not show how to recover.
    # abs: numpy rejects -0.0.
    offset = np.array([*rng.normal(0, abs(noise), len(action) - 1), 0], dtype=np.float32)
    return np.clip(action + offset, -1, 1).astype(np.float32)
