"""Door: pinch the handle, turn it until the latch is free, and pull the door open by it."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from fibopolicy.envs.robosuite_experts.motion import CLOSE, OPEN, Action, Arm, Vector

#: Where the handle is pinched: from its axis along it, and from the axis outward,
#: metres.
ALONG, OUT = 0.11, 0.10
#: The hand comes from the front at this angle from above, so that it clears the door,
#: radians.
TILT = np.pi / 4
#: The fingers hold the handle when they are less far than this from the middle between
#: them, metres.
HELD = 0.034
#: The handle's turn at which the latch is free, radians.
FREE = 0.9


#: The hand turns with the handle up to this angle, where the arm's reach ends; from
#: there on the handle turns in its fingers.
FOLLOW = 0.5


def door(arm: Arm) -> Action:
    axis, handle = arm.body("Door_latch")
    _, panel = arm.body("Door_door")
    turn, hinge = arm.joint("Door_latch_joint"), arm.joint("Door_hinge")
    outward, rightward = -panel[:, 1], panel[:, 1]
    pinch = axis + OUT * outward + ALONG * handle[:, 0]

    def hand_at(turn: float) -> Vector:
        """The hand's rotation at a turn of the handle."""
        up = Rotation.from_rotvec(np.clip(turn, 0, FOLLOW) * rightward).as_matrix() @ panel[:, 2]
        across = np.cos(TILT) * outward - np.sin(TILT) * up
        approach = -np.sin(TILT) * outward - np.cos(TILT) * up
        return np.stack([across, np.cross(approach, across), approach], axis=1)

    rotation = hand_at(turn)
    off = float(np.linalg.norm(pinch - arm.position))
    if off < 0.035 and arm.opening < HELD:
        if turn < FREE and hinge < 0.03:
            ahead = Rotation.from_rotvec(0.25 * rightward).as_matrix()
            return arm.to_pose(axis + ahead @ (pinch - axis), hand_at(turn + 0.25), CLOSE)
        return arm.to_pose(pinch + 0.04 * outward, rotation, CLOSE)

    turned = float(Rotation.from_matrix(rotation @ arm.rotation.T).magnitude())
    if off < 0.02 and turned < 0.3:
        return arm.to_pose(pinch, rotation, CLOSE)
    slack = 0.012 - 0.05 * max(0.0, turned - 0.15)
    return arm.to_pose(
        arm.descent(pinch, hover=0.07, slack=slack, axis=rotation[:, 2]), rotation, OPEN
    )
