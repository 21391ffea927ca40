"""One episode of a policy in a simulator."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fibopolicy.envs import Observation, TaskEnv
from fibopolicy.policies import Policy


@dataclass(frozen=True)
class Episode:
    """What happened: success at some step, control steps taken, summed reward, and the frames seen if asked for."""

    success: bool
    steps: int
    total_reward: float
    frames: tuple[NDArray[np.uint8], ...]


def rollout(policy: Policy, env: TaskEnv, obs: Observation, *, frames_from: str | None = None) -> Episode:
    """Run one episode until success or the task's horizon, from the restored start state that `obs` shows.

    Cameras are rendered only at instants that the policy reads, and at every step when `frames_from`, an observation
    key of a camera, asks for a video.
    """
    history = policy.config.history
    window = deque([obs] * history, maxlen=history)
    frames = [obs[frames_from]] if frames_from else []
    queue: deque[NDArray[np.float32]] = deque()
    state: Any = None
    steps, total, done, info = 0, 0.0, False, {"success": False}
    while not done:
        if not queue:
            actions, state = policy.act(stack(window), state)
            queue.extend(actions[0].cpu().numpy())
        reward, terminated, truncated, info = env.advance(queue.popleft())
        steps, total, done = steps + 1, total + reward, terminated or truncated
        if frames_from or (len(queue) < history and not done):
            window.append(env.observe())
            if frames_from:
                frames.append(window[-1][frames_from])
    return Episode(bool(info["success"]), steps, total, tuple(frames))


def stack(window: deque[Observation]) -> dict[str, torch.Tensor]:
    """Observations of the last T_o steps as a batch of one: `(1, T_o, ...)` per key."""
    return {key: torch.from_numpy(np.stack([o[key] for o in window])[None]) for key in window[0]}
