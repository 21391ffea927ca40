"""Restores demonstrations in their simulator: which ones, from which scene, with which actions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.envs import SimState, TaskEnv, from_env_args
from fibopolicy.envs.perturbations import Perturbation
from fibopolicy.envs.registry import unavailable
from fibopolicy.envs.rendering import ImageSize
from fibopolicy.errors import UserError

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Trajectory:
    """What a simulator needs of a demonstration.

    Args:
        demo: its name.
        model: the MJCF of its scene; `None` where the file keeps none.
        states: `(N, S)` float64, before each action.
        actions: `(N, A)` float64, those that were executed.
        perturbation, index: how an episode of an evaluation was perturbed, and the
            index of its initial state.
    """

    demo: str
    model: str | None
    states: NDArray[np.float64]
    actions: NDArray[np.float64]
    perturbation: Perturbation | None = None
    index: int = 0

    def state(self, env: TaskEnv, step: int) -> SimState:
        """The instant before action `step`, in the task's own scene where the file keeps none."""
        model = self.model
        if model is None:
            env.reset(seed=0)
            model = env.get_state().model
        return SimState(model, self.states[step])


def read_trajectory(file: DemoFile, demo: str) -> Trajectory:
    """A demonstration's model, states and actions, checked.

    Raises:
        UserError: there are no states, or what is there cannot be simulated; the
            message names file and demo.
    """
    states = read_motion(file, demo, "states")
    # Where noise was added for recovery, the scene moved by what was executed, not by
    # what the expert wanted.
    actions = read_motion(
        file, demo, "executed_actions" if file.has(demo, "executed_actions") else "actions"
    )
    model = file.attrs(demo).get("model_file")
    return Trajectory(demo, None if model is None else str(model), states, actions)


def read_motion(file: DemoFile, demo: str, key: str) -> NDArray[np.float64]:
    """A demonstration's states or actions `(N, width)`, checked as `read_trajectory` says."""
    if key == "states" and not file.has(demo, key):
        raise file.error(f"{demo}: holds no states, so that no simulator can restore it")
    values = file.read(demo, key)
    if (
        values.ndim != 2
        or len(values) != file.length(demo)
        or not np.issubdtype(values.dtype, np.number)
    ):
        raise file.error(
            f"{demo}: expected {key} of shape ({file.length(demo)}, width), found {values.dtype}"
            f" {values.shape}"
        )
    if len(faulty := np.argwhere(~np.isfinite(values))):
        step, dim = faulty[0]
        raise file.error(
            f"{demo}: {key} hold {values[step, dim]} at step {step}, dimension {dim}; must be"
            " finite"
        )
    return values.astype(np.float64)


def require_task(file: DemoFile) -> None:
    """Raise `UserError` if no simulator can make the file's task, before processes start."""
    with file.named():
        if (reason := unavailable(file.env_args)) is not None:
            raise UserError(reason)


def by_model(file: DemoFile, demos: Sequence[str]) -> list[str]:
    """The demos, grouped by scene: loading one takes seconds, another state milliseconds."""
    first: dict[object, int] = {}
    rank = {
        demo: first.setdefault(file.attrs(demo).get("model_file"), len(first)) for demo in demos
    }
    return sorted(demos, key=rank.__getitem__)


def warn_of_scenes(file: DemoFile, demos: Sequence[str]) -> None:
    """Warn of demos without a scene, which are restored in that of the installed versions."""
    if lacking := [demo for demo in demos if file.attrs(demo).get("model_file") is None]:
        others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        warnings.warn(
            f"{file.path}: {lacking[0]}{others} keep no scene (attribute model_file); they are"
            " restored in that of the installed versions, which may differ",
            stacklevel=3,
        )


class Restorer:
    """A demonstration file with its task's environment, in a worker process.

    Both are opened on first use, not when the process starts, so that their errors
    reach the parent unchanged.

    Args:
        path: the file.
        skip_corrupt: see `DemoFile`.
        overrides: options of the environment to override, e.g. `cameras`.
    """

    def __init__(self, path: Path, skip_corrupt: bool, **overrides: Any) -> None:
        self._path, self._skip_corrupt, self._overrides = path, skip_corrupt, overrides

    @cached_property
    def file(self) -> DemoFile:
        return DemoFile(self._path, skip_corrupt=self._skip_corrupt)

    @cached_property
    def env(self) -> TaskEnv:
        with warnings.catch_warnings(), self.file.named():
            warnings.simplefilter("ignore", UserWarning)  # the parent process has issued them
            return from_env_args(self.file.env_args, **self._overrides)

    def with_cameras(self, cameras: tuple[str, ...], image_size: ImageSize) -> Restorer:
        """The same file with an environment that renders."""
        rendering = {"cameras": cameras, "image_size": image_size}
        return Restorer(self._path, self._skip_corrupt, **{**self._overrides, **rendering})

    def attempt(self, demo: str, work: Callable[[Trajectory], _Result]) -> _Result | Corrupt:
        """The result of `work` on a demo, or why the demo cannot be restored."""
        self.env  # noqa: B018  (an error of the task is not one of the demo)
        try:
            return work(read_trajectory(self.file, demo))
        except UserError as error:
            reason = str(error)
            if not reason.startswith(str(self.file.path)):
                reason = str(self.file.error(f"{demo}: {reason}"))
            return Corrupt(reason)


@dataclass(frozen=True)
class Corrupt:
    """Why a demo cannot be restored: the file, the demo and the fault."""

    reason: str
