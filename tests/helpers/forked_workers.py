"""Starts simulators and other workers as forks of a process that has their imports."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from multiprocessing import forkserver
from multiprocessing.popen_forkserver import Popen
from pathlib import Path
from typing import Any

import pytest

from fibopolicy.envs.rendering import configure_gl
from fibopolicy.utils.processes import WorkerProcess


def fork_workers(patch: pytest.MonkeyPatch) -> None:
    """While patched, workers are not spawned, which takes half a second of imports, or
    three with robosuite. Tests of the command in a process of its own spawn them.
    """
    multiprocessing.set_forkserver_preload(["worker_imports"])
    patch.setattr(WorkerProcess, "_Popen", staticmethod(_start))


def _start(process: Any) -> Popen:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()
    process._target = partial(_with_environment, dict(os.environ), process._target)
    return Popen(process)


def _with_environment(
    environment: dict[str, str], target: Callable[..., None], *arguments: Any, **options: Any
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    configure_gl()  # as imports do
    target(*arguments, **options)
