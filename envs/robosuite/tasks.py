"""Robosuite's tasks with the settings of robomimic's benchmarks (Mandlekar et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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


def not_restorable(task: str, options: Mapping[str, Any]) -> str | None:
    """Why a state does not restore the scene of one of robosuite's tasks with these
    options, in one line; else `None`.
    """
    if task == "Wipe":
        return (
            "robosuite/Wipe cannot be simulated here: neither a seed nor a state determines where"
            " its dirt lies; use another task, such as robosuite/Door"
        )
    drawn = task in ("NutAssemblySingle", "PickPlaceSingle")
    if drawn or options.get("single_object_mode") == 1:
        return (
            f"robosuite/{task} cannot be simulated here: it draws which object to use whenever a"
            " state is restored; use the task of one object, such as robosuite/PickPlaceCan or"
            " robosuite/NutAssemblySquare"
        )
    return None
