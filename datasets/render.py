"""Images for demonstrations: each stored state is restored and rendered."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.restore import (
    Corrupt,
    Restorer,
    Trajectory,
    by_model,
    require_task,
    warn_of_scenes,
)
from fibopolicy.datasets.shards import (
    remove_shards,
    resume_folder,
    shards_folder,
    simulator_versions,
)
from fibopolicy.datasets.writer import DemoWriter
from fibopolicy.envs import Observation, SimState, TaskEnv
from fibopolicy.envs.base import camera_keys
from fibopolicy.envs.registry import warn_of_version
from fibopolicy.envs.rendering import FrameSizes, ImageSize, Quality, check_options, renderer_name
from fibopolicy.errors import UserError
from fibopolicy.utils.files import (
    StrPath,
    atomic_write,
    check_output,
    check_resume_or_overwrite,
    directory_lock,
    expanded,
)
from fibopolicy.utils.processes import checked_workers, simulator_pool

#: What this module writes; everything else of a demo is copied.
_WRITTEN = {"obs", "next_obs", "last_obs", "actions", "states", "rewards", "dones"}
#: Observations that a state does not determine: accelerations follow from the motors'
#: commands, which it leaves out.
_UNKNOWN = "_joint_acc"


@dataclass(frozen=True)
class View:
    """How the frames are rendered; stored with them.

    Args:
        cameras: their names; `None` means those in the file's `env_args`, else the
            task's own.
        image_size: pixels, the side of square frames, (height, width), or one of these
            per camera; `None` means the size in the file's `env_args`, else 84.
        quality: "fast" or "full", see `fibopolicy.envs.rendering`.
    """

    cameras: tuple[str, ...] | None = None
    image_size: ImageSize | None = None
    quality: Quality = "fast"

    def __post_init__(self) -> None:
        check_options(self.quality, horizon=1)
        if self.image_size is not None:
            FrameSizes(self.image_size, self.cameras or ())

    def overrides(self) -> dict[str, Any]:
        """The environment's settings that this decides."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Rendered:
    """The result of a rendering.

    Args:
        path: the new file.
        demos, steps: their numbers.
        cameras: the rendered ones.
        skipped: demos that could not be restored, with the reason.
        dropped: image observations of the old file that are not in the new one.
    """

    path: Path
    demos: int
    steps: int
    cameras: tuple[str, ...]
    skipped: dict[str, str]
    dropped: tuple[str, ...]


def render(
    src: StrPath,
    out: StrPath,
    view: View | None = None,
    *,
    filter_key: str | None = None,
    workers: int | None = None,
    skip_corrupt: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Rendered:
    """Write the demonstrations of `src` with new observations to `out`.

    Each state is restored in the installed simulator. Its observations are the cameras'
    frames and the simulator's vectors; `next_obs` is what follows, for which the last
    action is executed. Vectors that this simulator lacks are copied; other images are
    not, since frames of two renderers must not be mixed. Actions, states, attributes
    and filter keys stay. So do rewards and dones; where the file has none, they say
    after which actions the goal was met. `env_args` and the models become those of the
    installed simulator.

    The bytes of `out` depend neither on `workers` nor on an interruption: finished
    demos lie in a folder beside `out`, which is removed at the end.

    Raises:
        UserError: the file or one of its demos cannot be read or restored; a task or
            camera is unknown; `out` exists or is `src`; another rendering is unfinished
            there.
    """
    src, out, view = expanded(src), expanded(out), view or View()
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    check_output(out, overwrite, [src])
    with DemoFile(src, skip_corrupt=skip_corrupt) as file:
        require_task(file)
        demos = file.select(filter_key)
        warn_of_version(file.env_args)
        warn_of_scenes(file, demos)
        folder = shards_folder(out)
        with (
            directory_lock(folder),
            resume_folder(folder, _plan(file, demos, view), resume=resume, overwrite=overwrite),
        ):
            skipped = dict(file.corrupt)
            skipped |= _render_all(file, demos, view, folder, workers, skip_corrupt)
            kept = [demo for demo in demos if demo not in skipped]
            if not kept:
                raise UserError(f"{src}: no demo could be rendered; {next(iter(skipped.values()))}")
            done = _assemble(file, kept, view, folder, out, overwrite, skipped)
            remove_shards(folder)
    return done


def _plan(file: DemoFile, demos: Sequence[str], view: View) -> dict[str, Any]:
    """What a rendering depends on: shards of another one must not be mixed with it."""
    found = file.identity(demos, ("states", "actions", "executed_actions"))
    source = {"source": found.pop("path"), **found}
    return {**source, "demos": list(demos), **asdict(view)}


def _render_all(
    file: DemoFile,
    demos: Sequence[str],
    view: View,
    folder: Path,
    workers: int | None,
    skip_corrupt: bool,
) -> dict[str, str]:
    """Render the demos without a shard; returns those that cannot be restored, and why."""
    missing = [demo for demo in by_model(file, demos) if not _shard(folder, demo).exists()]
    total, skipped = sum(map(file.length, demos)), {}
    start = (file.path, skip_corrupt, view, folder)
    with tqdm(
        total=total,
        initial=total - sum(map(file.length, missing)),
        desc=f"render {file.path.name}",
        unit="step",
        disable=None,
    ) as bar:
        if not missing:
            return {}
        with simulator_pool(checked_workers(workers, len(missing)), _start_worker, *start) as pool:
            for done in as_completed([pool.submit(_render_one, demo) for demo in missing]):
                demo, corrupt = done.result()
                if corrupt is not None:
                    if not skip_corrupt:
                        raise UserError(f"{corrupt.reason}; --skip-corrupt leaves such demos out")
                    skipped[demo] = corrupt.reason
                bar.update(file.length(demo))
    return skipped


def _shard(folder: Path, demo: str) -> Path:
    return folder / f"{demo}.npz"


# In a worker

_restorer: Restorer
_folder: Path


def _start_worker(path: Path, skip_corrupt: bool, view: View, folder: Path) -> None:
    global _restorer, _folder
    _restorer, _folder = Restorer(path, skip_corrupt, **view.overrides()), folder


def _render_one(demo: str) -> tuple[str, Corrupt | None]:
    """Write a demo's shard, or return why the demo cannot be restored."""
    env = _restorer.env
    arrays = _restorer.attempt(demo, lambda trajectory: render_trajectory(env, trajectory))
    if isinstance(arrays, Corrupt):
        return demo, arrays
    images = camera_keys(env)
    facts = {"env_args": env.env_args, "images": images}
    facts["renderer"] = renderer_name() if images else "none"
    with atomic_write(_shard(_folder, demo)) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, facts=np.array(json.dumps(facts)), **arrays)
    return demo, None


def render_trajectory(env: TaskEnv, trajectory: Trajectory) -> dict[str, NDArray[Any]]:
    """The observations of a demonstration of N steps.

    Returns:
        `obs/<key>` `(N, ...)` before each action and `last_obs/<key>` `(1, ...)` after
        the last, which is executed; `success` `(N,)` bool after each action; `model`,
        the scene as the simulator loaded it.
    """
    start = trajectory.state(env, 0)
    seen: list[Observation] = []
    success = []
    for step, state in enumerate(trajectory.states):
        seen.append(env.set_state(SimState(start.model, state)))
        if step:
            success.append(env.success())
    model = env.get_state().model
    _, _, _, info = env.advance(trajectory.actions[-1])
    last = env.observe()
    known = [key for key in last if not key.endswith(_UNKNOWN)]
    arrays = {f"obs/{key}": np.stack([obs[key] for obs in seen]) for key in known}
    arrays |= {f"last_obs/{key}": last[key][None] for key in known}
    return {**arrays, "success": np.array([*success, info["success"]]), "model": np.array(model)}


# The new file


def _assemble(
    file: DemoFile,
    demos: Sequence[str],
    view: View,
    folder: Path,
    out: Path,
    overwrite: bool,
    skipped: dict[str, str],
) -> Rendered:
    facts = {demo: _facts(folder, demo) for demo in demos}
    first = facts[demos[0]]
    if other := next((demo for demo in demos if facts[demo] != first), None):
        raise UserError(
            f"{folder}: {other} was rendered with other settings than {demos[0]};"
            " pass --overwrite to start again"
        )
    old = {name: value for name, value in file.env_args.items() if name not in first["env_args"]}
    attrs = {
        **file.file_attrs,
        "quality": view.quality,
        "renderer": first["renderer"],
        "rendered_with": ", ".join(
            f"{name} {version}" for name, version in simulator_versions().items()
        ),
        "rendered_from": file.path.name,
        "source_env_version": str(file.env_args.get("env_version", "unknown")),
    }
    steps = 0
    with DemoWriter(out, {**old, **first["env_args"]}, attrs=attrs, overwrite=overwrite) as writer:
        for demo in tqdm(demos, desc=f"write {out.name}", unit="demo", disable=None):
            with np.load(_shard(folder, demo), allow_pickle=False) as arrays:
                _write(writer, file, demo, arrays)
            steps += file.length(demo)
        for name, members in file.filter_keys.items():
            if present := [demo for demo in demos if demo in members]:
                writer.add_filter_key(name, present)
    images = first["images"]
    dropped = tuple(key for key in file.image_keys if key not in images)
    return Rendered(
        out,
        len(demos),
        steps,
        tuple(key.removesuffix("_image") for key in images),
        skipped,
        dropped,
    )


def _facts(folder: Path, demo: str) -> dict[str, Any]:
    with np.load(_shard(folder, demo), allow_pickle=False) as arrays:
        facts: dict[str, Any] = json.loads(str(arrays["facts"]))
        return facts


def _write(
    writer: DemoWriter, file: DemoFile, demo: str, arrays: Mapping[str, NDArray[Any]]
) -> None:
    obs = {key.removeprefix("obs/"): arrays[key] for key in arrays if key.startswith("obs/")}
    then = {
        key: np.concatenate([value[1:], arrays[f"last_obs/{key}"]]) for key, value in obs.items()
    }
    source = file.group(demo)
    for key in file.vector_keys:
        if key not in obs and file.has(demo, f"obs/{key}"):
            obs[key] = file.read(demo, f"obs/{key}")
            if file.has(demo, f"next_obs/{key}"):
                then[key] = file.read(demo, f"next_obs/{key}")
            else:
                then[key] = np.concatenate([obs[key][1:], obs[key][-1:]])
    reached = arrays["success"]
    ends = reached | (np.arange(len(reached)) == len(reached) - 1)
    writer.add(
        obs,
        file.read(demo, "actions"),
        file.read(demo, "states"),
        file.read(demo, "rewards") if file.has(demo, "rewards") else reached.astype(np.float64),
        file.read(demo, "dones") if file.has(demo, "dones") else ends,
        next_obs=then,
        model_file=str(arrays["model"]),
        attrs={
            name: value
            for name, value in file.attrs(demo).items()
            if name not in ("num_samples", "model_file")
        },
        name=demo,
    )
    for key in source:
        if key not in _WRITTEN and isinstance(source[key], h5py.Dataset | h5py.Group):
            writer.copy(demo, source, key)
