"""Environments that misbehave, made in simulator processes: nothing here may load torch."""

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
    fault: Callable[[], None], folder: Path, times: int, seeds_hand: tuple[float, ...]
) -> envs.TaskEnv:
    env = envs.make("Lift-v0", image_size=16, horizon=12)
    advance = env.advance

    def faulty(action: np.ndarray[Any, Any]) -> tuple[float, bool, bool, dict[str, Any]]:
        ours = getattr(env, "_steps", 0) == 5 and np.allclose(env.begun, seeds_hand)
        if ours and len(list(folder.iterdir())) < times:
            (folder / f"{os.getpid()}").touch()
            fault()
        return advance(action)

    set_state = env.set_state

    def remembering(state: envs.SimState) -> envs.Observation:
        obs = set_state(state)
        env.begun = obs["hand_position"]
        return obs

    env.advance, env.set_state = faulty, remembering
    return env


def making(
    fault: Callable[[], None], folder: Path, times: int, hand: np.ndarray[Any, Any]
) -> Callable[[], envs.TaskEnv]:
    """Make a Lift whose step 5, in the episode that begins with the hand there,
    misbehaves in the first so many processes.
    """
    return partial(_make, fault, folder, times, tuple(float(x) for x in hand))


def dies_at_start() -> envs.TaskEnv:
    """An environment whose process dies while making it."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def lasting(folder: Path) -> envs.TaskEnv:
    """A Lift that lasts long and records the processes that it runs in."""
    (folder / f"{os.getpid()}").touch()
    return envs.make("Lift-v0", image_size=16, horizon=1000)
