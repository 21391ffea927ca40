"""Tasks by their versioned ids."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, cast

import gymnasium
import numpy as np

from fibopolicy.envs.base import Observation, TaskEnv
from fibopolicy.envs.metaworld.tasks import METAWORLD
from fibopolicy.envs.other_suites import ROBOSUITE_NAMES, of_other_suite, other_suite
from fibopolicy.envs.robosuite.tasks import TASKS
from fibopolicy.envs.versions import warn_of_versions
from fibopolicy.errors import UserError, unknown
from fibopolicy.utils.imports import import_object, is_import_path

#: Built-in tasks: id -> "module:class". They are also registered with gymnasium under
#: the same ids.
BUILT_IN: Mapping[str, str] = {
    "fibopolicy/Lift-v0": "fibopolicy.envs.tabletop.lift:Lift",
    "fibopolicy/Push-v0": "fibopolicy.envs.tabletop.push:Push",
    "fibopolicy/Reach-v0": "fibopolicy.envs.tabletop.reach:Reach",
    "fibopolicy/Stack-v0": "fibopolicy.envs.tabletop.stack:Stack",
}
ROBOSUITE = tuple(f"robosuite/{name}" for name in TASKS)
#: Other suites: what stands before the slash -> "module:class", which takes a task id.
SUITES: Mapping[str, str] = {
    "metaworld": "fibopolicy.envs.metaworld.environment:MetaWorldEnv",
    "robosuite": "fibopolicy.envs.robosuite.environment:RobosuiteEnv",
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

    "Lift-v0" and "lift" are short for "fibopolicy/Lift-v0", "reach-v3" and
    "button-press" for Meta-World's tasks; a name that several have is the built-in
    task's. "module:class" names a `TaskEnv` of the user's own, which `make` imports.

    Raises:
        UserError: no such task, with the nearest match suggested.
    """
    if is_import_path(name) or name in task_ids():
        return name
    for task_id in task_ids():
        short = task_id.partition("/")[2]
        names = (task_id, short, *(re.sub(r"-v\d+$", "", n) for n in (task_id, short)))
        if name.lower() in (n.lower() for n in names):
            return task_id
    if (suite := other_suite(name)) is not None:
        raise UserError(of_other_suite(name, suite))
    known = (*task_ids(), *(i.partition("/")[2] for i in (*BUILT_IN, *METAWORLD)))
    listed = ", ".join(i.removeprefix("fibopolicy/") for i in (*BUILT_IN, *ROBOSUITE))
    listed += f", Meta-World's {len(METAWORLD)} as {METAWORLD[0]}, your own as <module>:<class>"
    raise unknown("task", name, known, listed)


def make(task: str, **options: Any) -> TaskEnv:
    """Make a task's environment; `options` are its constructor's (cameras, image_size,
    quality, ...).

    Raises:
        UserError: no such task; one of the user's own is no `TaskEnv` or cannot be
            imported; an unknown option.
    """
    task_id = resolve(task)
    if is_import_path(task_id):
        takes = "; a task of your own takes cameras, image_size, quality and horizon"
        return _named(_construct(_own(task_id), task_id, options, takes), task_id)
    entry_point = BUILT_IN.get(task_id) or SUITES[task_id.partition("/")[0]]
    module, _, name = entry_point.partition(":")
    if task_id not in BUILT_IN:
        options = {"task_id": task_id, **options}
    return _construct(getattr(importlib.import_module(module), name), task_id, options)


def is_heavy(task_id: str) -> bool:
    """Whether one simulator of a task may fill a core: robosuite's do, and one of the
    user's own may.
    """
    return task_id.startswith("robosuite/") or is_import_path(task_id)


def _construct(
    found: Callable[..., Any], task_id: str, options: Mapping[str, Any], takes: str = ""
) -> TaskEnv:
    try:
        return cast(TaskEnv, found(**options))
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"{task_id}: {str(error).partition('() ')[2] or error}{takes}") from error


def _own(name: str) -> type[TaskEnv]:
    """The class of "module:class"."""
    found = import_object("task", name)
    if not (isinstance(found, type) and issubclass(found, TaskEnv)):
        raise UserError(f"task {name}: expected a class derived from fibopolicy.envs.TaskEnv")
    if missing := sorted(found.__abstractmethods__):
        raise UserError(
            f"task {name}: its class lacks {', '.join(missing)}; see fibopolicy.envs.TaskEnv"
        )
    return found


def _named(env: TaskEnv, task_id: str) -> TaskEnv:
    """`env`, answering to the name that makes it again, which data and start states carry."""
    try:
        env.task_id = task_id
    except AttributeError as error:
        raise UserError(
            f"task {task_id}: its task_id must be an attribute that can be set, not a property"
        ) from error
    if missing := [name for name in TaskEnv.__annotations__ if not hasattr(env, name)]:
        raise UserError(
            f"task {task_id}: its class lacks {', '.join(missing)}; see fibopolicy.envs.TaskEnv"
        )
    told = env.env_args
    if not isinstance(told, dict) or not {"env_name", "type", "env_kwargs"} <= told.keys():
        raise UserError(
            f"task {task_id}: its env_args must be a dict with env_name, type and env_kwargs, got {told!r}"[  # noqa: E501
                :300
            ]
        )
    if told["env_name"] != task_id or told["type"] == 1:
        raise UserError(
            f"task {task_id}: its env_args name {told['env_name']!r} of type {told['type']!r},"
            " which is another task; override them with self.task_id and type 2"
        )
    try:
        json.dumps(told)
    except TypeError as error:
        raise UserError(
            f"task {task_id}: its env_args cannot be stored as JSON: {error}"
        ) from error
    return env


def check_observation(env: TaskEnv, obs: Observation) -> None:
    """Raise `UserError` where an observation is not what `TaskEnv` promises, before
    hours of it are recorded.
    """
    for key, value in obs.items():
        array = np.asarray(value)
        expected = "uint8 (H, W, 3)" if key.endswith("_image") else "float (D,)"
        image = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
        vector = (
            np.issubdtype(array.dtype, np.floating)
            and array.ndim == 1
            and isinstance(value, np.ndarray)
        )
        if not (image if key.endswith("_image") else vector):
            raise UserError(
                f"{env.task_id}: observation {key} is {array.dtype} {array.shape}, expected"
                f" {expected}"
            )
    if lacking := [key for key in (*env.proprioception, *env.hands) if key not in obs]:
        raise UserError(
            f"{env.task_id}: its observations lack {', '.join(lacking)}, which it calls"
            " proprioception or hands"
        )


def unavailable(env_args: Mapping[str, Any]) -> str | None:
    """Why no environment can be made of a dataset's `env_args`, in one line; `None`
    where it can be tried.

    No simulator is imported: whether robosuite is installed and has the task is found
    out by `from_env_args`.
    """
    kind, name = env_args.get("type"), env_args.get("env_name")
    if name is None:
        return (
            "the data name no task, so that nothing can be simulated: write the attribute env_args"
            ' into the file\'s group data, for robosuite\'s Lift the JSON {"env_name": "Lift",'
            ' "type": 1, "env_kwargs": {"robots": ["Panda"]}}'
        )
    if is_import_path(str(name)) or name in BUILT_IN or str(name).startswith("metaworld/"):
        return None
    if (suite := other_suite(str(name), env_args.get("env_kwargs"))) is not None:
        return of_other_suite(str(name), suite)
    if kind == 1:
        return None
    return (
        f"env_args name task {name!r} of type {kind!r}, which is neither built in nor Meta-World's"
        " nor robosuite's (type 1) nor <module>:<class> of a task of your own"
    )


def is_known(env_args: Mapping[str, Any]) -> bool:
    """Whether `env_args` name a task that this library has, so that a command that
    simulates it may be recommended.
    """
    robosuite = env_args.get("type") == 1 and not is_import_path(
        name := str(env_args.get("env_name"))
    )
    return unavailable(env_args) is None and (not robosuite or name in ROBOSUITE_NAMES)


def from_env_args(env_args: Mapping[str, Any], **overrides: Any) -> TaskEnv:
    """The environment that a dataset's `env_args` describe.

    `overrides` replace single options, e.g. `cameras` or `image_size`. Robosuite's
    datasets have type 1 and its own `env_name` and `env_kwargs`; ours carry a task id.
    A file without images names no camera, and gets the task's own.

    Raises:
        UserError: no task is named, or it is one that this library cannot make, see
            `unavailable`.
    """
    if (reason := unavailable(env_args)) is not None:
        raise UserError(reason)
    kind, name = env_args.get("type"), str(env_args.get("env_name"))
    kwargs = dict(env_args.get("env_kwargs") or {})
    if kind == 1 and not is_import_path(name):
        from fibopolicy.envs.robosuite.environment import RobosuiteEnv

        return RobosuiteEnv.from_env_args(env_args, **overrides)
    if name.startswith("metaworld/"):
        warn_of_versions(env_args)
    if not kwargs.get("cameras"):
        kwargs.pop("cameras", None)
    return make(name, **{**kwargs, **overrides})
