"""Draw the states of demonstrations and episodes, for videos that are larger than what
a policy sees.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.restore import Trajectory, read_trajectory
from fibopolicy.envs import SimState, from_env_args
from fibopolicy.envs.base import camera_keys
from fibopolicy.envs.perturbations import PerturbedEnv
from fibopolicy.envs.rendering import ImageSize, Quality
from fibopolicy.errors import UserError
from fibopolicy.utils.processes import checked_workers, simulator_pool

#: Frames per second of a video, at most; Meta-World simulates 80 steps per second.
MAX_FPS = 20.0


@dataclass(frozen=True)
class Drawn:
    """A trajectory as frames.

    Args:
        frames: uint8 `(T, H, W, 3)`, all cameras side by side.
        fps: frames per second of real time.
        success: whether the goal was met in one of them.
    """

    frames: NDArray[np.uint8]
    fps: float
    success: bool


def view_size(shape: Sequence[int], height: int) -> tuple[int, int]:
    """(height, width) of a view of this height, in the proportions of a camera's frames
    of shape (h, w, ...), pixels.
    """
    return height, round(height * shape[1] / shape[0])


def draw_states(
    env_args: Mapping[str, Any],
    trajectories: Sequence[Trajectory],
    image_size: ImageSize,
    *,
    cameras: tuple[str, ...] | None = None,
    quality: Quality = "fast",
    max_frames: int | None = None,
    workers: int | None = None,
) -> list[Drawn]:
    """Restore the states of trajectories and draw them, at most `MAX_FPS` per second.

    A trajectory with as many actions as states has one more frame: what its last action
    leads to.

    Args:
        env_args: the task.
        image_size: pixels, as environments take it; all views must have one height.
        cameras: their names; the task's by default.
        max_frames: largest number of frames of each trajectory; of longer ones it
            leaves out states evenly, so that their videos are faster than real time.
        quality: render quality. In software, "full" takes ten times as long.
        workers: processes, one simulator each; as many as cores by default.

    Returns:
        the trajectories as frames, which lie in temporary files.

    Raises:
        UserError: the task cannot be made, a state does not fit it, or no OpenGL
            context can be made.
    """
    options: dict[str, Any] = {"image_size": image_size, "quality": quality}
    if cameras is not None:
        options["cameras"] = cameras
    workers = checked_workers(workers, len(trajectories))
    with (
        tempfile.TemporaryDirectory(prefix="fibopolicy-video-") as folder,
        simulator_pool(workers, _start_worker, dict(env_args), options) as pool,
        tqdm(total=len(trajectories), desc="draw", unit="clip", disable=None) as bar,
    ):
        paths = [Path(folder) / f"{i}.npy" for i in range(len(trajectories))]
        jobs = [
            pool.submit(_draw, trajectory, path, max_frames)
            for trajectory, path in zip(trajectories, paths, strict=True)
        ]
        drawn = []
        for job, path in zip(jobs, paths, strict=True):
            fps, success = job.result()
            # The mapping outlives the file.
            drawn.append(Drawn(np.load(path, mmap_mode="r"), fps, success))
            bar.update()
    return drawn


def draw_demos(
    file: DemoFile,
    demos: Sequence[str],
    height: int,
    *,
    cameras: tuple[str, ...] | None = None,
    max_frames: int | None = None,
    workers: int | None = None,
) -> list[Drawn]:
    """Draw demonstrations from their states; a demonstration is a success if its
    states meet the goal.

    Args:
        height: height of each view, pixels.
        cameras: their names; those of the stored frames by default, else the task's.
        max_frames: largest number of frames of each, see `draw_states`.

    Raises:
        UserError: what `read_trajectory` and `draw_states` raise.
    """
    stored = {camera_of(key): file.image_shape(key) for key in file.image_keys}
    if cameras is None and stored:
        cameras = tuple(stored)
    size: ImageSize = height
    if cameras is not None:
        size = {name: view_size(stored.get(name, (1, 1)), height) for name in cameras}
    trajectories = [read_trajectory(file, demo) for demo in demos]
    with file.named():
        return draw_states(
            file.env_args,
            trajectories,
            size,
            cameras=cameras,
            max_frames=max_frames,
            workers=workers,
        )


def camera_of(key: str) -> str:
    """The camera that an observation key names: "front" of "front_image" or "front_rgb"."""
    return key.removesuffix("_image").removesuffix("_rgb")


# In a worker


_make_env: Callable[[], PerturbedEnv]


def _start_worker(env_args: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    global _make_env

    @functools.cache
    def _make_env() -> PerturbedEnv:  # on first use, so that its errors reach the parent
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the parent has issued them
            return PerturbedEnv(from_env_args(env_args, **options))


def _draw(trajectory: Trajectory, path: Path, max_frames: int | None) -> tuple[float, bool]:
    """Write the frames as a .npy file; returns frames per second and success."""
    env = _make_env()
    every = max(1, round(env.control_hz / MAX_FPS))
    count = len(trajectory.states)
    steps = sorted({*range(0, count, every), count - 1})
    if max_frames is not None and len(steps) > max_frames:
        steps = np.linspace(0, count - 1, max_frames).round().astype(int).tolist()
    acts = len(trajectory.actions) == count
    if not (cameras := camera_keys(env)):
        raise UserError(f"{env.task_id} has no camera, so there is nothing to film")
    first = trajectory.state(env, 0)
    model = first.model
    env.set_state(first)  # without the perturbation of the trajectory before
    if trajectory.perturbation is not None:
        env.perturb(trajectory.perturbation, trajectory.index)
    success = False
    frames: NDArray[np.uint8] | None = None
    for i in range(len(steps) + acts):
        if i < len(steps):
            obs = env.restore(SimState(model, trajectory.states[steps[i]]), steps[i])
        else:
            env.advance(trajectory.actions[-1])
            obs = env.observe()
        success = success or env.success()
        frame = np.concatenate([obs[camera] for camera in cameras], axis=1)
        if frames is None:
            shape = (len(steps) + acts, *frame.shape)
            frames = np.lib.format.open_memmap(path, "w+", np.uint8, shape)  # type: ignore[no-untyped-call]
        frames[i] = frame
    return env.control_hz / every, success
