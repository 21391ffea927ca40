"""Robosuite's tasks with the settings of robomimic's benchmarks (Mandlekar et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Defaults:
    """The default settings of a task.

    Args:
        horizon: control steps until an episode is truncated; robomimic's for its
            proficient-human data.
        robots: robots of the scene.
        cameras: the cameras to render.
    """

    horizon: int = 400
    robots: tuple[str, ...] = ("Panda",)
    cameras: tuple[str, ...] = ("agentview", "robot0_eye_in_hand")


_TWO_ARMS = ("Panda", "Panda")

#: Registered tasks, by robosuite's names. Others can be made from a dataset's
#: `env_args`.
TASKS: Mapping[str, Defaults] = {
    "Lift": Defaults(),
    "Stack": Defaults(),
    "PickPlaceCan": Defaults(),
    "NutAssemblySquare": Defaults(),
    "Door": Defaults(),
    "ToolHang": Defaults(horizon=700, cameras=("sideview", "robot0_eye_in_hand")),
    "TwoArmTransport": Defaults(
        horizon=700,
        robots=_TWO_ARMS,
        cameras=("shouldercamera0", "robot0_eye_in_hand", "shouldercamera1", "robot1_eye_in_hand"),
    ),
    "TwoArmHandover": Defaults(
        horizon=700,
        robots=_TWO_ARMS,
        cameras=("agentview", "robot0_eye_in_hand", "robot1_eye_in_hand"),
    ),
}

#: All tasks of robosuite 1.5, whether or not it is installed.
# fmt: off
ROBOSUITE_NAMES = frozenset({
    *TASKS, "NutAssembly", "NutAssemblyRound", "NutAssemblySingle", "PickPlace", "PickPlaceBread",
    "PickPlaceCereal", "PickPlaceMilk", "PickPlaceSingle", "TwoArmLift", "TwoArmPegInHole", "Wipe",
})
# fmt: on
