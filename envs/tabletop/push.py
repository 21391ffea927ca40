"""Push a puck onto a target."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fibopolicy.envs.tabletop.base import TabletopEnv
from fibopolicy.envs.tabletop.scene import goal

RADIUS = 0.03
HALF_HEIGHT = 0.015
#: The hand's height while it pushes, and while it travels over the puck, metres.
LOW, HIGH = 0.018, 0.065


class Push(TabletopEnv):
    """Push the blue puck onto the green disc.

    Layouts: puck x and y uniform in [-0.07, 0.07] m; disc in any direction from it, 8
    to 14 cm away, within [-0.13, 0.13] m. Success: the puck's centre is within 2 cm of
    the disc's.
    """

    task_id = "fibopolicy/Push-v0"
    default_horizon = 200

    def objects(self) -> str:
        return f"""
    <body name="puck" pos="0 0 {HALF_HEIGHT}">
      <freejoint name="puck"/>
      <geom name="puck" type="cylinder" size="{RADIUS} {HALF_HEIGHT}" rgba="0.1 0.25 0.85 1" mass="0.06"
            condim="4" friction="0.6 0.01 0.0001"/>
    </body>""" + goal("target", f'type="cylinder" size="{RADIUS} 0.0005" rgba="0.1 0.7 0.2 1"')  # noqa: E501

    def place(self, rng: np.random.Generator) -> None:
        puck = rng.uniform(-0.07, 0.07, 2)
        while True:
            angle, distance = rng.uniform(-np.pi, np.pi), rng.uniform(0.08, 0.14)
            target = puck + distance * np.array([np.cos(angle), np.sin(angle)])
            if np.abs(target).max() <= 0.13:
                break
        self.put("puck", [*puck, HALF_HEIGHT])
        self.mark("target", [*target, 0.0005])

    def success(self) -> bool:
        return bool(np.linalg.norm(self.position("puck")[:2] - self.position("target")[:2]) < 0.02)

    def expert_action(self) -> NDArray[np.float32]:
        puck, hand = self.position("puck"), self.hand
        to_target = self.position("target")[:2] - puck[:2]
        direction = to_target / np.linalg.norm(to_target)
        from_puck = hand[:2] - puck[:2]
        # how far the hand is behind the puck, along the push
        behind = -float(from_puck @ direction)
        sideways = from_puck + behind * direction  # `(2,)`, off that line
        if hand[2] < LOW + 0.012 and behind > RADIUS - 0.01 and np.linalg.norm(sideways) < 0.012:
            # Steering against `sideways` makes the push stable: otherwise the puck
            # drifts away from the line.
            goal_xy = hand[:2] + 0.008 * direction - 0.8 * sideways
            return self.toward(np.array([*goal_xy, LOW]), 1.0)
        # Over the puck, at a safe height until the hand is right behind it.
        start = puck[:2] - (RADIUS + 0.022) * direction
        off = float(np.linalg.norm(start - hand[:2]))
        height = LOW + np.clip(4 * (off - 0.006), 0, HIGH - LOW)
        if hand[2] < height - 0.01:
            start = hand[:2]
        return self.toward(np.array([*start, height]), 1.0)
