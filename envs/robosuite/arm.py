"""The arm of robosuite's scripted experts: its present state, and actions that move it.

Every expert is a function of the simulator's present state alone. It remembers no
phase, so that a policy which sees the state can imitate it, and after a push it
continues from the gripper's present pose.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

Vector = NDArray[np.float64]
Action = NDArray[np.float32]

OPEN, CLOSE = -1.0, 1.0
#: What an action of 1 means to robosuite's default controller: metres and radians from
#: the present pose.
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5
#: The controller covers only a part of a command within a control step: commands are
#: this many times the error.
GAIN = 2.0
#: The gripper, pointing down over the table, can turn by a little less than half a turn
#: to either side of this angle, radians.
MIDDLE_YAW = 0.9
#: The largest turn about the vertical in one command, radians.
TURN_LIMIT = 0.15
DOWN: Vector = np.array([0.0, 0.0, -1.0])


class Arm:
    """A Panda and its scene at this instant.

    Positions are in metres in the world's frame, angles in radians.

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
        #: The gripper's axes as columns, `(3, 3)`: the fingers close along x and point
        #: along z.
        self.rotation: Vector = np.array(self._data.site_xmat[site]).reshape(3, 3)
        fingers = robot.gripper["right"].joints
        positions = [self._data.get_joint_qpos(joint) for joint in fingers]
        speeds = [self._data.get_joint_qvel(joint) for joint in fingers]
        #: Each finger's distance from the middle between them, 0 to 0.04, and the speed
        #: of the faster one, metres/s.
        self.opening = 0.5 * float(np.abs(positions).sum())
        self.finger_speed = float(np.abs(speeds).max())

    @property
    def yaw(self) -> float:
        """The gripper's turn about the vertical, 0 in its usual pose, without wrapping.

        It is counted between the stops of the arm's last joint.
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
        """The action `(7,)` in [-1, 1] toward a position, pointing down and turned by `yaw`."""
        # A fast turn drags the gripper off its path, and the shortest turn may lead
        # through a stop.
        turn = np.clip(yaw - self.yaw, -TURN_LIMIT, TURN_LIMIT)
        return self.to_pose(position, pointing_down(self.yaw + turn), grip)

    def to_pose(self, position: Vector, rotation: Vector, grip: float) -> Action:
        """The action `(7,)` in [-1, 1] toward a pose, by the shortest turn."""
        turn = Rotation.from_matrix(rotation @ self.rotation.T).as_rotvec()
        move = np.concatenate([(position - self.position) / POSITION_SCALE, turn / ROTATION_SCALE])
        return np.array([*np.clip(GAIN * move, -1, 1), grip], dtype=np.float32)

    def grasp(
        self, target: Vector, yaw: float, half_width: float, turn_within: float = np.inf
    ) -> Action | None:
        """Approach and grasp an object from above; `None` once it is held.

        Args:
            target: where to grasp it.
            half_width: half the object's width there, metres.
            turn_within: the gripper turns to `yaw` once it is this near to the target
                sideways, metres.
        """
        # A round object grasped off its middle is narrower, and objects slip a little
        # between the fingers.
        closed_on_it = -0.006 < self.opening - half_width < 0.003 and self.finger_speed < 0.02
        sideways, height = self._off(target)
        if max(sideways, height) < 0.025 and closed_on_it:
            return None
        return self.approach(target, yaw, turn_within)

    def approach(
        self, target: Vector, yaw: float, turn_within: float = np.inf, hover: float = 0.06
    ) -> Action:
        """Approach an object from above, `hover` metres over the target, and close the
        fingers there; the other arguments are those of `grasp`.
        """
        sideways, height = self._off(target)
        misaligned = abs(yaw - self.yaw)
        # Fingers that have begun to close continue, even if the gripper trembles.
        reach, across = (0.015, 0.2) if self.opening > 0.038 else (0.02, 0.3)
        if max(sideways, height) < reach and misaligned < across:
            return self.toward(target, yaw, CLOSE)
        # The fingers may come down to the target only once they are aligned with it.
        slack = 0.012 - 0.1 * max(0.0, misaligned - 0.15)
        way = self.descent(target, hover, slack)
        return self.toward(way, yaw if sideways < turn_within else self.yaw, OPEN)

    def _off(self, target: Vector) -> tuple[float, float]:
        """The gripper's distance from a position sideways, and in height."""
        error = target - self.position
        return float(np.linalg.norm(error[:2])), abs(float(error[2]))

    def release(self, place: Vector, half_width: float, retreat: float) -> Action:
        """Release an object `2 * half_width` metres wide, then rise by `retreat`
        metres.

        The fingers take half a second to open. Until then the gripper stays at `place`.
        """
        opened = self.opening > half_width + 0.005
        return self.toward(self.position + [0, 0, retreat] if opened else place, self.yaw, OPEN)

    def descent(self, target: Vector, hover: float, slack: float, axis: Vector = DOWN) -> Vector:
        """The next position on the path to `target` from above, or along another
        `axis`.

        The path is a funnel: within `slack` of the line through the target the gripper
        may descend to it; farther off it must be up to `hover` higher, 4 metres per
        metre, and rises before it moves sideways.
        """
        error = target - self.position
        depth = float(error @ axis)
        sideways = error - depth * axis
        height = float(np.clip(4 * (np.linalg.norm(sideways) - slack), 0, hover))
        if depth < height - 0.02:
            return self.position + (depth - height) * axis
        return target - height * axis


def pointing_down(yaw: float) -> Vector:
    """The rotation `(3, 3)` of a gripper that points down, turned by `yaw`."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[-s, c, 0], [c, s, 0], [0, 0, -1]])


def nearest(angle: float, reference: float, period: float) -> float:
    """The angle nearest to `reference` that differs from `angle` by a multiple of `period`."""
    return angle + period * round((reference - angle) / period)


def yaw_of(rotation: Vector) -> float:
    """The turn about the vertical of a flat body, by the more level of its first two axes."""
    x, y = rotation[:, 0], rotation[:, 1]
    return float(np.arctan2(x[1], x[0]) if abs(x[2]) <= abs(y[2]) else np.arctan2(-y[0], y[1]))
