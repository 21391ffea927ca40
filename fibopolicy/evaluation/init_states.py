"""Stored start states: the same episodes for every policy."""

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
from fibopolicy.errors import UserError
from fibopolicy.utils.files import atomic_write, check_output
from fibopolicy.utils.system import versions

_log = logging.getLogger(__name__)
#: Start states of one set; their states and hashes are kept in memory.
MOST = 1_000_000

#: Start states of the built-in tasks, 100 each, made by `fibopolicy starts make TASK
#: --episodes 100`.
SHIPPED = Path(__file__).parent / "start_states"


@dataclass(frozen=True)
class Starts:
    """Episodes 0 .. n-1 of a task, restored and never drawn again.

    Args:
        env_args: how the environment was made; its frames are the ones that `hashes`
            are of.
        seed: of the whole set.
        seeds: per episode, what the layout was drawn from.
        states: per episode.
        hashes: per episode and camera, of the first frame, to prove that a restored
            start looks the same.
        versions: of what drew and rendered them.
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
        """A digest of the state itself, the same however it is rendered: rows with
        equal ones can be paired.
        """
        model = re.sub(r"<quality\b[^>]*/>", "", self.states[index].model)
        digest = hashlib.sha256(model.encode())
        digest.update(np.ascontiguousarray(self.states[index].state).tobytes())
        return digest.hexdigest()[:16]


def picture_versions() -> dict[str, str]:
    """What a picture depends on beside its settings: the simulators' versions, and
    where OpenGL comes from.
    """
    simulators = {k: v for k, v in versions().items() if k in ("mujoco", "robosuite")}
    found = {"platform": f"{platform.system()} {platform.machine()}"}
    return {**found, "MUJOCO_GL": os.environ.get("MUJOCO_GL", ""), **simulators}


def camera_hashes(obs: Observation) -> dict[str, str]:
    """A digest per camera of an observation; equal exactly when every pixel is."""
    return {
        key: hashlib.sha256(np.ascontiguousarray(frame).tobytes()).hexdigest()[:16]
        for key, frame in sorted(obs.items())
        if frame.dtype == np.uint8
    }


def make_starts(env: TaskEnv, episodes: int, seed: int) -> Starts:
    """Draw start states; episode i depends on `seed` and i alone, and no demonstration
    is ever collected from it.
    """
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, got {episodes}")
    if episodes > MOST:
        raise UserError(f"episodes must be at most {MOST}, got {episodes}")
    if seed < 0:
        raise UserError(f"seed must be at least 0, got {seed}")
    seeds = tuple(episode_seed("evaluate", seed, index) for index in range(episodes))
    states, hashes = [], []
    for one in tqdm(seeds, desc=f"start states of {env.task_id}", unit="state", disable=None):
        env.reset(seed=one)
        states.append(env.get_state())
        # Hashed as restored, which is how every evaluation sees it.
        hashes.append(camera_hashes(env.set_state(states[-1])))
    return Starts(env.env_args, seed, seeds, tuple(states), tuple(hashes), picture_versions())


def default_starts(env: TaskEnv, episodes: int, seed: int) -> Starts:
    """The shipped start states where there are enough, else freshly drawn ones; hashed
    as this environment renders them here.
    """
    shipped = shipped_starts(env.task_id, seed)
    if shipped is None or len(shipped) < episodes:
        return make_starts(env, episodes, seed)
    states = shipped.states[:episodes]
    hashes = tuple(camera_hashes(env.set_state(state)) for state in states)
    if _same_picture(shipped.env_args, env.env_args):
        for index, here in enumerate(hashes):
            if any(shipped.hashes[index][camera] != digest for camera, digest in here.items()):
                _log.info(
                    "%s: OpenGL draws start state %d otherwise here than where it was shipped from;"
                    " rows of both are of the same states, seen differently",
                    env.task_id,
                    index,
                )
                break
    return Starts(env.env_args, seed, shipped.seeds[:episodes], states, hashes, picture_versions())


def _same_picture(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(
        a["env_kwargs"].get(key) == b["env_kwargs"].get(key) for key in ("image_size", "quality")
    )


def shipped_starts(task_id: str, seed: int) -> Starts | None:
    """The start states that come with this package, if any do for this task and seed."""
    path = SHIPPED / f"{task_id.replace('/', '_')}_seed{seed}.npz"
    return load_starts(path) if path.is_file() else None


def save_starts(starts: Starts, path: Path, *, overwrite: bool = False) -> None:
    """Write a compressed `.npz`: distinct models once, states, seeds and hashes."""
    check_output(path, overwrite)
    models = list(dict.fromkeys(s.model for s in starts.states))
    arrays: dict[str, NDArray[Any]] = {
        "env_args": np.array(json.dumps(dict(starts.env_args))),
        "seed": np.array(starts.seed),
        "seeds": np.array(starts.seeds, dtype=np.int64),
        "models": np.array(models),
        "model": np.array([models.index(s.model) for s in starts.states]),
        "states": np.stack([s.state for s in starts.states]),
        "versions": np.array(json.dumps(dict(starts.versions))),
        **{
            f"hashes/{camera}": np.array([h[camera] for h in starts.hashes])
            for camera in starts.hashes[0]
        },
    }
    with atomic_write(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_starts(path: Path) -> Starts:
    """Read what `save_starts` wrote."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of start states")
    try:
        with np.load(path, allow_pickle=False) as file:
            models = [str(m) for m in file["models"]]
            states = tuple(
                SimState(models[int(m)], s)
                for m, s in zip(file["model"], file["states"], strict=True)
            )
            cameras = {
                name.removeprefix("hashes/"): file[name]
                for name in file.files
                if name.startswith("hashes/")
            }
            return Starts(
                json.loads(str(file["env_args"])),
                int(file["seed"]),
                tuple(int(s) for s in file["seeds"]),
                states,
                tuple(
                    {camera: str(hashes[i]) for camera, hashes in cameras.items()}
                    for i in range(len(states))
                ),
                json.loads(str(file["versions"])),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: is not a file of start states ({' '.join(str(error).split())[:120]})"
        ) from error
