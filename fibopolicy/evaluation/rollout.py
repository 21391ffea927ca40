"""One episode of a policy in a simulator of this process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs import Observation, TaskEnv
from fibopolicy.evaluation.episode import LiveEpisode
from fibopolicy.evaluation.policy_runner import Actor, Request


@dataclass(frozen=True)
class Episode:
    """What happened: success at some step, control steps taken, summed reward, and the
    frames seen if asked for.
    """

    success: bool
    steps: int
    total_reward: float
    frames: tuple[NDArray[np.uint8], ...]


def rollout(
    policy: Any, env: TaskEnv, obs: Observation, *, frames_from: str | None = None, index: int = 0
) -> Episode:
    """Run one episode until success or the task's horizon, from the restored start
    state that `obs` shows.

    Args:
        policy: anything that `Actor` takes, or an `Actor`.
        frames_from: observation key of a camera to film; otherwise cameras are rendered
            only where the policy reads them.
        index: of the episode, which random policies are seeded with.
    """
    actor = policy if isinstance(policy, Actor) else Actor(policy)
    episode = LiveEpisode(env, obs, actor.n_obs_steps, film=frames_from)
    request = Request(index, {})
    while not episode.done:
        request.window = {key: np.stack([o[key] for o in episode.window]) for key in obs}
        episode.execute(actor.act([request])[0])
    return Episode(episode.success, episode.steps, episode.total_reward, tuple(episode.frames))
