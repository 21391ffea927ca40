"""Robosuite's options, from a caller or a dataset, and the environment made from them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.rendering import FrameSizes, ImageSize, load_mujoco
from fibopolicy.envs.robosuite.legacy import composite_controller
from fibopolicy.envs.robosuite.tasks import not_restorable
from fibopolicy.errors import UserError, one_line, unknown
from fibopolicy.utils.files import provide_caches

#: Options of robosuite and robomimic for rendering, episodes and seeds, which
#: `RobosuiteEnv` sets itself.
# fmt: off
RESERVED_OPTIONS = {
    "has_renderer", "has_offscreen_renderer", "use_camera_obs", "camera_names", "camera_heights",
    "camera_widths", "camera_depths", "camera_segmentations", "ignore_done", "hard_reset",
    "horizon", "seed", "renderer", "renderer_config", "render_camera", "render_collision_mesh",
    "render_visual_mesh", "render_gpu_device_id", "render", "render_offscreen", "use_image_obs",
    "use_depth_obs", "postprocess_visual_obs", "gripper_visualization", "gripper_visualizations",
}
# fmt: on


def import_robosuite() -> Any:
    """The robosuite module, imported without its log messages below errors.

    Raises:
        UserError: it cannot be imported, with the command that installs it.
    """
    # A filter on robosuite's own logger: its import sets the level, so that a level set
    # here would not last.
    logging.getLogger("robosuite_logs").addFilter(_errors_only)
    provide_caches()
    load_mujoco()
    try:
        import robosuite
    except ImportError as error:
        raise UserError(
            f"robosuite cannot be imported ({error}); install it with"
            " `pip install 'fibopolicy[robosuite]'`"
        ) from error
    return robosuite


def _errors_only(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def constructor_arguments(
    env_args: Mapping[str, Any], overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of `RobosuiteEnv` that a robomimic file's `env_args` describe.

    Args:
        overrides: arguments that replace those of the file.

    Raises:
        UserError: they are not robosuite's, or are malformed.
    """
    if env_args.get("type") != 1 or not isinstance(env_args.get("env_name"), str):
        raise UserError(
            f"env_args of robosuite have type 1 and an env_name, got {dict(env_args)}"[:300]
        )
    kwargs = dict(env_args.get("env_kwargs") or {})
    arguments = {key: value for key, value in kwargs.items() if key not in RESERVED_OPTIONS}
    arguments["task_id"] = f"robosuite/{env_args['env_name']}"
    if "mount_types" in arguments:  # its name until 1.4
        arguments["base_types"] = arguments.pop("mount_types")
    if names := kwargs.get("camera_names"):  # a file without images gets the task's own cameras
        arguments["cameras"] = _names("camera_names", names)
    if "camera_heights" in kwargs and "image_size" not in overrides:
        heights = kwargs["camera_heights"]
        widths = kwargs.get("camera_widths", heights)
        arguments["image_size"] = _image_size(arguments.get("cameras", ()), heights, widths)
    if "horizon" in kwargs:
        arguments["horizon"] = kwargs["horizon"]
    # Without a quality, a file was rendered with robosuite's own settings.
    arguments["quality"] = env_args.get("render_quality", "full")
    return {**arguments, **overrides}


def camera_settings(sizes: FrameSizes) -> dict[str, Any]:
    """Cameras and their sizes in robosuite's form: numbers, or lists in the cameras' order."""
    heights, widths = sizes.shared or zip(*sizes.by_camera.values(), strict=True)
    return {
        "camera_names": list(sizes.by_camera),
        "camera_heights": heights if isinstance(heights, int) else list(heights),
        "camera_widths": widths if isinstance(widths, int) else list(widths),
    }


def robosuite_options(task_id: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `robosuite.make`, with robots and controllers in the installed
    form.

    Raises:
        UserError: no such task, robot, controller or option; its states do not restore.
    """
    robosuite = import_robosuite()
    from robosuite.environments.base import REGISTERED_ENVS
    from robosuite.robots import ROBOT_CLASS_MAPPING

    task = task_id.partition("/")[2]
    if not task_id.startswith("robosuite/") or task not in REGISTERED_ENVS:
        raise unknown("robosuite task", task_id, [f"robosuite/{name}" for name in REGISTERED_ENVS])
    if reason := not_restorable(task, options):
        raise UserError(reason)
    known = {
        name
        for kind in REGISTERED_ENVS[task].__mro__
        for name in inspect.signature(kind.__init__).parameters
    }
    known -= RESERVED_OPTIONS | {"self", "args", "kwargs"}
    for option in options:
        if option not in known:
            ours = {"cameras", "image_size", "quality", "horizon"}
            raise unknown(f"option of {task_id}", option, known | ours)
    robots = list(_names("robots", options["robots"]))
    for robot in robots:
        if robot not in ROBOT_CLASS_MAPPING:
            raise unknown("robosuite robot", robot, ROBOT_CLASS_MAPPING)
    configs = options.get("controller_configs")
    configs = configs if isinstance(configs, list) else [configs] * len(robots)
    if len(configs) != len(robots):
        raise UserError(f"{task_id}: {len(configs)} controller_configs for {len(robots)} robots")
    configs = [
        robosuite.load_composite_controller_config(robot=robot)
        if config is None
        else composite_controller(config, robot)
        for config, robot in zip(configs, robots, strict=True)
    ]
    return {
        "control_freq": 20,
        "use_object_obs": True,
        "reward_shaping": False,
        **deepcopy(dict(options)),
        "robots": robots,
        "controller_configs": configs[0] if len(configs) == 1 else configs,
    }


def make_robosuite(task_id: str, options: Mapping[str, Any]) -> Any:
    """The robosuite environment of checked options, without a renderer.

    Raises:
        UserError: robosuite rejects the options.
    """
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
            # Fixes what a model randomises, such as the cube's size, in every process.
            seed=0,
        )
    except (AssertionError, KeyError, TypeError, ValueError, SimulationError) as error:
        reason = one_line(error)
        raise UserError(f"robosuite cannot make {task_id}: {reason}") from error
    # Robosuite's observations lag by most of a control step, and its reward by one
    # physics step. Here observations are read on demand, and a control step ends with
    # everything computed for the instant of its state.
    post_action = env._post_action

    def post_action_now(action: NDArray[np.float64]) -> Any:
        env.sim.forward()
        return post_action(action)

    env._post_action = post_action_now
    env._update_observables = lambda force=False: None
    return env


def takes_absolute_actions(configs: dict[str, Any] | list[dict[str, Any]]) -> bool:
    """Whether any arm of composite controller configs takes absolute commands."""
    every = configs if isinstance(configs, list) else [configs]
    parts = (part for config in every for part in config["body_parts"].values())
    return any(part.get("input_type") == "absolute" for part in parts)


def _names(what: str, given: Any) -> tuple[str, ...]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{what} must be a name or a list of names, got {given!r}")
    return tuple(names)


def _image_size(cameras: tuple[str, ...], heights: Any, widths: Any) -> ImageSize:
    """The `image_size` of robosuite's `camera_heights` and `camera_widths`."""
    try:
        sizes = [(int(height), int(width)) for height, width in np.broadcast(heights, widths)]
    except (TypeError, ValueError) as error:
        raise UserError(
            "camera_heights and camera_widths must be numbers of pixels,"
            f" got {heights!r} and {widths!r}"
        ) from error
    if len(set(sizes)) == 1:
        height, width = sizes[0]
        return height if height == width else (height, width)
    if len(sizes) != len(cameras):
        raise UserError(
            f"camera_heights and camera_widths hold {len(sizes)} sizes"
            f" for the {len(cameras)} camera_names"
        )
    return dict(zip(cameras, sizes, strict=True))
