"""Scripted experts for robosuite's tasks, for a Panda with robosuite's default controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fibopolicy.envs.robosuite_experts.door import door
from fibopolicy.envs.robosuite_experts.lift import lift
from fibopolicy.envs.robosuite_experts.motion import POSITION_SCALE, ROTATION_SCALE, Action, Arm
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
    """The action `(7,)` in [-1, 1] of a task's expert in a robosuite environment's
    present state.

    Raises:
        UserError: the task has no expert, or the environment is not a Panda with the
            default controller.
    """
    if task_id not in EXPERTS:
        raise UserError(f"{task_id} has no scripted expert; these have one: {', '.join(EXPERTS)}")
    if not _is_usual(env):
        raise UserError(
            f"the expert of {task_id} moves one Panda with robosuite's default controller"
            " (OSC_POSE, delta), not this one"
        )
    return EXPERTS[task_id](Arm(env))


def _is_usual(env: Any) -> bool:
    """Whether the arm and its commands are those that the experts are written for."""
    if [robot.name for robot in env.robots] != ["Panda"]:
        return False
    robot = env.robots[0]
    arm = robot.part_controllers["right"]
    if (
        arm.name != "OSC_POSE"
        or arm.input_type != "delta"
        or type(robot.gripper["right"]).__name__ != "PandaGripper"
    ):
        return False
    return bool(np.allclose(arm.output_max, [*[POSITION_SCALE] * 3, *[ROTATION_SCALE] * 3]))
