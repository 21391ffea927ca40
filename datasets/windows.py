"""Training samples: a window of observations and the actions that follow, cut from
demonstrations.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from fibopolicy.datasets.cache import FrameCache
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.sampling import batch_indices
from fibopolicy.datasets.validate import clipped, read_valid
from fibopolicy.errors import UserError
from fibopolicy.utils.files import StrPath

Floats = NDArray[np.float32]


class Batch(TypedDict):
    """B windows, as numpy arrays that own their memory.

    Attributes:
        obs: per camera uint8 `(B, T_o, H, W, 3)`, per vector float32 `(B, T_o, D)`,
            oldest first.
        actions: float32 `(B, horizon, A)`.
        action_mask: bool `(B, horizon)`, false where an action is padding after the end
            of the demo.
    """

    obs: dict[str, NDArray[Any]]
    actions: Floats
    action_mask: NDArray[np.bool_]


class WindowDataset:
    """Every step t of every selected demo is one sample: what was seen up to t, and the
    actions from t on.

    The observations are those of steps t-n_obs_steps+1 .. t, and steps before the first
    repeat the first; the actions are those of t .. t+horizon-1, and steps after the last
    repeat the last. A window never reaches into another demo. Sample i is step i of the
    demos in a row.

    Frames lie in a memory-mapped cache, so that memory does not grow with them; vectors
    and actions lie in memory.

    Args:
        path: a robomimic HDF5 file, or one that is open and stays so; it is validated
            first.
        cameras, vectors: observation keys, in the order in which `batch` gives them.
        filter_key: which demos, `None` for all.
        horizon: actions per sample, at least 1.
        n_obs_steps: observations per sample up to t, at least 1.
        sequence: go on with the observations of the actions after t, so that T_o is
            n_obs_steps + horizon - 1 instead of n_obs_steps; those after the demo's last step
            repeat it.
        cache_dir: the folder of the frame cache, see `FrameCache`.

    Attributes:
        env_args: the task, as the file gives it.
        warnings: the file's harmless oddities, one line each, which names it.
        demos: the selected demos.
        left_out: observation keys of the file that are neither cameras nor vectors
            here.
        image_shapes: (H, W, 3) per camera.
        vector_dims: D per vector key.
        action_dim: A.
        actions: of all steps of the selected demos, float32 `(len, A)`; clipped to [-1,
            1] where the task's simulator does so.
        stats: per vector key and for "actions": `min`, `max`, `mean` and (population)
            `std`, float64 `(D,)`, over all steps of the selected demos.

    Raises:
        UserError: the file, a key or an option is at fault, see `DemoFile` and
            `validate`.
    """

    def __init__(
        self,
        path: StrPath | DemoFile,
        *,
        cameras: Sequence[str],
        vectors: Sequence[str],
        filter_key: str | None = None,
        horizon: int,
        n_obs_steps: int = 1,
        sequence: bool = False,
        cache_dir: StrPath | None = None,
    ) -> None:
        for name, value in (("horizon", horizon), ("n_obs_steps", n_obs_steps)):
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        self.path = path.path if isinstance(path, DemoFile) else Path(path)
        self.cameras, self.vectors = tuple(cameras), tuple(vectors)
        self.horizon, self.n_obs_steps, self.sequence = horizon, n_obs_steps, sequence
        with nullcontext(path) if isinstance(path, DemoFile) else DemoFile(path) as file:
            self.env_args: dict[str, Any] = file.env_args
            self.warnings = tuple(f"{self.path}: {oddity}" for oddity in file.warnings)
            self.left_out = tuple(key for key in file.obs if key not in (*cameras, *vectors))
            self.demos = file.select(filter_key)
            arrays: dict[str, list[Floats]] = {key: [] for key in (*vectors, "actions")}
            for values in read_valid(file, cameras, vectors, self.demos):
                for key, array in values.items():
                    arrays[key].append(array.astype(np.float32))
            self.image_shapes = {camera: file.image_shape(camera) for camera in cameras}
            self.vector_dims = {key: file.vector_dim(key) for key in vectors}
            self.action_dim = file.action_dim
            self._vectors = {key: np.concatenate(arrays[key]) for key in vectors}  # (F, D) each
            with file.named():
                # (F, A)
                self.actions, warning = clipped(np.concatenate(arrays["actions"]), file.env_args)
            if warning is not None:
                self.warnings = (*self.warnings, f"{self.path}: {warning}")
            # (demos,) one past each demo's last step
            self._ends = np.cumsum([file.length(demo) for demo in self.demos])
            self._starts = np.concatenate([[0], self._ends[:-1]])
            self._frames = FrameCache(file, self.demos, cameras, cache_dir)
        self.stats = {
            key: _stats(values)
            for key, values in {**self._vectors, "actions": self.actions}.items()
        }

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def num_demos(self) -> int:
        """How many demos are selected."""
        return len(self.demos)

    def indices(self, batch_size: int, seed: int, step: int) -> NDArray[np.int64]:
        """The `(batch_size,)` samples of global step `step >= 0`: a function of these
        numbers alone.
        """
        return batch_indices(len(self), batch_size, seed, step)

    def batch(self, indices: NDArray[np.int64]) -> Batch:
        """The samples of `indices` `(B,)`, each in 0 .. len - 1."""
        demo = np.searchsorted(self._ends, indices, side="right")  # (B,)
        # (B, T_o)
        seen = indices[:, None] + np.arange(
            1 - self.n_obs_steps, self.horizon if self.sequence else 1
        )
        seen = np.clip(seen, self._starts[demo][:, None], self._ends[demo][:, None] - 1)
        then = indices[:, None] + np.arange(self.horizon)  # (B, horizon)
        mask = then < self._ends[demo][:, None]
        then = np.minimum(then, self._ends[demo][:, None] - 1)
        images = {camera: self._frames.gather(camera, seen) for camera in self.cameras}
        vectors = {key: values[seen] for key, values in self._vectors.items()}
        return {"obs": {**images, **vectors}, "actions": self.actions[then], "action_mask": mask}


def share_at_limits(actions: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    """Of actions `(n, A)` per dimension `(A,)`: the share that equals its least or its
    greatest value, 1 where there are two.
    """
    at_a_limit = (actions == actions.min(axis=0)) | (actions == actions.max(axis=0))
    return np.asarray(at_a_limit.mean(axis=0), dtype=np.float64)


def _stats(values: Floats) -> dict[str, NDArray[np.float64]]:
    exact = values.astype(np.float64)
    return {
        "min": exact.min(axis=0),
        "max": exact.max(axis=0),
        "mean": exact.mean(axis=0),
        "std": exact.std(axis=0),
    }
