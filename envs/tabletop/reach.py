"""Bring the hand to a marked point."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.tabletop.base import TabletopEnv
from fibopolicy.envs.tabletop.scene import goal


class Reach(TabletopEnv):
    """Bring the point between the fingertips to the centre of the green ball.

    Layouts: ball x and y uniform in [-0.1, 0.1] m, height uniform in [0.03, 0.1] m.
    Success: within 1.5 cm.
    """

    task_id = "fibopolicy/Reach-v0"
    default_horizon = 80

    def objects(self) -> str:
        return goal("target", 'type="sphere" size="0.014" rgba="0.1 0.7 0.2 1"')

    def place(self, rng: np.random.Generator) -> None:
        self.mark("target", [*rng.uniform(-0.1, 0.1, 2), rng.uniform(0.03, 0.1)])

    def success(self) -> bool:
        return bool(np.linalg.norm(self.hand - self.position("target")) < 0.015)

    def expert_action(self) -> NDArray[np.float32]:
        return self.toward(self.position("target"), -1.0)
