"""Scripted experts for robosuite's tasks, for a Panda with robosuite's default
controller.

Each is a function of an `Arm`: the action for the simulator's present state. To add
one, write the function here and name it in `EXPERTS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from fibopolicy.envs.robosuite.arm import (
    CLOSE,
    MIDDLE_YAW,
    OPEN,
    POSITION_SCALE,
    ROTATION_SCALE,
    Action,
    Arm,
    Vector,
    nearest,
    yaw_of,
)
from fibopolicy.errors import UserError

# Lift: grasp the cube and raise it.

#: The gripper turns to a cube only when it is nearer to it sideways than this, metres.
#: No camera shows from afar how a cube is turned: a policy must look from above before
#: it turns, so it cannot imitate an expert that turns early.
CUBE_SEEN = 0.04


def lift(arm: Arm) -> Action:
    grasp = grasp_cube(arm, "cube_main", float(arm.geom_size("cube_g0")[0]))
    return arm.toward(arm.position + [0, 0, 0.03], arm.yaw, CLOSE) if grasp is None else grasp


def grasp_cube(arm: Arm, body: str, half_width: float) -> Action | None:
    """Approach and grasp a cube from above; `None` once it is held."""
    position, rotation = arm.body(body)
    yaw = nearest(yaw_of(rotation), arm.yaw, np.pi / 2)
    return arm.grasp(position, yaw, half_width, turn_within=CUBE_SEEN)


# Stack: put the red cube on the green one and let go.

HALF_RED, HALF_GREEN = 0.02, 0.025
#: How far above the green cube the red one may be released, metres. The drop does no
#: harm; waiting for less teaches policies to wait.
RELEASE = 0.012


def stack(arm: Arm) -> Action:
    red, _ = arm.body("cubeA_main")
    green, _ = arm.body("cubeB_main")
    gap = red - green - [0, 0, HALF_RED + HALF_GREEN]
    place = green + [0, 0, HALF_RED + HALF_GREEN - 0.001] + (arm.position - red)
    if np.linalg.norm(gap[:2]) < 0.015 and abs(gap[2]) < RELEASE:
        return arm.release(place, HALF_RED, retreat=0.05)
    grasp = grasp_cube(arm, "cubeA_main", HALF_RED)
    if grasp is not None:
        return grasp
    return arm.toward(arm.descent(place, hover=0.05, slack=0.014), arm.yaw, CLOSE)


# PickPlaceCan: carry the can over the bins' walls into its compartment and let go.

CAN_RADIUS = 0.025
#: A standing can is grasped this far above its middle, so that the gripper stays clear
#: of the walls.
CAN_GRASP_HEIGHT = 0.012
#: Above this height over a bin's floor, what the gripper carries clears the walls.
CLEARANCE = 0.2


def pick_place_can(arm: Arm) -> Action:
    can, rotation = arm.body("Can_main")
    bin_ = arm.env.target_bin_placements[arm.env.object_to_id["can"]]
    off = float(np.abs((can - bin_)[:2]).max())
    place = bin_ + [0, 0, 0.07] + (arm.position - can)
    if off < 0.06 and can[2] < bin_[2] + 0.1:
        return arm.release(place, CAN_RADIUS, retreat=0.1)
    axis = rotation[:, 2]
    if abs(axis[2]) > 0.8:
        target, yaw = can + [0, 0, CAN_GRASP_HEIGHT], 0.0
    else:  # it lies on its side: the fingers close across it
        target, yaw = can, nearest(float(np.arctan2(axis[1], axis[0])), 0.0, np.pi)
    grasp = arm.grasp(target, yaw, CAN_RADIUS)
    if grasp is not None:
        return grasp
    return arm.toward(arm.descent(place, hover=CLEARANCE, slack=0.04), arm.yaw, CLOSE)


# NutAssemblySquare: grasp the square nut by its handle and thread it on the square peg.

#: Where the handle is grasped, from the nut's centre, and half its width, metres.
NUT_GRIP, NUT_HALF_WIDTH = 0.058, 0.0159
#: As `CUBE_SEEN`, for the handle.
HANDLE_SEEN = 0.05
#: Heights of the nut's centre above the peg's middle, metres: carried over the peg,
#: just over its top, surely around it.
OVER, TOP, AROUND = 0.13, 0.105, 0.085
#: How far the nut may be off the peg's axis, metres, to go down, to be held just over
#: the top, and to be carried high up. The height is interpolated: an expert that
#: switched at a threshold would teach policies to wait there.
MISS = (0.005, 0.008, 0.02)


def nut_assembly_square(arm: Arm) -> Action:
    nut, rotation = arm.body("SquareNut_main")
    peg, _ = arm.body("peg1")
    handle = rotation[:, 0]
    # On the peg the handle points at the robot: beside or behind the peg the arm does
    # not reach.
    turn = nearest(float(np.arctan2(-handle[1], -handle[0])), MIDDLE_YAW, 2 * np.pi)
    # A handle can be grasped in two ways, half a turn apart: by the smaller turn, away
    # from the stops of the last joint.
    yaw = nearest(turn, float(np.clip(arm.yaw, MIDDLE_YAW - 1.5, MIDDLE_YAW + 1.5)), np.pi)
    target = nut + NUT_GRIP * handle + [0, 0, 0.004]
    grasp = arm.grasp(target, yaw, NUT_HALF_WIDTH, turn_within=HANDLE_SEEN)
    if grasp is not None:
        return grasp

    # Held: turn the nut with the gripper, which ends at 0 or at half a turn, depending
    # on how it grasped.
    final = 0.0 if np.cos(turn - arm.yaw) > 0 else np.pi
    left = nearest(-turn, final - arm.yaw, 2 * np.pi)
    c, s = np.cos(left), np.sin(left)
    eef = arm.position - nut
    place = peg + [c * eef[0] - s * eef[1], s * eef[0] + c * eef[1], eef[2]]
    off = float(np.linalg.norm((nut - peg)[:2]))
    height = nut[2] - peg[2]
    lift = float(np.interp(off + 0.1 * max(0.0, abs(left) - 0.05), MISS, [0, TOP, OVER]))
    if height < AROUND and off < 0.012:
        lift = 0.0
    if height < lift - 0.02 and off > MISS[-1]:
        place[:2] = arm.position[:2]
    # Slow down over the last 12 centimetres: at full speed the gripper overshoots the
    # peg.
    sideways = place[:2] - arm.position[:2]
    share = min(1.0, max(0.01 / (np.linalg.norm(sideways) + 1e-9), 0.2))
    place[:2] = arm.position[:2] + sideways * share
    place[2] += lift
    return arm.toward(place, arm.yaw + left, CLOSE)


# Door: pinch the handle, turn it until the latch is free, and pull the door open by it.

#: Where the handle is pinched: along it from its axis, and outward from the axis,
#: metres.
ALONG, OUT = 0.11, 0.10
#: The gripper comes from the front at this angle from above, clear of the door,
#: radians.
TILT = np.pi / 4
#: The fingers hold the handle when each is nearer than this to the middle, metres.
HELD = 0.034
#: The handle's turn at which the latch is free, radians.
FREE = 0.9
#: The gripper turns with the handle up to this angle, where the arm's reach ends;
#: beyond it the handle turns between the fingers.
FOLLOW = 0.5


def door(arm: Arm) -> Action:
    axis, handle = arm.body("Door_latch")
    _, panel = arm.body("Door_door")
    turn, hinge = arm.joint("Door_latch_joint"), arm.joint("Door_hinge")
    outward, rightward = -panel[:, 1], panel[:, 1]
    pinch = axis + OUT * outward + ALONG * handle[:, 0]

    def rotation_at(turn: float) -> Vector:
        """The gripper's rotation at a turn of the handle."""
        up = Rotation.from_rotvec(np.clip(turn, 0, FOLLOW) * rightward).as_matrix() @ panel[:, 2]
        across = np.cos(TILT) * outward - np.sin(TILT) * up
        approach = -np.sin(TILT) * outward - np.cos(TILT) * up
        return np.stack([across, np.cross(approach, across), approach], axis=1)

    rotation = rotation_at(turn)
    off = float(np.linalg.norm(pinch - arm.position))
    if off < 0.035 and arm.opening < HELD:
        if turn < FREE and hinge < 0.03:
            ahead = Rotation.from_rotvec(0.25 * rightward).as_matrix()
            return arm.to_pose(axis + ahead @ (pinch - axis), rotation_at(turn + 0.25), CLOSE)
        return arm.to_pose(pinch + 0.04 * outward, rotation, CLOSE)

    turned = float(Rotation.from_matrix(rotation @ arm.rotation.T).magnitude())
    if off < 0.02 and turned < 0.3:
        return arm.to_pose(pinch, rotation, CLOSE)
    slack = 0.012 - 0.05 * max(0.0, turned - 0.15)
    target = arm.descent(pinch, hover=0.07, slack=slack, axis=rotation[:, 2])
    return arm.to_pose(target, rotation, OPEN)


#: Task id -> its expert.
EXPERTS: Mapping[str, Callable[[Arm], Action]] = {
    "robosuite/Door": door,
    "robosuite/Lift": lift,
    "robosuite/NutAssemblySquare": nut_assembly_square,
    "robosuite/PickPlaceCan": pick_place_can,
    "robosuite/Stack": stack,
}


def expert_action(task_id: str, env: Any) -> Action:
    """The action `(7,)` in [-1, 1] of a task's expert in the present state of a
    robosuite environment.

    Raises:
        UserError: the task has no expert, or the environment is not a Panda with the
            default controller.
    """
    if task_id not in EXPERTS:
        raise UserError(f"{task_id} has no scripted expert; these have one: {', '.join(EXPERTS)}")
    if not _is_default(env):
        raise UserError(
            f"the expert of {task_id} moves one Panda with robosuite's default controller"
            " (OSC_POSE, delta), not this one"
        )
    return EXPERTS[task_id](Arm(env))


def _is_default(env: Any) -> bool:
    """Whether the arm and its commands are those that the experts are written for."""
    robot = env.robots[0]
    if len(env.robots) != 1 or robot.name != "Panda":
        return False
    arm, gripper = robot.part_controllers["right"], type(robot.gripper["right"]).__name__
    if (arm.name, arm.input_type, gripper) != ("OSC_POSE", "delta", "PandaGripper"):
        return False
    return np.allclose(arm.output_max, [*[POSITION_SCALE] * 3, *[ROTATION_SCALE] * 3])
