"""Tasks by their versioned ids."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any, cast

import gymnasium

from fibopolicy.envs.base import TaskEnv
from fibopolicy.envs.metaworld_tasks import METAWORLD
from fibopolicy.envs.robosuite_tasks import TASKS
from fibopolicy.envs.versions import warn_of_versions
from fibopolicy.errors import UserError, unknown

#: Built-in tasks: id -> "module:class". They are also registered with gymnasium under the same ids.
BUILT_IN: Mapping[str, str] = {
    "fibopolicy/Lift-v0": "fibopolicy.envs.tabletop.lift:Lift",
    "fibopolicy/Push-v0": "fibopolicy.envs.tabletop.push:Push",
    "fibopolicy/Reach-v0": "fibopolicy.envs.tabletop.reach:Reach",
    "fibopolicy/Stack-v0": "fibopolicy.envs.tabletop.stack:Stack",
}
ROBOSUITE = tuple(f"robosuite/{name}" for name in TASKS)
#: Other suites: what stands before the slash -> "module:class", which takes a task id.
SUITES: Mapping[str, str] = {
    "metaworld": "fibopolicy.envs.metaworld:MetaWorldEnv",
    "robosuite": "fibopolicy.envs.robosuite:RobosuiteEnv",
}


def register() -> None:
    """Make the built-in tasks known to `gymnasium.make`."""
    for task_id, entry_point in BUILT_IN.items():
        if task_id not in gymnasium.registry:
            gymnasium.register(task_id, entry_point=entry_point)


def task_ids() -> tuple[str, ...]:
    return (*BUILT_IN, *ROBOSUITE, *METAWORLD)


def resolve(name: str) -> str:
    """The full id for a task's name.

    "Lift-v0" and "lift" are short for "fibopolicy/Lift-v0", "reach-v3" and "button-press" for Meta-World's tasks; a name
    that several have is the built-in task's.

    Raises:
        UserError: no such task, with the nearest match suggested.
    """
    if name in task_ids():
        return name
    for task_id in task_ids():
        short = task_id.partition("/")[2]
        names = (task_id, short, *(re.sub(r"-v\d+$", "", n) for n in (task_id, short)))
        if name.lower() in (n.lower() for n in names):
            return task_id
    raise unknown("task", name, (*task_ids(), *(i.partition("/")[2] for i in (*BUILT_IN, *METAWORLD))))


def make(task: str, **options: Any) -> TaskEnv:
    """Make a task's environment; `options` are its constructor's (cameras, image_size, quality, ...)."""
    task_id = resolve(task)
    entry_point = BUILT_IN.get(task_id) or SUITES[task_id.partition("/")[0]]
    module, _, name = entry_point.partition(":")
    if task_id not in BUILT_IN:
        options = {"task_id": task_id, **options}
    try:
        return cast(TaskEnv, getattr(importlib.import_module(module), name)(**options))
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"{task_id}: {str(error).partition('() ')[2] or error}") from error


def from_env_args(env_args: Mapping[str, Any], **overrides: Any) -> TaskEnv:
    """The environment that a dataset's `env_args` describe.

    `overrides` replace single options, e.g. `cameras` or `image_size`. Robosuite's datasets have type 1 and its own
    `env_name` and `env_kwargs`; ours carry a task id. A file without images names no camera, and gets the task's own.
    """
    kind, name = env_args.get("type"), str(env_args.get("env_name"))
    kwargs = dict(env_args.get("env_kwargs") or {})
    if kind == 1:
        from fibopolicy.envs.robosuite import RobosuiteEnv

        return RobosuiteEnv.from_env_args(env_args, **overrides)
    if name.startswith("metaworld/"):
        warn_of_versions(env_args)
    elif name not in BUILT_IN:
        raise UserError(
            f"env_args name task {name!r} of type {kind!r}, which is neither built in nor Meta-World's nor robosuite's (type 1)"
        )
    if not kwargs.get("cameras"):
        kwargs.pop("cameras", None)
    return make(name, **{**kwargs, **overrides})
