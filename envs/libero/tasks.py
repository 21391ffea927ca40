"""LIBERO's tasks by name (Liu et al., 2023), and the conventions of its evaluations."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fibopolicy.utils.files import cache_home

#: The 130 tasks, in LIBERO's order, known whether or not it is installed.
LIBERO: tuple[str, ...] = tuple(
    f"libero/{line}"
    for line in Path(__file__).with_name("tasks.txt").read_text(encoding="utf-8").split()
)
#: Suite -> control steps until an episode is truncated, as published evaluations count
#: them: without the idle steps.
HORIZONS: Mapping[str, int] = {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400}
#: How models name the files in the folder `assets`, wherever it lies.
ASSETS = "libero/assets/"
#: Control steps of an open gripper that stands still, before a policy acts. Objects
#: that were placed a little above the ground come to rest meanwhile.
IDLE_STEPS = 10


def assets_home() -> Path:
    """The folder that `fibopolicy download libero-assets` fills: `assets` with the
    meshes, and `init_states` with one file per task.
    """
    return cache_home() / "libero"


def suite_of(task_id: str) -> str:
    return task_id.split("/")[1]


def instruction_of(task_id: str) -> str:
    """The instruction given to the robot, in the words of LIBERO's benchmark."""
    name = task_id.rpartition("/")[2]
    return re.sub(r"^[A-Z_]+_SCENE\d+_", "", name).replace("_", " ")


def task_of_file(env_args: Mapping[str, Any]) -> str | None:
    """The task of one of LIBERO's own files, which name a BDDL file; else `None`."""
    path = str((env_args.get("env_kwargs") or {}).get("bddl_file_name", ""))
    found = re.search(r"libero_(\w+)/([^/]+)\.bddl$", path)
    task_id = f"libero/{found[1]}/{found[2]}" if found else ""
    return task_id if task_id in LIBERO else None
