"""The environment contract that collection, rendering and evaluation rely on."""

from __future__ import annotations

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import gymnasium
import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.rendering import Decor, Quality
from fibopolicy.errors import UserError

Observation = dict[str, NDArray[Any]]
Space = gymnasium.Space[Any]


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
    """A manipulation task: observations out, normalised actions in, success as a
    predicate.

    Observations are a dict: `<camera>_image` uint8 `(H, W, 3)`, upright, and float32
    vectors. Actions are float32 in [-1, 1]. `info["success"]` says whether the goal is
    met at this instant; an episode terminates when it is. `step` is `advance` followed
    by `observe`: call only `advance` if no images are needed.

    A custom class, named as "module:class", is constructed with the keyword arguments
    `cameras`, `image_size` and `quality`, and `horizon` if the caller sets one.
    `image_size` is a number of pixels, (height, width), or a mapping from cameras to
    sizes. Its `env_args` give its `task_id` as `env_name`, `type` 2, and these
    arguments as `env_kwargs`.

    Attributes:
        task_id: set by `fibopolicy.envs.make` for a custom class.
        control_hz: control steps per second.
        quality: how frames are rendered. Frames of different qualities do not match.
        horizon: the most control steps of an episode, which is then truncated. The name
            is robosuite's; a policy's `horizon` is the length of its action chunk.
        expert_noise: default standard deviation of the noise on an expert's executed
            actions, action units.
        proprioception: the observation keys of the robot's own state. Training reads
            those that `fibopolicy.datasets.conventions.PROPRIOCEPTION` lists, such as
            "robot_state", by default, and others by `--vectors`.
        eef_keys: the observation keys of the end effectors' positions, `(3,)` each,
            metres.
        instruction: the instruction given to the robot, where the task has one in
            words.
        decor: shapes that are drawn although the simulation does not have them; `None`
            if this environment cannot draw any.
    """

    task_id: str
    control_hz: float
    quality: Quality
    horizon: int
    expert_noise: float = 0.2
    proprioception: tuple[str, ...]
    eef_keys: tuple[str, ...] = ()
    instruction: str | None = None
    decor: tuple[Decor, ...] | None = None

    @abstractmethod
    def advance(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[float, bool, bool, dict[str, Any]]:
        """Simulate one control step: `(reward, terminated, truncated, info)`, no rendering."""

    @abstractmethod
    def observe(self) -> Observation:
        """The observation at this instant, with its cameras rendered."""

    @abstractmethod
    def get_state(self) -> SimState:
        """The state at this instant, for `set_state`."""

    @abstractmethod
    def set_state(self, state: SimState) -> Observation:
        """Restore an instant exactly and start counting steps from 0; returns its observation."""

    @property
    @abstractmethod
    def env_args(self) -> dict[str, Any]:
        """The arguments from which `fibopolicy.envs.from_env_args` makes this
        environment.

        Every dataset stores them.
        """

    @abstractmethod
    def success(self) -> bool:
        """Whether the goal is met at this instant."""

    def benchmark_states(self) -> Sequence[SimState]:
        """The initial states that the task's benchmark prescribes; empty where it
        draws them.
        """
        return ()

    def begin(self, obs: Observation) -> Observation:
        """Bring a restored initial state to the instant where a policy takes over.

        Most tasks are there already. LIBERO's let the scene come to rest first.

        Args:
            obs: the observation of the restored state.

        Returns:
            The observation for the policy, `obs` itself if nothing was done.
        """
        return obs

    def expert_action(self) -> NDArray[np.float32]:
        """The scripted expert's action at this instant, a function of the simulator's
        state alone.

        Raises:
            UserError: the task has no expert.
        """
        raise UserError(f"{self.task_id} has no scripted expert to collect from")

    def simulation(self) -> tuple[Any, Any]:
        """MuJoCo's current model and data. Restoring a state with another model replaces them."""
        raise LookupError(f"{self.task_id} has no MuJoCo simulation to show")

    def step(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        reward, terminated, truncated, info = self.advance(action)
        return self.observe(), reward, terminated, truncated, info


def episode_seed(purpose: Literal["collect", "evaluate", "expand"], seed: int, index: int) -> int:
    """The seed of episode `index`, a 32-bit integer.

    Each purpose and each seed has a separate stream, so that no policy is evaluated on
    the layouts that it was trained on.
    """
    sequence = np.random.SeedSequence([zlib.crc32(purpose.encode()), seed, index])
    return int(sequence.generate_state(1)[0])


# Shared by the environments of this package.


def image_key(camera: str) -> str:
    """The observation key of a camera's frames. LIBERO's files name theirs
    `<camera>_rgb`, so a camera of such a name keeps it.
    """
    return camera if camera.endswith("_rgb") else f"{camera}_image"


def camera_keys(env: TaskEnv) -> list[str]:
    """The observation keys of an environment's frames."""
    spaces = cast("gymnasium.spaces.Dict", env.observation_space).spaces
    return [key for key, space in spaces.items() if space.dtype == np.uint8]


def own_env_args(
    env: TaskEnv, version: str, cameras: Sequence[str], image_size: Any, **options: Any
) -> dict[str, Any]:
    """`env_args` in the form that `TaskEnv` describes.

    Args:
        version: of the simulator or of the package with the tasks.
        options: arguments beyond those of every environment.
    """
    kwargs = {
        "cameras": list(cameras),
        "image_size": image_size,
        "quality": env.quality,
        "horizon": env.horizon,
        **options,
    }
    # robomimic's number for a gymnasium environment is 2.
    return {"env_name": env.task_id, "env_version": version, "type": 2, "env_kwargs": kwargs}


def make_observation_space(
    image_sizes: Mapping[str, tuple[int, int]], vectors: Mapping[str, Space]
) -> gymnasium.Space[Observation]:
    """A space of images, by camera and (height, width), and of vectors."""
    images: dict[str, Space] = {
        image_key(camera): gymnasium.spaces.Box(0, 255, (*size, 3), np.uint8)
        for camera, size in image_sizes.items()
    }
    return cast("gymnasium.Space[Observation]", gymnasium.spaces.Dict({**images, **vectors}))


def get_physics(model: Any, data: Any, parts: int) -> NDArray[np.float64]:
    """MuJoCo's state of this instant, of the given `mujoco.mjtState` parts."""
    import mujoco

    state = np.empty(mujoco.mj_stateSize(model, parts))
    mujoco.mj_getState(model, data, state, parts)
    return state


def set_physics(model: Any, data: Any, state: NDArray[np.float64], parts: int) -> None:
    """Restore what `get_physics` returned, exactly."""
    import mujoco

    state = np.ascontiguousarray(state)
    mujoco.mj_resetData(model, data)
    mujoco.mj_setState(model, data, state, parts)
    mujoco.mj_forward(model, data)
    # mj_forward changes what the solver starts from; the stored values continue the run
    # exactly.
    mujoco.mj_setState(model, data, state, parts)


def finite_vector(values: NDArray[np.floating[Any]], size: int, what: str) -> NDArray[np.float64]:
    """`values` in float64.

    Args:
        what: what they should be, the beginning of the message.

    Raises:
        UserError: their shape is not `(size,)`, or they are not finite.
    """
    vector = np.ascontiguousarray(values, dtype=np.float64)
    if vector.shape != (size,):
        raise UserError(f"{what}, got shape {vector.shape}")
    if not np.isfinite(vector).all():
        raise UserError(f"{what}, got shape {vector.shape} with NaN or infinity")
    return vector


def finite_action(env: TaskEnv, action: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """`action` in float64.

    Raises:
        UserError: its shape is not the action space's, or it is not finite.
    """
    command = np.asarray(action, dtype=np.float64)
    if command.shape != env.action_space.shape or not np.isfinite(command).all():
        dims = math.prod(env.action_space.shape or ())
        raise UserError(
            f"{env.task_id} takes an action of {dims} finite numbers,"
            f" got {np.asarray(action).tolist()}"
        )
    return command
