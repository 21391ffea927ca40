"""Lift: grasp the cube and raise it."""

from __future__ import annotations

import numpy as np

from fibopolicy.envs.robosuite_experts.motion import CLOSE, OPEN, Action, Arm, nearest, pointing_down, yaw_of


def lift(arm: Arm) -> Action:
    half_width = float(arm.env.cube.size[0])
    grasp = grasp_cube(arm, "cube_main", half_width)
    return arm.toward(arm.position + [0, 0, 0.03], pointing_down(arm.yaw), CLOSE) if grasp is None else grasp


def grasp_cube(arm: Arm, body: str, half_width: float) -> Action | None:
    """Approach and grasp a cube from above; `None` once it is held."""
    position, rotation = arm.body(body)
    yaw = nearest(yaw_of(rotation), arm.yaw, np.pi / 2)
    off = float(np.linalg.norm((position - arm.position)[:2]))
    near = off < 0.015 and abs(position[2] - arm.position[2]) < 0.015
    if near and arm.opening < half_width + 0.003 and arm.finger_speed < 0.02:
        return None
    if near and abs(yaw - arm.yaw) < 0.2:
        return arm.toward(position, pointing_down(yaw), CLOSE)
    return arm.toward(arm.descent(position, hover=0.06, slack=0.012), pointing_down(yaw), OPEN)
