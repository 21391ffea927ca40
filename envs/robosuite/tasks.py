"""Robosuite's tasks with the settings that robomimic's benchmarks use (Mandlekar et al., 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_ONE_ARM = ("agentview", "robot0_eye_in_hand")


@dataclass(frozen=True)
class Defaults:
    """What a task gets unless told otherwise.

    Args:
        horizon: control steps until an episode is truncated; robomimic's for its
            proficient-human data.
        robots: of the scene.
        cameras: what is rendered.
    """

    horizon: int = 400
    robots: tuple[str, ...] = ("Panda",)
    cameras: tuple[str, ...] = _ONE_ARM


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
