from __future__ import annotations

import re

import pytest

from fibopolicy.envs.robosuite.legacy import convert_model, portable
from fibopolicy.errors import UserError

pytest.importorskip("robosuite", reason="robosuite is not installed")

OWN = """<mujoco><worldbody>
<body name="robot0_base"><joint name="robot0_joint1"/><joint name="gripper0_right_finger_joint1"/></body>
<body name="cube_main"><geom type="box" size="1 1 1" name="cube_g0"/><geom type="box" size="1 1 1" name="cube_vis"/>
  <joint type="free" name="cube_joint0"/></body>
</worldbody></mujoco>"""  # noqa: E501
OF_1_0 = """<mujoco><worldbody>
<body name="robot0_base"><joint name="robot0_joint1"/><joint name="gripper0_finger_joint1"/></body>
<body name="cube" pos="1 2 3" quat="0 1 0 0"><geom type="box" size=".02 .03 .04" name="cube"/>
  <joint name="cube_jnt0" type="free"/></body>
</worldbody></mujoco>"""


def test_an_object_of_robosuite_1_0_passes_its_pose_and_size_to_the_installed_one() -> None:
    converted = convert_model(OF_1_0, OWN, ["cube_main"])
    assert re.findall(r'size="([^"]*)"', converted) == [".02 .03 .04"] * 2
    assert 'name="cube_main" pos="1 2 3" quat="0 1 0 0"' in converted
    assert "gripper0_right_finger_joint1" in converted
    assert "cube_g0" in converted


def test_a_missing_object_is_named() -> None:
    with pytest.raises(UserError, match="has no body 'cube_main'"):
        convert_model(OF_1_0.replace('name="cube"', 'name="ball"'), OWN, ["cube_main"])


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (
            "/home/me/robosuite/models/assets/textures/wood-tiles.png",
            "robosuite/models/assets/textures/wood-tiles.png",
        ),
        (
            "/home/me/robosuite/old/robosuite/models/assets/textures/clay.png",
            "robosuite/models/assets/textures/clay.png",
        ),
        (
            "C:\\me\\robosuite\\models\\assets\\textures\\clay.png",
            "robosuite/models/assets/textures/clay.png",
        ),
        (
            "/somewhere/else/textures/wood-tiles.png",
            "robosuite/models/assets/textures/wood-tiles.png",
        ),
        (
            "/home/me/robosuite/assets/moved/objects/meshes/can.msh",
            "robosuite/models/assets/objects/meshes/can.msh",
        ),
        ("/home/me/robosuite/models/assets/never.stl", "robosuite/models/assets/never.stl"),
        ("/home/me/never.stl", "/home/me/never.stl"),
    ],
)
def test_assets_are_replaced_by_the_installed_ones(found: str, expected: str) -> None:
    assert portable(f'<mesh file="{found}"/>') == f'<mesh file="{expected}"/>'
