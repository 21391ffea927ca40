"""One episode in a simulator, chunk of actions by chunk of actions; knows no policy and
no torch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs import Observation, TaskEnv


class LiveEpisode:
    """An episode under way, from a restored start state.

    Cameras are rendered only at the instants that the policy reads, and at every step
    when it is filmed.

    Args:
        env: restored to the start state.
        obs: what it shows there.
        n_obs_steps: T_o, observations that the policy reads, the newest last; the first
            stands for those before it.
        film: observation key of a camera whose every frame is kept in `frames`, uint8
            `(H, W, 3)` each.
        beat: called after every control step and every observation, as a sign of life.
        show: called after every control step.
    """

    def __init__(
        self,
        env: TaskEnv,
        obs: Observation,
        n_obs_steps: int,
        *,
        film: str | None = None,
        beat: Callable[[], None] = lambda: None,
        show: Callable[[], None] = lambda: None,
    ) -> None:
        self._env, self._history, self._film, self._beat, self._show = (
            env,
            n_obs_steps,
            film,
            beat,
            show,
        )
        self.window: deque[Observation] = deque([obs] * n_obs_steps, maxlen=n_obs_steps)
        self.frames: list[NDArray[np.uint8]] = [obs[film]] if film else []
        self.steps, self.total_reward, self.success, self.done = 0, 0.0, False, False

    def execute(self, actions: NDArray[np.floating[Any]]) -> None:
        """Control steps for actions `(T_a, A)`, until the episode ends; afterwards
        `window` shows what the policy reads next.
        """
        for left, action in zip(range(len(actions) - 1, -1, -1), actions, strict=True):
            reward, terminated, truncated, info = self._env.advance(action)
            self._beat()
            self._show()
            self.steps, self.total_reward = self.steps + 1, self.total_reward + reward
            self.success, self.done = bool(info["success"]), terminated or truncated
            if self._film or (left < self._history and not self.done):
                self.window.append(self._env.observe())
                self._beat()
                if self._film:
                    self.frames.append(self.window[-1][self._film])
            if self.done:
                return
