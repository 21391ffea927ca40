"""The model that belongs to a state of robosuite.

A state holds joints only. An object without joints, such as a door, is where the model
puts it. Each episode places it differently, so each episode has its own model text.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

#: Position `(3,)` and quaternion `(4,)` of a body in its parent.
Place = tuple[list[float], list[float]]


class ModelText:
    """The MJCF text of the loaded model, with the present places of its fixed objects.

    Args:
        env: the robosuite environment; its simulation may be replaced.
        loaded: the MJCF text that its simulation was made from.
    """

    def __init__(self, env: Any, loaded: str) -> None:
        self._env = env
        self.loaded = loaded
        self._cached: tuple[tuple[Any, ...], str] = ((), loaded)

    def current(self) -> str:
        """The text of this instant."""
        fixed = self._fixed_bodies()
        if not fixed:
            return self.loaded
        model = self._env.sim.model
        places = tuple((*model.body_pos[i], *model.body_quat[i]) for i in fixed.values())
        if self._cached[0] != places:
            root = ET.fromstring(self.loaded)
            for name, i in fixed.items():
                body = root.find(f"worldbody//body[@name='{name}']")
                assert body is not None
                for key, values in (("pos", model.body_pos), ("quat", model.body_quat)):
                    body.set(key, " ".join(map(repr, values[i].tolist())))
            self._cached = (places, ET.tostring(root, encoding="unicode"))
        return self._cached[1]

    def move_fixed_bodies(self, text: str) -> bool:
        """Put the fixed objects where an MJCF text has them.

        Returns:
            Whether that is all that the text changes; if not, nothing was moved and the
            text has to be loaded.
        """
        fixed = self._fixed_bodies()
        if not fixed:
            return False
        ours, _ = _without_places(self.current(), list(fixed))
        theirs, places = _without_places(text, list(fixed))
        if ours != theirs:
            return False
        model = self._env.sim.model
        for name, (position, quaternion) in places.items():
            model.body_pos[fixed[name]] = position
            model.body_quat[fixed[name]] = quaternion
        return True

    def _fixed_bodies(self) -> dict[str, int]:
        """The task's objects without joints: name -> index."""
        model = self._env.sim.model
        roots = [thing.root_body for thing in self._env.model.mujoco_objects]
        indices = {name: model.body_name2id(name) for name in roots}
        return {name: i for name, i in indices.items() if model.body_jntnum[i] == 0}


def _without_places(text: str, bodies: list[str]) -> tuple[str, dict[str, Place]]:
    """An MJCF text without the places of some bodies, and these. Broken text gives nothing."""
    try:
        root = ET.fromstring(text)
    except ET.ParseError:
        return "", {}
    places = {}
    for name in bodies:
        body = root.find(f"worldbody//body[@name='{name}']")
        if body is None or not {"pos", "quat"} <= body.attrib.keys():
            return "", {}
        position, quaternion = (
            [float(number) for number in body.attrib.pop(key).split()] for key in ("pos", "quat")
        )
        places[name] = (position, quaternion)
    return ET.tostring(root, encoding="unicode"), places
