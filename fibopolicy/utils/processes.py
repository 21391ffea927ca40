"""Processes: how ours is set up, and how workers are started, ignore Ctrl-C and end
with their parent.

Workers start from a script, a notebook or standard input alike, because none of them
runs the caller's `__main__` again.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FunctionType
from typing import Any

from fibopolicy.errors import UserError
from fibopolicy.utils.files import provide_caches

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def set_up() -> None:
    """Let waiting threads sleep, keep freed memory, and find places for caches."""
    provide_caches()
    # Before torch loads OpenMP: its threads would spin while they wait for each other,
    # and beside any other busy process they wait long. Measured on two cores next to
    # one busy process: with sleeping threads matrices multiply 4 times as fast.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()


def make_streams_safe() -> None:
    """Make printing safe on every terminal: characters it lacks are escaped, and a
    closed stream takes and drops output.

    File names need not be valid UTF-8, and a terminal may know ASCII alone.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # closed by the caller; left so, the next opened file would get its descriptor
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Send what standard output still holds nowhere, so that Python does not fail on it
    again at its end.
    """
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no file behind it
        return


def _keep_freed_memory() -> None:
    """Has glibc keep up to 2 GiB of what is freed, instead of giving it back and having
    it faulted in, page by page, again.

    A training step frees and takes the same hundreds of megabytes each time. Measured
    on two cores: attention over (8, 6, 588, 64), forward and backward, in 6.6 ms
    instead of 8 to 16.
    """
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class WorkerProcess(SpawnProcess):
    """A spawned process that ignores Ctrl-C and ends with its parent.

    Spawned, never forked: a process forked after OpenGL or torch have started threads
    hangs.
    """

    def start(self) -> None:
        with _no_interrupts(), _without_main():
            super().start()

    def run(self) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


class WorkerContext(SpawnContext):
    """The multiprocessing context of `WorkerProcess`, also for a `ProcessPoolExecutor`."""

    Process = WorkerProcess


def check_importable(what: str, value: Any) -> None:
    """Refuse a value that a worker cannot be given, because its code cannot be imported
    there.

    Args:
        what: the value's name in the message.

    Raises:
        UserError: a class or function of `__main__`, a lambda, a local function, or
            anything else that cannot be pickled.
    """
    try:
        _Pickler(what, io.BytesIO()).dump(value)
    except UserError:
        raise
    except Exception as error:  # an object's own code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"{what}: cannot be passed to a worker process ({reason}); {_REMEDY}"
        ) from error


_REMEDY = (
    "define it at the top level of a module, a .py file beside your script, and import it from"
    " there"
)


class _Pickler(pickle.Pickler):
    """Finds code that other processes cannot import, wherever in a value it is."""

    def __init__(self, what: str, file: io.BytesIO) -> None:
        super().__init__(file)
        self._what = what

    def persistent_id(self, obj: Any) -> None:
        if not isinstance(obj, type | FunctionType):
            return
        if obj.__module__ == "__main__" or "<" in obj.__qualname__:  # "<lambda>", "<locals>"
            kind = "class" if isinstance(obj, type) else "function"
            raise UserError(
                f"{self._what}: {kind} {obj.__qualname__} of {obj.__module__} cannot be imported by"
                f" worker processes; {_REMEDY}"
            )


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back; a process started meanwhile never gets it.

    A terminal sends it to everyone in front of it, but only the parent decides what
    ends.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Keep processes that are started meanwhile from running the caller's script again.

    Most scripts import torch, which takes longer than all else that a simulator loads;
    and one without `if __name__ == "__main__"` would start processes without end.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {
        name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)
    }
    vars(main).update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        vars(main).update(hidden)


def _end_with_parent() -> None:
    """Should the parent be killed, nobody would tell this process to end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def simulator_pool(
    workers: int, initializer: Callable[..., None], *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes that have each run `initializer(*arguments)`.

    What has not begun is cancelled when the block is left.

    Raises:
        UserError: a process was ended from outside, say for want of memory, or none can
            be started.
    """
    others = set(multiprocessing.active_children())
    try:
        pool = ProcessPoolExecutor(
            workers, mp_context=WorkerContext(), initializer=initializer, initargs=arguments
        )
    except OSError as error:  # its queues have semaphores, which lie in /dev/shm
        raise UserError(
            f"worker processes cannot be started: {error.strerror or error}; their semaphores need"
            " a few kilobytes in /dev/shm, which must be writable: with docker pass --shm-size=64m"
        ) from error
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError(
            "a simulator's process was ended from outside, perhaps for want of memory: use fewer"
            " workers"
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # nobody wants what it is at: an interrupt shall not wait for it
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def checked_workers(workers: int | None, jobs: int) -> int:
    """As many processes as asked for, or as there are cores, but no more than jobs."""
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    return max(1, min(workers or os.cpu_count() or 1, jobs))
