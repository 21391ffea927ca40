"""Workers start from scripts and standard input, and name objects that they cannot import."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from fibopolicy import envs
from fibopolicy.errors import UserError
from fibopolicy.evaluation import evaluate_policy, simulator
from fibopolicy.utils import processes
from fibopolicy.utils.imports import import_object
from fibopolicy.utils.processes import WorkerProcess, check_importable

#: Has no main guard: a worker that ran it again would start workers itself.
SCRIPT = """
from fibopolicy.datasets.collect import Plan, collect
from fibopolicy.datasets.render import View, render
from fibopolicy.datasets.replay import replay
collect(Plan("Reach-v0", cameras=("wrist",), image_size=16), 2, "a.hdf5", workers=1)
print(render("a.hdf5", "b.hdf5", View(image_size=24), workers=1).demos)
print(len(replay("b.hdf5", workers=1).demos))
"""


def python(
    code: str, folder: Path, *options: str, file: bool = False
) -> subprocess.CompletedProcess[str]:
    if file:
        (folder / "script.py").write_text(code)
    command = [sys.executable, "script.py" if file else "-"]
    return subprocess.run(
        [*options, *command],
        input=None if file else code,
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
        timeout=1000,
    )


@pytest.mark.parametrize("file", [True, False], ids=["script", "standard input"])
def test_collect_render_and_replay_need_no_main_guard(tmp_path: Path, file: bool) -> None:
    done = python(SCRIPT, tmp_path, file=file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", "2"]


def test_an_environment_of_a_script_is_rejected_before_any_process_starts(tmp_path: Path) -> None:
    code = """
from fibopolicy.envs.tabletop.reach import Reach
from fibopolicy.evaluation import evaluate_policy
from fibopolicy.errors import UserError
import functools
class MyReach(Reach): pass
def make(): return MyReach()
for task in (MyReach, make, lambda: MyReach(), functools.partial(MyReach, cameras=())):
    try:
        evaluate_policy(lambda obs: None, task, 1, workers=1)
    except UserError as error:
        print(error)
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    names = ["class MyReach", "function make", "function <lambda>", "class MyReach"]
    assert len(lines) == len(names)
    for line, name in zip(lines, names, strict=True):
        assert f"{name} of __main__ cannot be imported by worker processes" in line
        assert "module" in line


class Callable:
    def __init__(self, function: object) -> None:
        self.function = function

    def __call__(self) -> envs.TaskEnv:
        raise AssertionError("not called")


def local_function() -> object:
    def inner() -> None: ...

    return inner


@pytest.mark.parametrize(
    ("make_env", "message"),
    [
        (lambda: envs.make("reach"), r"function <lambda> of "),
        (
            functools.partial(lambda size: envs.make("reach", image_size=size), 16),
            r"function <lambda> of ",
        ),
        (local_function(), r"function local_function\.<locals>\.inner of "),
        (Callable(lambda: None), r"function .*<lambda> of "),
        (
            functools.partial(envs.make, "reach", callback=types.ModuleType("x")),
            r"cannot pickle 'module' object",
        ),
    ],
)
def test_an_object_that_cannot_be_pickled_gets_a_hint_to_use_a_module(
    make_env, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        evaluate_policy(lambda obs: None, make_env, 1, workers=1)
    assert "at the top level of a module" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_objects_of_a_module_can_be_sent_to_a_worker() -> None:
    check_importable(
        "task",
        functools.partial(envs.make, "__main__", cameras=("wrist",), image_size={"wrist": (8, 9)}),
    )


def test_a_task_of_main_is_rejected_by_name() -> None:
    with pytest.raises(UserError, match=r"task __main__:Mine: .* put Mine into a module"):
        import_object("task", "__main__:Mine")


def test_a_pool_has_spawned_workers_that_ignore_an_interrupt() -> None:
    with processes.simulator_pool(1, int) as pool:
        handler = pool.submit(signal.getsignal, signal.SIGINT)
        assert handler.result() == signal.SIG_IGN
        kinds = [type(process) for process in multiprocessing.active_children()]
    assert WorkerProcess in kinds
    assert issubclass(WorkerProcess, SpawnProcess)


def test_a_full_dev_shm_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(processes, "ProcessPoolExecutor", full)
    with (
        pytest.raises(UserError, match=r"No space left on device; .* /dev/shm.* --shm-size"),
        processes.simulator_pool(1, print),
    ):
        pass


def test_a_failed_memory_allocation_is_an_error_and_not_a_crash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(
        UserError, match=r"needs 12345 bytes .*Cannot allocate memory.* fewer workers"
    ):
        simulator._allocate(12345)


@pytest.mark.parametrize("options", ["size=8k", "ro"])
def test_a_simulator_works_without_dev_shm(tmp_path: Path, options: str) -> None:
    mount = f"mount -t tmpfs -o {options} none /dev/shm"
    if (
        sys.platform != "linux"
        or os.geteuid()
        or subprocess.run(["unshare", "-m", "sh", "-c", mount], check=False).returncode
    ):
        pytest.skip("mounting needs root and a mount namespace")
    code = """
from fibopolicy.evaluation import evaluate_policy
import numpy as np
rows = evaluate_policy(lambda obs: np.zeros(4), "reach", 1, workers=1, image_size=128, horizon=2)
print(rows[0].steps, rows[0].error)
from fibopolicy.datasets.collect import Plan, collect
from fibopolicy.errors import UserError
try:
    collect(Plan("Reach-v0", cameras=("wrist",), image_size=16), 1, "a.hdf5", workers=1)
    print("collected")
except UserError as error:
    print(error)
"""
    done = python(code, tmp_path, "unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh")
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.split() == ["2"]
    assert second == "collected" or "--shm-size" in second
