"""Which actions of a file are absolute, where their rotations are, and which must lie
in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fibopolicy.utils.imports import is_import_path

#: Of an arm under OSC_POSE with its gripper: x, y, z in metres, axis times angle in
#: radians, the gripper's command.
ARM_DIM = 7
ROTATION = 3


def is_absolute(env_args: Mapping[str, Any]) -> bool:
    """Whether the actions are absolute: the controller's `control_delta` false, or its
    `input_type` absolute.

    Args:
        env_args: as a robomimic file holds them, of any robosuite from 1.0 to 1.5.
    """
    return any(
        part.get("input_type") == "absolute"
        or (part.get("control_delta") is False and "input_type" not in part)
        for part in _arms(env_args)
    )


def is_unit(env_args: Mapping[str, Any]) -> bool:
    """Whether the task's simulator clips actions to [-1, 1]: robosuite unless they are
    absolute, Meta-World, the built-in one.

    Others take actions of any range, say joint targets in radians and a gripper of 0 to
    255.
    """
    name = str(env_args.get("env_name"))
    if env_args.get("type") == 1 and not is_import_path(name):
        return not is_absolute(env_args) and not any(
            _custom_range(part) for part in _arms(env_args)
        )
    return name.startswith(("fibopolicy/", "metaworld/"))


def rotation_columns(env_args: Mapping[str, Any], action_dim: int) -> tuple[int, ...]:
    """The first of three columns of each axis-angle rotation among absolute actions;
    none where actions are displacements.

    Known for robots of one arm each under OSC_POSE with fixed impedance and a gripper
    of one number: every 7 columns hold a position, a rotation and the gripper. Where
    `action_dim` does not say so, no column counts as a rotation.
    """
    if not is_absolute(env_args) or any(part.get("type") != "OSC_POSE" for part in _arms(env_args)):
        return ()
    robots = _options(env_args).get("robots") or ["one"]
    count = 1 if isinstance(robots, str) else len(robots)
    return tuple(range(ROTATION, action_dim, ARM_DIM)) if action_dim == count * ARM_DIM else ()


def _custom_range(part: Mapping[str, Any]) -> bool:
    """Whether a controller scales commands from another range than [-1, 1]."""
    return bool(part.get("input_max", 1) != 1 or part.get("input_min", -1) != -1)


def _options(env_args: Mapping[str, Any]) -> Mapping[str, Any]:
    options = env_args.get("env_kwargs")
    return options if isinstance(options, Mapping) else {}


def _arms(env_args: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every arm's controller config: the flat one of robosuite 1.0 to 1.4, or those in
    a composite one of 1.5.
    """
    configs = _options(env_args).get("controller_configs") or ()
    for config in configs if isinstance(configs, list | tuple) else [configs]:
        if isinstance(config, Mapping):
            yield from (
                _parts(config) if isinstance(config.get("body_parts"), Mapping) else (config,)
            )


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    parts = config["body_parts"]
    arms = parts.get("arms")
    for name, part in {**parts, **(arms if isinstance(arms, Mapping) else {})}.items():
        if name in ("right", "left") and isinstance(part, Mapping):
            yield part
