"""Worker processes: spawned, deaf to Ctrl-C, and gone when their parent is.

They start from a script, a notebook or standard input alike, because none of them runs the caller's `__main__` again.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FunctionType
from typing import Any

from fibopolicy.errors import UserError


class WorkerProcess(SpawnProcess):
    """A spawned process that ignores Ctrl-C and ends with its parent.

    Spawned, never forked: a process forked after OpenGL or torch have started threads hangs.
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
    """Refuse a value that a worker cannot be given, because its code cannot be imported there.

    Args:
        what: the value's name in the message.

    Raises:
        UserError: a class or function of `__main__`, a lambda, a local function, or anything else that cannot be pickled.
    """
    try:
        _Pickler(what, io.BytesIO()).dump(value)
    except UserError:
        raise
    except Exception as error:  # an object's own code may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{what}: cannot be passed to a worker process ({reason}); {_REMEDY}") from error


_REMEDY = "define it at the top level of a module, a .py file beside your script, and import it from there"


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
                f"{self._what}: {kind} {obj.__qualname__} of {obj.__module__} cannot be imported by worker processes; {_REMEDY}"
            )


@contextlib.contextmanager
def _no_interrupts() -> Iterator[None]:
    """Hold Ctrl-C back; a process started meanwhile never gets it.

    A terminal sends it to everyone in front of it, but only the parent decides what ends.
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

    Most scripts import torch, which takes longer than all else that a simulator loads; and one without
    `if __name__ == "__main__"` would start processes without end.
    """
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main)[name] for name in ("__spec__", "__file__") if name in vars(main)}
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
