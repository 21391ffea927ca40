"""Stack: put the red cube on the green one and let go."""

from __future__ import annotations

import numpy as np

from fibopolicy.envs.robosuite_experts.lift import grasp_cube
from fibopolicy.envs.robosuite_experts.motion import CLOSE, OPEN, Action, Arm

HALF_RED, HALF_GREEN = 0.02, 0.025


def stack(arm: Arm) -> Action:
    red, _ = arm.body("cubeA_main")
    green, _ = arm.body("cubeB_main")
    gap = red - green - [0, 0, HALF_RED + HALF_GREEN]
    if np.linalg.norm(gap[:2]) < 0.015 and abs(gap[2]) < 0.004:
        retreat = 0.05 if arm.opening > HALF_RED + 0.005 else 0.0
        return arm.toward(arm.position + [0, 0, retreat], arm.yaw, OPEN)
    grasp = grasp_cube(arm, "cubeA_main", HALF_RED)
    if grasp is not None:
        return grasp
    place = green + [0, 0, HALF_RED + HALF_GREEN - 0.001] + (arm.position - red)
    return arm.toward(arm.descent(place, hover=0.05, slack=0.009), arm.yaw, CLOSE)
