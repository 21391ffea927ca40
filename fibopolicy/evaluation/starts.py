"""Stored start states: the same episodes for every policy."""

from __future__ import annotations

import hashlib
import json
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
from fibopolicy.envs.seeding import episode_seed
from fibopolicy.errors import UserError
from fibopolicy.files import refuse_existing, written_aside


@dataclass(frozen=True)
class Starts:
    """Episodes 0 .. n-1 of a task, restored and never drawn again.

    Args:
        env_args: how the environment was made; its frames are the ones that `hashes` are of.
        seed: of the whole set.
        seeds: per episode, what the layout was drawn from.
        states: per episode.
        hashes: per episode, of the first observation's frames, to prove that a restored start looks the same.
    """

    env_args: Mapping[str, Any]
    seed: int
    seeds: tuple[int, ...]
    states: tuple[SimState, ...]
    hashes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.states)


def frames_hash(obs: Observation) -> str:
    """A digest of an observation's images; equal exactly when every pixel is."""
    digest = hashlib.sha256()
    for key in sorted(k for k, v in obs.items() if v.dtype == np.uint8):
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(obs[key]).tobytes())
    return digest.hexdigest()[:16]


def make_starts(env: TaskEnv, episodes: int, seed: int) -> Starts:
    """Draw start states; episode i depends on `seed` and i alone, and no demonstration is ever collected from it."""
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, got {episodes}")
    seeds = tuple(episode_seed("evaluate", seed, index) for index in range(episodes))
    states, hashes = [], []
    for one in tqdm(seeds, desc=f"start states of {env.task_id}", unit="state", disable=None):
        env.reset(seed=one)
        states.append(env.get_state())
        # Hashed as restored, which is how every evaluation sees it.
        hashes.append(frames_hash(env.set_state(states[-1])))
    return Starts(env.env_args, seed, seeds, tuple(states), tuple(hashes))


def save_starts(starts: Starts, path: Path, *, overwrite: bool = False) -> None:
    """Write a compressed `.npz`: distinct models once, states, seeds and hashes."""
    refuse_existing(path, overwrite)
    models = list(dict.fromkeys(s.model for s in starts.states))
    arrays: dict[str, NDArray[Any]] = {
        "env_args": np.array(json.dumps(dict(starts.env_args))),
        "seed": np.array(starts.seed),
        "seeds": np.array(starts.seeds, dtype=np.int64),
        "models": np.array(models),
        "model": np.array([models.index(s.model) for s in starts.states]),
        "states": np.stack([s.state for s in starts.states]),
        "hashes": np.array(starts.hashes),
    }
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)


def load_starts(path: Path) -> Starts:
    """Read what `save_starts` wrote."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of start states")
    try:
        with np.load(path, allow_pickle=False) as file:
            models = [str(m) for m in file["models"]]
            states = tuple(SimState(models[int(m)], s) for m, s in zip(file["model"], file["states"], strict=True))
            return Starts(
                json.loads(str(file["env_args"])),
                int(file["seed"]),
                tuple(int(s) for s in file["seeds"]),
                states,
                tuple(str(h) for h in file["hashes"]),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: is not a file of start states ({' '.join(str(error).split())[:120]})") from error
