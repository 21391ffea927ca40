"""Lift: grasp the cube and raise it."""

from __future__ import annotations

import numpy as np

from fibopolicy.envs.robosuite_experts.motion import CLOSE, Action, Arm, nearest, yaw_of


def lift(arm: Arm) -> Action:
    grasp = grasp_cube(arm, "cube_main", float(arm.geom_size("cube_g0")[0]))
    return arm.toward(arm.position + [0, 0, 0.03], arm.yaw, CLOSE) if grasp is None else grasp


#: A hand farther aside of a cube than this does not turn yet, metres. From afar no
#: camera tells how a cube is turned: an expert that turns on its way leaves no
#: demonstration of what a policy must do, which is to look from above and then turn.
SEEN = 0.04


def grasp_cube(arm: Arm, body: str, half_width: float) -> Action | None:
    """Approach and grasp a cube from above; `None` once it is held."""
    position, rotation = arm.body(body)
    return arm.grasp(
        position, nearest(yaw_of(rotation), arm.yaw, np.pi / 2), half_width, turn_within=SEEN
    )
