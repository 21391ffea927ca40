"""Episodes made ahead by simulators side by side, kept in shards beside an output until
it is complete.

What an episode is depends on its index alone, so the output does not depend on the
number of workers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.datasets.writer import DemoWriter
from fibopolicy.utils.files import atomic_write
from fibopolicy.utils.processes import simulator_pool

#: What is known of one episode.
Arrays = dict[str, NDArray[Any]]


def made_ahead(
    parts: Path,
    start: Callable[[], Callable[[int], Arrays]],
    *,
    needed: int,
    size: int,
    workers: int,
) -> Iterator[Arrays]:
    """All episodes from index 0 on, in order, without end; shards are made ahead, and
    those that lie in `parts` are taken.

    Args:
        start: called once in every process; returns what makes the episode of an index.
        needed: how many are needed if none fails; more are made only once these are
            used up.
        size: episodes in a shard: what a killed run loses at most, per worker.
    """
    with simulator_pool(workers, _start_worker, start) as pool:
        pending: deque[Future[Path]] = deque()
        started, enough = 0, -(-needed // size)
        while True:
            while len(pending) < 2 * workers and started < enough:
                pending.append(pool.submit(_make_shard, parts, started, size))
                started += 1
            if pending:
                yield from _load_shard(pending.popleft().result(), size)
            else:
                enough += workers


def add_episode(writer: DemoWriter, episode: Arrays, attrs: Mapping[str, Any]) -> str:
    """Write an episode as a demo; returns its name.

    Args:
        episode: `actions`, `executed_actions`, `states`, `rewards`, `dones` and `obs/*`
            `(N, ...)`, `last_obs/*` `(1, ...)`, and the scalars `seed` and `model`, the
            scene's MJCF in UTF-8.
        attrs: of the demo, beside its seed.
    """
    obs = {
        key.removeprefix("obs/"): value for key, value in episode.items() if key.startswith("obs/")
    }
    return writer.add(
        obs,
        episode["actions"],
        episode["states"],
        episode["rewards"],
        episode["dones"],
        next_obs={
            key: np.concatenate([value[1:], episode[f"last_obs/{key}"]])
            for key, value in obs.items()
        },
        model_file=episode["model"].item().decode(),
        extra={"executed_actions": episode["executed_actions"]},
        attrs={"seed": int(episode["seed"]), **attrs},
    )


_make: Callable[[int], Arrays] | None = None


def _start_worker(start: Callable[[], Callable[[int], Arrays]]) -> None:
    global _make
    _make = start()


def _make_shard(parts: Path, k: int, size: int) -> Path:
    assert _make is not None
    path = parts / f"shard_{k:05d}.npz"
    if not path.exists():
        made = [_make(index) for index in range(k * size, (k + 1) * size)]
        flat = {
            f"{i}/{key}": value for i, episode in enumerate(made) for key, value in episode.items()
        }
        with atomic_write(path) as aside, aside.open("wb") as file:
            np.savez(file, allow_pickle=False, **flat)
    return path


def _load_shard(path: Path, size: int) -> Iterator[Arrays]:
    with np.load(path, allow_pickle=False) as arrays:
        for i in range(size):
            prefix = f"{i}/"
            yield {
                key.removeprefix(prefix): arrays[key]
                for key in arrays.files
                if key.startswith(prefix)
            }
