"""Many demonstrations from a few: recorded ones adapted to new scenes, kept if they succeed."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fibopolicy.datasets.collect import check_noise_and_seed
from fibopolicy.datasets.download import published
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.restore import read_motion, require_task
from fibopolicy.datasets.segments import Segment, follow_segments, split_subtasks
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
from fibopolicy.envs.base import episode_seed
from fibopolicy.envs.registry import is_robosuite
from fibopolicy.envs.robosuite.environment import RobosuiteEnv
from fibopolicy.envs.robosuite.subtasks import SUBTASKS, EndEffector
from fibopolicy.errors import UserError, unknown
from fibopolicy.statistics.rates import wilson
from fibopolicy.utils.files import StrPath, check_output, check_resume_or_overwrite, expanded
from fibopolicy.utils.processes import checked_workers

#: Attempts per shard.
SHARD_SIZE = 10
#: Attempts after which a generation that hardly ever succeeds is abandoned.
GIVE_UP_AFTER = 50
#: Attributes of the source that describe its frames, which the output lacks.
_OF_FRAMES = ("quality", "renderer", "rendered_with", "rendered_from")


@dataclass(frozen=True)
class SourceDemo:
    """One demonstration to generate from.

    Args:
        demo: its name in the source file.
        origin: who made it, e.g. "human" or "scripted expert".
        segments: the movement of the end effector, subtask by subtask.
    """

    demo: str
    origin: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Generated:
    """The result of a generation.

    Args:
        demos: kept, all successes.
        attempts: for these demos, each in a different scene.
        steps: control steps kept.
        low, high: the 95 % Wilson interval of the success rate `demos / attempts`.
    """

    path: Path
    demos: int
    attempts: int
    steps: int
    low: float
    high: float


def generate(
    file: StrPath,
    demos: int,
    out: StrPath,
    *,
    task: str | None = None,
    filter_key: str | None = None,
    origin: str | None = None,
    noise: float = 0.05,
    seed: int = 0,
    skip_corrupt: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Generated:
    """Write `demos` successful demonstrations in new scenes, from a few robosuite
    demonstrations.

    The output holds states, actions and vector observations, no images. Each demo names
    its `source_demo`, its `generator` and the `seed` of its scene; no evaluation starts
    from such a scene. The output depends on the input and the settings alone, not on
    `workers`. `resume=True` completes an interrupted generation. Licence and other
    attributes of the source stay.

    Args:
        file: a robomimic file; its `env_args` determine robot, controller and control
            frequency.
        task: robosuite's name of the task, if it is a part of the file's, e.g.
            "PickPlaceCan" of "PickPlace".
        filter_key: use only these demos; see `DemoFile.training_key` for the default.
        origin: who made the source's demos, if the file does not say, e.g. "human".
        noise: standard deviation of the Gaussian noise on the executed position
            actions, in action units; the recorded `actions` are clean, so that the data
            show how to recover. The executed ones are stored as `executed_actions`.
        seed: with an attempt's index, decides its scene and noise.
        skip_corrupt: leave out demos that cannot be split into subtasks, with a warning
            each, instead of rejecting the file.

    Raises:
        UserError: the task's subtasks are not known; a demo lacks states or model, or
            does not replay; hardly any attempt succeeds; `out` exists, or other
            unfinished work lies there.
    """
    out = expanded(out)
    if demos < 1:
        raise UserError(f"demos must be at least 1, got {demos}")
    check_noise_and_seed(noise, seed)
    workers = checked_workers(workers, -(-demos // SHARD_SIZE))
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    check_output(out, overwrite, [expanded(file)])

    with DemoFile(file, skip_corrupt=skip_corrupt) as source:
        for reason in source.corrupt.values():
            warnings.warn(f"left out: {reason}", stacklevel=2)
        env_args = _generated_env_args(source, task)
        provenance = {k: v for k, v in source.file_attrs.items() if k not in _OF_FRAMES}
        names = source.select(source.training_key(filter_key))
        sources, own_args = _sources(source, env_args, names, origin, skip_corrupt=skip_corrupt)
    task = env_args["env_name"]
    plan = {"task": task, "source": _digest(sources, env_args), "noise": noise, "seed": seed}
    generator = _generator(*{source.origin for source in sources})
    attrs: dict[str, Attribute] = {
        **provenance,
        "generator": generator,
        "seed": seed,
        "noise": noise,
        "source_file": source.path.name,
        "source_env_version": str(source.env_args.get("env_version", "unknown")),
    }

    def demo_attrs(episode: Arrays) -> dict[str, Attribute]:
        made_from = sources[int(episode["source"])]
        return {"generator": _generator(made_from.origin), "source_demo": made_from.demo}

    def give_up(kept: int, attempts: int) -> UserError | None:
        if attempts < GIVE_UP_AFTER or kept >= attempts // 10:
            return None
        return UserError(
            f"{source.path}: {kept} of {attempts} attempts at {task} succeeded with noise {noise};"
            " lower it, or choose other demos with a filter key"
        )

    folder = shards_folder(out)
    with (
        DemoWriter(out, own_args, attrs=attrs, overwrite=overwrite) as writer,
        # The writer has locked the output, so no other generation uses these shards.
        resume_folder(folder, plan, resume=resume, overwrite=overwrite),
    ):
        attempts, steps = record_demos(
            writer,
            folder,
            partial(_start, env_args, sources, noise, seed),
            demos=demos,
            shard_size=SHARD_SIZE,
            workers=workers,
            attrs=demo_attrs,
            give_up=give_up,
            description=f"generate {task}",
        )
        rate = wilson(demos, attempts)
        writer.set_attrs(
            {
                "attempts": attempts,
                "success_rate": rate.value,
                "success_rate_low": rate.low,
                "success_rate_high": rate.high,
            }
        )
    remove_shards(folder)
    return Generated(out, demos, attempts, steps, rate.low, rate.high)


# The source


def _generated_env_args(source: DemoFile, task: str | None) -> dict[str, Any]:
    """The `env_args` of the new scenes."""
    require_task(source)
    if not is_robosuite(source.env_args):
        raise source.error(
            f"is of task {source.env_args['env_name']!r}, which is not robosuite's (type 1);"
            " only those can be generated from"
        )
    name = task or source.env_args["env_name"]
    if name not in SUBTASKS:
        advice = "; --task names the part of this file's task to generate" if task is None else ""
        raise source.error(f"{unknown('subtasks of task', name, SUBTASKS)}{advice}")
    return {**source.env_args, "env_name": name}


def _sources(
    file: DemoFile,
    env_args: Mapping[str, Any],
    demos: tuple[str, ...],
    origin: str | None,
    *,
    skip_corrupt: bool,
) -> tuple[tuple[SourceDemo, ...], dict[str, Any]]:
    """The demos split into subtasks, and the simulator's own `env_args`."""

    @contextmanager
    def skipping() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if not skip_corrupt:
                raise UserError(f"{error} (--skip-corrupt leaves such demos out)") from error
            warnings.warn(f"left out: {error}", stacklevel=2)

    # All are read before the simulator is made, which takes seconds.
    recorded = {}
    for demo in demos:
        with skipping():
            recorded[demo] = _read(file, demo)
    label = file.file_attrs.get("generator") or origin or file.file_attrs.get("origin")
    label = label or published(file.path) or "demonstrations of unknown origin"
    sources = []
    with file.named():
        env = RobosuiteEnv.from_env_args(env_args, cameras=())
    try:
        eef, subtasks = EndEffector(env), SUBTASKS[env_args["env_name"]]
        bar = tqdm(recorded.items(), desc="split into subtasks", unit="demo", disable=None)
        for demo, (model, states, actions) in bar:
            with skipping(), file.named(f"{demo}: "):
                if actions.shape[1:] != env.action_space.shape:
                    raise UserError(
                        f"its actions are of shape {actions.shape[1:]}, this robot's of"
                        f" {env.action_space.shape}"
                    )
                segments = split_subtasks(env, eef, subtasks, model, states, actions)
                made_by = str(file.attrs(demo).get("generator") or label)
                sources.append(SourceDemo(demo, made_by, segments))
    finally:
        env.close()
    if not sources:
        raise file.error("no demo is left to generate from")
    return tuple(sources), env.env_args


def _read(file: DemoFile, demo: str) -> tuple[str, NDArray[np.float64], NDArray[np.float64]]:
    """A demo's model, states `(N, S)` and actions `(N, A)`."""
    model = file.attrs(demo).get("model_file")
    if not model:
        raise file.error(
            f"{demo}: has no attribute model_file, the MJCF of its scene; use a file that has it"
        )
    return str(model), read_motion(file, demo, "states"), read_motion(file, demo, "actions")


def _digest(sources: tuple[SourceDemo, ...], env_args: Mapping[str, Any]) -> str:
    """Identifies the movements and the task of a generation."""
    digest = hashlib.sha256(json.dumps(env_args, sort_keys=True).encode())
    for source in sources:
        digest.update(f"{source.demo} {source.origin}".encode())
        for segment in source.segments:
            for array in (segment.poses, segment.goals, segment.gripper, segment.reference):
                digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _generator(*origins: str) -> str:
    return f"expanded from {' and '.join(sorted(origins))}"


# The attempts


def _start(
    env_args: Mapping[str, Any], sources: tuple[SourceDemo, ...], noise: float, seed: int
) -> RecordEpisode:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parent process has issued them
        env = RobosuiteEnv.from_env_args(env_args, cameras=())
    return partial(record_attempt, env, EndEffector(env), sources, noise, seed)


def record_attempt(
    env: RobosuiteEnv,
    eef: EndEffector,
    sources: tuple[SourceDemo, ...],
    noise: float,
    seed: int,
    index: int,
) -> Arrays:
    """One attempt: `success`, and if so a whole `Recording` and `source`, an index."""
    own_seed = episode_seed("expand", seed, index)
    rng = np.random.default_rng([own_seed, 1])  # `own_seed` alone draws the layout
    recording = Recording(env, own_seed)
    source = _source(index, len(sources), seed)

    def act(action: NDArray[np.float32]) -> bool:
        executed = action.copy()
        executed[:3] = np.clip(action[:3] + rng.normal(0, abs(noise), 3), -1, 1)
        terminated, _ = recording.step(action, executed)
        return terminated

    if not follow_segments(eef, sources[source].segments, act):
        return {"success": np.array(False)}
    return {**recording.arrays(), "source": np.array(source)}


def _source(index: int, sources: int, seed: int) -> int:
    """The source of an attempt: each is used equally often, in an order drawn for each
    round, since with a fixed one every tenth demo, for validation, could have the same.
    """
    number, place = divmod(index, sources)
    return int(np.random.default_rng([seed, number]).permutation(sources)[place])
