"""One episode of a policy in an environment in the process of the test."""

from __future__ import annotations

from typing import Any

import numpy as np

from fibopolicy.envs import Observation, TaskEnv
from fibopolicy.evaluation.episodes import Episode
from fibopolicy.evaluation.policy_runner import PolicyRunner
from fibopolicy.evaluation.simulator import EpisodeRunner


def rollout(
    policy: Any, env: TaskEnv, obs: Observation, *, keep_states: bool = False, index: int = 0
) -> Episode:
    """Run an episode from the restored initial state that `obs` shows.

    Args:
        policy: a `PolicyRunner`, or any policy that it accepts.
        keep_states: keep the state after every step.
        index: of the episode; it seeds random policies.
    """
    policy_runner = policy if isinstance(policy, PolicyRunner) else PolicyRunner(policy)
    episode = Episode(index)
    runner = EpisodeRunner(env, obs, policy_runner.n_obs_steps, keep_states=keep_states)
    while not runner.done:
        episode.window = {key: np.stack([o[key] for o in runner.window]) for key in obs}
        runner.execute(policy_runner.act_batch([episode])[0])
    episode.success, episode.steps = runner.success, runner.steps
    episode.total_reward, episode.states = runner.total_reward, runner.states
    return episode
