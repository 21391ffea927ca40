"""Door: pinch the handle, turn it until the latch is free, and pull the door open by it."""

from __future__ import annotations

import numpy as np
from scipy.spatial.transform import Rotation

from fibopolicy.envs.robosuite_experts.motion import CLOSE, OPEN, Action, Arm

#: Where the handle is pinched: from its axis along it, and from the axis outward, metres.
ALONG, OUT = 0.11, 0.10
#: The hand comes from the front at this angle from above, so that it clears the door, radians.
TILT = np.pi / 4
#: Half the handle's width between the fingers of a hand that is so tilted, metres.
HALF_WIDTH = 0.0247
#: The handle's turn at which the latch is free, radians.
FREE = 0.9


def door(arm: Arm) -> Action:
    axis, handle = arm.body("Door_latch")
    _, panel = arm.body("Door_door")
    outward = -panel[:, 1]
    pinch = axis + OUT * outward + ALONG * handle[:, 0]
    across = np.cos(TILT) * outward - np.sin(TILT) * handle[:, 2]
    approach = -np.sin(TILT) * outward - np.cos(TILT) * handle[:, 2]
    rotation = np.stack([across, np.cross(approach, across), approach], axis=1)

    error = pinch - arm.position
    turned = float(Rotation.from_matrix(rotation @ arm.rotation.T).magnitude())
    near = np.linalg.norm(error) < 0.025
    if not near or arm.opening > HALF_WIDTH + 0.005:
        if near and turned < 0.3:
            return arm.to_pose(pinch, rotation, CLOSE)
        slack = 0.012 - 0.05 * max(0.0, turned - 0.15)
        return arm.to_pose(arm.descent(pinch, hover=0.07, slack=slack, axis=approach), rotation, OPEN)

    if arm.joint("Door_latch_joint") < FREE and arm.joint("Door_hinge") < 0.03:
        ahead = Rotation.from_rotvec(0.25 * panel[:, 1]).as_matrix()
        return arm.to_pose(axis + ahead @ (pinch - axis), ahead @ rotation, CLOSE)
    return arm.to_pose(pinch + 0.03 * outward, rotation, CLOSE)
