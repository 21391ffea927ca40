"""Episodes made ahead in spawned processes, kept in shards until a file of them is complete.

The shards lie in a folder beside the output, so that work which was killed goes on where it was. What an episode is depends on
its index alone: so the output does not depend on the number of workers.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.errors import UserError
from fibopolicy.files import failure_told, written_aside

#: What is known of one episode.
Arrays = dict[str, NDArray[Any]]
#: The settings of the shards beside it.
PLAN = "plan.json"


def parts_folder(out: Path) -> Path:
    """Where the shards of an output lie."""
    return out.with_name(out.name + ".parts")


def open_parts(parts: Path, plan: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Make the folder of shards, or check that the one there is of the same plan.

    Raises:
        UserError: unfinished work lies there and is to be neither completed nor replaced, or is of another plan.
    """
    wanted = json.loads(json.dumps(plan))
    file = parts / PLAN
    if file.exists():
        if overwrite:
            remove_parts(parts)
        elif not resume:
            raise UserError(
                f"{parts}: holds an unfinished collection; pass --resume to go on with it or --overwrite to start again"
            )
        elif json.loads(file.read_text()) != wanted:
            raise UserError(
                f"{parts}: holds a collection with other settings ({file.read_text()}); pass --overwrite to start again"
            )
    elif parts.exists() and any(parts.iterdir()):
        raise UserError(f"{parts}: is in the way and no collection's; choose another --out")
    with failure_told(parts):
        parts.mkdir(parents=True, exist_ok=True)
    with written_aside(file) as aside:
        aside.write_text(json.dumps(wanted))


def remove_parts(parts: Path) -> None:
    """Delete the shards and their plan, and nothing else."""
    for path in (*parts.glob("shard_*.npz*"), parts / PLAN):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        parts.rmdir()


def episodes(parts: Path, start: Callable[[], Callable[[int], Arrays]], workers: int, size: int) -> Iterator[Arrays]:
    """All episodes from index 0 on, in order, without end; shards of `size` are made ahead by processes, one simulator each.

    Args:
        start: called once in every process; returns what makes episode `index`. Both can be pickled by reference.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(start,)) as pool:
        pending = [pool.submit(_make_shard, parts, k, size) for k in range(2 * workers)]
        ahead = len(pending)
        try:
            while True:
                shard = pending.pop(0).result()
                pending.append(pool.submit(_make_shard, parts, ahead, size))
                ahead += 1
                yield from _load_shard(shard, size)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


_run: Callable[[int], Arrays] | None = None


def _start_worker(start: Callable[[], Callable[[int], Arrays]]) -> None:
    global _run
    # Should the parent be killed, nobody would ever tell this process to end.
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _run = start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _make_shard(parts: Path, k: int, size: int) -> Path:
    assert _run is not None
    path = parts / f"shard_{k:05d}.npz"
    if not path.exists():
        made = [_run(index) for index in range(k * size, (k + 1) * size)]
        flat = {f"{i}/{key}": value for i, episode in enumerate(made) for key, value in episode.items()}
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **flat)
    return path


def _load_shard(path: Path, size: int) -> Iterator[Arrays]:
    with np.load(path, allow_pickle=False) as arrays:
        for i in range(size):
            prefix = f"{i}/"
            yield {key.removeprefix(prefix): arrays[key] for key in arrays.files if key.startswith(prefix)}
