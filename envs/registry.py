"""Tasks by their versioned ids, and by the `env_args` that datasets store."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium
import numpy as np

from fibopolicy.envs.base import Observation, TaskEnv
from fibopolicy.envs.libero.tasks import LIBERO, task_of_file
from fibopolicy.envs.metaworld.tasks import METAWORLD
from fibopolicy.envs.robosuite.tasks import ROBOSUITE_NAMES, TASKS, not_restorable
from fibopolicy.errors import UserError, unknown
from fibopolicy.utils.imports import import_object, is_import_path
from fibopolicy.utils.registry import Registry
from fibopolicy.utils.system import versions

#: Built-in tasks: id -> "module:class". Gymnasium knows them under the same ids.
BUILT_IN: dict[str, str] = {
    "fibopolicy/Lift-v0": "fibopolicy.envs.tabletop.lift:Lift",
    "fibopolicy/Push-v0": "fibopolicy.envs.tabletop.push:Push",
    "fibopolicy/Reach-v0": "fibopolicy.envs.tabletop.reach:Reach",
    "fibopolicy/Stack-v0": "fibopolicy.envs.tabletop.stack:Stack",
}
ROBOSUITE = tuple(f"robosuite/{name}" for name in TASKS)
#: Supported suites: prefix of the task id -> "module:class", which takes a task id.
SUITES: dict[str, str] = {
    "libero": "fibopolicy.envs.libero.environment:LiberoEnv",
    "metaworld": "fibopolicy.envs.metaworld.environment:MetaWorldEnv",
    "robosuite": "fibopolicy.envs.robosuite.environment:RobosuiteEnv",
}
_CLASSES = Registry[Callable[..., TaskEnv]]("task", {**BUILT_IN, **SUITES})
_CONTRACT = "fibopolicy.envs.TaskEnv"
#: Suites that fibopolicy does not simulate -> pattern of `env_name` in their files.
OTHER_SUITES: Mapping[str, re.Pattern[str]] = {
    "MimicGen": re.compile(r"\w+_[DO]\d"),
    "DexMimicGen": re.compile(
        r"TwoArm(Threading|ThreePieceAssembly|LiftTray|BoxCleanup|DrawerCleanup|Pouring|Coffee"
        r"|CanSort\w*)"
    ),
    "RoboCasa": re.compile(
        r"PnP\w+To\w+|(Open|Close)(Single|Double)?(Door|Drawer)|TurnSinkSpout|NavigateKitchen"
        r"|Turn(On|Off)(Microwave|Stove|SinkFaucet)|Coffee(SetupMug|ServeMug|PressButton)"
    ),
    "Isaac Lab": re.compile(r"Isaac-.+"),
}
#: Suite -> entries of `env_kwargs` that only its files have.
_OTHER_SUITES_KWARGS: Mapping[str, frozenset[str]] = {
    "RoboCasa": frozenset({"layout_ids", "style_ids", "layout_and_style_ids", "obj_registries"}),
}


def register() -> None:
    """Make the built-in tasks known to `gymnasium.make`."""
    for task_id, entry_point in BUILT_IN.items():
        if task_id not in gymnasium.registry:
            gymnasium.register(task_id, entry_point=entry_point)


def task_ids() -> tuple[str, ...]:
    return (*BUILT_IN, *ROBOSUITE, *METAWORLD, *LIBERO)


def resolve(name: str) -> str:
    """The full id for a task's name.

    "Lift-v0" and "lift" are short for "fibopolicy/Lift-v0", "reach-v3" and
    "button-press" for Meta-World's tasks. A name that several tasks share means the
    built-in one. "module:class" names a custom `TaskEnv`, which `make` imports.

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
        raise UserError(_not_run(name, suite))
    known = (*task_ids(), *(i.partition("/")[2] for i in (*BUILT_IN, *METAWORLD, *LIBERO)))
    listed = ", ".join(i.removeprefix("fibopolicy/") for i in (*BUILT_IN, *ROBOSUITE))
    listed += (
        f", Meta-World's {len(METAWORLD)} such as {METAWORLD[0]}, LIBERO's {len(LIBERO)} such as"
        f" {LIBERO[10]}, or a custom <module>:<class>"
    )
    raise unknown("task", name, known, listed)


def other_suite(name: str, kwargs: Mapping[str, Any] | None = None) -> str | None:
    """The suite that a task belongs to, among those that fibopolicy does not simulate;
    else `None`.

    Args:
        name: the task's name, with or without "robosuite/".
        kwargs: the `env_kwargs` of a dataset.
    """
    if name in ROBOSUITE_NAMES:
        return None
    for suite, keys in _OTHER_SUITES_KWARGS.items():
        if keys & (kwargs or {}).keys():
            return suite
    short = name.removeprefix("robosuite/")
    return next((suite for suite, names in OTHER_SUITES.items() if names.fullmatch(short)), None)


def _not_run(name: str, suite: str) -> str:
    return (
        f"task {name!r} is {suite}'s, which fibopolicy does not simulate: training on its data"
        f" works; to roll a policy out, call its `act` in {suite}'s simulator, or set"
        " env_name in env_args to the <module>:<class> of a custom TaskEnv"
    )


# Environments by task id


def make(task: str, **options: Any) -> TaskEnv:
    """Make a task's environment.

    Args:
        options: options of its constructor: cameras, image_size, quality, ...

    Raises:
        UserError: an unknown task or option; a custom task that is not a `TaskEnv` or
            cannot be imported.
    """
    task_id = resolve(task)
    if is_import_path(task_id):
        takes = "; a custom task takes cameras, image_size, quality and horizon"
        env = _construct(_import_custom(task_id), task_id, options, takes)
        return _checked_custom(env, task_id)
    if task_id in BUILT_IN:
        return _construct(_CLASSES[task_id], task_id, options)
    suite = task_id.partition("/")[0]
    return _construct(_CLASSES[suite], task_id, {"task_id": task_id, **options})


def is_heavy(task_id: str) -> bool:
    """Whether one simulator may fill a core: robosuite's and LIBERO's do, and a custom
    one may.
    """
    return task_id.startswith(("robosuite/", "libero/")) or is_import_path(task_id)


def _construct(
    make_env: Callable[..., TaskEnv], task_id: str, options: Mapping[str, Any], takes: str = ""
) -> TaskEnv:
    try:
        return make_env(**options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"{task_id}: {str(error).partition('() ')[2] or error}{takes}") from error


def _import_custom(name: str) -> type[TaskEnv]:
    """The class of "module:class"."""
    found = import_object("task", name)
    if not (isinstance(found, type) and issubclass(found, TaskEnv)):
        raise UserError(f"task {name}: expected a class derived from fibopolicy.envs.TaskEnv")
    if missing := sorted(found.__abstractmethods__):
        raise UserError(f"task {name}: its class lacks {', '.join(missing)}; see {_CONTRACT}")
    return found


def _checked_custom(env: TaskEnv, task_id: str) -> TaskEnv:
    """Name a custom environment by its id, which data and initial states store, and check it."""
    try:
        env.task_id = task_id
    except AttributeError as error:
        raise UserError(
            f"task {task_id}: its task_id must be an attribute that can be set, not a property"
        ) from error
    if missing := [name for name in TaskEnv.__annotations__ if not hasattr(env, name)]:
        raise UserError(f"task {task_id}: its class lacks {', '.join(missing)}; see {_CONTRACT}")
    args = env.env_args
    if not isinstance(args, dict) or not {"env_name", "type", "env_kwargs"} <= args.keys():
        raise UserError(
            f"task {task_id}: its env_args must be a dict with env_name, type and env_kwargs,"
            f" got {args!r}"[:300]
        )
    if args["env_name"] != task_id or args["type"] == 1:
        raise UserError(
            f"task {task_id}: its env_args name {args['env_name']!r} of type {args['type']!r},"
            " which is another task; override them with self.task_id and type 2"
        )
    try:
        json.dumps(args)
    except TypeError as error:
        raise UserError(
            f"task {task_id}: its env_args cannot be stored as JSON: {error}"
        ) from error
    return env


def check_observation(env: TaskEnv, obs: Observation) -> None:
    """Check that an observation is what `TaskEnv` promises, before hours of it are
    recorded.

    Raises:
        UserError: a key has another shape or dtype, or is missing.
    """
    for key, value in obs.items():
        array = np.asarray(value)
        if key.endswith("_image"):
            expected = "uint8 (H, W, 3)"
            fits = array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3
        else:
            expected = "float (D,)"
            fits = np.issubdtype(array.dtype, np.floating) and array.ndim == 1
            fits = fits and isinstance(value, np.ndarray)
        if not fits:
            raise UserError(
                f"{env.task_id}: observation {key} is {array.dtype} {array.shape},"
                f" expected {expected}"
            )
    if missing := [key for key in (*env.proprioception, *env.eef_keys) if key not in obs]:
        raise UserError(
            f"{env.task_id}: its observations lack {', '.join(missing)},"
            " which its proprioception or eef_keys name"
        )


# Environments by the `env_args` of a dataset


def is_robosuite(env_args: Mapping[str, Any]) -> bool:
    """Whether `env_args` describe a task as robosuite's and robomimic's files do (type 1)."""
    return env_args.get("type") == 1 and not is_import_path(str(env_args.get("env_name")))


def task_id_of(env_args: Mapping[str, Any]) -> str:
    """The task id that `env_args` name, for example "robosuite/Lift" or "fibopolicy/Lift-v0"."""
    if (task_id := task_of_file(env_args)) is not None:
        return task_id
    name = str(env_args.get("env_name"))
    return f"robosuite/{name}" if is_robosuite(env_args) else name


def named_task(task_id: str, document: Mapping[str, Any]) -> str:
    """The task in the file names of an evaluation; empty for the one task of a run's
    training.

    Args:
        document: the run's `config.json`.
    """
    own = "" if document.get("task_env_args") else task_id_of(document["env_args"])
    return "" if task_id == own else task_id


def unavailable(env_args: Mapping[str, Any]) -> str | None:
    """Why no environment can be made of a dataset's `env_args`, in one line; else
    `None`.

    Imports no simulator: `from_env_args` finds out whether robosuite is installed and
    has the task.
    """
    if env_args.get("env_name") is None:
        return (
            "the data name no task, so nothing can be simulated: add the attribute env_args to the"
            " file's group data, for example for robosuite's Lift the JSON"
            ' {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"]}}'
        )
    name, kind = str(env_args["env_name"]), env_args.get("type")
    if is_import_path(name) or name in BUILT_IN or name.startswith(("metaworld/", "libero/")):
        return None
    if task_of_file(env_args) is not None:
        return None
    if re.fullmatch(r"Libero_\w+", name, re.IGNORECASE):
        return (
            f"task {name!r} is LIBERO's, and env_args name none of its {len(LIBERO)} tasks by their"
            f" bddl_file_name; set env_name to a task such as {LIBERO[10]}, and type to 2"
        )
    if (suite := other_suite(name, env_args.get("env_kwargs"))) is not None:
        return _not_run(name, suite)
    if kind == 1:
        return not_restorable(name, env_args.get("env_kwargs") or {})
    return (
        f"env_args name task {name!r} of type {kind!r}; expected a built-in, Meta-World, LIBERO or"
        " robosuite (type 1) task, or <module>:<class>"
    )


def is_known(env_args: Mapping[str, Any]) -> bool:
    """Whether this library has the task, so that a command that simulates it may be suggested."""
    if unavailable(env_args) is not None:
        return False
    if not is_robosuite(env_args) or task_of_file(env_args) is not None:
        return True
    return env_args["env_name"] in ROBOSUITE_NAMES


def warn_of_version(env_args: Mapping[str, Any]) -> None:
    """Warn when a dataset comes from another version of its simulator than is installed."""
    recorded = env_args.get("env_version")
    suite = task_id_of(env_args).partition("/")[0]
    package = {"fibopolicy": "mujoco", "libero": "rpent-libero"}.get(suite, suite)
    installed = versions().get(package)
    if recorded is None or installed is None:
        return
    if str(recorded).split(".")[:2] != installed.split(".")[:2]:
        warnings.warn(
            f"the data come from {package} {recorded}, and {installed} is installed: replay some"
            " before relying on them",
            stacklevel=3,
        )


def from_env_args(env_args: Mapping[str, Any], **overrides: Any) -> TaskEnv:
    """The environment that a dataset's `env_args` describe.

    `overrides` replace single options, e.g. `cameras` or `image_size`. Robosuite's
    datasets have type 1 and its own `env_name` and `env_kwargs`; ours carry a task id.
    A file without images names no camera and gets the task's own.

    Raises:
        UserError: no task is named, or this library cannot make it, see `unavailable`.
    """
    if (reason := unavailable(env_args)) is not None:
        raise UserError(reason)
    if (task_id := task_of_file(env_args)) is not None:
        from fibopolicy.envs.libero.environment import file_options

        return make(task_id, **{**file_options(env_args), **overrides})
    if is_robosuite(env_args):
        from fibopolicy.envs.robosuite.environment import RobosuiteEnv

        return RobosuiteEnv.from_env_args(env_args, **overrides)
    name = task_id_of(env_args)
    kwargs = dict(env_args.get("env_kwargs") or {})
    if name.startswith(("metaworld/", "libero/")):
        warn_of_version(env_args)
    if not kwargs.get("cameras"):
        kwargs.pop("cameras", None)
    return make(name, **{**kwargs, **overrides})
