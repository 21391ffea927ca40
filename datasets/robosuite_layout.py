"""The layout that robosuite's own recording script writes, turned into robomimic's.

data/              attrs: env, env_info (JSON: robots, controller_configs),
repository_version, date, time
  demo_<k>/        attrs: model_file (MJCF, or until robosuite 1.0 the name of a file in
  models/)
    states (N, S)  actions (N, A)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from fibopolicy.datasets.links import read
from fibopolicy.datasets.writer import DemoWriter
from fibopolicy.errors import UserError

#: Of robosuite's recording script.
CONTROL_HZ = 20
#: Of an OSC_POSE command of one arm, which all of robosuite 1.0's recordings hold.
_ROTATION = slice(3, 6)


def recorded_task(info: Mapping[str, Any], version: Any) -> dict[str, Any]:
    """Robomimic's `env_args` of a recording.

    Args:
        info: the recording's `env_info`: `env_name`, `robots` (one name or several),
            and settings of `robosuite.make`.
        version: its `repository_version`, `None` where it names none.

    Raises:
        KeyError: `info` lacks `env_name` or `robots`.
    """
    kwargs, robots = dict(info), info["robots"]
    kwargs |= {
        "robots": [robots] if isinstance(robots, str) else robots,
        "control_freq": CONTROL_HZ,
    }
    return {
        "env_name": kwargs.pop("env_name"),
        "env_version": version,
        "type": 1,
        "env_kwargs": kwargs,
    }


def convert(src: Path, out: Path, attrs: Mapping[str, Any], models: Mapping[str, str]) -> None:
    """Write `out` in robomimic's layout; names of demos, states and models stay.

    Devices were recorded with commands beyond [-1, 1], which robosuite's controllers
    clip before anything moves: so they are clipped here, and mean the same. Robosuite
    1.0 turned arms the other way round than its successors (its `set_goal_orientation`
    applies the transposed rotation): rotations of its files are negated. There are no
    rewards, dones and observations; `render` makes them.

    Args:
        src: a file of robosuite's script.
        attrs: where it comes from, stored with the data.
        models: MJCF by the names that demos may give for it.

    Raises:
        UserError: `src` is no such file.
    """
    with h5py.File(src, "r") as file:
        data = file.get("data")
        if not isinstance(data, h5py.Group) or "env_info" not in data.attrs:
            raise UserError(
                f"{src}: no attribute env_info in data: not a recording of robosuite's script"
            )
        version = data.attrs.get("repository_version")
        env_args = recorded_task(json.loads(data.attrs["env_info"]), version)
        told = {name: data.attrs[name] for name in ("date", "time") if name in data.attrs}
        with DemoWriter(out, env_args, attrs={**told, **attrs}) as writer:
            for demo in sorted(data, key=lambda name: int(name.removeprefix("demo_"))):
                group = data[demo]
                model = str(group.attrs["model_file"])
                actions = np.clip(read(group, "actions"), -1, 1)
                if str(version).startswith("1.0."):
                    actions[:, _ROTATION] *= -1
                writer.add(
                    {},
                    actions,
                    read(group, "states"),
                    None,
                    None,
                    model_file=models.get(model, model),
                    attrs={"origin": "human"},
                    name=demo,
                )
