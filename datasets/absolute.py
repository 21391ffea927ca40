"""Which actions of a robosuite file are absolute poses, and where their rotations are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Of an arm under OSC_POSE with its gripper: x, y, z in metres, axis times angle in radians, the gripper's command.
ARM_DIM = 7
ROTATION = 3


def is_absolute(env_args: Mapping[str, Any]) -> bool:
    """Whether the actions are absolute: the controller's `control_delta` false, or its `input_type` absolute.

    Args:
        env_args: as a robomimic file holds them, of any robosuite from 1.0 to 1.5.
    """
    return any(
        part.get("input_type") == "absolute" or (part.get("control_delta") is False and "input_type" not in part)
        for part in _arms(env_args)
    )


def rotation_columns(env_args: Mapping[str, Any], action_dim: int) -> tuple[int, ...]:
    """The first of three columns of each axis-angle rotation among absolute actions; none where actions are displacements.

    Known for robots of one arm each under OSC_POSE with fixed impedance and a gripper of one number: every 7 columns hold a
    position, a rotation and the gripper. Where `action_dim` does not say so, no column counts as a rotation.
    """
    if not is_absolute(env_args) or any(part.get("type") != "OSC_POSE" for part in _arms(env_args)):
        return ()
    robots = _options(env_args).get("robots") or ["one"]
    count = 1 if isinstance(robots, str) else len(robots)
    return tuple(range(ROTATION, action_dim, ARM_DIM)) if action_dim == count * ARM_DIM else ()


def _options(env_args: Mapping[str, Any]) -> Mapping[str, Any]:
    options = env_args.get("env_kwargs")
    return options if isinstance(options, Mapping) else {}


def _arms(env_args: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every arm's controller config: the flat one of robosuite 1.0 to 1.4, or those in a composite one of 1.5."""
    configs = _options(env_args).get("controller_configs") or ()
    for config in [configs] if isinstance(configs, Mapping) else configs:
        yield from _parts(config) if "body_parts" in config else (config,)


def _parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    parts = config["body_parts"]
    for part in {**parts, **parts.get("arms", {})}.values():
        if str(part.get("type", "")).startswith("OSC"):
            yield part
