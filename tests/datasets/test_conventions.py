from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fibopolicy.datasets import DemoFile, DemoWriter, validate
from fibopolicy.datasets.conventions import is_absolute, rotation_columns
from fibopolicy.errors import UserError

FLAT = {"type": "OSC_POSE", "control_delta": False}
ARM = {"type": "OSC_POSE", "input_type": "absolute", "gripper": {"type": "GRIP"}}
COMPOSITE = {"type": "BASIC", "body_parts": {"right": ARM}}
NESTED = {"type": "BASIC", "body_parts": {"arms": COMPOSITE["body_parts"]}}


def env_args(controller: Any, robots: Any = ("Panda",)) -> dict[str, Any]:
    return {
        "env_name": "Lift",
        "type": 1,
        "env_kwargs": {"robots": robots, "controller_configs": controller},
    }


@pytest.mark.parametrize("controller", [FLAT, COMPOSITE, NESTED, [COMPOSITE]])
def test_the_controller_says_that_actions_are_absolute(controller: Any) -> None:
    task = env_args(controller)
    assert is_absolute(task)
    assert rotation_columns(task, 7) == (3,)
    assert rotation_columns(env_args(controller, "Panda"), 7) == (3,)


@pytest.mark.parametrize(
    "controller",
    [
        None,
        {"type": "OSC_POSE"},
        {"type": "OSC_POSE", "control_delta": True},
        {"type": "OSC_POSE", "input_type": "delta", "control_delta": False},
        {"type": "BASIC", "body_parts": {"right": {"type": "OSC_POSE", "input_type": "delta"}}},
    ],
)
def test_displacements_are_not_absolute_actions(controller: Any) -> None:
    assert not is_absolute(env_args(controller))
    assert rotation_columns(env_args(controller), 7) == ()
    assert not is_absolute({"env_name": "Lift-v0", "env_kwargs": {}})


def test_two_robots_have_two_rotations() -> None:
    assert rotation_columns(env_args([COMPOSITE, COMPOSITE], ["Panda", "Panda"]), 14) == (3, 10)


@pytest.mark.parametrize(
    ("controller", "dim"),
    [({"type": "OSC_POSITION", "control_delta": False}, 4), (FLAT, 8), (FLAT, 14)],
)
def test_other_layouts_of_absolute_actions_have_no_known_rotations(
    controller: Any, dim: int
) -> None:
    assert is_absolute(env_args(controller))
    assert rotation_columns(env_args(controller), dim) == ()


def test_absolute_actions_need_only_be_finite(tmp_path: Path) -> None:
    actions = np.full((4, 7), 2.5, np.float32)
    for name, controller, broken in (("absolute", FLAT, False), ("nan", FLAT, True)):
        actions[2, 1] = np.nan if broken else 2.5
        with DemoWriter(tmp_path / name, env_args(controller)) as writer:
            writer.add(
                {"eef_pos": np.zeros((4, 3), np.float32)},
                actions=actions,
                states=np.zeros((4, 2)),
                rewards=None,
                dones=None,
            )
    with DemoFile(tmp_path / "absolute") as file:
        validate(file, (), ("eef_pos",))
    with (
        DemoFile(tmp_path / "nan") as file,
        pytest.raises(UserError, match=r"nan at step 2, dimension 1; actions must be finite"),
    ):
        validate(file, (), ("eef_pos",))
