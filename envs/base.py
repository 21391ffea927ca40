"""The environment contract that collection, rendering and evaluation rely on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.rendering import Quality
from fibopolicy.errors import UserError

Observation = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SimState:
    """One exact instant of a simulation.

    Args:
        model: the MJCF text that the state belongs to.
        state: `(S,)` float64, everything that the next step depends on.
    """

    model: str
    state: NDArray[np.float64]


class TaskEnv(gymnasium.Env[Observation, NDArray[np.float32]], ABC):
    """A manipulation task: images and proprioception in, normalised actions out,
    success as a predicate.

    Observations are a dict: `<camera>_image` uint8 `(H, W, 3)`, upright, and float32
    vectors. Actions are float32 in [-1, 1]. `info["success"]` says whether the goal is
    met at this instant; an episode terminates when it is. `step` is `advance` followed
    by `observe`: whoever needs no picture of an instant calls `advance` alone.

    A class of your own that is named as "module:class" is made with the keyword
    arguments `cameras`, `image_size` and `quality`, and `horizon` where one is asked
    for; `image_size` is a number, or where cameras differ or are not square, (height,
    width) or a mapping from cameras to sizes; `env_args` give its `task_id` as
    `env_name`, `type` 2, and these arguments as `env_kwargs`.
    """

    task_id: str
    control_hz: float
    #: How frames are rendered; they look different otherwise.
    quality: Quality
    #: Control steps after which an episode is truncated.
    horizon: int
    #: Standard deviation of the noise that an expert's executed actions carry unless
    #: told otherwise, action units.
    expert_noise: float = 0.2
    #: The observation keys that a policy uses as proprioception unless told otherwise.
    proprioception: tuple[str, ...]
    #: The observation keys of the hands' places, `(3,)` each, metres.
    hands: tuple[str, ...] = ()

    @abstractmethod
    def advance(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[float, bool, bool, dict[str, Any]]:
        """Simulate one control step: `(reward, terminated, truncated, info)`, no rendering."""

    @abstractmethod
    def observe(self) -> Observation:
        """The observation of this instant, with its cameras rendered."""

    @abstractmethod
    def get_state(self) -> SimState:
        """This instant, for `set_state`."""

    @abstractmethod
    def set_state(self, state: SimState) -> Observation:
        """Restore an instant exactly and start counting steps from 0; returns its observation."""

    @property
    @abstractmethod
    def env_args(self) -> dict[str, Any]:
        """What `fibopolicy.envs.from_env_args` needs to make this environment again;
        stored with every dataset.
        """

    @abstractmethod
    def success(self) -> bool:
        """Whether the goal is met at this instant."""

    def expert_action(self) -> NDArray[np.float32]:
        """The scripted expert's action at this instant, a function of the simulator's
        state alone.

        Raises:
            UserError: the task has no expert.
        """
        raise UserError(f"{self.task_id} has no scripted expert to collect from")

    def simulation(self) -> tuple[Any, Any]:
        """MuJoCo's model and data behind this environment, as they are now; a state
        with another model replaces them.
        """
        raise LookupError(f"{self.task_id} has no MuJoCo simulation to show")

    def step(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info
