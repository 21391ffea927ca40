"""Stored initial states: every policy runs the same episodes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fibopolicy.envs import Observation, SimState, TaskEnv
from fibopolicy.envs.base import episode_seed
from fibopolicy.errors import UserError, message_of
from fibopolicy.utils.files import atomic_write, check_output
from fibopolicy.utils.system import versions

_log = logging.getLogger(__name__)

#: Largest number of initial states in a set, which is kept in memory.
MAX_INIT_STATES = 1_000_000
#: 100 initial states of each built-in task, from `fibopolicy init-states TASK
#: --episodes 100`.
SHIPPED = Path(__file__).parent / "init_states_data"


@dataclass(frozen=True)
class InitStates:
    """The initial states of episodes 0 .. n-1 of a task.

    Args:
        env_args: `env_args` of the environment that drew the states and rendered the
            frames.
        seed: seed of the set.
        seeds: seed of each episode's layout.
        states: initial state of each episode.
        hashes: digests of each episode's first frames, by camera; they show whether a
            restored state looks the same.
        versions: versions of the software that drew and rendered the states.
    """

    env_args: Mapping[str, Any]
    seed: int
    seeds: tuple[int, ...]
    states: tuple[SimState, ...]
    hashes: tuple[Mapping[str, str], ...]
    versions: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.states)

    def identity(self, index: int) -> str:
        """A digest of one state, which does not depend on how it is rendered: results
        with equal digests can be paired.
        """
        model = re.sub(r"<quality\b[^>]*/>", "", self.states[index].model)
        digest = hashlib.sha256(model.encode())
        digest.update(np.ascontiguousarray(self.states[index].state).tobytes())
        return digest.hexdigest()[:16]

    def different_cameras(self, index: int, hashes: Mapping[str, str]) -> list[str]:
        """The cameras whose first frame differs from the stored one."""
        stored = self.hashes[index]
        return [camera for camera, digest in hashes.items() if stored.get(camera) != digest]


def rendering_versions() -> dict[str, str]:
    """The software that a frame depends on: platform, OpenGL backend, simulators."""
    simulators = {k: v for k, v in versions().items() if k in ("mujoco", "robosuite")}
    found = {"platform": f"{platform.system()} {platform.machine()}"}
    return {**found, "MUJOCO_GL": os.environ.get("MUJOCO_GL", ""), **simulators}


def camera_hashes(obs: Observation) -> dict[str, str]:
    """A digest of each camera's frame, which is equal if and only if all pixels are."""
    return {
        key: hashlib.sha256(np.ascontiguousarray(frame).tobytes()).hexdigest()[:16]
        for key, frame in sorted(obs.items())
        if frame.dtype == np.uint8
    }


def make_init_states(env: TaskEnv, episodes: int, seed: int) -> InitStates:
    """Draw initial states. Episode i depends only on `seed` and i, and demonstrations
    are never collected from it.

    With seed 0, these are the states that a benchmark such as LIBERO prescribes, if there
    are enough. Otherwise all are drawn.

    Raises:
        UserError: a number is out of range.
    """
    if not 1 <= episodes <= MAX_INIT_STATES:
        limit = "at least 1" if episodes < 1 else f"at most {MAX_INIT_STATES}"
        raise UserError(f"episodes must be {limit}, got {episodes}")
    if seed < 0:
        raise UserError(f"seed must be at least 0, got {seed}")
    seeds = tuple(episode_seed("evaluate", seed, index) for index in range(episodes))
    prescribed = env.benchmark_states() if seed == 0 else ()
    if len(prescribed) >= episodes:
        seeds = tuple(range(episodes))
    states, hashes = [], []
    description = f"initial states of {env.task_id}"
    for index, layout_seed in enumerate(tqdm(seeds, desc=description, unit="state", disable=None)):
        if len(prescribed) >= episodes:
            states.append(prescribed[index])
        else:
            env.reset(seed=layout_seed)
            states.append(env.get_state())
        # Hash the restored state, since that is what an evaluation sees.
        hashes.append(camera_hashes(env.set_state(states[-1])))
    return InitStates(env.env_args, seed, seeds, tuple(states), tuple(hashes), rendering_versions())


def default_init_states(env: TaskEnv, episodes: int, seed: int) -> InitStates:
    """The shipped initial states if there are enough, else new ones; hashed as this
    environment renders them.
    """
    shipped = shipped_init_states(env.task_id, seed)
    if shipped is None or len(shipped) < episodes:
        return make_init_states(env, episodes, seed)
    states = shipped.states[:episodes]
    hashes = tuple(camera_hashes(env.set_state(state)) for state in states)
    ours, theirs = env.env_args["env_kwargs"], shipped.env_args["env_kwargs"]
    if all(ours.get(key) == theirs.get(key) for key in ("image_size", "quality")):
        different = [i for i, here in enumerate(hashes) if shipped.different_cameras(i, here)]
        if different:
            _log.info(
                "%s: OpenGL renders initial state %d differently here than where it was made; the"
                " states are the same",
                env.task_id,
                different[0],
            )
    return InitStates(
        env.env_args, seed, shipped.seeds[:episodes], states, hashes, rendering_versions()
    )


def shipped_init_states(task_id: str, seed: int) -> InitStates | None:
    """The initial states in this package for a task and seed, if there are any."""
    path = SHIPPED / f"{task_id.replace('/', '_')}_seed{seed}.npz"
    return load_init_states(path) if path.is_file() else None


def save_init_states(init_states: InitStates, path: Path, *, overwrite: bool = False) -> None:
    """Write a compressed `.npz` file, in which equal models are stored once.

    Raises:
        UserError: the file exists and `overwrite` is not given, or cannot be written.
    """
    check_output(path, overwrite)
    models = list(dict.fromkeys(s.model for s in init_states.states))
    cameras = init_states.hashes[0]
    arrays: dict[str, NDArray[Any]] = {
        "env_args": np.array(json.dumps(dict(init_states.env_args))),
        "seed": np.array(init_states.seed),
        "seeds": np.array(init_states.seeds, dtype=np.int64),
        "models": np.array(models),
        "model": np.array([models.index(s.model) for s in init_states.states]),
        "states": np.stack([s.state for s in init_states.states]),
        "versions": np.array(json.dumps(dict(init_states.versions))),
        **{
            f"hashes/{camera}": np.array([h[camera] for h in init_states.hashes])
            for camera in cameras
        },
    }
    with atomic_write(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_init_states(path: Path) -> InitStates:
    """Read a file that `save_init_states` wrote.

    Raises:
        UserError: no such file, or another kind of file.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file of initial states")
    try:
        with np.load(path, allow_pickle=False) as file:
            models = [str(m) for m in file["models"]]
            states = tuple(
                SimState(models[int(model)], state)
                for model, state in zip(file["model"], file["states"], strict=True)
            )
            hashes = {name: file[name] for name in file.files if name.startswith("hashes/")}
            return InitStates(
                env_args=json.loads(str(file["env_args"])),
                seed=int(file["seed"]),
                seeds=tuple(int(s) for s in file["seeds"]),
                states=states,
                hashes=tuple(
                    {name.removeprefix("hashes/"): str(h[i]) for name, h in hashes.items()}
                    for i in range(len(states))
                ),
                versions=json.loads(str(file["versions"])),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = message_of(error)[:120]
        raise UserError(f"{path}: is not a file of initial states ({reason})") from error
