"""Robosuite's tasks behind the environment contract."""

from __future__ import annotations

import inspect
import logging
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Self, cast

import gymnasium
import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.base import Observation, SimState, TaskEnv
from fibopolicy.envs.rendering import (
    DEFAULT_IMAGE_SIZE,
    FrameSizes,
    ImageSize,
    Quality,
    check_options,
    configure_gl,
    no_gl,
)
from fibopolicy.envs.robosuite.experts import expert_action
from fibopolicy.envs.robosuite.legacy import adopt, composite_controller, hold_orientation, portable
from fibopolicy.envs.robosuite.tasks import TASKS, Defaults
from fibopolicy.envs.scene_renderer import SceneRenderer
from fibopolicy.envs.versions import warn_of_versions
from fibopolicy.errors import UserError, unknown
from fibopolicy.utils.files import provide_caches

configure_gl()  # before anything imports mujoco, robosuite included

#: What files say of rendering, episodes and seeds, in robosuite's and robomimic's words. Here this class decides them.  # noqa: E501
# fmt: off
_DECIDED_HERE = {
    "has_renderer", "has_offscreen_renderer", "use_camera_obs", "camera_names", "camera_heights", "camera_widths",  # noqa: E501
    "camera_depths", "camera_segmentations", "ignore_done", "hard_reset", "horizon", "seed", "renderer",  # noqa: E501
    "renderer_config", "render_camera", "render_collision_mesh", "render_visual_mesh", "render_gpu_device_id", "render",  # noqa: E501
    "render_offscreen", "use_image_obs", "use_depth_obs", "postprocess_visual_obs", "gripper_visualization",  # noqa: E501
    "gripper_visualizations",
}
# fmt: on


class RobosuiteEnv(TaskEnv):
    """A task of robosuite 1.5: from its own settings, or from those that a dataset's
    `env_args` describe.

    Observations: `<camera>_image` uint8 `(H, W, 3)`, upright, and all of robosuite's
    vectors of this instant as float32, e.g. `robot0_eef_pos` `(3,)` metres,
    `robot0_eef_quat` `(4,)` xyzw, `robot0_gripper_qpos` `(2,)` metres, `cube_pos`.
    Actions are robosuite's: for the Panda's default controller `(7,)`, position (1 = 5
    cm), rotation (1 = 0.5 rad) and gripper (-1 open, 1 closed). An absolute controller
    takes metres and radians, and its action space is unbounded.

    A state is robosuite's and robomimic's: time, joint positions, joint velocities. It
    holds no controller's memory, so `set_state` starts the controllers afresh:
    everything that follows is exactly repeatable, from `reset` too. An instant in the
    middle of a grasp loses one thing: the gripper's command, which robosuite ramps over
    5 control steps, starts from its middle.

    Args:
        task_id: "robosuite/" and the task's name, e.g. "robosuite/Lift".
        cameras: the cameras to render, by default the task's in `fibopolicy.envs.robosuite.tasks`;
            fewer are faster, and none needs no OpenGL.
        image_size: pixels, the side of square frames, (height, width), or one of these
            per camera.
        quality: "fast" renders without shadows, reflections and multisampling.
        horizon: control steps until truncation, by default the task's.
        options: passed to `robosuite.make`, e.g. `robots` (by default the task's),
            `controller_configs` (of any generation), `control_freq`.

    Raises:
        UserError: robosuite is missing; no such task, robot, controller, camera or
            option.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
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
        self.image_size = image_size
        self._sizes = FrameSizes(image_size, self.cameras)
        self.quality = quality
        self.horizon = horizon
        self.render_mode = render_mode
        self._options = _checked_options(task_id, {"robots": list(defaults.robots), **options})
        self._env = _make(task_id, self._options)
        for camera in self.cameras:
            if camera not in self._env.sim.model.camera_names:
                raise unknown("camera", camera, self._env.sim.model.camera_names)
        self.control_hz = float(self._env.control_freq)
        self._renderer: SceneRenderer | None = None
        self._steps = 0
        self._placed: tuple[str, tuple[Any, ...], str] = ("", (), "")
        self._own_model = self._loaded = self._source = portable(self._env.model.get_xml())
        self._prepare_model()

        sensors = self._vectors()
        prefixes = [robot.robot_model.naming_prefix for robot in self._env.robots]
        hands = [
            f"{p}{arm}"
            for p in prefixes
            for arm in ("", "right_", "left_")
            if f"{p}{arm}eef_pos" in sensors
        ]
        self.hands = tuple(f"{hand}eef_pos" for hand in hands)
        self.proprioception = tuple(
            f"{hand}{key}" for hand in hands for key in ("eef_pos", "eef_quat", "gripper_qpos")
        )
        limit = np.inf if _absolute(self._options["controller_configs"]) else 1.0
        self.action_space = gymnasium.spaces.Box(-limit, limit, (self._env.action_dim,), np.float32)
        spaces: dict[str, gymnasium.Space[Any]] = {
            f"{camera}_image": gymnasium.spaces.Box(0, 255, (*self._sizes[camera], 3), np.uint8)
            for camera in self.cameras
        }
        spaces |= {
            key: gymnasium.spaces.Box(-np.inf, np.inf, value.shape, np.float32)
            for key, value in sensors.items()
        }
        self.observation_space = cast("gymnasium.Space[Observation]", gymnasium.spaces.Dict(spaces))

    @classmethod
    def from_env_args(cls, env_args: Mapping[str, Any], **overrides: Any) -> Self:
        """The environment that a robomimic file's `env_args` describe, of any robosuite
        from 1.0 to 1.5.

        `overrides` replace single arguments of the constructor, e.g. `cameras`,
        `image_size`, `quality` or `horizon`.

        Raises:
            UserError: the `env_args` are not robosuite's, or name what the installed
                robosuite lacks.
        """
        import_robosuite()
        if env_args.get("type") != 1 or not isinstance(env_args.get("env_name"), str):
            raise UserError(
                f"env_args of robosuite have type 1 and an env_name, got {dict(env_args)}"[:300]
            )
        warn_of_versions(env_args)
        kwargs = dict(env_args.get("env_kwargs") or {})
        arguments = {key: value for key, value in kwargs.items() if key not in _DECIDED_HERE}
        if "mount_types" in arguments:  # its name until 1.4
            arguments["base_types"] = arguments.pop("mount_types")
        # a file without images names none, and gets the task's own
        if names := kwargs.get("camera_names"):
            arguments["cameras"] = _names("camera_names", names)
        if "camera_heights" in kwargs and "image_size" not in overrides:
            heights = kwargs["camera_heights"]
            arguments["image_size"] = _sizes(
                arguments.get("cameras"), heights, kwargs.get("camera_widths", heights)
            )
        if "horizon" in kwargs:
            arguments["horizon"] = kwargs["horizon"]
        # A file that says nothing of quality was rendered as robosuite does by itself.
        arguments["quality"] = env_args.get("render_quality", "full")
        return cls(f"robosuite/{env_args['env_name']}", **{**arguments, **overrides})

    # The environment contract.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Draw a layout from `seed`, in robosuite's ranges: the same one whatever ran before."""
        super().reset(seed=seed)
        if self._loaded != self._own_model:
            self._load(self._own_model)
        placement = getattr(self._env, "placement_initializer", None)
        samplers = getattr(placement, "samplers", {}).values()
        for owner in (self._env, placement, *samplers, *self._env.model.mujoco_objects):
            if hasattr(owner, "rng"):
                owner.rng = self.np_random
        self._env.reset()
        # Through `set_state`, so that this episode and its replays from the stored
        # start are one and the same.
        state = self.get_state()
        self._source = state.model
        return self.set_state(state), {"success": self.success()}

    def advance(
        self, action: NDArray[np.floating[Any]]
    ) -> tuple[float, bool, bool, dict[str, Any]]:
        command = np.asarray(action, dtype=np.float64)
        if command.shape != self.action_space.shape or not np.isfinite(command).all():
            raise UserError(
                f"{self.task_id} takes {self._env.action_dim} finite actions, got"
                f" {np.asarray(action).tolist()}"
            )
        _, reward, _, _ = self._env.step(command)
        self._steps += 1
        success = self.success()
        return float(reward), success, self._steps >= self.horizon, {"success": success}

    def observe(self) -> Observation:
        images: Observation = {
            f"{camera}_image": self.render_camera(camera) for camera in self.cameras
        }
        return images | self._vectors()

    def get_state(self) -> SimState:
        return SimState(
            self._model_text(), np.asarray(self._env.sim.get_state().flatten(), dtype=np.float64)
        )

    def set_state(self, state: SimState) -> Observation:
        """Restore an instant exactly and start counting steps from 0; returns its
        observation.

        The model may come from another machine, and from a robosuite as old as 1.0 (see
        `legacy.adopt`).

        Raises:
            UserError: the model does not fit this task or does not load; the state's
                width is not the model's.
        """
        if state.model not in (self._source, self._model_text()):
            if not self._moved_fixed(state.model):
                objects = [thing.root_body for thing in self._env.model.mujoco_objects]
                self._load(adopt(state.model, self._own_model, objects))
            self._source = state.model
        sim = self._env.sim
        width = 1 + sim.model.nq + sim.model.nv
        vector = np.asarray(state.state, dtype=np.float64)
        if vector.shape != (width,) or not np.isfinite(vector).all():
            raise UserError(
                f"a state of {self.task_id} is {width} finite numbers for this model, got shape"
                f" {vector.shape}"
            )
        self._reset_deterministically()
        sim.reset()
        sim.set_state_from_flattened(vector)
        sim.forward()
        if vector[0] > 0:
            # The controllers still see the robot's nominal pose; in mid-episode their
            # first step would pull it back there. At time 0 robosuite's recordings
            # begin just so: replaying them drifts by 1 mm, and by 10 mm if this is
            # mended.
            for robot in self._env.robots:
                for controller in robot.composite_controller.part_controllers.values():
                    controller.update(force=True)
        hold_orientation(self._env.robots)
        self._steps = 0
        return self.observe()

    @property
    def env_args(self) -> dict[str, Any]:
        """In robomimic's form, which its own tools can read; `render_quality` stands
        beside the kwargs that robosuite takes.
        """
        # Numbers where all cameras share a size, else lists in their order.
        heights, widths = self._sizes.shared or zip(*self._sizes.all, strict=True)
        kwargs = {
            **deepcopy(self._options),
            "camera_names": list(self.cameras),
            "camera_heights": heights if isinstance(heights, int) else list(heights),
            "camera_widths": widths if isinstance(widths, int) else list(widths),
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
        """The scripted expert's action at this instant; see
        `fibopolicy.envs.robosuite.experts`.

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
        return self._renderer.render(data, camera, cull=self.quality == "fast", size=size)

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        if self._env.sim is not None:
            self._env.close()

    # The model and what is derived from it.

    def _load(self, model: str) -> None:
        """Replace the simulation by one of this MJCF text; on an error the old one stays."""
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
                f"robosuite cannot load a state's model: {' '.join(str(error).split())}"
            ) from error
        old.free()
        self._loaded = self._source = model

    def _prepare_model(self) -> None:
        """Set what rendering needs in a freshly loaded model."""
        model = self._env.sim.model._model
        if self.quality == "fast":
            model.vis.quality.shadowsize = 0
            model.vis.quality.offsamples = 0
            model.mat_reflectance[:] = 0
        if self._renderer is not None:
            self._renderer.load(model)

    def _reset_deterministically(self) -> None:
        """Robosuite's reset with nothing drawn: new controllers, counters at zero,
        references into the current simulation.
        """
        self._env.deterministic_reset = True
        try:
            self._env.reset()
        finally:
            self._env.deterministic_reset = False

    def _model_text(self) -> str:
        """The loaded model's MJCF, with the places where the last reset put objects
        that cannot move, such as a door.
        """
        fixed = self._fixed_bodies()
        if not fixed:
            return self._loaded
        model = self._env.sim.model
        places = tuple(
            (*model.body_pos[i], *model.body_quat[i]) for i in map(model.body_name2id, fixed)
        )
        if self._placed[:2] == (self._loaded, places):
            return self._placed[2]
        root = ET.fromstring(self._loaded)
        for name in fixed:
            body = root.find(f"worldbody//body[@name='{name}']")
            assert body is not None
            for key, values in (("pos", model.body_pos), ("quat", model.body_quat)):
                body.set(key, " ".join(map(repr, values[model.body_name2id(name)].tolist())))
        self._placed = (self._loaded, places, ET.tostring(root, encoding="unicode"))
        return self._placed[2]

    def _moved_fixed(self, text: str) -> bool:
        """Put the objects that cannot move where an MJCF text has them, if that is all
        that it changes: no loading needed.
        """
        fixed = self._fixed_bodies()
        if not fixed:
            return False
        ours, _ = _apart(self._model_text(), fixed)
        theirs, places = _apart(text, fixed)
        if ours != theirs:
            return False
        model = self._env.sim.model
        for name, (position, quaternion) in places.items():
            model.body_pos[model.body_name2id(name)] = position
            model.body_quat[model.body_name2id(name)] = quaternion
        return True

    def _fixed_bodies(self) -> list[str]:
        model = self._env.sim.model
        roots = [thing.root_body for thing in self._env.model.mujoco_objects]
        return [name for name in roots if model.body_jntnum[model.body_name2id(name)] == 0]

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


def import_robosuite() -> Any:
    """The robosuite module, imported without the notices that it writes for its
    developers.

    Raises:
        UserError: it cannot be imported, with the command that installs it.
    """
    # A filter on robosuite's own logger alone; its import sets the level, so a level
    # set here would not last.
    logging.getLogger("robosuite_logs").addFilter(_errors_only)
    provide_caches()
    try:
        import mujoco  # noqa: F401
    except Exception as error:  # it loads OpenGL
        raise no_gl(error) from error
    try:
        import robosuite
    except ImportError as error:
        raise UserError(
            f"robosuite cannot be imported ({error}); install it with `pip install"
            " 'fibopolicy[robosuite]'`"
        ) from error
    return robosuite


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _checked_options(task_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `robosuite.make`, with robots and controllers spelled out in the
    installed robosuite's form.
    """
    robosuite = import_robosuite()
    from robosuite.environments.base import REGISTERED_ENVS
    from robosuite.robots import ROBOT_CLASS_MAPPING

    task = task_id.partition("/")[2]
    if not task_id.startswith("robosuite/") or task not in REGISTERED_ENVS:
        raise unknown("robosuite task", task_id, [f"robosuite/{name}" for name in REGISTERED_ENVS])
    known = {
        name
        for kind in REGISTERED_ENVS[task].__mro__
        for name in inspect.signature(kind.__init__).parameters
    }
    known -= _DECIDED_HERE | {"self", "args", "kwargs"}
    for option in options:
        if option not in known:
            raise unknown(
                f"option of {task_id}",
                option,
                {*known, "cameras", "image_size", "quality", "horizon"},
            )
    robots = list(_names("robots", options["robots"]))
    for robot in robots:
        if robot not in ROBOT_CLASS_MAPPING:
            raise unknown("robosuite robot", robot, ROBOT_CLASS_MAPPING)
    configs = options.get("controller_configs")
    configs = configs if isinstance(configs, list) else [configs] * len(robots)
    if len(configs) != len(robots):
        raise UserError(f"{task_id}: {len(configs)} controller_configs for {len(robots)} robots")
    configs = [
        (
            robosuite.load_composite_controller_config(robot=robot)
            if config is None
            else composite_controller(config, robot)
        )
        for config, robot in zip(configs, robots, strict=True)
    ]
    rest = {
        "control_freq": 20,
        "use_object_obs": True,
        "reward_shaping": False,
        **deepcopy(dict(options)),
    }
    return {
        **rest,
        "robots": robots,
        "controller_configs": configs[0] if len(configs) == 1 else configs,
    }


def _make(task_id: str, options: Mapping[str, Any]) -> Any:
    """The robosuite environment, without a renderer of its own."""
    robosuite = import_robosuite()
    from robosuite.utils import SimulationError

    try:
        env = robosuite.make(
            task_id.partition("/")[2],
            **deepcopy(dict(options)),
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            renderer="mujoco",
            ignore_done=True,
            hard_reset=False,
            seed=0,  # draws what a model varies, such as the cube's size: the same in every process
        )
    except (AssertionError, KeyError, TypeError, ValueError, SimulationError) as error:
        raise UserError(
            f"robosuite cannot make {task_id}: {type(error).__name__}:"
            f" {' '.join(str(error).split())}"
        ) from error
    # Robosuite's observations lag by most of a control step, and its reward by one
    # physics step. Here observations are read when they are asked for, and a control
    # step ends with everything brought up to the instant that its state tells.
    post_action = env._post_action

    def post_action_now(action: NDArray[np.float64]) -> Any:
        env.sim.forward()
        return post_action(action)

    env._post_action = post_action_now
    env._update_observables = lambda force=False: None
    return env


def _apart(text: str, bodies: list[str]) -> tuple[str, dict[str, tuple[list[float], list[float]]]]:
    """An MJCF text without the places of some bodies, and these: position and
    quaternion. Of broken text, nothing.
    """
    try:
        root = ET.fromstring(text)
    except ET.ParseError:
        return "", {}
    places = {}
    for name in bodies:
        body = root.find(f"worldbody//body[@name='{name}']")
        if body is None or not {"pos", "quat"} <= body.attrib.keys():
            return "", {}
        position, quaternion = (
            [float(number) for number in body.attrib.pop(key).split()] for key in ("pos", "quat")
        )
        places[name] = (position, quaternion)
    return ET.tostring(root, encoding="unicode"), places


def _absolute(configs: dict[str, Any] | list[dict[str, Any]]) -> bool:
    """Whether any arm's controller takes absolute commands."""
    every = configs if isinstance(configs, list) else [configs]
    return any(
        part.get("input_type") == "absolute"
        for config in every
        for part in config["body_parts"].values()
    )


def _names(what: str, given: Any) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{what} must be a name or a list of names, got {given!r}")
    return tuple(names)


def _sizes(cameras: tuple[str, ...] | None, heights: Any, widths: Any) -> ImageSize:
    """The `image_size` that robosuite's `camera_heights` and `camera_widths` mean:
    numbers, or lists in the cameras' order.
    """
    try:
        sizes = [(int(height), int(width)) for height, width in np.broadcast(heights, widths)]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"camera_heights and camera_widths must be numbers of pixels, got {heights!r} and"
            f" {widths!r}"
        ) from error
    if len(set(sizes)) == 1:
        height, width = sizes[0]
        return height if height == width else (height, width)
    if len(sizes) != len(cameras or ()):
        raise UserError(
            f"camera_heights and camera_widths hold {len(sizes)} sizes for the {len(cameras or ())}"
            " camera_names"
        )
    return dict(zip(cameras or (), sizes, strict=True))
