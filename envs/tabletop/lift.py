"""Lift a cube off the table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.tabletop.base import TabletopEnv, Vector
from fibopolicy.envs.tabletop.scene import CUBE, cube


class Lift(TabletopEnv):
    """Grasp the red cube and raise it 5 cm.

    Layouts: cube x and y uniform in [-0.1, 0.1] m, yaw uniform in [-0.3, 0.3] rad.
    Success: the cube's centre is 5 cm above its initial height.
    """

    task_id = "fibopolicy/Lift-v0"

    def objects(self) -> str:
        return cube("cube", "0.85 0.1 0.1 1")

    def place(self, rng: np.random.Generator) -> None:
        self.put("cube", [*rng.uniform(-0.1, 0.1, 2), CUBE], rng.uniform(-0.3, 0.3))

    def success(self) -> bool:
        return bool(self.position("cube")[2] > CUBE + 0.05)

    def expert_action(self) -> NDArray[np.float32]:
        grasp = grasp_action(self, "cube")
        return self.toward(self.hand + [0, 0, 0.1], 1.0) if grasp is None else grasp


def grasp_action(env: TabletopEnv, body: str) -> NDArray[np.float32] | None:
    """Approach and grasp a cube from above; `None` once it is held. A function of this
    instant alone.
    """
    cube_position = env.position(body)
    error: Vector = cube_position - env.hand
    distance = float(np.linalg.norm(error[:2]))
    near = distance < 0.012 and abs(error[2]) < 0.01
    if near and env.opening < CUBE + 0.003:
        return None
    if near:
        return env.toward(cube_position, 1.0)
    # A funnel: the hand may only be low when the fingers are on both sides of the cube.
    above = np.array([0, 0, np.clip(4 * (distance - 0.008), 0, 0.07)])
    return env.toward(cube_position + above, -1.0)
