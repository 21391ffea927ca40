"""The subtasks of robosuite's tasks, and an end effector that is commanded by poses.

Generation of demonstrations (`fibopolicy.datasets.generate`) uses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from fibopolicy.envs.robosuite.environment import RobosuiteEnv
from fibopolicy.errors import UserError

#: A rigid pose: homogeneous `(4, 4)`, metres, in the world's frame.
Pose = NDArray[np.float64]

#: Inverse kinematics: steps for each goal, how far each goes (metres, radians),
#: damping, and the share of the way back to the arm's usual posture.
IK_STEPS, IK_REACH, IK_DAMPING, IK_POSTURE = 4, 0.1, 1e-3, 0.05

#: The symmetry of a round object: turns of one degree.
ROUND = 360


@dataclass(frozen=True)
class TaskObject:
    """A body that matters to a task.

    Args:
        body: its name in robosuite's model.
        symmetry: turns about its vertical axis that change nothing, e.g. 4 for a cube.
    """

    body: str
    symmetry: int = 1


@dataclass(frozen=True)
class Subtask:
    """A part of a task that happens relative to one object.

    Args:
        reference: the object; `None` is the world, for a place that never moves.
        carried: the object in the gripper, which the robot puts down; `None` where the
            reference is picked up.
    """

    reference: TaskObject | None
    carried: TaskObject | None = None


def _pick_and_place(picked: TaskObject, target: TaskObject | None) -> tuple[Subtask, Subtask]:
    return Subtask(picked), Subtask(target, carried=picked)


#: Tasks with known subtasks: an object is picked up and, except in Lift, put down.
SUBTASKS: Mapping[str, tuple[Subtask, ...]] = {
    "Lift": (Subtask(TaskObject("cube_main", 4)),),
    "Stack": _pick_and_place(TaskObject("cubeA_main", 4), TaskObject("cubeB_main", 4)),
    "PickPlaceCan": _pick_and_place(TaskObject("Can_main", ROUND), None),
    "NutAssemblySquare": _pick_and_place(TaskObject("SquareNut_main"), TaskObject("peg1", 4)),
}


class EndEffector:
    """The gripper of an environment with one arm, whose actions are OSC_POSE deltas.

    Raises:
        UserError: the environment has several arms or another controller.
    """

    def __init__(self, env: RobosuiteEnv) -> None:
        self._env = env
        robots = env._env.robots
        controllers = robots[0].composite_controller.part_controllers
        arms = [controllers[arm] for arm in robots[0].arms]
        arm = arms[0]
        delta = (
            getattr(arm, "input_type", None) == "delta"
            and getattr(arm, "impedance_mode", None) == "fixed"
        )
        one_arm = len(robots) == len(arms) == 1 and env.action_space.shape == (7,)
        if not one_arm or arm.name != "OSC_POSE" or not delta:
            raise UserError(
                f"{env.task_id}: demonstrations can be split into subtasks for one arm under delta"
                f" OSC_POSE with a gripper (7 actions); this file's has {len(arms)} arm(s) under"
                f" {arm.name} and {env.action_space.shape} actions"
            )
        self._in_base = arm.input_ref_frame == "base"
        self._joints: list[str] = list(robots[0].robot_joints)
        self._rest = np.array(robots[0].init_qpos, dtype=np.float64)
        #: What an action of 1 means: metres (3,), radians (3,).
        self.scale = np.asarray(arm.output_max, dtype=np.float64)

    @property
    def pose(self) -> Pose:
        """The pose of the point between the fingers, at this instant."""
        robot, data = self._env._env.robots[0], self._env._env.sim.data
        site = robot.eef_site_id[robot.arms[0]]
        return _pose(data.site_xpos[site], data.site_xmat[site])

    def body(self, name: str) -> Pose:
        """The pose of a body, at this instant."""
        sim = self._env._env.sim
        body = sim.model.body_name2id(name)
        return _pose(sim.data.body_xpos[body], sim.data.body_xmat[body])

    def show(self, state: NDArray[np.float64]) -> None:
        """Put the bodies where a recorded state has them, to read their poses.

        This restores no controller; `RobosuiteEnv.set_state` does.
        """
        sim = self._env._env.sim
        sim.set_state_from_flattened(np.asarray(state, dtype=np.float64))
        sim.forward()

    def action_toward(self, target: Pose) -> NDArray[np.float64]:
        """The arm's action `(6,)` in [-1, 1] toward `target`, as far as the limits allow."""
        now, frame = self.pose, self._frame()
        turn = Rotation.from_matrix(target[:3, :3] @ now[:3, :3].T).as_rotvec()
        error = np.concatenate([frame.T @ (target[:3, 3] - now[:3, 3]), frame.T @ turn])
        action: NDArray[np.float64] = np.clip(error / self.scale, -1, 1)
        return action

    def goals(
        self, poses: NDArray[np.float64], actions: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """The poses `(N, 4, 4)` that the actions `(N, 7)` command, taken at `poses`."""
        frame, goals = self._frame(), poses.copy()
        moves = np.clip(actions[:, :6], -1, 1) * self.scale
        goals[:, :3, 3] += moves[:, :3] @ frame.T
        goals[:, :3, :3] = (
            Rotation.from_rotvec(moves[:, 3:] @ frame.T).as_matrix() @ poses[:, :3, :3]
        )
        return goals

    @property
    def joints(self) -> NDArray[np.float64]:
        """The arm's joints `(7,)` at this instant, radians."""
        return np.array(self._env._env.sim.data.qpos[self._addresses()[1]])

    def follow(
        self, joints: NDArray[np.float64], goals: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], float]:
        """Follow `goals` `(N, 4, 4)` from `joints` `(7,)` by inverse kinematics.

        Joint limits are respected, collisions ignored. The simulation is unchanged.

        Returns:
            The joints at the end, and the largest distance from a goal: metres, a
            radian counted as 0.1.
        """
        env = self._env._env
        model, robot = env.sim.model._model, env.robots[0]
        ids, positions, velocities = self._addresses()
        low, high = model.jnt_range[ids].T
        data = mujoco.MjData(model)
        data.qpos[:] = env.sim.data.qpos
        site = robot.eef_site_id[robot.arms[0]]
        full, joints, worst = np.empty((6, model.nv)), joints.copy(), 0.0

        def error_to(goal: NDArray[np.float64]) -> NDArray[np.float64]:
            """The remaining error `(6,)`, metres and radians."""
            data.qpos[positions] = joints
            mujoco.mj_kinematics(model, data)
            turn = Rotation.from_matrix(
                goal[:3, :3] @ data.site_xmat[site].reshape(3, 3).T
            ).as_rotvec()
            return np.concatenate([goal[:3, 3] - data.site_xpos[site], turn])

        for goal in goals:
            error = error_to(goal)
            for _ in range(IK_STEPS):
                mujoco.mj_comPos(model, data)
                mujoco.mj_jacSite(model, data, full[:3], full[3:], site)
                jacobian = full[:, velocities]
                inverse = jacobian.T @ np.linalg.inv(jacobian @ jacobian.T + IK_DAMPING * np.eye(6))
                # The free directions bring the joints back to their usual posture, as
                # the controller does.
                free = np.eye(len(joints)) - inverse @ jacobian
                near = error / max(1.0, float(np.abs(error).max()) / IK_REACH)
                joints = np.clip(
                    joints + inverse @ near + IK_POSTURE * free @ (self._rest - joints), low, high
                )
                error = error_to(goal)
            worst = max(worst, float(np.linalg.norm(error[:3]) + 0.1 * np.linalg.norm(error[3:])))
        return joints, worst

    def _addresses(self) -> tuple[list[int], NDArray[np.intp], NDArray[np.intp]]:
        """The arm's joints in the model: ids, and indices of positions and velocities."""
        model = self._env._env.sim.model
        ids = [model.joint_name2id(joint) for joint in self._joints]
        return ids, np.array(model.jnt_qposadr[ids]), np.array(model.jnt_dofadr[ids])

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
