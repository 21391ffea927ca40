"""A scripted expert for LIBERO's suites "spatial" and "object": it grasps the goal's
object from above and carries it to where the goal wants it.

It knows no layout. Grasp and path follow from the shapes of the scene at this instant.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fibopolicy.envs.libero.tasks import LIBERO, suite_of
from fibopolicy.envs.robosuite.arm import (
    CLOSE,
    MIDDLE_YAW,
    OPEN,
    Action,
    Arm,
    Vector,
    nearest,
    yaw_of,
)
from fibopolicy.errors import UserError

#: The suites whose tasks it solves: each has one object to move.
EXPERT_SUITES = ("spatial", "object")
EXPERT_TASKS = tuple(task for task in LIBERO if suite_of(task) in EXPERT_SUITES)

# The gripper, metres from the point between its fingertips.

#: The hand begins this far above, so an object is grasped at most `DEPTH` below its top.
PALM, DEPTH = 0.026, 0.02
#: Outer side of an open finger, half the palm's length the way the fingers move, and
#: half its width across.
FINGER, PALM_LENGTH, PALM_WIDTH = 0.046, 0.104, 0.032
#: Thicker objects do not fit between the fingers.
WIDEST = 0.07

# Lengths in the scene, metres.

#: The black bowl's rim is grasped this far from the bowl's axis and above its origin.
RIM_RADIUS, RIM_HEIGHT, RIM_WIDTH = 0.0475, 0.036, 0.008
#: Farther from its base than this the arm is almost straight and moves badly.
REACH = 0.70
#: A grasp with less room than this around the gripper is worse than others.
ROOM = 0.02
#: The height of a path above the shapes below it.
CLEARANCE = 0.02
#: An object is released when it is this near to its goal sideways and in height.
AT_GOAL = (0.015, 0.01)

#: MuJoCo's type of an endless plane.
PLANE = 0
UP = np.array([0.0, 0.0, 1.0])


class Boxes(NamedTuple):
    """Collision shapes, each as the oriented box around it.

    Args:
        centre: `(N, 3)`, metres in the world's frame.
        axes: `(N, 3, 3)`, each box's axes as columns.
        half: `(N, 3)`, half lengths along them, metres.
    """

    centre: Vector
    axes: Vector
    half: Vector

    def span(self, direction: Vector) -> tuple[Vector, Vector]:
        """Where each box begins and ends along a unit vector, `(N,)` each, metres."""
        middle = self.centre @ direction
        reach = (np.abs(direction @ self.axes) * self.half).sum(axis=1)
        return middle - reach, middle + reach

    def distance(self, points: Vector) -> float:
        """The smallest distance of `points`, `(P, 3)`, from a box, 0 inside one."""
        offset = np.einsum("pni,nij->pnj", points[:, None] - self.centre, self.axes)
        return float(np.linalg.norm(np.maximum(np.abs(offset) - self.half, 0), axis=2).min())

    def top(self, start: Vector, end: Vector, radius: float) -> float:
        """Height of the highest box that is, seen from above, within `radius` of a
        straight path.
        """
        path = start[:2] + np.linspace(0, 1, 16)[:, None] * (end - start)[:2]
        met = np.ones((len(path), len(self.centre)), dtype=bool)
        for axis in (0, 1):
            low, high = self.span(np.eye(3)[axis])
            at = path[:, axis, None]
            met &= (at > low - radius) & (at < high + radius)
        return float(np.max(self.span(UP)[1], where=met.any(axis=0), initial=-np.inf))


class Grasp(NamedTuple):
    """A position, the gripper's yaw, and the object's width there, metres."""

    target: Vector
    yaw: float
    width: float


def expert_action(task_id: str, env: Any, goal: tuple[str, ...]) -> Action:
    """The action `(7,)` in [-1, 1] in the present state of LIBERO's environment `env`.

    Args:
        goal: "on" or "in", the object, and the object or site where it goes.

    Raises:
        UserError: the task has no expert.
    """
    if task_id not in EXPERT_TASKS:
        raise UserError(
            f"{task_id} has no scripted expert; the tasks of libero/spatial and libero/object"
            " have one"
        )
    arm = Arm(env)
    predicate, name, destination = goal
    item = env.objects_dict[name]
    shapes, others = shapes_of(env, item.root_body)
    held = env._check_grasp(env.robots[0].gripper["right"], item)
    if not held or arm.finger_speed > 0.02:
        body = item.root_body
        bowl = "bowl" in name
        grasps = rim_grasps(arm, body) if bowl else grasps_across(arm, body, shapes)
        grasp = min(grasps, key=lambda grasp: cost(arm, grasp, others))
        over = others.top(arm.position, grasp.target, FINGER) + CLEARANCE
        return arm.approach(grasp.target, grasp.yaw, hover=max(over - grasp.target[2], 0.06))

    position, _ = arm.body(item.root_body)
    if predicate == "in":  # below the brim, so that the hand stays above it
        goal_position = env.sim.data.get_site_xpos(destination) + 0.05 * UP
    else:
        goal_position = arm.body(env.objects_dict[destination].root_body)[0] + 0.004 * UP
    gap = position - goal_position
    if np.linalg.norm(gap[:2]) < AT_GOAL[0] and abs(gap[2]) < AT_GOAL[1]:
        return arm.toward(arm.position, arm.yaw, OPEN)
    below = position[2] - float(shapes.span(UP)[0].min())
    over = others.top(position, goal_position, 0.05) + CLEARANCE + below
    way = arm.descent(arm.position - gap, hover=max(over - goal_position[2], 0.05), slack=0.01)
    return arm.toward(way, arm.yaw, CLOSE)


def cost(arm: Arm, grasp: Grasp, others: Boxes) -> float:
    """How bad a grasp is: far, turned, wide, at the end of the reach, in a narrow place."""
    across = np.array([-np.sin(grasp.yaw), np.cos(grasp.yaw), 0])
    along = np.array([np.cos(grasp.yaw), np.sin(grasp.yaw), 0])
    fingers = [side * across for side in np.linspace(-FINGER, FINGER, 9)]
    palm = [
        length * across + width * along + PALM * UP
        for length in np.linspace(-PALM_LENGTH, PALM_LENGTH, 5)
        for width in (-PALM_WIDTH, PALM_WIDTH)
    ]
    rooms = [others.distance(grasp.target + np.array(part)) for part in (fingers, palm)]
    base, _ = arm.body(arm.env.robots[0].robot_model.root_body)
    way, reach = (float(np.linalg.norm((grasp.target - at)[:2])) for at in (arm.position, base))
    return (
        abs(grasp.yaw - arm.yaw)
        + 10 * way
        + 20 * grasp.width
        + 60 * max(0, reach - REACH)
        + 300 * sum(max(0, ROOM - room) for room in rooms)
        + 1000 * max(0, grasp.width - WIDEST)
    )


def rim_grasps(arm: Arm, body: str) -> list[Grasp]:
    """Grasps of a bowl's rim, one finger inside."""
    position, rotation = arm.body(body)
    angles = np.arange(16) * np.pi / 8
    offset = (arm.position - position) @ rotation
    if abs(np.linalg.norm(offset[:2]) - RIM_RADIUS) < 0.02 and offset[2] < RIM_HEIGHT + 0.02:
        # The rim is between the fingers.
        angles = angles[[round(np.arctan2(offset[1], offset[0]) / (np.pi / 8)) % 16]]
    grasps = []
    for angle in angles:
        outward = rotation @ [np.cos(angle), np.sin(angle), 0]
        target = position + RIM_RADIUS * outward + RIM_HEIGHT * rotation[:, 2]
        yaw = near_yaw(arm, float(np.arctan2(-outward[0], outward[1])))
        grasps.append(Grasp(target, yaw, RIM_WIDTH))
    return grasps


def grasps_across(arm: Arm, body: str, shapes: Boxes) -> list[Grasp]:
    """Grasps across an object, a little below its top."""
    low, high = shapes.span(UP)
    height = max(high.max() - DEPTH, low.min() + 0.009)
    between = (low < height + 0.012) & (high > height - 0.004)  # the fingers' pads
    touched = Boxes(*(part[between] for part in shapes))
    first = yaw_of(arm.body(body)[1])
    grasps = []
    for angle in first + np.arange(8) * np.pi / 8:
        yaw = near_yaw(arm, angle)
        target, width = height * UP, 0.0
        for direction in ([np.cos(yaw), np.sin(yaw), 0], [-np.sin(yaw), np.cos(yaw), 0]):
            starts, ends = touched.span(np.array(direction))
            start, end = float(starts.min()), float(ends.max())
            target = target + 0.5 * (start + end) * np.array(direction)
            width = end - start  # at last across, where the fingers close
        grasps.append(Grasp(target, yaw, width))
    return grasps


def near_yaw(arm: Arm, yaw: float) -> float:
    """The same grasp by the smaller turn, away from the stops of the arm's last joint."""
    return nearest(yaw, float(np.clip(arm.yaw, MIDDLE_YAW - 1.5, MIDDLE_YAW + 1.5)), np.pi)


def shapes_of(env: Any, body: str) -> tuple[Boxes, Boxes]:
    """The collision shapes of the object with this root body, and those of all else but
    the robot.
    """
    model, data = env.sim.model._model, env.sim.data._data
    roots = model.body_rootid[model.geom_bodyid]
    solid = (model.geom_contype != 0) & (model.geom_type != PLANE)
    own = roots == model.body_rootid[model.body(body).id]
    robot = roots == model.body_rootid[model.body(env.robots[0].robot_model.root_body).id]
    axes = data.geom_xmat.reshape(-1, 3, 3)
    centre = data.geom_xpos + np.einsum("nij,nj->ni", axes, model.geom_aabb[:, :3])
    boxes = Boxes(centre, axes, model.geom_aabb[:, 3:])
    mine, rest = solid & own, solid & ~own & ~robot
    return Boxes(*(part[mine] for part in boxes)), Boxes(*(part[rest] for part in boxes))
