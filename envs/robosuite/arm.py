"""What robosuite's scripted experts share: the arm as it stands now, and actions that
move it.

Every expert is a function of the simulator's present state alone: no phase is
remembered, so that a policy which sees the state can imitate it, and an expert that is
pushed off its way goes on from where it finds itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Vector = NDArray[np.float64]
Action = NDArray[np.float32]

OPEN, CLOSE = -1.0, 1.0
#: What an action of 1 asks of robosuite's default controller: metres and radians from
#: the present pose.
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5
#: The controller covers only a part of a command within a control step: errors are
#: asked for this many times over.
GAIN = 2.0
#: The hand, pointing down over the table, can turn by a little less than half a turn to
#: either side of this one, radians.
MIDDLE_YAW = 0.9
#: The farthest turn about the vertical that is asked for at once, radians.
TURN_LIMIT = 0.15
DOWN: Vector = np.array([0.0, 0.0, -1.0])


class Arm:
    """A Panda and its scene at this instant. Positions are metres in the world's frame,
    angles radians.

    Args:
        env: the robosuite environment.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self._model, self._data = env.sim.model, env.sim.data
        robot = env.robots[0]
        site = robot.eef_site_id["right"]
        #: The point between the fingertips, `(3,)`.
        self.position: Vector = np.array(self._data.site_xpos[site])
        #: The hand's axes as columns, `(3, 3)`: the fingers close along x and point
        #: along z.
        self.rotation: Vector = np.array(self._data.site_xmat[site]).reshape(3, 3)
        fingers = robot.gripper["right"].joints
        #: How far each finger stands from the middle between them, 0 to 0.04, and how
        #: fast the faster one moves, metres/s.
        self.opening = 0.5 * float(
            np.abs([self._data.get_joint_qpos(joint) for joint in fingers]).sum()
        )
        self.finger_speed = float(
            np.abs([self._data.get_joint_qvel(joint) for joint in fingers]).max()
        )

    @property
    def yaw(self) -> float:
        """The hand's turn about the vertical, 0 in its usual pose, counted between the
        stops of the arm's last joint.
        """
        return nearest(
            float(np.arctan2(self.rotation[1, 1], self.rotation[0, 1])), MIDDLE_YAW, 2 * np.pi
        )

    def body(self, name: str) -> tuple[Vector, Vector]:
        """A body's position `(3,)` and rotation `(3, 3)`."""
        index = self._model.body_name2id(name)
        return np.array(self._data.body_xpos[index]), np.array(self._data.body_xmat[index]).reshape(
            3, 3
        )

    def geom_size(self, name: str) -> Vector:
        """A shape's size `(3,)` as MuJoCo gives it: a box's half lengths."""
        return np.array(self._model.geom_size[self._model.geom_name2id(name)])

    def joint(self, name: str) -> float:
        """A hinge's angle."""
        return float(self._data.get_joint_qpos(name))

    def toward(self, position: Vector, yaw: float, grip: float) -> Action:
        """The action `(7,)` in [-1, 1] that moves the hand to a position, pointing down
        and turned by `yaw` as `yaw` counts.
        """
        # A fast turn drags the hand off its way, and the shortest turn may lead through
        # a stop.
        return self.to_pose(
            position,
            pointing_down(self.yaw + np.clip(yaw - self.yaw, -TURN_LIMIT, TURN_LIMIT)),
            grip,
        )

    def to_pose(self, position: Vector, rotation: Vector, grip: float) -> Action:
        """The action `(7,)` in [-1, 1] that moves the hand to a pose, by the shortest turn."""
        turn = Rotation.from_matrix(rotation @ self.rotation.T).as_rotvec()
        move = np.concatenate([(position - self.position) / POSITION_SCALE, turn / ROTATION_SCALE])
        return np.array([*np.clip(GAIN * move, -1, 1), grip], dtype=np.float32)

    def grasp(
        self, target: Vector, yaw: float, half_width: float, turn_within: float = np.inf
    ) -> Action | None:
        """Approach and grasp from above what is `2 * half_width` metres wide at
        `target`; `None` once it is held.

        The hand turns to `yaw` once it is less than `turn_within` metres aside of the
        target.
        """
        error = target - self.position
        aside, crooked = float(np.linalg.norm(error[:2])), abs(yaw - self.yaw)
        distance = max(aside, abs(float(error[2])))
        # Grasped off its middle a round thing is narrower, and things slip a little
        # between the fingers.
        if (
            distance < 0.025
            and -0.006 < self.opening - half_width < 0.003
            and self.finger_speed < 0.02
        ):
            return None
        # Fingers that have begun to close go on, even where the hand trembles.
        reach, across = (0.015, 0.2) if self.opening > 0.038 else (0.02, 0.3)
        if distance < reach and crooked < across:
            return self.toward(target, yaw, CLOSE)
        # The fingers may come down beside the target only once they stand across it.
        slack = 0.012 - 0.1 * max(0.0, crooked - 0.15)
        return self.toward(
            self.descent(target, hover=0.06, slack=slack),
            yaw if aside < turn_within else self.yaw,
            OPEN,
        )

    def release(self, place: Vector, half_width: float, retreat: float) -> Action:
        """Let go of what is `2 * half_width` metres wide, then rise by `retreat`
        metres.

        The fingers take half a second to open. Until they have, the hand keeps to
        `place`.
        """
        opened = self.opening > half_width + 0.005
        return self.toward(self.position + [0, 0, retreat] if opened else place, self.yaw, OPEN)

    def descent(self, target: Vector, hover: float, slack: float, axis: Vector = DOWN) -> Vector:
        """Where to go next so that `target` is reached from above, or against another
        approach `axis`.

        A funnel: within `slack` of the line through the target the way is free down to
        it; farther off the hand must be up to `hover` higher, 4 metres per metre, and
        rises before it moves sideways.
        """
        error = target - self.position
        depth = float(error @ axis)
        aside = error - depth * axis
        height = float(np.clip(4 * (np.linalg.norm(aside) - slack), 0, hover))
        if depth < height - 0.02:
            return self.position + (depth - height) * axis
        return target - height * axis


def pointing_down(yaw: float) -> Vector:
    """The rotation `(3, 3)` of a hand that points down, turned by `yaw` from its usual pose."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[-s, c, 0], [c, s, 0], [0, 0, -1]])


def nearest(angle: float, reference: float, period: float) -> float:
    """The angle nearest to `reference` among those that differ from `angle` by a
    multiple of `period`.
    """
    return angle + period * round((reference - angle) / period)


def yaw_of(rotation: Vector) -> float:
    """The turn about the vertical of a body that lies flat, by the more level of its
    first two axes.
    """
    x, y = rotation[:, 0], rotation[:, 1]
    return float(np.arctan2(x[1], x[0]) if abs(x[2]) <= abs(y[2]) else np.arctan2(-y[0], y[1]))
