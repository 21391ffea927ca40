"""Which vectors of a file are the robot's own state, by the names that each suite gives them."""

from __future__ import annotations

from collections.abc import Iterable

_ARMS = ("", "right_", "left_")  # robosuite names an arm only where a robot has two
_ROBOTS = ("robot0_", "robot1_")

#: In the order in which a policy reads them. Object poses are left out: a policy that
#: reads them has no use for its cameras.
PROPRIOCEPTION: tuple[str, ...] = (
    # The built-in tasks and Meta-World.
    *("hand_position", "gripper_opening"),
    # Robosuite, robomimic, MimicGen and RoboCasa: every arm, then the base of a mobile
    # robot.
    *(
        f"{robot}{arm}{key}"
        for robot in _ROBOTS
        for arm in _ARMS
        for key in ("eef_pos", "eef_quat", "gripper_qpos")
    ),
    *(f"{robot}base_{key}" for robot in _ROBOTS for key in ("pos", "quat")),
    *(
        f"{robot}base_to_{arm}eef_{key}"
        for robot in _ROBOTS
        for arm in _ARMS
        for key in ("pos", "quat")
    ),
    # LIBERO.
    *("ee_pos", "ee_ori", "ee_states", "gripper_states", "joint_states"),
)


def proprioception(keys: Iterable[str]) -> tuple[str, ...]:
    """The robot's own state among vector observations, in the order of
    `PROPRIOCEPTION`; "state/ee_pos" counts as "ee_pos".
    """
    rank = {name: place for place, name in enumerate(PROPRIOCEPTION)}
    known = [key for key in keys if _name(key) in rank]
    return tuple(sorted(known, key=lambda key: (rank[_name(key)], key)))


def _name(key: str) -> str:
    return key.rpartition("/")[2]
