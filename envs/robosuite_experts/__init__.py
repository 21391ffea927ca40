"""Scripted experts for robosuite's tasks, for a Panda with robosuite's default controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fibopolicy.envs.robosuite_experts.door import door
from fibopolicy.envs.robosuite_experts.lift import lift
from fibopolicy.envs.robosuite_experts.motion import Action, Arm
from fibopolicy.envs.robosuite_experts.nut_assembly_square import nut_assembly_square
from fibopolicy.envs.robosuite_experts.pick_place_can import pick_place_can
from fibopolicy.envs.robosuite_experts.stack import stack
from fibopolicy.errors import UserError

#: Task id -> its expert.
EXPERTS: Mapping[str, Callable[[Arm], Action]] = {
    "robosuite/Door": door,
    "robosuite/Lift": lift,
    "robosuite/NutAssemblySquare": nut_assembly_square,
    "robosuite/PickPlaceCan": pick_place_can,
    "robosuite/Stack": stack,
}


def expert_action(task_id: str, env: Any) -> Action:
    """The action `(7,)` in [-1, 1] of a task's expert in a robosuite environment's present state.

    Raises:
        UserError: the task has no expert, or the environment is not a Panda with the default controller.
    """
    if task_id not in EXPERTS:
        raise UserError(f"{task_id} has no scripted expert; those that have one: {', '.join(EXPERTS)}")
    return EXPERTS[task_id](Arm(env))
