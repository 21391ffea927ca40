"""What files bring from other machines and older robosuites: controllers and models, brought up to the installed robosuite."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from fibopolicy.errors import UserError, unknown

#: Names of the flat arm controllers of robosuite 1.0 to 1.4 -> those of 1.5, which ignores the old ones silently.
_RENAMED = {"damping": "damping_ratio", "damping_limits": "damping_ratio_limits"}


def composite_controller(config: Mapping[str, Any], robot: str) -> dict[str, Any]:
    """A robot's controller config in the composite form of robosuite 1.5; one that has it already is only checked.

    A flat config describes the arms alone. Its operational-space commands are in the world's frame, as they were until 1.4,
    and `control_delta: false` makes them absolute (metres and axis-angle radians).

    Raises:
        UserError: no such controller, with the nearest match suggested.
    """
    import robosuite
    from robosuite.controllers.composite.composite_controller_factory import refactor_composite_controller_config
    from robosuite.models.robots.robot_model import REGISTERED_ROBOTS

    if not isinstance(config, Mapping):
        raise UserError(f"a robosuite controller config is a mapping with a type, got {config!r}")
    arm_controllers, kind = robosuite.ALL_PART_CONTROLLERS, config.get("type")
    if "body_parts" in config:
        if kind not in robosuite.ALL_COMPOSITE_CONTROLLERS:
            raise unknown("robosuite composite controller", kind, robosuite.ALL_COMPOSITE_CONTROLLERS)
        for part in config["body_parts"].values():
            if part.get("type") not in arm_controllers:
                raise unknown("robosuite controller", part.get("type"), arm_controllers)
        return deepcopy(dict(config))
    if kind not in arm_controllers:
        raise unknown("robosuite controller", kind, arm_controllers)
    arm = {_RENAMED.get(key, key): value for key, value in config.items() if key != "control_delta"}
    if str(kind).startswith("OSC"):
        arm["input_ref_frame"] = "world"
        arm["input_type"] = "delta" if config.get("control_delta", True) else "absolute"
    composite: dict[str, Any] = refactor_composite_controller_config(arm, robot, REGISTERED_ROBOTS[robot].arms)
    return composite


def portable(model: str) -> str:
    """MJCF text with its paths into a robosuite installation cut to `robosuite/...`: robosuite completes them when it loads."""
    return re.sub(r'file="[^"]*robosuite/', 'file="robosuite/', model)


def adopt(model: str, own: str, objects: Collection[str]) -> str:
    """A file's MJCF text in a form that the installed robosuite can load.

    Models of the installed generation pass, but for their paths. Older ones (1.0 to 1.4) name robot parts otherwise and want
    meshes that are gone, while the robots' joints and masses are the same. So the installed scene is kept, and takes from the
    file what a task varies: its objects, with their shapes, masses and places.

    Args:
        model: the file's MJCF.
        own: the installed robosuite's MJCF of the same task.
        objects: names of the bodies that are the task's objects.

    Raises:
        UserError: the text is not MJCF, or of another robot or task.
    """
    try:
        theirs = ET.fromstring(model)
    except ET.ParseError as error:
        raise UserError(f"a state's model is not MJCF: {error}") from error
    ours = ET.fromstring(own)
    joints, expected = _joints(theirs), _joints(ours)
    if joints == expected:
        return portable(model)
    if [_plain(name) for name in joints] != [_plain(name) for name in expected]:
        raise UserError(
            f"a state's model has the joints {', '.join(joints) or 'none'}, but this task's are {', '.join(expected)}:"
            " make the environment from the env_args of the model's own file"
        )
    world = ours.find("worldbody")
    assert world is not None
    for index, body in enumerate(world):
        if body.get("name") in objects:
            replacement = theirs.find(f"worldbody/body[@name='{body.get('name')}']")
            if replacement is None:
                raise UserError(f"a state's model has no body {body.get('name')!r}, which this task needs")
            world[index] = replacement
    return portable(ET.tostring(ours, encoding="unicode"))


def _joints(model: ET.Element) -> list[str]:
    """The names of a model's joints, in the order of its state vector."""
    return [e.get("name", "") for e in model.iterfind("worldbody//*") if e.tag in ("joint", "freejoint")]


def _plain(joint: str) -> str:
    """A joint's name without the arm that robosuite 1.5 puts into a gripper's."""
    return re.sub(r"^(gripper\d+)_(right|left)_", r"\1_", joint)
