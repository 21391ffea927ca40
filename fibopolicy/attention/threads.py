"""Runs one compiled function on as many threads as torch uses.

Where torch brings GNU's or Intel's OpenMP, the function runs on torch's own team: those
threads are awake already, and no second pool competes with them. It is safe from
several Python threads, each of which has its own team. Elsewhere Python threads do the
same a little slower. A forked child has lost the team of its parent, and OpenMP would
wait for it for ever, so there the function runs serially.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_in_forked_child = False


def _note_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the OpenMP that torch has
    loaded, if it is that kind.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@functools.lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fibottention")


def run(function: int, argument: int, threads: int) -> None:
    """Calls the C function at address `function` with the address `argument`, up to
    `threads` times at once.

    At least one call runs; the function has to share out its own work. The GIL is
    released meanwhile.
    """
    call: Any = _caller(function)
    if threads <= 1 or _in_forked_child:
        call(argument)
    elif (parallel := _openmp()) is not None:
        parallel(function, argument, threads, 0)
    else:
        others = [_pool(threads - 1).submit(call, argument) for _ in range(threads - 1)]
        call(argument)
        for other in others:
            other.result()


@functools.cache
def _caller(function: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
