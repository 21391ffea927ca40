"""Set up this process, and start workers that ignore Ctrl-C and end with their parent.

Workers can be started from a script, a notebook or standard input, because they do not
run the caller's `__main__` again.
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

from fibopolicy.errors import UserError, one_line
from fibopolicy.utils.files import provide_caches

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def set_up() -> None:
    """Let waiting threads sleep, keep freed memory, and choose cache folders."""
    provide_caches()
    # Set before torch loads OpenMP, whose threads otherwise spin while they wait.
    # Measured on two cores next to one busy process: with sleeping threads, matrix
    # products are 4 times as fast.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    _keep_freed_memory()


def make_streams_safe() -> None:
    """Make printing safe on every terminal: escape characters that it lacks, and
    discard output to a closed stream.

    File names need not be valid UTF-8, and a terminal may support ASCII only.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # closed by the caller; otherwise the next opened file gets its descriptor
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


def drop_output() -> None:
    """Discard the rest of standard output, so that Python does not fail on it again at
    exit.
    """
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # no file behind it
        return


def _keep_freed_memory() -> None:
    """Make glibc keep up to 2 GiB of freed memory, instead of returning it and faulting
    it in again page by page.

    Each training step frees and allocates the same hundreds of megabytes. Measured
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
    """Check that a value can be passed to a worker, which has to import its code.

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
        reason = one_line(error)
        raise UserError(
            f"{what}: cannot be passed to a worker process ({reason}); {_REMEDY}"
        ) from error


_REMEDY = (
    "define it at the top level of a module, a .py file beside your script, and import it from"
    " there"
)


class _Pickler(pickle.Pickler):
    """Finds code anywhere in a value that other processes cannot import."""

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
    """Block Ctrl-C; a process that is started in this context never gets it.

    A terminal sends it to all foreground processes, but only the parent decides what
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
    """Keep processes that are started in this context from running the caller's script.

    Most scripts import torch, which takes longer than everything that a simulator
    loads. A script without `if __name__ == "__main__"` would start processes endlessly.
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
    """End this process when its parent has ended, even if that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def simulator_pool(
    workers: int, initializer: Callable[..., None], *arguments: Any
) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes that have each run `initializer(*arguments)`.

    Jobs that have not begun are cancelled at the end of the block.

    Raises:
        UserError: a process was killed, for example for lack of memory, or none can be
            started.
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
            "a simulator's process was killed, perhaps for lack of memory; use fewer workers"
        ) from error
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # its result is not needed, so do not wait for it
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def checked_workers(workers: int | None, jobs: int) -> int:
    """Number of processes: `workers`, by default the number of cores, at most `jobs`."""
    if workers is not None and workers < 1:
        raise UserError(f"workers must be at least 1, got {workers}")
    return max(1, min(workers or os.cpu_count() or 1, jobs))
