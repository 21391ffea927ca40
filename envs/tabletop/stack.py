"""Stack one cube on another."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.tabletop.base import TabletopEnv
from fibopolicy.envs.tabletop.lift import grasp_action
from fibopolicy.envs.tabletop.scene import CUBE, cube

BASE = 0.025
#: The fingers have let go of the cube when they are this far from the middle, metres.
RELEASED = CUBE + 0.008
#: Height of the withdrawn hand above the cube's centre, metres. If releasing were the
#: end, each demonstration would show it for one step only, and policies would hold the
#: stacked cube forever.
WITHDRAWN = 0.04


class Stack(TabletopEnv):
    """Put the red cube on the larger green one, let go and withdraw.

    Layouts: both cubes' x and y uniform in [-0.1, 0.1] m, at least 11 cm apart; yaw
    uniform in [-0.3, 0.3] rad. Success: the red cube rests on the green one, centres
    within 2 cm sideways, the gripper has let go and the hand is above.
    """

    task_id = "fibopolicy/Stack-v0"
    default_horizon = 200

    def objects(self) -> str:
        return cube("cube", "0.85 0.1 0.1 1") + cube("base", "0.1 0.6 0.2 1", BASE)

    def place(self, rng: np.random.Generator) -> None:
        while True:
            red, green = rng.uniform(-0.1, 0.1, (2, 2))
            if np.linalg.norm(red - green) >= 0.11:
                break
        self.put("cube", [*red, CUBE], rng.uniform(-0.3, 0.3))
        self.put("base", [*green, BASE], rng.uniform(-0.3, 0.3))

    def success(self) -> bool:
        withdrawn = self.hand[2] > self.position("cube")[2] + WITHDRAWN
        return bool(self._resting(tolerance=0.02) and self.opening > RELEASED and withdrawn)

    def _resting(self, tolerance: float) -> bool:
        gap = self.position("cube") - self.position("base") - [0, 0, BASE + CUBE]
        return bool(np.linalg.norm(gap[:2]) < tolerance and abs(gap[2]) < 0.003)

    def expert_action(self) -> NDArray[np.float32]:
        if self._resting(tolerance=0.012):
            retreat = 0.05 if self.opening > RELEASED else 0.0
            return self.toward(self.hand + [0, 0, retreat], -1.0)
        grasp = grasp_action(self, "cube")
        if grasp is not None:
            return grasp
        # Carry: the farther the hand is from the base, the higher it must be; then it
        # descends.
        place = (
            self.position("base")
            + [0, 0, BASE + CUBE - 0.001]
            + (self.hand - self.position("cube"))
        )
        off = float(np.linalg.norm(place[:2] - self.hand[:2]))
        place[2] += np.clip(4 * (off - 0.004), 0, 0.04)
        if self.hand[2] < place[2] - 0.015:
            place[:2] = self.hand[:2]
        return self.toward(place, 1.0)
