"""The batches of a run, prepared while the GPU computes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fibopolicy.datasets import Windows
from fibopolicy.training.config import ComputeConfig
from fibopolicy.training.data import mapped, parts_of
from fibopolicy.utils.gpu_memory import RUNS_PER_GPU

#: Batches that are prepared ahead on a GPU.
AHEAD = 2
#: Frames stay in GPU memory if they take at most this share of what is free, divided by
#: the runs of a study that share the GPU.
RESIDENT_SHARE = 0.25
_BLOCK = 64  # frames that are copied to the GPU at a time


class BatchLoader:
    """The batch of each step as tensors on a device.

    Neither argument changes a batch.

    Args:
        indices: the samples `(B,)` of a step.
        ahead: batches that a thread reads ahead of the step; with 0, a batch is read
            when it is asked for. For a GPU the thread puts them into pinned memory,
            from which they are copied while the GPU computes.
        frames: all frames of the dataset, see `resident_frames`; without them, those of
            a batch are read from the dataset.

    Attributes:
        frames: the same, or empty.
    """

    def __init__(
        self,
        dataset: Windows,
        indices: Callable[[int], NDArray[np.int64]],
        device: torch.device,
        *,
        ahead: int = 0,
        frames: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._dataset, self._indices, self._device = dataset, indices, device
        self._ahead, self.frames = ahead, frames or {}
        self._thread = ThreadPoolExecutor(1, initializer=self._use_device) if ahead else None
        self._futures: dict[int, Future[dict[str, Any]]] = {}

    def __call__(self, step: int) -> dict[str, Any]:
        if self._thread is None:
            batch = self._read(step)
        else:
            for number in range(step, step + 1 + self._ahead):
                if number not in self._futures:
                    self._futures[number] = self._thread.submit(self._read, number)
            batch = self._futures.pop(step).result()
        batch = mapped(batch, lambda x: x.to(self._device, non_blocking=True))
        for camera, frames in self.frames.items():
            batch["obs"][camera] = frames[batch["obs"][camera]]
        return batch

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _read(self, step: int) -> dict[str, Any]:
        arrays = self._dataset.batch(self._indices(step), frames=not self.frames)
        tensors = mapped(arrays, lambda x: torch.from_numpy(np.ascontiguousarray(x)))
        return mapped(tensors, Tensor.pin_memory) if self._device.type == "cuda" else tensors

    def _use_device(self) -> None:
        """Let the thread pin memory for this GPU, without starting the first one."""
        if self._device.index is not None and self._device.type == "cuda":
            torch.cuda.set_device(self._device)


def make_loader(
    dataset: Windows,
    indices: Callable[[int], NDArray[np.int64]],
    device: torch.device,
    compute: ComputeConfig,
) -> BatchLoader:
    """A loader for a device: on a GPU, with a thread, and with all frames if they fit."""
    if device.type != "cuda":
        return BatchLoader(dataset, indices, device)
    size = len(dataset) * sum(map(math.prod, dataset.image_shapes.values()))
    share = RESIDENT_SHARE / int(os.environ.get(RUNS_PER_GPU, "1"))
    frames = None
    if compute.frames_on_gpu and size <= share * torch.cuda.mem_get_info(device)[0]:
        with suppress(torch.OutOfMemoryError):  # another process took it meanwhile
            frames = resident_frames(dataset, device)
    return BatchLoader(dataset, indices, device, ahead=AHEAD, frames=frames)


def resident_frames(dataset: Windows, device: torch.device) -> dict[str, Tensor]:
    """All frames on a device, uint8 `(samples, H, W, 3)` per camera."""
    newest = parts_of(dataset)[0].n_obs_steps - 1  # in a window: the frame of its own step
    frames = {
        camera: torch.empty((len(dataset), *shape), dtype=torch.uint8, device=device)
        for camera, shape in dataset.image_shapes.items()
    }
    for start in range(0, len(dataset), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(dataset)))
        obs = dataset.batch(block)["obs"]
        for camera, resident in frames.items():
            own = np.ascontiguousarray(obs[camera][:, newest])
            resident[start : start + len(block)] = torch.from_numpy(own).to(device)
    return frames
