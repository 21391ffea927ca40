"""PickPlaceCan: carry the can over the bins' walls into its compartment and let go."""

from __future__ import annotations

import numpy as np

from fibopolicy.envs.robosuite_experts.motion import CLOSE, Action, Arm, nearest

RADIUS = 0.025
#: A standing can is grasped this far above its middle, so that the hand stays clear of
#: the walls.
GRASP_HEIGHT = 0.012
#: From here up, above a bin's floor, what the hand carries clears the walls.
CLEARANCE = 0.2


def pick_place_can(arm: Arm) -> Action:
    can, rotation = arm.body("Can_main")
    bin_ = arm.env.target_bin_placements[arm.env.object_to_id["can"]]
    off = float(np.abs((can - bin_)[:2]).max())
    place = bin_ + [0, 0, 0.07] + (arm.position - can)
    if off < 0.06 and can[2] < bin_[2] + 0.1:
        return arm.release(place, RADIUS, retreat=0.1)
    axis = rotation[:, 2]
    if abs(axis[2]) > 0.8:
        target, yaw = can + [0, 0, GRASP_HEIGHT], 0.0
    else:  # it lies: the fingers close across it
        target, yaw = can, nearest(float(np.arctan2(axis[1], axis[0])), 0.0, np.pi)
    grasp = arm.grasp(target, yaw, RADIUS)
    if grasp is not None:
        return grasp
    return arm.toward(arm.descent(place, hover=CLEARANCE, slack=0.04), arm.yaw, CLOSE)
