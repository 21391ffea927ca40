"""The base of the built-in tasks: the hand's control, observations, exact states."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.base import (
    Observation,
    SimState,
    TaskEnv,
    finite_action,
    get_physics,
    make_observation_space,
    own_env_args,
    set_physics,
)
from fibopolicy.envs.rendering import (
    DEFAULT_IMAGE_SIZE,
    FrameSizes,
    ImageSize,
    Quality,
    Renderers,
    check_options,
    load_mujoco,
)
from fibopolicy.envs.tabletop.scene import MAX_OPENING, WORKSPACE_HIGH, WORKSPACE_LOW, scene
from fibopolicy.errors import UserError, unknown

load_mujoco()
import mujoco  # noqa: E402

CAMERAS = ("workspace", "wrist")
CONTROL_HZ = 20
#: Displacement of the hand's target by a full action in one control step, metres.
STEP = 0.01
#: Largest distance of the target from the hand, metres: bounds the force on an
#: obstacle.
LEAD = 0.03

#: The parts of MuJoCo's state that the next step depends on.
_PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION

Vector = NDArray[np.float64]


class TabletopEnv(TaskEnv):
    """A hand with four degrees of freedom above a table, in MuJoCo, at 20 Hz.

    Action `(4,)` float32 in [-1, 1]: x, y, z displacement of the hand's target (1 = 1
    cm) and the gripper (-1 open, 1 closed). Observations: `workspace_image` and
    `wrist_image` uint8 `(H, W, 3)`, `hand_position` float32 `(3,)` in metres,
    `gripper_opening` float32 `(1,)` in metres (each finger's distance from the middle).
    The reward is 1 at success and 0 before.

    Args:
        cameras: the cameras to render, any of "workspace" and "wrist"; fewer are
            faster.
        image_size: pixels, the side of square frames, (height, width), or one of these
            per camera.
        quality: "fast" renders without shadows and multisampling.
        horizon: control steps until truncation; `None` means the task's own.
    """

    metadata = {  # noqa: RUF012
        "render_modes": ["rgb_array"],
        "render_fps": CONTROL_HZ,
    }
    control_hz = float(CONTROL_HZ)
    proprioception = ("hand_position", "gripper_opening")
    eef_keys = ("hand_position",)
    default_horizon = 120
    decor = ()

    def __init__(
        self,
        cameras: tuple[str, ...] | list[str] = CAMERAS,
        image_size: ImageSize = DEFAULT_IMAGE_SIZE,
        quality: Quality = "fast",
        horizon: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        for camera in cameras:
            if camera not in CAMERAS:
                raise unknown("camera", camera, CAMERAS)
        self.horizon = self.default_horizon if horizon is None else horizon
        check_options(quality, self.horizon)
        self.cameras = tuple(cameras)
        self._sizes = FrameSizes(image_size, self.cameras)
        self.quality = quality
        self.render_mode = render_mode
        self._xml = scene(self.objects(), quality)
        self.model = mujoco.MjModel.from_xml_string(self._xml)
        self.data = mujoco.MjData(self.model)
        self._substeps = round(1 / (CONTROL_HZ * self.model.opt.timestep))
        self._grip = self.model.site("grip").id
        self._renderers = Renderers(self.model, self._sizes)
        self._steps = 0
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (4,), np.float32)
        box = gymnasium.spaces.Box
        vectors = {
            "hand_position": box(-1.0, 1.0, (3,), np.float32),
            "gripper_opening": box(-0.01, MAX_OPENING + 0.01, (1,), np.float32),
        }
        self.observation_space = make_observation_space(self._sizes.by_camera, vectors)

    # Defined by each task.

    @abstractmethod
    def objects(self) -> str:
        """The task's bodies as MJCF."""

    @abstractmethod
    def place(self, rng: np.random.Generator) -> None:
        """Draw the layout: write the objects' start poses into `self.data`."""

    @abstractmethod
    def success(self) -> bool:
        """Whether the goal is met at this instant."""

    # The environment contract.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a layout from `seed`.

        The hand is within 5 cm of the centre at 13 to 18 cm height, the objects as the
        task states.
        """
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        rng = self.np_random
        start = np.array([*rng.uniform(-0.05, 0.05, 2), rng.uniform(0.13, 0.18)])
        self.data.qpos[:3] = self.data.ctrl[:3] = start
        self.data.qpos[3:5] = self.data.ctrl[3:5] = MAX_OPENING
        self.place(rng)
        mujoco.mj_forward(self.model, self.data)
        self._steps = 0
        return self.observe(), {"success": self.success()}

    def advance(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[float, bool, bool, dict[str, Any]]:
        command = np.clip(finite_action(self, action), -1.0, 1.0)
        hand = self.data.qpos[:3]
        target = np.clip(self.data.ctrl[:3] + STEP * command[:3], hand - LEAD, hand + LEAD)
        self.data.ctrl[:3] = np.clip(target, WORKSPACE_LOW, WORKSPACE_HIGH)
        self.data.ctrl[3:5] = MAX_OPENING * (1 - command[3]) / 2
        mujoco.mj_step(self.model, self.data, self._substeps)
        # A step ends with new joint positions, but with poses of bodies and cameras from
        # before it. These are what tasks and renderers read.
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        self._steps += 1
        success = self.success()
        return float(success), success, self._steps >= self.horizon, {"success": success}

    def observe(self) -> Observation:
        observation: Observation = {
            f"{camera}_image": self.render_camera(camera) for camera in self.cameras
        }
        observation["hand_position"] = self.hand.astype(np.float32)
        observation["gripper_opening"] = np.array([self.opening], dtype=np.float32)
        return observation

    def get_state(self) -> SimState:
        return SimState(self._xml, get_physics(self.model, self.data, _PHYSICS))

    def set_state(self, state: SimState) -> Observation:
        size = mujoco.mj_stateSize(self.model, _PHYSICS)
        if state.state.shape != (size,):
            raise UserError(f"a state of {self.task_id} has width {size}, got {state.state.shape}")
        set_physics(self.model, self.data, state.state, _PHYSICS)
        self._steps = 0
        return self.observe()

    @property
    def env_args(self) -> dict[str, Any]:
        return own_env_args(self, mujoco.__version__, self.cameras, self._sizes.stored())

    def simulation(self) -> tuple[Any, Any]:
        return self.model, self.data

    def render(self) -> NDArray[np.uint8]:
        return self.render_camera("workspace")

    def render_camera(self, camera: str) -> NDArray[np.uint8]:
        """One frame, uint8 `(H, W, 3)`, upright."""
        return self._renderers.render(self.data, camera, self.decor)

    def close(self) -> None:
        self._renderers.close()

    # Read by tasks and experts.

    @property
    def hand(self) -> Vector:
        """The point between the fingertips, `(3,)` metres."""
        return np.array(self.data.site_xpos[self._grip])

    @property
    def opening(self) -> float:
        """The fingers' mean distance from the middle, metres."""
        return float(self.data.qpos[3:5].mean())

    def position(self, body: str) -> Vector:
        """A body's position, `(3,)` metres."""
        return np.array(self.data.body(body).xpos)

    def mark(self, goal: str, xyz: Vector | list[float]) -> None:
        """Place a goal marker."""
        self.data.mocap_pos[self.model.body(goal).mocapid[0]] = xyz

    def put(self, body: str, xyz: Vector | list[float], yaw: float = 0.0) -> None:
        """Place a free body."""
        joint = self.model.joint(body)
        start = int(joint.qposadr[0])
        self.data.qpos[start : start + 3] = xyz
        self.data.qpos[start + 3 : start + 7] = [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]

    def toward(self, target: Vector, grip: float) -> NDArray[np.float32]:
        """The action toward `target` `(3,)`, with a gripper command (-1 open, 1 closed)."""
        move = np.clip((target - self.hand) / STEP, -1, 1)
        return np.array([*move, grip], dtype=np.float32)
