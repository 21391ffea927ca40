"""Robosuite's tasks behind the environment contract."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Self

import gymnasium
import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.base import (
    Observation,
    SimState,
    Space,
    TaskEnv,
    finite_action,
    finite_vector,
    image_key,
    make_observation_space,
    own_env_args,
)
from fibopolicy.envs.registry import warn_of_version
from fibopolicy.envs.rendering import (
    DEFAULT_IMAGE_SIZE,
    FrameSizes,
    ImageSize,
    Quality,
    SceneRenderer,
    apply_quality,
    check_options,
    configure_gl,
)
from fibopolicy.envs.robosuite.experts import expert_action
from fibopolicy.envs.robosuite.legacy import convert_model, hold_orientation, portable
from fibopolicy.envs.robosuite.options import (
    camera_settings,
    constructor_arguments,
    import_robosuite,
    make_robosuite,
    robosuite_options,
    takes_absolute_actions,
)
from fibopolicy.envs.robosuite.states import ModelText
from fibopolicy.envs.robosuite.tasks import TASKS, Defaults
from fibopolicy.errors import UserError, message_of, unknown

configure_gl()  # before anything imports mujoco, robosuite included


class RobosuiteEnv(TaskEnv):
    """A task of robosuite 1.5, with its own settings or those of a dataset's
    `env_args`.

    Observations: `<camera>_image` uint8 `(H, W, 3)`, upright, and all of robosuite's
    vectors of this instant as float32, e.g. `robot0_eef_pos` `(3,)` metres,
    `robot0_eef_quat` `(4,)` xyzw, `robot0_gripper_qpos` `(2,)` metres, `cube_pos`.
    Actions are robosuite's: for the Panda's default controller `(7,)`, position (1 = 5
    cm), rotation (1 = 0.5 rad) and gripper (-1 open, 1 closed). An absolute controller
    takes metres and radians, and its action space is unbounded.

    A state is robosuite's and robomimic's: time, joint positions, joint velocities. It
    holds no controller's memory, so `set_state` restarts the controllers: everything
    that follows is exactly repeatable, also after `reset`. In the middle of a grasp one
    thing is lost. Robosuite ramps the gripper's command over 5 control steps, and after
    `set_state` the ramp starts from its middle.

    A subclass is a custom task, named as "module:class", for example of a class that
    robosuite does not ship: see `docs/tutorials/your_task.md`.

    Args:
        task_id: "robosuite/" and the task's name, e.g. "robosuite/Lift"; robosuite knows
            every class that derives from its environments by the class's name.
        cameras: the cameras to render, by default the task's in `tasks.TASKS`; fewer
            are faster, and none needs no OpenGL.
        image_size: pixels, the side of square frames, (height, width), or one of these
            per camera.
        quality: "fast" renders without shadows, reflections and multisampling.
        horizon: control steps until truncation, by default the task's.
        options: passed to `robosuite.make`, e.g. `robots` (by default the task's),
            `controller_configs` (of any generation), `control_freq`.

    Raises:
        UserError: robosuite is missing; no such task, robot, controller, camera or
            option; a state does not restore the task's scene.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    decor = ()
    expert_noise = 0.1  # 5 mm and 0.05 rad per control step
    proprioception: tuple[str, ...] = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")

    def __init__(
        self,
        task_id: str = "robosuite/Lift",
        cameras: tuple[str, ...] | list[str] | None = None,
        image_size: ImageSize = DEFAULT_IMAGE_SIZE,
        quality: Quality = "fast",
        horizon: int | None = None,
        render_mode: str | None = None,
        **options: Any,
    ) -> None:
        defaults = TASKS.get(task_id.partition("/")[2], Defaults())
        horizon = defaults.horizon if horizon is None else horizon
        check_options(quality, horizon)
        self.task_id = self._suite_id = task_id
        self.cameras = defaults.cameras if cameras is None else tuple(cameras)
        self._sizes = FrameSizes(image_size, self.cameras)
        self.quality = quality
        self.horizon = horizon
        self.render_mode = render_mode
        self._options = robosuite_options(task_id, {"robots": list(defaults.robots), **options})
        self._env = make_robosuite(task_id, self._options)
        for camera in self.cameras:
            if self._camera_name(camera) not in self._env.sim.model.camera_names:
                raise unknown("camera", camera, self._env.sim.model.camera_names)
        self.control_hz = float(self._env.control_freq)
        self._renderer: SceneRenderer | None = None
        self._steps = 0
        self._own_model = self._source = portable(self._env.model.get_xml())
        self._text = ModelText(self._env, self._own_model)
        self._prepare_model()

        sensors = self._vectors()
        arms = [
            prefix
            for robot in self._env.robots
            for arm in ("", "right_", "left_")
            if f"{(prefix := robot.robot_model.naming_prefix + arm)}eef_pos" in sensors
        ]
        self.eef_keys = tuple(f"{arm}eef_pos" for arm in arms)
        self.proprioception = tuple(
            f"{arm}{key}" for arm in arms for key in ("eef_pos", "eef_quat", "gripper_qpos")
        )
        box = gymnasium.spaces.Box
        limit = np.inf if takes_absolute_actions(self._options["controller_configs"]) else 1.0
        self.action_space = box(-limit, limit, (self._env.action_dim,), np.float32)
        vectors: dict[str, Space] = {
            key: box(-np.inf, np.inf, value.shape, np.float32) for key, value in sensors.items()
        }
        self.observation_space = make_observation_space(self._sizes.by_camera, vectors)

    @classmethod
    def from_env_args(cls, env_args: Mapping[str, Any], **overrides: Any) -> Self:
        """The environment that a robomimic file of robosuite 1.0 to 1.5 describes.

        `overrides` replace single arguments of the constructor, e.g. `cameras`,
        `image_size`, `quality` or `horizon`.

        Raises:
            UserError: the `env_args` are not robosuite's, or name what the installed
                robosuite lacks.
        """
        import_robosuite()
        arguments = constructor_arguments(env_args, overrides)
        warn_of_version(env_args)
        return cls(**arguments)

    # The environment contract.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a layout from `seed`, in robosuite's ranges, regardless of earlier episodes.

        A layout is where robot and objects are. Sizes and masses that robosuite draws
        when it builds a model, such as those of Lift's cube or TwoArmHandover's hammer,
        are one fixed draw in all episodes.
        """
        super().reset(seed=seed)
        if self._text.loaded != self._own_model:
            self._load(self._own_model)
        self._draw_layout()
        # Through `set_state`, so that this episode equals its replays from the stored
        # initial state.
        state = self.get_state()
        self._source = state.model
        return self.set_state(state), {"success": self.success()}

    def advance(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[float, bool, bool, dict[str, Any]]:
        _, reward, _, _ = self._env.step(finite_action(self, action))
        self._steps += 1
        success = self.success()
        return float(reward), success, self._steps >= self.horizon, {"success": success}

    def observe(self) -> Observation:
        images: Observation = {
            image_key(camera): self.render_camera(camera) for camera in self.cameras
        }
        return images | self._vectors()

    def get_state(self) -> SimState:
        vector = np.asarray(self._env.sim.get_state().flatten(), dtype=np.float64)
        return SimState(self._text.current(), vector)

    def set_state(self, state: SimState) -> Observation:
        """Restore an instant exactly and start counting steps from 0; returns its
        observation.

        The model may come from another machine, and from a robosuite as old as 1.0 (see
        `legacy.convert_model`).

        Raises:
            UserError: the model does not fit this task or does not load; the state's
                width is not the model's.
        """
        if state.model not in (self._source, self._text.current()):
            if not self._text.move_fixed_bodies(state.model):
                objects = [thing.root_body for thing in self._env.model.mujoco_objects]
                self._load(convert_model(state.model, self._own_model, objects))
            self._source = state.model
        sim = self._env.sim
        width = 1 + sim.model.nq + sim.model.nv
        what = f"a state of {self.task_id} is {width} finite numbers for this model"
        vector = finite_vector(state.state, width, what)
        self._reset_deterministically()
        sim.reset()
        sim.set_state_from_flattened(vector)
        sim.forward()
        if vector[0] > 0:
            # The controllers still see the robot's nominal pose; in mid-episode their
            # first step would pull it back there. At time 0 robosuite's recordings
            # begin that way: replaying them drifts by 1 mm, but by 10 mm with this
            # correction.
            for robot in self._env.robots:
                for controller in robot.composite_controller.part_controllers.values():
                    controller.update(force=True)
        hold_orientation(self._env.robots)
        self._steps = 0
        return self.observe()

    @property
    def env_args(self) -> dict[str, Any]:
        """In robomimic's form, which its own tools can read; those of a custom class in
        the form of `TaskEnv`.

        `render_quality` is not among the kwargs, since robosuite would reject it.
        """
        if self.task_id != self._suite_id:
            version = import_robosuite().__version__
            return own_env_args(self, version, self.cameras, self._sizes.stored())
        kwargs = {
            **deepcopy(self._options),
            **camera_settings(self._sizes),
            "camera_depths": False,
            "use_camera_obs": bool(self.cameras),
            "has_offscreen_renderer": bool(self.cameras),
            "has_renderer": False,
            "ignore_done": True,
            "horizon": self.horizon,
        }
        return {
            "env_name": self._suite_id.partition("/")[2],
            "env_version": import_robosuite().__version__,
            "type": 1,
            "env_kwargs": kwargs,
            "render_quality": self.quality,
        }

    def success(self) -> bool:
        """Whether the task's goal is met at this instant."""
        return bool(self._env._check_success())

    def simulation(self) -> tuple[Any, Any]:
        return self._env.sim.model._model, self._env.sim.data._data

    def expert_action(self) -> NDArray[np.float32]:
        """The scripted expert's action at this instant; see `robosuite.experts`.

        Raises:
            UserError: the task has no expert, or the robot or its controller is not the
                expert's.
        """
        return expert_action(self._suite_id, self._env)

    def render(self) -> NDArray[np.uint8]:
        return self.render_camera(
            self.cameras[0] if self.cameras else self._env.sim.model.camera_names[0]
        )

    def render_camera(self, camera: str) -> NDArray[np.uint8]:
        """One frame, uint8 `(H, W, 3)`, upright."""
        if self._renderer is None:
            self._renderer = SceneRenderer(*self._sizes.largest)
            self._renderer.load(self._env.sim.model._model)
        data, size = self._env.sim.data._data, self._sizes[camera]
        name = self._camera_name(camera)
        return self._renderer.render(
            data, name, cull=self.quality == "fast", size=size, decor=self.decor
        )

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self._env.sim is not None:
            self._env.close()

    # What other suites on robosuite do differently.

    def _camera_name(self, camera: str) -> str:
        """MuJoCo's name of a camera."""
        return camera

    def _draw_layout(self) -> None:
        """Draw a layout from `self.np_random`."""
        placement = getattr(self._env, "placement_initializer", None)
        samplers = getattr(placement, "samplers", {}).values()
        for owner in (self._env, placement, *samplers, *self._env.model.mujoco_objects):
            if hasattr(owner, "rng"):
                owner.rng = self.np_random
        self._env.reset()

    # The model and what is derived from it.

    def _load(self, model: str) -> None:
        """Replace the simulation by one of this MJCF text; on an error, keep the old one."""
        old = self._env.sim
        try:
            self._env._initialize_sim(xml_string=model)
            self._prepare_model()
            self._reset_deterministically()  # which looks up the parts that the task needs
        except (ValueError, KeyError) as error:
            if self._env.sim is not old:
                self._env.sim.free()
                self._env.sim = old
                self._prepare_model()
                self._reset_deterministically()
            raise UserError(
                f"robosuite cannot load a state's model: {message_of(error)}"
            ) from error
        old.free()
        self._text = ModelText(self._env, model)
        self._source = model

    def _prepare_model(self) -> None:
        """Set what rendering needs in a freshly loaded model."""
        model = self._env.sim.model._model
        apply_quality(model, self.quality)
        if self._renderer is not None:
            self._renderer.load(model)

    def _reset_deterministically(self) -> None:
        """Robosuite's reset without a new layout: new controllers, counters at zero."""
        self._env.deterministic_reset = True
        try:
            self._env.reset()
        finally:
            self._env.deterministic_reset = False

    def _vectors(self) -> Observation:
        """All of robosuite's active vector observables at this instant, float32."""
        values: dict[str, Any] = {}  # later sensors are computed from earlier ones
        active = []
        for name, observable in self._env._observables.items():
            if observable.is_enabled():
                values[name] = np.asarray(observable._sensor(values))
                if observable.is_active() and values[name].ndim <= 1:
                    active.append(name)
        vectors = {name: np.atleast_1d(values[name]).astype(np.float32) for name in active}
        if objects := [
            vectors[name] for name in active if self._env._observables[name].modality == "object"
        ]:
            # as robosuite's "object-state", under robomimic's name
            vectors["object"] = np.concatenate(objects)
        return vectors
