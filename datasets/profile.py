"""Where the time of a batch goes: `fibopolicy profile data`."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.datasets.cache import FrameCache
from fibopolicy.datasets.hdf5 import DemoFile
from fibopolicy.datasets.windows import Mixture, Windows
from fibopolicy.utils.files import cache_home


@dataclass(frozen=True)
class Part:
    """The time of one part of the work.

    Attributes:
        seconds: median over turns, and its quartiles.
        share: share of the whole, in [0, 1].
    """

    name: str
    seconds: float
    spread: tuple[float, float]
    share: float


@dataclass(frozen=True)
class DataProfile:
    """Batches of a dataset, drawn in the order of training.

    Attributes:
        batch_bytes: bytes of one batch.
        samples_per_s, mb_per_s: samples and MB per second of ready batches; MB are 10^6
            bytes.
        cache_bytes, cache_seconds: building a new frame cache from the files, which the
            system may hold in memory.
    """

    batch_size: int
    batch_bytes: int
    samples_per_s: float
    mb_per_s: float
    parts: Sequence[Part]
    cache_bytes: int
    cache_seconds: float


def profile_data(dataset: Windows, *, batch_size: int, turns: int, seed: int = 0) -> DataProfile:
    """Time `turns` batches after a few warm-up batches, then time building the cache in
    a temporary folder.
    """
    seconds: dict[str, list[float]] = {}
    size = 0
    with _timed_frames() as spent:
        for turn in range(-5, turns):
            spent.clear()
            began = time.perf_counter()
            indices = dataset.indices(batch_size, seed, turn + 5)
            chosen = time.perf_counter()
            batch = dataset.batch(indices)
            whole = time.perf_counter() - began
            if turn >= 0:
                parts = {
                    "choosing samples": chosen - began,
                    **{f"frames of {camera}": t for camera, t in spent.items()},
                }
                for name, value in {
                    **parts,
                    "vectors and actions": whole - sum(parts.values()),
                    "batch": whole,
                }.items():
                    seconds.setdefault(name, []).append(value)
                size = sum(
                    array.nbytes
                    for array in (*batch["obs"].values(), batch["actions"], batch["action_mask"])
                )
    whole = statistics.median(seconds["batch"])
    cache_bytes, cache_seconds = _build_caches(dataset)
    return DataProfile(
        batch_size,
        size,
        batch_size / whole,
        size / whole / 1e6,
        shares(seconds, "batch"),
        cache_bytes,
        cache_seconds,
    )


def shares(seconds: dict[str, list[float]], whole: str) -> list[Part]:
    """Medians and quartiles over turns, each as a share of the median of `whole`."""
    total = statistics.median(seconds[whole])
    parts = []
    for name, values in seconds.items():
        low, median, high = np.percentile(values, [25, 50, 75]).tolist()
        parts.append(Part(name, median, (low, high), median / total))
    return parts


def data_table(profile: DataProfile) -> str:
    """A profile as a Markdown table and a few lines."""
    lines = parts_table(profile.parts)
    lines += [
        "",
        (
            f"{profile.samples_per_s:.0f} samples/s, {profile.mb_per_s:.0f} MB/s in batches of"
            f" {profile.batch_size}"
        ),
    ]
    if profile.cache_bytes:
        rate = profile.cache_bytes / max(profile.cache_seconds, 1e-9) / 1e6
        lines.append(
            f"frame cache: {profile.cache_bytes / 1e6:.0f} MB, built once in"
            f" {profile.cache_seconds:.2f} s ({rate:.0f} MB/s)"
        )
    return "\n".join(lines)


def parts_table(parts: Sequence[Part]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| part | ms (quartiles) | share |", "|---|---|---|"]
    for part in parts:
        low, high = (1e3 * value for value in part.spread)
        lines.append(
            f"| {part.name} | {1e3 * part.seconds:.3f} ({low:.3f}-{high:.3f}) | {part.share:.1%} |"
        )
    return lines


@contextmanager
def _timed_frames() -> Iterator[dict[str, float]]:
    """Within it, seconds per camera that frame caches have spent since the dict was
    last cleared.
    """
    spent: dict[str, float] = {}
    gather = FrameCache.gather

    def timed(self: FrameCache, camera: str, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        began = time.perf_counter()
        frames = gather(self, camera, indices)
        spent[camera] = spent.get(camera, 0.0) + time.perf_counter() - began
        return frames

    FrameCache.gather = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        FrameCache.gather = gather  # type: ignore[method-assign]


def _build_caches(dataset: Windows) -> tuple[int, float]:
    """Bytes and seconds of the frame caches of all files, built next to the usual ones,
    which means on the same disk.
    """
    if not dataset.cameras:
        return 0, 0.0
    cache_home().mkdir(parents=True, exist_ok=True)
    size, spent = 0, 0.0
    for part in dataset.parts if isinstance(dataset, Mixture) else (dataset,):
        with (
            tempfile.TemporaryDirectory(prefix="profile-", dir=cache_home()) as folder,
            DemoFile(part.path) as file,
        ):
            began = time.perf_counter()
            cache: Any = FrameCache(file, part.demos, part.cameras, folder)
            spent += time.perf_counter() - began
            size += sum(os.path.getsize(path) for path in cache.path.glob("*.uint8"))
    return size, spent
