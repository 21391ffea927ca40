"""The table, the hand and the cameras that every built-in task shares, as MJCF."""

from __future__ import annotations

from fibopolicy.envs.rendering import Quality

#: Half the edge of the cubes, metres.
CUBE = 0.02
#: Each finger's travel from the middle, metres: the gripper opens to twice this.
MAX_OPENING = 0.04
#: Where the point between the fingertips may be sent, metres: (x, y, z) low and high.
WORKSPACE_LOW = (-0.2, -0.2, 0.014)
WORKSPACE_HIGH = (0.2, 0.2, 0.25)

_QUALITY = {
    "fast": '<quality shadowsize="0" offsamples="0"/>',
    "full": '<quality shadowsize="4096" offsamples="4"/>',
}


def cube(name: str, rgba: str, half_size: float = CUBE) -> str:
    """A free cube; 0.03 kg at the standard size."""
    return f"""
    <body name="{name}" pos="0 0 {half_size}">
      <freejoint name="{name}"/>
      <geom name="{name}" type="box" size="{half_size} {half_size} {half_size}" rgba="{rgba}" density="500"
            condim="4" friction="1 0.01 0.0001"/>
    </body>"""  # noqa: E501


def goal(name: str, geom: str) -> str:
    """A marker that nothing touches; `geom` gives its type, size and colour."""
    return f"""
    <body name="{name}" mocap="true">
      <geom {geom} contype="0" conaffinity="0"/>
    </body>"""


def scene(objects: str, quality: Quality) -> str:
    """The whole model: a 4-degree-of-freedom hand (x, y, z, grip) above a table, with
    `objects` on it.
    """
    (x0, y0, _), (x1, y1, z1) = WORKSPACE_LOW, WORKSPACE_HIGH
    return f"""
<mujoco model="fibopolicy-tabletop">
  <option timestep="0.005" integrator="implicitfast" iterations="20" cone="elliptic" impratio="5"/>
  <visual>
    {_QUALITY[quality]}
    <headlight ambient="0.45 0.45 0.45" diffuse="0.45 0.45 0.45" specular="0 0 0"/>
    <map znear="0.005" zfar="5"/>
  </visual>
  <asset>
    <material name="table" rgba="0.7 0.66 0.6 1"/>
  </asset>
  <default>
    <default class="finger">
      <geom type="box" size="0.009 0.006 0.026" rgba="0.15 0.15 0.18 1" mass="0.02" condim="4" friction="1.5 0.01 0.0001"/>
      <joint type="slide" range="0 {MAX_OPENING}" damping="0.5"/>
    </default>
  </default>
  <worldbody>
    <light pos="0.3 -0.3 1" dir="-0.3 0.3 -1" diffuse="0.35 0.35 0.35" specular="0 0 0"/>
    <geom name="table" type="box" size="0.32 0.32 0.02" pos="0 0 -0.02" material="table" condim="4" friction="1 0.01 0.0001"/>
    <camera name="workspace" pos="0.27 0 0.36" xyaxes="0 1 0 -0.81 0 0.59" fovy="52"/>
    <body name="hand" gravcomp="1">
      <joint name="hand_x" type="slide" axis="1 0 0" range="{x0 - 0.02} {x1 + 0.02}"/>
      <joint name="hand_y" type="slide" axis="0 1 0" range="{y0 - 0.02} {y1 + 0.02}"/>
      <joint name="hand_z" type="slide" axis="0 0 1" range="0 {z1 + 0.02}"/>
      <geom name="palm" type="box" size="0.014 0.05 0.008" pos="0 0 0.048" rgba="0.85 0.85 0.88 1" mass="0.3"/>
      <geom name="wrist" type="cylinder" size="0.018 0.02" pos="0 0 0.076" rgba="0.85 0.85 0.88 1" mass="0.1"
            contype="0" conaffinity="0"/>
      <camera name="wrist" pos="0 0 0.036" xyaxes="0 1 0 -1 0 0" fovy="95"/>
      <site name="grip" size="0.004" rgba="0 0 0 0"/>
      <body name="left_finger" pos="0 0.006 0.014" gravcomp="1">
        <joint name="left_finger" class="finger" axis="0 1 0"/>
        <geom name="left_finger" class="finger"/>
      </body>
      <body name="right_finger" pos="0 -0.006 0.014" gravcomp="1">
        <joint name="right_finger" class="finger" axis="0 -1 0"/>
        <geom name="right_finger" class="finger"/>
      </body>
    </body>
    {objects}
  </worldbody>
  <contact>
    <exclude body1="left_finger" body2="right_finger"/>
    <exclude body1="hand" body2="left_finger"/>
    <exclude body1="hand" body2="right_finger"/>
  </contact>
  <actuator>
    <position name="hand_x" joint="hand_x" kp="2000" dampratio="1"/>
    <position name="hand_y" joint="hand_y" kp="2000" dampratio="1"/>
    <position name="hand_z" joint="hand_z" kp="2000" dampratio="1"/>
    <position name="left_finger" joint="left_finger" kp="200" kv="12"/>
    <position name="right_finger" joint="right_finger" kp="200" kv="12"/>
  </actuator>
</mujoco>"""  # noqa: E501
