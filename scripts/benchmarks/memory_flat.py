"""Memory of a training process on a large dataset: makes a synthetic file, caches it,
and samples it at random.

    python scripts/benchmarks/memory_flat.py --gigabytes 2

Prints anonymous and total resident memory (the latter counts mapped pages of the cache)
of the process at each stage. Linux only. Needs twice the size on disk, in a temporary
folder that is removed at the end.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from usage import resident_mb

from fibopolicy.datasets import DemoWriter, WindowDataset, batch_indices

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
STEPS, SIDE, ACTION_DIM = 400, 84, 7


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the synthetic file")
    parser.add_argument(
        "--batches", type=int, default=2000, help="random batches of 16 windows of 10 frames"
    )
    parser.add_argument("--folder", type=Path, default=None, help="where the temporary files go")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="fibopolicy-memory-", dir=options.folder) as folder:
        path = Path(folder) / "synthetic.hdf5"
        write(path, options.gigabytes)
        print(f"{'file':<34}{path.stat().st_size / 1e9:8.2f} GB")
        report("start", resident_mb())
        with peak("building the cache"):
            dataset = WindowDataset(
                path,
                cameras=CAMERAS,
                vectors=("robot0_eef_pos",),
                horizon=8,
                n_obs_steps=10,
                cache_dir=Path(folder) / "cache",
            )
        report("cache built", resident_mb())
        began = time.perf_counter()
        with peak(f"{options.batches} random batches"):
            for step in range(options.batches):
                dataset.batch(batch_indices(len(dataset), 16, seed=0, step=step))
        rate = 16 * options.batches / (time.perf_counter() - began)
        report("after", resident_mb())
        print(
            f"{'windows':<34}{len(dataset):8d} of 10 x {len(CAMERAS)} frames, {rate:.0f} samples/s"
        )


def write(path: Path, gigabytes: float) -> None:
    random = np.random.default_rng(0)
    demos = max(1, round(gigabytes * 1e9 / (len(CAMERAS) * STEPS * SIDE * SIDE * 3)))
    with DemoWriter(
        path, {"env_name": "Synthetic", "env_version": "0", "type": 2, "env_kwargs": {}}
    ) as writer:
        for _ in range(demos):
            obs = {
                camera: random.integers(0, 256, (STEPS, SIDE, SIDE, 3), dtype=np.uint8)
                for camera in CAMERAS
            }
            obs["robot0_eef_pos"] = random.normal(size=(STEPS, 3))
            actions = random.uniform(-1, 1, (STEPS, ACTION_DIM))
            writer.add(obs, actions, np.zeros((STEPS, 32)), np.zeros(STEPS), np.zeros(STEPS))


@contextmanager
def peak(stage: str) -> Iterator[None]:
    """Print the peaks of anonymous and of total memory during the block, read every 5 ms."""
    highest, done = resident_mb(), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            highest.update(
                {name: max(highest[name], value) for name, value in resident_mb().items()}
            )

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        report(f"peak, {stage}", highest)


def report(stage: str, memory: dict[str, float]) -> None:
    print(
        f"{stage:<34}{memory['anonymous']:8.0f} MB anonymous {memory['resident']:8.0f} MB total",
        flush=True,
    )


if __name__ == "__main__":
    main()
