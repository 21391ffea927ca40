"""The scenes of LIBERO's suites "goal" and "spatial", and a task of "object", made of
boxes, in place of 360 MB of meshes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

_THING = """<mujoco model="thing">
  <worldbody><body>
    <body name="object">{parts}</body>
    <site name="bottom_site" pos="0 0 {bottom}" size="0.005" rgba="0 0 0 0"/>
    <site name="top_site" pos="0 0 0.03" size="0.005" rgba="0 0 0 0"/>
    <site name="horizontal_radius_site" pos="0.03 0.03 0" size="0.005" rgba="0 0 0 0"/>
  </body></worldbody>
</mujoco>"""
_DRAWER = """<body name="cabinet_{level}">
  <inertial pos="0 0 0" mass="3" diaginertia="1 1 1"/>
  <joint name="{level}_level" type="slide" axis="0 1 0" limited="true" range="-0.16 0.01"
    damping="50"/>
  <site name="{level}_region" type="box" pos="0 0 {height}" quat="1 0 0 0" size="0.08 0.06 0.03"
    rgba="0 0 0 0"/>
</body>"""
_ARENA = """<mujoco model="arena">
  <asset>
    <texture file="../textures/any.png" type="2d" name="texplane"/>
    <material name="floorplane" texture="texplane"/>
    <texture file="../textures/any.png" type="2d" name="tex-wall"/>
    <material name="walls_mat" texture="tex-wall"/>
  </asset>
  <worldbody>
    <geom name="floor" type="plane" size="3 3 .1" material="floorplane" group="1"/>
    {furniture}
    <light pos="1 1 4" dir="0 -.15 -1"/>
    <camera name="frontview" pos="1 0 1.45" quat="0.56 0.43 0.43 0.56"/>
    <camera name="agentview" pos="0.5 0 1.35" quat="0.653 0.271 0.271 0.653"/>
  </worldbody>
</mujoco>"""
_TABLE = """<body name="table" pos="0 0 0.4">
      <geom name="table_collision" size="0.4 0.4 0.4" type="box"/>
      <geom name="table_visual" size="0.4 0.4 0.4" type="box" contype="0" conaffinity="0"
        group="1" rgba="0.7 0.5 0.3 1"/>
      <site name="table_top" pos="0 0 0.4" size="0.001" rgba="0 0 0 0"/>
      {legs}
    </body>"""


def box(size: str, at: str = "0 0 0", rgba: str = "0.2 0.4 0.8 1", quat: str = "1 0 0 0") -> str:
    """A box that is seen and collides."""
    shape = f'type="box" size="{size}" pos="{at}" quat="{quat}" rgba="{rgba}" density="100"'
    return f'<geom {shape} group="0"/><geom {shape} group="1" contype="0" conaffinity="0"/>'


def bowl() -> str:
    """A ring where the black bowl's rim is, on a foot."""
    foot = box("0.03 0.03 0.018", at="0 0 -0.002")
    wall = [
        box(
            "0.003 0.02 0.018",
            at=f"{0.0475 * np.cos(angle)} {0.0475 * np.sin(angle)} 0.034",
            quat=f"{np.cos(angle / 2)} 0 0 {np.sin(angle / 2)}",
        )
        for angle in np.arange(8) * np.pi / 4
    ]
    return foot + "".join(wall)


def basket() -> str:
    """Four walls on a bottom."""
    walls = [
        box("0.005 0.075 0.07", at=f"{0.07 * x} {0.07 * y} 0.07", quat=f"1 0 0 {abs(y)}")
        for x, y in ((-1, 0), (1, 0), (0, -1), (0, 1))
    ]
    region = (
        '<site name="contain_region" type="box" pos="0 0 0.07" quat="0 0 0 1"'
        ' size="0.06 0.06 0.07" rgba="0 0 0 0"/>'
    )
    return box("0.07 0.07 0.01", at="0 0 -0.01") + "".join(walls) + region


def write_scene(folder: Path) -> None:
    """Write assets for all tasks of the suites "goal" and "spatial", and for the butter of
    "object", to `folder`.
    """
    files = {
        "stable_scanned_objects/akita_black_bowl/akita_black_bowl": bowl(),
        "stable_scanned_objects/basket/basket": basket(),
        "stable_scanned_objects/glazed_rim_porcelain_ramekin/glazed_rim_porcelain_ramekin": box(
            "0.03 0.03 0.02"
        ),
        "stable_hope_objects/cookies/cookies": box("0.04 0.03 0.02"),
        **{
            f"stable_hope_objects/{name}/{name}": box("0.02 0.02 0.02")
            for name in (
                "tomato_sauce",
                "orange_juice",
                "chocolate_pudding",
                "bbq_sauce",
                "ketchup",
            )
        },
        "stable_hope_objects/butter/butter": box("0.04 0.02 0.02"),
        "stable_scanned_objects/plate/plate": box("0.05 0.05 0.01", rgba="0.9 0.9 0.9 1"),
        "stable_hope_objects/cream_cheese/cream_cheese": box("0.02 0.02 0.02"),
        "turbosquid_objects/wine_bottle/wine_bottle": box("0.02 0.02 0.03"),
        "turbosquid_objects/wine_rack/wine_rack": box("0.08 0.03 0.03")
        + '<site name="top_region" type="box" pos="0 0 0.03" quat="1 0 0 0" size="0.08 0.03 0.002"'
        ' rgba="0 0 0 0"/>',
        "articulated_objects/flat_stove": '<body name="burner" pos="0.1 0 0">'
        + box("0.09 0.09 0.02", rgba="0.3 0.3 0.3 1")
        + '<site name="cook_region" type="box" pos="0 0 0" quat="1 0 0 0"'
        ' size="0.075 0.075 0.003" rgba="0 0 0 0"/>'
        '<site name="burner" type="cylinder" pos="0 0 0.03" size="0.06 0.001"'
        ' rgba="0.9 0.05 0.05 1"/></body>'
        '<body name="button"><inertial pos="0 0 0" mass="3" diaginertia="1 1 1"/>'
        '<joint name="button" type="hinge" axis="0 0 1" limited="true" range="-0.005 2.1"'
        ' damping="1"/></body>',
        "articulated_objects/wooden_cabinet": '<body name="base">'
        + box("0.1 0.08 0.01", at="0 0 0.2", rgba="0.4 0.2 0.1 1")
        + '<site name="top_side" type="box" pos="0 0 0.21" quat="1 0 0 0"'
        ' size="0.1 0.08 0.002" rgba="0 0 0 0"/>'
        + "".join(
            _DRAWER.format(level=level, height=height)
            for level, height in (("top", 0.16), ("middle", 0.1), ("bottom", 0.04))
        )
        + "</body>",
    }
    for name, parts in files.items():
        path = folder / "assets" / f"{name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_THING.format(parts=parts, bottom=-0.02), encoding="utf-8")
    legs = "".join(
        f'<geom name="table_leg{i}_visual" size="0.05 0.1" type="cylinder" contype="0"'
        ' conaffinity="0" group="1"/>'
        for i in (1, 2, 3, 4)
    )
    scenes = folder / "assets/scenes"
    scenes.mkdir()
    for name, furniture in (
        ("tabletop", _TABLE.format(legs=legs)),
        ("floor", '<body name="floor"/>'),
    ):
        (scenes / f"libero_{name}_base_style.xml").write_text(
            _ARENA.format(furniture=furniture), encoding="utf-8"
        )
    for name in ("light-gray-floor-tile", "light-gray-plaster"):
        path = folder / f"assets/textures/{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 200, np.uint8)).save(path)
