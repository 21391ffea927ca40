"""Episodes that worker processes record ahead, kept in shards until the output is
complete.

Each episode depends on its index alone, so the output does not depend on the number of
workers. A command that was killed resumes from the shards in a folder beside its
output.
"""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fibopolicy.datasets.writer import Attribute, DemoWriter
from fibopolicy.envs import TaskEnv
from fibopolicy.errors import UserError
from fibopolicy.utils.files import atomic_write, wrap_os_error
from fibopolicy.utils.processes import simulator_pool
from fibopolicy.utils.settings import first_difference
from fibopolicy.utils.system import versions

#: One episode as arrays, see `Recording.arrays`.
Arrays = dict[str, NDArray[Any]]
#: Records the episode of an index.
RecordEpisode = Callable[[int], Arrays]

#: The file in the folder of shards that holds the settings they were made with.
PLAN = "plan.json"
#: Every n-th demo is held out for validation, for any number of workers.
VALID_EVERY = 10
#: Packages whose versions episodes and frames depend on.
_SIMULATORS = ("fibopolicy", "robosuite", "metaworld", "mujoco")


# The folder of shards


def shards_folder(out: Path) -> Path:
    """The folder of an output's shards."""
    return out.with_name(out.name + ".shards")


@contextmanager
def resume_folder(
    folder: Path, plan: Mapping[str, Any], *, resume: bool, overwrite: bool
) -> Iterator[None]:
    """Make the folder of shards, or check that the existing one has the same plan and
    is of the same versions of the simulators.

    Wrap the block that does the work. If it fails before its first shard, as with an
    invalid setting, it leaves no folder.

    Raises:
        UserError: the folder holds unfinished work of another plan, or of this one
            without `resume` or `overwrite`.
    """
    wanted = json.loads(json.dumps({**plan, "versions": simulator_versions()}))
    file = folder / PLAN
    has_files = any(not path.name.startswith(PLAN) for path in folder.glob("*"))
    if has_files and not file.exists():
        raise UserError(f"{folder}: holds files that are not shards; choose another --out")
    if has_files and overwrite:
        remove_shards(folder)
    elif has_files and not resume:
        raise UserError(
            f"{folder}: holds unfinished work; pass --resume to complete it or --overwrite to"
            " start again"
        )
    elif has_files:
        found = json.loads(file.read_text(encoding="utf-8"))
        if difference := first_difference(found, wanted):
            raise UserError(
                f"{folder}: holds work with other settings ({difference}); pass --overwrite to"
                " start again"
            )
    with wrap_os_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as partial, wrap_os_error(file):
        partial.write_text(json.dumps(wanted), encoding="utf-8")
    try:
        yield
    except BaseException:
        if not any(folder.glob("*.npz")):
            remove_shards(folder)
        raise


def simulator_versions() -> dict[str, str]:
    """Version by package."""
    return {name: versions()[name] for name in _SIMULATORS if name in versions()}


def remove_shards(folder: Path) -> None:
    """Delete the shards and their plan, and nothing else."""
    for path in (*folder.glob("*.npz"), *folder.glob("*.npz.partial"), folder / PLAN):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


# One episode


class Recording:
    """An episode that is recorded step by step.

    Args:
        env: the task.
        seed: seed of its layout.
    """

    def __init__(self, env: TaskEnv, seed: int) -> None:
        self._env, self._seed = env, seed
        self._obs, _ = env.reset(seed=seed)
        self._model = env.get_state().model
        self._rows: dict[str, list[Any]] = {}
        self.success = False

    def step(self, action: NDArray[np.float32], executed: NDArray[np.float32]) -> tuple[bool, bool]:
        """Execute an action `(A,)`, which may differ from the one to be imitated.

        Returns:
            Whether the episode terminated, and whether it was truncated.
        """
        row: dict[str, Any] = {"actions": action, "executed_actions": executed}
        row["states"] = self._env.get_state().state
        row |= {f"obs/{key}": value for key, value in self._obs.items()}
        self._obs, row["rewards"], terminated, truncated, info = self._env.step(executed)
        self.success = bool(info["success"])
        for key, value in row.items():
            self._rows.setdefault(key, []).append(value)
        return terminated, truncated

    def arrays(self) -> Arrays:
        """The N steps so far, the last one being the end of the episode.

        Returns:
            `actions`, `executed_actions` `(N, A)`, `states` `(N, S)`, `rewards`,
            `dones` `(N,)`, `obs/*` `(N, ...)`, `last_obs/*` `(1, ...)`, and the scalars
            `success`, `seed` and `model`, the MJCF of this episode's scene in UTF-8.
        """
        arrays = {key: np.stack(values) for key, values in self._rows.items()}
        arrays["dones"] = np.arange(len(arrays["rewards"])) == len(arrays["rewards"]) - 1
        arrays |= {f"last_obs/{key}": value[None] for key, value in self._obs.items()}
        arrays["success"], arrays["seed"] = np.array(self.success), np.array(self._seed)
        arrays["model"] = np.array(self._model.encode())
        return arrays


def add_episode(writer: DemoWriter, episode: Arrays, attrs: Mapping[str, Attribute]) -> str:
    """Write an episode, see `Recording.arrays`, as a demo; returns its name.

    Args:
        attrs: attributes of the demo, besides its seed.
    """
    obs = {key[4:]: value for key, value in episode.items() if key.startswith("obs/")}
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


# Many episodes


def record_demos(
    writer: DemoWriter,
    folder: Path,
    start: Callable[[], RecordEpisode],
    *,
    demos: int,
    shard_size: int,
    workers: int,
    attrs: Callable[[Arrays], Mapping[str, Attribute]],
    give_up: Callable[[int, int], UserError | None],
    description: str,
) -> tuple[int, int]:
    """Write the first `demos` successful episodes, with filter keys "train" and
    "valid".

    Args:
        folder: folder of the shards, see `resume_folder`.
        start: called once in every process; returns what records the episode of an
            index.
        shard_size: episodes in a shard: the most that a killed run loses per worker.
        attrs: attributes of the demo made from an episode.
        give_up: the reason to stop after so many successes in so many episodes, if any.

    Returns:
        Attempts, and control steps kept.
    """
    names: list[str] = []
    steps = 0
    episodes = prefetch_episodes(
        folder, start, needed=demos, shard_size=shard_size, workers=workers
    )
    # Closed at once: an abandoned collection must not end the next one's workers.
    with (
        contextlib.closing(episodes),
        tqdm(total=demos, desc=description, unit="demo", disable=None) as bar,
    ):
        for attempts, episode in enumerate(episodes, start=1):
            if episode["success"]:
                names.append(add_episode(writer, episode, attrs(episode)))
                steps += len(episode["actions"])
                bar.update()
            bar.set_postfix_str(f"{len(names)} of {attempts} episodes", refresh=False)
            if len(names) == demos:
                break
            if (reason := give_up(len(names), attempts)) is not None:
                raise reason
    if valid := names[VALID_EVERY - 1 :: VALID_EVERY]:
        writer.add_filter_key("train", [name for name in names if name not in set(valid)])
        writer.add_filter_key("valid", valid)
    return attempts, steps


def prefetch_episodes(
    folder: Path,
    start: Callable[[], RecordEpisode],
    *,
    needed: int,
    shard_size: int,
    workers: int,
) -> Generator[Arrays, None, None]:
    """Yield all episodes from index 0 on, in order, endlessly.

    Workers record ahead; shards that lie in `folder` are not recorded again.

    Args:
        needed: how many are needed if none fails; more are recorded only after these.
    """
    with simulator_pool(workers, _start_worker, start) as pool:
        pending: deque[Future[Path]] = deque()
        started, enough = 0, -(-needed // shard_size)
        while True:
            while len(pending) < 2 * workers and started < enough:
                pending.append(pool.submit(_record_shard, folder, started, shard_size))
                started += 1
            if pending:
                yield from _load_shard(pending.popleft().result(), shard_size)
            else:
                enough += workers


_record: RecordEpisode | None = None


def _start_worker(start: Callable[[], RecordEpisode]) -> None:
    global _record
    _record = start()


def _record_shard(folder: Path, number: int, size: int) -> Path:
    assert _record is not None
    path = folder / f"shard_{number:05d}.npz"
    if not path.exists():
        episodes = [_record(index) for index in range(number * size, (number + 1) * size)]
        flat = {f"{i}/{key}": episode[key] for i, episode in enumerate(episodes) for key in episode}
        with atomic_write(path) as partial, wrap_os_error(path), partial.open("wb") as file:
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
