"""What keys and settings mean in the files of each suite: proprioception and actions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fibopolicy.utils.imports import is_import_path

# Proprioception

_ARMS = ("", "right_", "left_")  # robosuite names an arm only where a robot has two
_ROBOTS = ("robot0_", "robot1_")

#: Keys of the robot's own state, in the order in which a policy reads them. Object
#: poses are left out: a policy that reads them has no use for its cameras.
PROPRIOCEPTION: tuple[str, ...] = (
    # The built-in tasks and Meta-World.
    *("hand_position", "gripper_opening"),
    # Robosuite, robomimic, MimicGen and RoboCasa: every arm, then the base of a mobile
    # robot.
    *(
        f"{robot}{arm}{key}"
        for robot in _ROBOTS
        for arm in _ARMS
        for key in ("eef_pos", "eef_quat", "gripper_qpos")
    ),
    *(f"{robot}base_{key}" for robot in _ROBOTS for key in ("pos", "quat")),
    *(
        f"{robot}base_to_{arm}eef_{key}"
        for robot in _ROBOTS
        for arm in _ARMS
        for key in ("pos", "quat")
    ),
    # LIBERO.
    *("ee_pos", "ee_ori", "ee_states", "gripper_states", "joint_states"),
    # ALOHA, and LeRobot's datasets when they are imported.
    *("qpos", "robot_state"),
)


def proprioception(keys: Iterable[str]) -> tuple[str, ...]:
    """The robot's own state among vector observations, in the order of
    `PROPRIOCEPTION`.

    A key in a group counts by its last part: "state/ee_pos" is "ee_pos".
    """
    rank = {name: place for place, name in enumerate(PROPRIOCEPTION)}
    names = {key: key.rpartition("/")[2] for key in keys}
    known = [key for key, name in names.items() if name in rank]
    return tuple(sorted(known, key=lambda key: (rank[names[key]], key)))


# Actions

#: Dimensions of an arm under OSC_POSE with its gripper: x, y, z in metres, axis times
#: angle in radians, the gripper's command; and where the rotation begins.
ARM_DIM, ROTATION = 7, 3


def is_absolute(env_args: Mapping[str, Any]) -> bool:
    """Whether the actions are absolute, by the controller's `control_delta` or
    `input_type`.

    Args:
        env_args: `env_args` of a robomimic file, of any robosuite from 1.0 to 1.5.
    """
    return any(
        part.get("input_type") == "absolute"
        or (part.get("control_delta") is False and "input_type" not in part)
        for part in _arms(env_args)
    )


def is_unit(env_args: Mapping[str, Any]) -> bool:
    """Whether the task's simulator clips actions to [-1, 1].

    Robosuite does unless its actions are absolute, and so do LIBERO, Meta-World and the
    built-in tasks. Others take actions of any range, e.g. joint targets in radians and
    a gripper of 0 to 255.
    """
    name = str(env_args.get("env_name"))
    if env_args.get("type") == 1 and not is_import_path(name):
        scaled = any(
            part.get("input_max", 1) != 1 or part.get("input_min", -1) != -1
            for part in _arms(env_args)
        )
        return not scaled and not is_absolute(env_args)
    return name.startswith(("fibopolicy/", "metaworld/", "libero/"))


def rotation_columns(env_args: Mapping[str, Any], action_dim: int) -> tuple[int, ...]:
    """The first of the three columns of each axis-angle rotation among absolute
    actions.

    They are known for robots of one arm each under OSC_POSE with fixed impedance and a
    gripper of one number: every 7 columns hold a position, a rotation and the gripper.
    There are none where `action_dim` does not match, or where actions are
    displacements.
    """
    parts = list(_arms(env_args))
    if not is_absolute(env_args) or any(part.get("type") != "OSC_POSE" for part in parts):
        return ()
    robots = _kwargs(env_args).get("robots") or ["one"]
    count = 1 if isinstance(robots, str) else len(robots)
    return tuple(range(ROTATION, action_dim, ARM_DIM)) if action_dim == count * ARM_DIM else ()


def _kwargs(env_args: Mapping[str, Any]) -> Mapping[str, Any]:
    kwargs = env_args.get("env_kwargs")
    return kwargs if isinstance(kwargs, Mapping) else {}


def _arms(env_args: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every arm's controller config: a flat one (robosuite until 1.4) or a part of a
    composite one.
    """
    configs = _kwargs(env_args).get("controller_configs") or ()
    for config in configs if isinstance(configs, list | tuple) else [configs]:
        parts = config.get("body_parts") if isinstance(config, Mapping) else None
        if isinstance(parts, Mapping):
            arms = parts.get("arms")
            for name, part in {**parts, **(arms if isinstance(arms, Mapping) else {})}.items():
                if name in ("right", "left") and isinstance(part, Mapping):
                    yield part
        elif isinstance(config, Mapping):
            yield config


# Recordings of robosuite's own script

#: Control frequency of robosuite's recording script, which does not store it.
CONTROL_HZ = 20


def recorded_env_args(info: Mapping[str, Any], version: Any) -> dict[str, Any]:
    """Robomimic's `env_args` of a recording.

    Args:
        info: the recording's `env_info`: `env_name`, `robots` (one name or several),
            and settings of `robosuite.make`.
        version: its `repository_version`, `None` where it names none.

    Raises:
        KeyError: `info` lacks `env_name` or `robots`.
    """
    kwargs, robots = dict(info), info["robots"]
    robots = [robots] if isinstance(robots, str) else robots
    kwargs |= {"robots": robots, "control_freq": CONTROL_HZ}
    name = kwargs.pop("env_name")
    return {"env_name": name, "env_version": version, "type": 1, "env_kwargs": kwargs}


# The instruction given to the robot

#: The attribute of a demo that holds it.
INSTRUCTION = "language_instruction"


def instruction_in(attrs: Mapping[str, Any]) -> str | None:
    """The instruction in the attributes of a demo or its file: by itself, in robosuite's
    `ep_meta` or in LIBERO's `problem_info`.
    """
    found = attrs.get(INSTRUCTION)
    for name, key in (("ep_meta", "lang"), ("problem_info", INSTRUCTION)):
        try:
            found = found or json.loads(attrs.get(name) or "{}").get(key)
        except (ValueError, TypeError, AttributeError):
            continue
    return found if isinstance(found, str) else None
