"""Simulators at work side by side: one worker process each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from fibopolicy.errors import UserError
from fibopolicy.worker import WorkerContext


@contextmanager
def simulator_pool(workers: int, initializer: Callable[..., None], *arguments: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool of `workers` processes that have each run `initializer(*arguments)`.

    What has not begun is cancelled when the block is left.

    Raises:
        UserError: a process was ended from outside, say for want of memory, or none can be started.
    """
    others = set(multiprocessing.active_children())
    try:
        pool = ProcessPoolExecutor(workers, mp_context=WorkerContext(), initializer=initializer, initargs=arguments)
    except OSError as error:  # its queues have semaphores, which lie in /dev/shm
        raise UserError(
            f"worker processes cannot be started: {error.strerror or error}; their semaphores need a few kilobytes in /dev/shm,"
            " which must be writable: with docker pass --shm-size=64m"
        ) from error
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
