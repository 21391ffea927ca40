"""Meta-World's tasks behind the environment contract."""

from __future__ import annotations

import functools
import itertools
import math
import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.base import (
    Observation,
    SimState,
    TaskEnv,
    finite_action,
    finite_vector,
    get_physics,
    make_observation_space,
    own_env_args,
    set_physics,
)
from fibopolicy.envs.metaworld.tasks import METAWORLD, import_metaworld, metaworld_version
from fibopolicy.envs.rendering import (
    DEFAULT_IMAGE_SIZE,
    FrameSizes,
    ImageSize,
    Quality,
    Renderers,
    apply_quality,
    check_options,
    load_mujoco,
)
from fibopolicy.errors import UserError, unknown

load_mujoco()
import mujoco  # noqa: E402

CAMERAS = ("corner2", "gripperPOV")
#: The parts of MuJoCo's state that the next step depends on; external forces are never
#: applied.
_PHYSICS = (
    mujoco.mjtState.mjSTATE_FULLPHYSICS
    | mujoco.mjtState.mjSTATE_WARMSTART
    | mujoco.mjtState.mjSTATE_CTRL
    | mujoco.mjtState.mjSTATE_MOCAP_POS
    | mujoco.mjtState.mjSTATE_MOCAP_QUAT
)
#: Meta-World's observation: this frame, the previous one, the goal; a frame is hand 3,
#: gripper 1, two objects of 7.
FRAME = 18

Vector = NDArray[np.float64]


class MetaWorldEnv(TaskEnv):
    """A task of Meta-World 3: a Sawyer arm whose gripper moves in x, y, z, at 80 Hz.

    Action `(4,)` float32 in [-1, 1]: x, y, z displacement of the gripper's target (1 =
    1 cm) and the gripper's force (-1 opens, 1 closes). Observations: `<camera>_image`
    uint8 `(H, W, 3)`, upright; float32 `hand_position` `(3,)` metres, `gripper_opening`
    `(1,)` from 0 to 1 (10 cm between the fingers), `object_state` `(14,)`, position and
    quaternion of up to two objects, zeros for those that the task lacks, and
    `goal_position` `(3,)` metres. A policy reads the first two vectors by default. The
    reward is 1 at success and 0 before; `info["shaped_reward"]` is Meta-World's, from 0
    to 10. Unlike in Meta-World, an episode ends when its goal is met.

    The corner cameras of Meta-World are mounted upside down: their frames are turned by
    180 degrees here. "corner4" is where published image policies commonly move
    "corner2": nearer, so that small goals can be seen in small frames. In assembly,
    coffee-button, disassemble, door-lock, door-unlock and sweep Meta-World draws no
    marker at the goal.

    A layout is what `reset` draws: Meta-World's random vector, which with the task
    determines the goal, the objects' positions and everything that Meta-World remembers
    in an episode. A state is MuJoCo's own, the layout, and the previous frame of
    Meta-World's observation: episodes continue from it exactly, in any process.

    Args:
        task_id: "metaworld/<name>", e.g. "metaworld/reach-v3".
        cameras: the cameras to render, of "topview", "corner", "corner2", "corner3",
            "corner4", "behindGripper" and "gripperPOV".
        image_size: pixels, the side of square frames, (height, width), or one of these
            per camera.
        quality: "fast" renders without shadows, multisampling and reflections.
        horizon: control steps until truncation.
        goal_visible: whether frames show the goal's markers, where Meta-World draws
            them, and `goal_position` holds the goal. If not, it is zeros, as in
            Meta-World's meta-learning benchmarks.

    Raises:
        UserError: Meta-World is missing or not made for the installed mujoco; no such
            task, camera or option.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": 80,
    }
    proprioception = ("hand_position", "gripper_opening")
    eef_keys = ("hand_position",)
    decor = ()

    def __init__(
        self,
        task_id: str,
        cameras: tuple[str, ...] | list[str] = CAMERAS,
        image_size: ImageSize = DEFAULT_IMAGE_SIZE,
        quality: Quality = "fast",
        horizon: int = 500,
        goal_visible: bool = True,
        render_mode: str | None = None,
    ) -> None:
        if task_id not in METAWORLD:
            raise unknown("Meta-World task", task_id, METAWORLD)
        check_options(quality, horizon)
        self.task_id = task_id
        self.cameras = tuple(cameras)
        self._sizes = FrameSizes(image_size, self.cameras)
        self.quality = quality
        self.horizon = horizon
        self.goal_visible = goal_visible
        self.render_mode = render_mode
        self._env = _make(task_id)
        self.model: mujoco.MjModel = self._env.model
        self.data: mujoco.MjData = self._env.data
        names = [self.model.camera(i).name for i in range(self.model.ncam)]
        for camera in self.cameras:
            if camera not in names:
                raise unknown(f"camera of {task_id}", camera, names)
        self.control_hz = round(1 / float(self._env.dt), 6)
        self._policy = _expert(task_id)
        self._renderers = Renderers(self.model, self._sizes)
        self._steps = 0
        # Everything that Meta-World changes from one episode to the next.
        self._initial_attributes = _copies(vars(self._env))
        self._initial_poses = self.model.body_pos.copy(), self.model.site_pos.copy()
        self._layout: Vector = np.zeros(self._env._random_reset_space.shape)
        self._previous: Vector = np.zeros(FRAME)
        self._prepare_rendering()
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        box = gymnasium.spaces.Box
        vectors = {
            "hand_position": box(-np.inf, np.inf, (3,), np.float32),
            "gripper_opening": box(0.0, 1.0, (1,), np.float32),
            "object_state": box(-np.inf, np.inf, (14,), np.float32),
            "goal_position": box(-np.inf, np.inf, (3,), np.float32),
        }
        self.observation_space = make_observation_space(self._sizes.by_camera, vectors)

    # The environment contract.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a layout from `seed`, in Meta-World's ranges, regardless of earlier episodes."""
        super().reset(seed=seed)
        self._set_layout(self._draw())
        # Restored, so that this episode equals its replays from the stored initial
        # state.
        obs = self._restore(self._vector())
        return obs, {"success": self.success()}

    def advance(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[float, bool, bool, dict[str, Any]]:
        command = finite_action(self, action)
        self._previous = self._env._prev_obs
        _, reward, _, _, info = self._env.step(np.clip(command, -1, 1).astype(np.float32))
        self._steps += 1
        success = bool(info["success"])
        facts = {"success": success, "shaped_reward": float(reward)}
        return float(success), success, self._steps >= self.horizon, facts

    def observe(self) -> Observation:
        seen = self.metaworld_observation()
        observation: Observation = {
            f"{camera}_image": self.render_camera(camera) for camera in self.cameras
        }
        observation["hand_position"] = seen[:3].astype(np.float32)
        observation["gripper_opening"] = seen[3:4].astype(np.float32)
        observation["object_state"] = seen[4:FRAME].astype(np.float32)
        observation["goal_position"] = (seen[-3:] * self.goal_visible).astype(np.float32)
        return observation

    def get_state(self) -> SimState:
        return SimState(_model_text(self.task_id, self._env.fullpath), self._vector())

    def set_state(self, state: SimState) -> Observation:
        """Restore an instant exactly and start counting steps from 0; returns its
        observation.

        Raises:
            UserError: the state is of another task, or not as wide as this task's.
        """
        name = re.search(r'<mujoco model="([^"]*)"', state.model[:1000])
        if name is None or name[1] != self.task_id:
            raise UserError(
                f"a state of {name[1] if name else 'an unknown model'} does not fit {self.task_id}"
            )
        width = mujoco.mj_stateSize(self.model, _PHYSICS) + self._layout.size + FRAME
        what = f"a state of {self.task_id} is {width} finite numbers"
        vector = finite_vector(state.state, width, what)
        layout = vector[-FRAME - self._layout.size : -FRAME]
        if not np.array_equal(layout, self._layout):
            self._set_layout(layout)
        return self._restore(vector)

    @property
    def env_args(self) -> dict[str, Any]:
        version, size = metaworld_version(), self._sizes.stored()
        return own_env_args(self, version, self.cameras, size, goal_visible=self.goal_visible)

    def expert_action(self) -> NDArray[np.float32]:
        """The action of Meta-World's scripted policy, which always sees the goal.

        None of the 50 policies has a memory.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of actions beyond the limits
            action = self._policy.get_action(self.metaworld_observation())
        clipped: NDArray[np.float32] = np.clip(action, -1, 1).astype(np.float32)
        return clipped

    def render(self) -> NDArray[np.uint8]:
        return self.render_camera(self.cameras[0] if self.cameras else CAMERAS[0])

    def render_camera(self, camera: str) -> NDArray[np.uint8]:
        """One frame, uint8 `(H, W, 3)`, upright."""
        frame = self._renderers.render(self.data, camera, self.decor)
        return np.ascontiguousarray(frame[::-1, ::-1]) if camera in self._upside_down else frame

    def close(self) -> None:
        self._renderers.close()

    # Beyond the contract.

    def metaworld_observation(self) -> Vector:
        """Meta-World's own observation of this instant with the goal in it, `(39,)` float64."""
        env = self._env
        seen = np.hstack(
            (env._get_curr_obs_combined_no_goal(), self._previous, env._get_pos_goal())
        )
        space = env.sawyer_observation_space
        clipped: Vector = np.clip(seen, space.low, space.high)
        return clipped

    def simulation(self) -> tuple[Any, Any]:
        """MuJoCo's model and data behind this environment."""
        return self.model, self.data

    def success(self) -> bool:
        """Whether the task's goal is met at this instant."""
        _, info = self._env.evaluate_state(self.metaworld_observation(), np.zeros(4, np.float32))
        return bool(info["success"])

    # Layouts and states.

    def _draw(self) -> Vector:
        """A layout that the task accepts, from `self.np_random`."""
        env = self._initial_env()
        env._freeze_rand_vec, env.seeded_rand_vec, env.np_random = False, True, self.np_random
        env.reset()
        return np.array(env._last_rand_vec)

    def _set_layout(self, layout: Vector) -> None:
        """Bring the task to the start of the episode with this layout."""
        self._layout = np.full_like(self._layout, np.nan)  # invalid, in case what follows fails
        env = self._initial_env()
        num_draws = itertools.count()

        def same_layout() -> Vector:
            if next(num_draws) > 9:  # Meta-World asks twice, and again if the task rejects it
                raise UserError(
                    f"{self.task_id} rejects the layout of this state: {layout.tolist()}"
                )
            return layout.copy()

        env._get_state_rand_vec = same_layout
        env.reset()
        # Meta-World moves bodies after it last computed their positions.
        mujoco.mj_forward(self.model, self.data)
        self._previous = env._get_curr_obs_combined_no_goal()
        self.success()  # two tasks remember something of the first evaluation
        self._layout = layout.copy()

    def _initial_env(self) -> Any:
        """Return Meta-World's environment in its initial state.

        Otherwise its layouts would depend on the previous episode.
        """
        vars(self._env).clear()
        vars(self._env).update(_copies(self._initial_attributes))
        self.model.body_pos[:], self.model.site_pos[:] = self._initial_poses
        mujoco.mj_resetData(self.model, self.data)
        return self._env

    def _vector(self) -> Vector:
        """MuJoCo's state, the layout, the previous frame."""
        physics = get_physics(self.model, self.data, _PHYSICS)
        return np.concatenate([physics, self._layout, self._previous])

    def _restore(self, vector: Vector) -> Observation:
        """Restore a state of the current layout."""
        physics = vector[: mujoco.mj_stateSize(self.model, _PHYSICS)]
        set_physics(self.model, self.data, physics, _PHYSICS)
        self._previous = vector[-FRAME:].copy()
        self._env._prev_obs = self._env._get_curr_obs_combined_no_goal()
        self._steps = 0
        return self.observe()

    def _prepare_rendering(self) -> None:
        model = self.model
        apply_quality(model, self.quality)
        if not self.goal_visible:
            for i in range(model.nsite):
                if "goal" in model.site(i).name.lower() or model.site(i).name == "pegTop":
                    model.site_rgba[i, 3] = 0
        # Cameras fixed in the room whose upper edge points down.
        up = model.cam_mat0.reshape(-1, 3, 3)[:, 2, 1]
        self._upside_down = {
            model.camera(i).name
            for i in range(model.ncam)
            if model.cam_bodyid[i] == 0 and up[i] < -0.1
        }


def _make(task_id: str) -> Any:
    """Meta-World's environment of one task, fully observable, with a task set."""
    import_metaworld()
    from metaworld.env_dict import ENV_CLS_MAP

    env: Any = ENV_CLS_MAP[task_id.partition("/")[2]]()
    env._partially_observable = False
    del env.sawyer_observation_space  # it is cached for the partially observable one
    env._set_task_called = True
    env.max_path_length = math.inf  # truncation is decided here
    return env


def _expert(task_id: str) -> Any:
    from metaworld.policies import ENV_POLICY_MAP

    policies: Mapping[str, Any] = ENV_POLICY_MAP
    return policies[task_id.partition("/")[2]]()


def _copies(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the attributes that could be modified in place, except views into MuJoCo's
    data.
    """
    own = {
        k
        for k, v in attributes.items()
        if isinstance(v, dict) or (isinstance(v, np.ndarray) and v.flags.owndata)
    }
    return {key: deepcopy(value) if key in own else value for key, value in attributes.items()}


@functools.cache
def _model_text(task_id: str, path: str) -> str:
    """The task's MJCF, named after it; its files lie in the metaworld package, relative
    to `assets/sawyer_xyz`.
    """
    spec = mujoco.MjSpec.from_file(path)
    spec.modelname = task_id
    spec.compile()
    return str(spec.to_xml())
