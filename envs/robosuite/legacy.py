"""Adapts controllers and models from other machines and robosuite versions to the installed one."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

from fibopolicy.envs.libero.tasks import ASSETS, assets_home
from fibopolicy.errors import UserError, unknown

#: Names of the flat arm controllers of robosuite 1.0 to 1.4 -> those of 1.5, which
#: ignores the old ones silently.
_RENAMED = {"damping": "damping_ratio", "damping_limits": "damping_ratio_limits"}
#: A setting of an arm's controller: it holds its orientation. Robosuite ignores it.
_HOLDS = "holds_orientation"


def composite_controller(config: Mapping[str, Any], robot: str) -> dict[str, Any]:
    """A robot's controller config in the composite form of robosuite 1.5.

    A config that has this form is only checked. A flat config describes the arms alone.
    Its operational-space commands are in the world's frame, as they were until 1.4, and
    `control_delta: false` makes them absolute (metres and axis-angle radians). With
    deltas the arm holds its orientation, see `hold_orientation`.

    Raises:
        UserError: no such controller, with the nearest match suggested.
    """
    import robosuite
    from robosuite.controllers.composite.composite_controller_factory import (
        refactor_composite_controller_config,
    )
    from robosuite.models.robots.robot_model import REGISTERED_ROBOTS

    if not isinstance(config, Mapping):
        raise UserError(f"a robosuite controller config is a mapping with a type, got {config!r}")
    arm_controllers, kind = robosuite.ALL_PART_CONTROLLERS, config.get("type")
    if "body_parts" in config:
        if kind not in robosuite.ALL_COMPOSITE_CONTROLLERS:
            raise unknown(
                "robosuite composite controller", kind, robosuite.ALL_COMPOSITE_CONTROLLERS
            )
        parts = config["body_parts"]
        mappings = isinstance(parts, Mapping) and all(
            isinstance(part, Mapping) for part in parts.values()
        )
        if not mappings:
            raise UserError(
                "body_parts of a robosuite controller config map each part to its own config,"
                f" got {parts!r}"[:300]
            )
        for part in parts.values():
            if part.get("type") not in arm_controllers:
                raise unknown("robosuite controller", part.get("type"), arm_controllers)
        return deepcopy(dict(config))
    if kind not in arm_controllers:
        raise unknown("robosuite controller", kind, arm_controllers)
    arm = {_RENAMED.get(key, key): value for key, value in config.items() if key != "control_delta"}
    if str(kind).startswith("OSC"):
        arm["input_ref_frame"] = "world"
        arm["input_type"] = "delta" if config.get("control_delta", True) else "absolute"
        arm[_HOLDS] = arm["input_type"] == "delta"
    composite: dict[str, Any] = refactor_composite_controller_config(
        arm, robot, REGISTERED_ROBOTS[robot].arms
    )
    return composite


def hold_orientation(robots: Sequence[Any]) -> None:
    """Make the arms of older files hold their commanded orientation, as robosuite did
    until 1.4.

    There a delta without any rotation changed the goal position alone. In 1.5 it also
    makes the reached orientation the goal, so that an arm which sags or is pushed does
    not turn back: recordings of keyboards and of devices with a dead zone, whose
    rotations are exactly 0 for long stretches, then drift.

    Args:
        robots: robots of a robosuite environment, with new or updated controllers.
    """
    for robot in robots:
        composite = robot.composite_controller
        for part, controller in composite.part_controllers.items():
            if composite.part_controller_config.get(part, {}).get(_HOLDS):
                controller.reset_goal()
                controller.compute_goal_ori = partial(_goal_orientation, controller)


def _goal_orientation(controller: Any, delta: Any, goal_update_mode: str | None = None) -> Any:
    """The class's `compute_goal_ori`, except that the goal stays without a rotation."""
    if controller.goal_ori is not None and not any(delta):
        return controller.goal_ori
    return type(controller).compute_goal_ori(controller, delta, goal_update_mode)


def portable(model: str) -> str:
    """MJCF text with its paths into a robosuite installation cut to `robosuite/...`, and
    those of LIBERO's files to `libero/assets/...`.

    Robosuite completes such paths when it loads the text. A path that names no
    robosuite, or a file that the installed one lacks, becomes that of the installed
    file with the same name and the most folders in common; if there is none it stays,
    and loading names it.
    """
    return re.sub(r'file="([^"]*)"', lambda found: f'file="{_installed_asset(found[1])}"', model)


@cache
def _installed_asset(path: str) -> str:
    root = _robosuite_folder()
    _, within, below = path.replace("\\", "/").rpartition("robosuite/")
    if within and (root / below).is_file():
        return f"robosuite/{below}"
    _, among_assets, asset = path.partition("assets/")
    if among_assets and not within and (assets_home() / "assets" / asset).is_file():
        return ASSETS + asset
    *folders, name = path.replace("\\", "/").split("/")
    ranked = sorted(
        ((_in_common(folders, asset.parts[:-1]), asset) for asset in _assets().get(name, ())),
        reverse=True,
    )
    if ranked and (len(ranked) == 1 or ranked[0][0] > ranked[1][0]):
        return f"robosuite/{ranked[0][1].as_posix()}"
    return f"robosuite/{below}" if within else path


@cache
def _assets() -> dict[str, list[Path]]:
    """The installed robosuite's asset files by name, as paths below its folder."""
    root = _robosuite_folder()
    found: dict[str, list[Path]] = {}
    for path in sorted((root / "models/assets").rglob("*")):
        found.setdefault(path.name, []).append(path.relative_to(root))
    return found


def _robosuite_folder() -> Path:
    import robosuite

    return Path(robosuite.__file__).parent


def _in_common(folders: Sequence[str], others: Sequence[str]) -> int:
    """How many folders two paths have in common, counted from the file up."""
    same = [a == b for a, b in zip(reversed(folders), reversed(others), strict=False)]
    return same.index(False) if False in same else len(same)


def convert_model(model: str, own: str, objects: Collection[str]) -> str:
    """A file's MJCF text in a form that the installed robosuite can load.

    Models of the installed generation only change in their paths. Older ones (1.0 to
    1.4) use other names and meshes that are gone, while the robots' joints and masses
    are the same. So the installed scene is kept, with the file's objects: their shapes,
    masses and places. Robosuite 1.0 gave objects other names and fewer parts: of those,
    the places are taken, and the sizes of boxes and other primitives.

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
            f"a state's model has the joints {', '.join(joints) or 'none'}, but this task's are"
            f" {', '.join(expected)}: make the environment from the env_args of the model's own"
            " file"
        )
    world = ours.find("worldbody")
    assert world is not None
    for index, body in enumerate(world):
        if body.get("name") in objects:
            name = str(body.get("name"))
            older = name.removesuffix("_main")
            named = {str(other.get("name")): other for other in theirs.iterfind("worldbody/body")}
            if name in named:
                world[index] = named[name]
            elif (found := named.get(older, named.get(f"{older}0"))) is not None:
                _take_place_and_size(body, found)
            else:
                raise UserError(f"a state's model has no body {name!r}, which this task needs")
    return portable(ET.tostring(ours, encoding="unicode"))


def _joints(model: ET.Element) -> list[str]:
    """The names of a model's joints, in the order of its state vector."""
    return [
        e.get("name", "") for e in model.iterfind("worldbody//*") if e.tag in ("joint", "freejoint")
    ]


def _take_place_and_size(ours: ET.Element, theirs: ET.Element) -> None:
    for key in ("pos", "quat"):
        if (value := theirs.get(key)) is not None:
            ours.set(key, value)
    for geom in ours.iterfind("geom"):
        same = [other for other in theirs.iterfind("geom") if other.get("type") == geom.get("type")]
        if geom.get("type") != "mesh" and len(same) == 1 and same[0].get("size"):
            geom.set("size", same[0].get("size", ""))


def _plain(joint: str) -> str:
    """A joint's name in a form common to all robosuites: without the arm that 1.5 puts
    into a gripper's, and without 1.0's endings.
    """
    name = re.sub(r"^(gripper\d+)_(right|left)_", r"\1_", joint)
    name = re.sub(r"0?_jnt0$", "_joint0", name)
    # 1.0: door_hinge and latch_joint; 1.5: Door_hinge and Door_latch_joint
    return name.lower().removeprefix("door_")
