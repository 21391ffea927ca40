"""Many demonstrations from a few: recorded ones carried over to new scenes (see
`segments`), kept when they succeed there.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from tqdm import tqdm

from fibopolicy.datasets.fetch import published
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.parts import opened_parts, parts_folder, remove_parts
from fibopolicy.datasets.restore import read_motion, require_task
from fibopolicy.datasets.segments import Segment, attempt, take_apart
from fibopolicy.datasets.shards import Arrays, add_episode, made_ahead
from fibopolicy.datasets.writer import Attribute, DemoWriter
from fibopolicy.envs.base import episode_seed
from fibopolicy.envs.robosuite.environment import RobosuiteEnv
from fibopolicy.envs.robosuite.subtasks import SUBTASKS, Hand
from fibopolicy.errors import UserError, unknown
from fibopolicy.utils.files import StrPath, check_output, check_resume_or_overwrite, expanded
from fibopolicy.utils.processes import checked_workers

#: Attempts per shard: what a killed expansion loses at most, per worker.
SHARD = 10
#: Attempts after which an expansion that all but never succeeds is given up.
HOPELESS = 50


@dataclass(frozen=True)
class Source:
    """One demonstration to expand.

    Args:
        demo: its name in the source file.
        origin: who made it, e.g. "human" or "scripted expert".
        segments: what the hand did, subtask by subtask.
    """

    demo: str
    origin: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True)
class Expanded:
    """What an expansion gave.

    Args:
        demos: kept, all successes.
        tried: attempts for them, each in a scene of its own.
        steps: control steps kept.
        low, high: the 95 % Wilson interval of the generation success rate `demos /
            tried`.
    """

    path: Path
    demos: int
    tried: int
    steps: int
    low: float
    high: float


def expand(
    file: StrPath,
    demos: int,
    out: StrPath,
    *,
    task: str | None = None,
    filter_key: str | None = None,
    origin: str | None = None,
    noise: float = 0.05,
    seed: int = 0,
    skip_damaged: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
) -> Expanded:
    """Write `demos` successful demonstrations in new scenes, made from those of a
    robomimic file of robosuite.

    The output holds states, actions and vector observations, no images. Each demo tells
    its `source_demo`, its `generator` and the `seed` of its scene; no evaluation starts
    from such a scene. It depends on the input and the settings alone, not on `workers`.
    An expansion that was stopped goes on where it was with `resume=True`.

    Args:
        file: the source; its `env_args` decide robot, controller and control frequency.
        task: robosuite's name of the task, where it is a part of the file's, e.g.
            "PickPlaceCan" of "PickPlace".
        filter_key: takes these demos alone.
        origin: who made the source's demos, where they do not say, e.g. "human".
        noise: standard deviation of the Gaussian noise on the executed position
            actions, in action units; the recorded `actions` are clean, so that the data
            show how to recover. What was executed is stored as `executed_actions`.
        seed: with an attempt's index, gives its scene and noise.
        skip_damaged: leave out demos that cannot be taken apart, with a warning each,
            instead of refusing the file.

    Raises:
        UserError: the task's structure is not known; a demo lacks states or model, or
            does not replay; hardly any attempt succeeds; `out` exists, or other
            unfinished work lies there.
    """
    out = expanded(out)
    if demos < 1:
        raise UserError(f"demos must be at least 1, got {demos}")
    if not 0 <= noise <= 2:
        raise UserError(f"noise must be between 0 and 2 (action units), got {noise}")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"seed must be between 0 and 2^63 - 1, got {seed}")
    workers = checked_workers(workers, -(-demos // SHARD))
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    check_output(out, overwrite, [expanded(file)])

    with DemoFile(file, skip_damaged=skip_damaged) as source:
        for reason in source.damaged.values():
            warnings.warn(f"left out: {reason}", stacklevel=2)
        env_args = _target(source, task)
        sources, own_args = _sources(
            source, env_args, source.select(filter_key), origin, skip_damaged=skip_damaged
        )
    plan = {
        "task": env_args["env_name"],
        "source": _digest(sources, env_args),
        "noise": noise,
        "seed": seed,
    }
    generator = _generator({s.origin for s in sources})
    attrs: dict[str, Attribute] = {
        "generator": generator,
        "seed": seed,
        "noise": noise,
        "source_file": source.path.name,
    }

    parts = parts_folder(out)
    kept = tried = steps = 0
    with (
        tqdm(total=demos, desc=f"expand {env_args['env_name']}", unit="demo", disable=None) as bar,
        DemoWriter(out, own_args, attrs=attrs, overwrite=overwrite) as writer,
        # The writer holds the output by now, so no other expansion is at work on these
        # shards.
        opened_parts(parts, plan, resume=resume, overwrite=overwrite),
    ):
        names: list[str] = []
        start = partial(_start, env_args, sources, noise, seed)
        for episode in made_ahead(parts, start, needed=demos, size=SHARD, workers=workers):
            tried += 1
            if episode["success"]:
                made_from = sources[int(episode["source"])]
                attrs = {"generator": _generator({made_from.origin}), "source_demo": made_from.demo}
                names.append(add_episode(writer, episode, attrs))
                kept, steps = kept + 1, steps + len(episode["actions"])
                bar.update()
            bar.set_postfix_str(f"{kept} of {tried} attempts", refresh=False)
            if kept == demos:
                break
            if tried >= HOPELESS and kept < tried // 10:
                raise UserError(
                    f"{source.path}: {kept} of {tried} attempts at {env_args['env_name']} succeeded"
                    f" with noise {noise}; lower it, or choose other demos with a filter key"
                )
        # Every tenth demo is held out, the same ones whatever the number of workers.
        if valid := names[9::10]:
            writer.add_filter_key("train", [n for n in names if n not in set(valid)])
            writer.add_filter_key("valid", valid)
        interval = binomtest(kept, tried).proportion_ci(method="wilson")
        low, high = float(interval.low), float(interval.high)
        writer.set_attrs(
            {
                "attempts": tried,
                "success_rate": kept / tried,
                "success_rate_low": low,
                "success_rate_high": high,
            }
        )
    remove_parts(parts)
    return Expanded(out, kept, tried, steps, low, high)


# The source


def _target(source: DemoFile, task: str | None) -> dict[str, Any]:
    """The `env_args` of the new scenes."""
    require_task(source)
    if source.env_args.get("type") != 1:
        raise source.error(
            f"is of task {source.env_args['env_name']!r}, which is not robosuite's (type 1); expand"
            " takes those"
        )
    name = task or source.env_args["env_name"]
    if name not in SUBTASKS:
        advice = (
            "; --task names the part of this file's task that is to be expanded"
            if task is None
            else ""
        )
        raise source.error(f"{unknown('structure of task', name, SUBTASKS)}{advice}")
    return {**source.env_args, "env_name": name}


def _sources(
    file: DemoFile,
    env_args: Mapping[str, Any],
    demos: tuple[str, ...],
    origin: str | None,
    *,
    skip_damaged: bool,
) -> tuple[tuple[Source, ...], dict[str, Any]]:
    """The demos taken apart, without those that cannot be, if these may be left out;
    and the simulator's own `env_args`.
    """

    @contextmanager
    def damage_told() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if not skip_damaged:
                raise UserError(f"{error} (--skip-damaged leaves such demos out)") from error
            warnings.warn(f"left out: {error}", stacklevel=2)

    # All are read before the simulator is made, which takes seconds.
    recorded = {}
    for demo in demos:
        with damage_told():
            recorded[demo] = _recorded(file, demo)
    label = (
        file.file_attrs.get("generator")
        or origin
        or published(file.path)
        or "demonstrations of unknown origin"
    )
    sources = []
    with file.named():
        env = RobosuiteEnv.from_env_args(env_args, cameras=())
    try:
        hand, subtasks = Hand(env), SUBTASKS[env_args["env_name"]]
        for demo, (model, states, actions) in tqdm(
            recorded.items(), desc="take apart", unit="demo", disable=None
        ):
            with damage_told(), file.named(f"{demo}: "):
                if actions.shape[1:] != env.action_space.shape:
                    raise UserError(
                        f"its actions are of shape {actions.shape[1:]}, this robot's of"
                        f" {env.action_space.shape}"
                    )
                segments = take_apart(env, hand, subtasks, model, states, actions)
                sources.append(
                    Source(demo, str(file.attrs(demo).get("generator") or label), segments)
                )
    finally:
        env.close()
    if not sources:
        raise file.error("no demo is left to expand")
    return tuple(sources), env.env_args


def _recorded(file: DemoFile, demo: str) -> tuple[str, NDArray[np.float64], NDArray[np.float64]]:
    """A demo's model, states `(N, S)` and actions `(N, A)`."""
    model = file.attrs(demo).get("model_file")
    if not model:
        raise file.error(
            f"{demo}: has no attribute model_file, the MJCF of its scene; take a file that has it"
        )
    return str(model), read_motion(file, demo, "states"), read_motion(file, demo, "actions")


def _digest(sources: tuple[Source, ...], env_args: Mapping[str, Any]) -> str:
    """Tells whether two expansions take over the same movements in the same task."""
    digest = hashlib.sha256(json.dumps(env_args, sort_keys=True).encode())
    for source in sources:
        digest.update(f"{source.demo} {source.origin}".encode())
        for segment in source.segments:
            for array in (segment.poses, segment.goals, segment.gripper, segment.about):
                digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _generator(origins: set[str]) -> str:
    return f"expanded from {' and '.join(sorted(origins))}"


# The attempts


def _start(
    env_args: Mapping[str, Any], sources: tuple[Source, ...], noise: float, seed: int
) -> Callable[[int], Arrays]:
    """What a worker process makes attempts with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parent has given them
        env = RobosuiteEnv.from_env_args(env_args, cameras=())
    return partial(generate, env, Hand(env), sources, noise, seed)


def generate(
    env: RobosuiteEnv, hand: Hand, sources: tuple[Source, ...], noise: float, seed: int, index: int
) -> Arrays:
    """One attempt: `success`, and if so the arrays of a demo, `model`, `source` (an
    index), `seed` and `last_obs/*`.
    """
    own = episode_seed("expand", seed, index)
    rng = np.random.default_rng(own)
    obs, _ = env.reset(seed=own)
    source = index % len(sources)
    rows: dict[str, list[Any]] = {}

    def act(action: NDArray[np.float32]) -> bool:
        nonlocal obs
        executed = action.copy()
        executed[:3] = np.clip(action[:3] + rng.normal(0, abs(noise), 3), -1, 1)
        row = {"actions": action, "executed_actions": executed, "states": env.get_state().state}
        row |= {f"obs/{key}": value for key, value in obs.items()}
        reward, success, _, _ = env.advance(executed)
        obs = env.observe()
        for key, value in {**row, "rewards": reward, "dones": success}.items():
            rows.setdefault(key, []).append(value)
        return success

    if not attempt(hand, sources[source].segments, act):
        return {"success": np.array(False)}
    arrays = {key: np.stack(values) for key, values in rows.items()}
    arrays |= {f"last_obs/{key}": value[None] for key, value in obs.items()}
    model = np.array(env.get_state().model.encode())
    return {
        **arrays,
        "model": model,
        "success": np.array(True),
        "source": np.array(source),
        "seed": np.array(own),
    }
