"""Environments that misbehave. Simulator processes import this file, so it must not
import torch.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fibopolicy import envs


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def crash() -> None:
    raise ArithmeticError("the simulation is unstable")


def _make(
    fault: Callable[[], None], folder: Path, times: int, first_hand: tuple[float, ...]
) -> envs.TaskEnv:
    env = envs.make("Lift-v0", image_size=16, horizon=12)
    advance = env.advance

    def faulty_advance(action: np.ndarray[Any, Any]) -> tuple[float, bool, bool, dict[str, Any]]:
        is_target = getattr(env, "_steps", 0) == 5 and np.allclose(env.first_hand, first_hand)
        if is_target and len(list(folder.iterdir())) < times:
            (folder / f"{os.getpid()}").touch()
            fault()
        return advance(action)

    set_state = env.set_state

    def remembering_set_state(state: envs.SimState) -> envs.Observation:
        obs = set_state(state)
        env.first_hand = obs["hand_position"]
        return obs

    env.advance, env.set_state = faulty_advance, remembering_set_state
    return env


def make_faulty(
    fault: Callable[[], None], folder: Path, times: int, hand: np.ndarray[Any, Any]
) -> Callable[[], envs.TaskEnv]:
    """Function that makes a Lift environment. Step 5 of the episode whose hand starts
    at `hand` calls `fault` in the first `times` processes.
    """
    return partial(_make, fault, folder, times, tuple(float(x) for x in hand))


def dies_at_start() -> envs.TaskEnv:
    """An environment whose constructor kills its process."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def make_long_lift(folder: Path) -> envs.TaskEnv:
    """A long Lift episode; records the processes that it runs in."""
    (folder / f"{os.getpid()}").touch()
    return envs.make("Lift-v0", image_size=16, horizon=1000)
