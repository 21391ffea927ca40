"""Stack: put the red cube on the green one and let go."""

from __future__ import annotations

import numpy as np

from fibopolicy.envs.robosuite_experts.lift import grasp_cube
from fibopolicy.envs.robosuite_experts.motion import CLOSE, Action, Arm

HALF_RED, HALF_GREEN = 0.02, 0.025
#: How far above the green cube the red one may be let go, metres. It drops unharmed;
#: waiting for less teaches policies to wait.
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
