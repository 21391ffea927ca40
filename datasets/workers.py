"""Simulators at work side by side: one spawned process each, which ends when its parent does."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from fibopolicy.errors import UserError


@contextmanager
def simulator_pool(workers: int, initializer: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes that have each run `initializer(*arguments)`.

    Spawned, never forked: a process forked after OpenGL or torch have started threads hangs. What has not begun is cancelled
    when the block is left.

    Raises:
        UserError: a process was ended from outside, say for want of memory.
    """
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(initializer, arguments))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise UserError("a simulator's process was ended from outside, perhaps for want of memory: use fewer workers") from error
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


def _start(initializer: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a keyboard interrupts all processes: the parent alone answers
    # Should the parent be killed, nobody would ever tell this process to end.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    initializer(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
