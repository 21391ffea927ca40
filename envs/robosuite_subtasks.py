"""What robosuite's tasks consist of, for code that takes demonstrations apart: subtasks, poses, and commands toward a pose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from fibopolicy.envs.robosuite import RobosuiteEnv
from fibopolicy.errors import UserError

#: A rigid pose: homogeneous `(4, 4)`, metres, in the world's frame.
Pose = NDArray[np.float64]

#: The symmetry of what is round: turns of one degree.
ROUND = 360


@dataclass(frozen=True)
class Thing:
    """A body that matters to a task.

    Args:
        body: its name in robosuite's model.
        symmetry: turns about its vertical axis that change nothing, e.g. 4 for a cube.
    """

    body: str
    symmetry: int = 1


@dataclass(frozen=True)
class Subtask:
    """A part of a task that happens relative to one thing.

    Args:
        about: the thing; `None` is the world, a place that never moves.
        carried: what is in the hand meanwhile and is to be put down; `None` where a thing is picked up.
    """

    about: Thing | None
    carried: Thing | None = None


def _pick_and_place(thing: Thing, target: Thing | None) -> tuple[Subtask, Subtask]:
    return Subtask(thing), Subtask(target, carried=thing)


#: Tasks of known structure: first a thing is picked up, then, unless lifting is all, it is put down.
SUBTASKS: Mapping[str, tuple[Subtask, ...]] = {
    "Lift": (Subtask(Thing("cube_main", 4)),),
    "Stack": _pick_and_place(Thing("cubeA_main", 4), Thing("cubeB_main", 4)),
    "PickPlaceCan": _pick_and_place(Thing("Can_main", ROUND), None),
    "NutAssemblySquare": _pick_and_place(Thing("SquareNut_main"), Thing("peg1", 4)),
}


class Hand:
    """The one arm of an environment whose actions are OSC_POSE deltas: where it is, and how to command it to a pose.

    Raises:
        UserError: the environment has several arms or another controller.
    """

    def __init__(self, env: RobosuiteEnv) -> None:
        self._env = env
        robots = env._env.robots
        controllers = robots[0].composite_controller.part_controllers
        arms = [controllers[arm] for arm in robots[0].arms]
        arm = arms[0]
        delta = getattr(arm, "input_type", None) == "delta" and getattr(arm, "impedance_mode", None) == "fixed"
        if len(robots) != 1 or len(arms) != 1 or arm.name != "OSC_POSE" or not delta or env.action_space.shape != (7,):
            raise UserError(
                f"{env.task_id}: demonstrations are taken apart for one arm under delta OSC_POSE with a gripper (7 actions);"
                f" this file's has {len(arms)} arm(s) under {arm.name} and {env.action_space.shape} actions"
            )
        self._in_base = arm.input_ref_frame == "base"
        #: Of an action of 1: metres (3,), radians (3,).
        self.scale = np.asarray(arm.output_max, dtype=np.float64)

    @property
    def pose(self) -> Pose:
        """Of the point between the fingers, at this instant."""
        robot, data = self._env._env.robots[0], self._env._env.sim.data
        site = robot.eef_site_id[robot.arms[0]]
        return _pose(data.site_xpos[site], data.site_xmat[site])

    def body(self, name: str) -> Pose:
        """Of a body, at this instant."""
        sim = self._env._env.sim
        body = sim.model.body_name2id(name)
        return _pose(sim.data.body_xpos[body], sim.data.body_xmat[body])

    def show(self, state: NDArray[np.float64]) -> None:
        """Put the bodies where a recorded state has them, to read poses from; restores no controller (see `set_state`)."""
        sim = self._env._env.sim
        sim.set_state_from_flattened(np.asarray(state, dtype=np.float64))
        sim.forward()

    def action_toward(self, target: Pose) -> NDArray[np.float64]:
        """The arm's action `(6,)` in [-1, 1] whose goal is `target`, or lies as far in its direction as the limits allow."""
        now, frame = self.pose, self._frame()
        turn = Rotation.from_matrix(target[:3, :3] @ now[:3, :3].T).as_rotvec()
        error = np.concatenate([frame.T @ (target[:3, 3] - now[:3, 3]), frame.T @ turn])
        action: NDArray[np.float64] = np.clip(error / self.scale, -1, 1)
        return action

    def goals(self, poses: NDArray[np.float64], actions: NDArray[np.float64]) -> NDArray[np.float64]:
        """The poses `(N, 4, 4)` that the actions `(N, 7)`, taken at hand poses `(N, 4, 4)`, are commands toward."""
        frame, goals = self._frame(), poses.copy()
        moves = np.clip(actions[:, :6], -1, 1) * self.scale
        goals[:, :3, 3] += moves[:, :3] @ frame.T
        goals[:, :3, :3] = Rotation.from_rotvec(moves[:, 3:] @ frame.T).as_matrix() @ poses[:, :3, :3]
        return goals

    def _frame(self) -> NDArray[Any]:
        """The axes of the actions, as columns."""
        if not self._in_base:
            return np.eye(3)
        return self.body(self._env._env.robots[0].robot_model.root_body)[:3, :3]


def _pose(position: NDArray[Any], rotation: NDArray[Any]) -> Pose:
    pose = np.eye(4)
    pose[:3, 3] = position
    pose[:3, :3] = np.reshape(rotation, (3, 3))
    return pose
