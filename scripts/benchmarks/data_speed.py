"""Batches per second, against robomimic's SequenceDataset and DataLoader.

    python scripts/benchmarks/data_speed.py --dataset lift_human.hdf5 \\
        --out docs/benchmarks/data_<hardware>_<date>

Batches of 16 windows of 10 steps, two cameras of 84 x 84, proprioception and actions,
as torch tensors on the CPU with images in uint8, as both libraries' loops have them
before the transfer to the device. robomimic 0.3 runs in its three cache modes, with the
settings of its BC-RNN (seq_length 10, padded, no next_obs, no worker processes). Every
contender has its own process with one thread. They take turns, and each turn draws
whole epochs in random order. Ratios are medians over turns, with quartiles, of
processor time, which other work on the machine hardly changes, and of wall time. Memory
is that of each process after all turns, less that of the same process before it opened
the file. Ours includes the pages of the mapped cache, which the system may reclaim.
Linux only.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import results
from results import ratio_text, spread
from usage import resident_mb

CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")
VECTORS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
WINDOW, BATCH = 10, 16
THEIRS = {"None": None, "low_dim": "low_dim", "all": "all"}
#: Least ratio of our rate to theirs.
TARGETS = {"None": 10.0, "low_dim": 5.0, "all": 1.0}


class Ours:
    def __init__(self, path: Path, cache: str) -> None:
        from fibopolicy.datasets import WindowDataset

        self.dataset = WindowDataset(
            path, cameras=CAMERAS, vectors=VECTORS, horizon=WINDOW, sequence=True, cache_dir=cache
        )
        self.step = 0

    def epoch(self) -> Iterator[int]:
        import torch

        from fibopolicy.training.data import to_device

        for _ in range(len(self.dataset) // BATCH):
            batch = to_device(
                self.dataset.batch(self.dataset.indices(BATCH, 0, self.step)), torch.device("cpu")
            )
            self.step += 1
            yield len(batch["actions"])


class Theirs:
    def __init__(self, path: Path, mode: str | None) -> None:
        import robomimic.utils.obs_utils as obs_utils
        from robomimic.utils.dataset import SequenceDataset
        from torch.utils.data import DataLoader

        obs_utils.initialize_obs_utils_with_obs_specs(
            {"obs": {"rgb": list(CAMERAS), "low_dim": list(VECTORS)}}
        )
        dataset = SequenceDataset(
            hdf5_path=str(path),
            obs_keys=(*CAMERAS, *VECTORS),
            dataset_keys=("actions", "rewards", "dones"),
            seq_length=WINDOW,
            hdf5_cache_mode=mode,
            load_next_obs=False,
        )
        self.loader = DataLoader(
            dataset, batch_size=BATCH, shuffle=True, num_workers=0, drop_last=True
        )

    def epoch(self) -> Iterator[int]:
        for batch in self.loader:
            yield len(batch["actions"])


def serve(connection: Connection, kind: str, path: Path, cache: str) -> None:
    """A contender's process: opens the file, then draws whole epochs for the requested
    seconds of processor time.
    """
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    from fibopolicy.utils.imports import make_torchvision_importable

    torch.set_num_threads(1)
    make_torchvision_importable()
    import robomimic.utils.dataset  # noqa: F401

    before = resident_mb()
    began = time.perf_counter()
    with open(os.devnull, "w", encoding="utf-8") as sink:
        os.dup2(sink.fileno(), 1)  # robomimic prints
        contender: Any = Ours(path, cache) if kind == "fibopolicy" else Theirs(path, THEIRS[kind])
    connection.send(time.perf_counter() - began)
    while (least := connection.recv()) is not None:
        samples, began, busy = 0, time.perf_counter(), time.process_time()
        while time.process_time() - busy < least:
            samples += sum(contender.epoch())
        connection.send(
            (samples / (time.process_time() - busy), samples / (time.perf_counter() - began))
        )
    connection.send(
        {
            name: round(now - was)
            for (name, now), was in zip(resident_mb().items(), before.values(), strict=True)
        }
    )


def measure(path: Path, turns: int, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="fibopolicy-data-") as cache:
        names = ("fibopolicy", *THEIRS)
        pipes = {}
        opened = {}
        for name in names:
            pipes[name], theirs = multiprocessing.Pipe()
            multiprocessing.Process(
                target=serve, args=(theirs, name, path, cache), daemon=True
            ).start()
            opened[name] = pipes[name].recv()
        # by processor time, by wall time
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for turn in range(turns + 1):
            for name in names:
                pipes[name].send(seconds)
                rate = pipes[name].recv()
                if turn:  # the first warms up
                    rates[name].append(rate)
        memory = {}
        for name in names:
            pipes[name].send(None)
            memory[name] = pipes[name].recv()
    every = {name: np.array(values) for name, values in rates.items()}  # (turns, 2)
    return {
        clock: {
            "samples_per_s": {name: spread(values[:, column], 2) for name, values in every.items()},
            "ratios": {
                name: spread(every["fibopolicy"][:, column] / every[name][:, column], 2)
                for name in THEIRS
            },
        }
        for column, clock in enumerate(("processor_time", "wall_time"))
    } | {
        "memory_mb": memory,
        "opening_s": {name: round(value, 2) for name, value in opened.items()},
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        (
            "| | samples/s | fibopolicy over it (quartiles) | in wall time | target | MB resident |"
            " MB anonymous | opening s |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    busy, wall = result["processor_time"], result["wall_time"]
    for name, rate in busy["samples_per_s"].items():
        by_processor = by_wall = target = ""
        if name in busy["ratios"]:
            by_processor, by_wall = (ratio_text(clock["ratios"][name]) for clock in (busy, wall))
            met = busy["ratios"][name]["median"] >= TARGETS[name]
            target = f">= {TARGETS[name]:.0f}: {'met' if met else 'missed'}"
        memory = result["memory_mb"][name]
        label = name if name == "fibopolicy" else f"robomimic, {name}"
        lines.append(
            f"| {label} | {rate['median']:.0f} | {by_processor} | {by_wall} | {target} |"
            f" {memory['resident']} | {memory['anonymous']} | {result['opening_s'][name]} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument(
        "--dataset",
        type=Path,
        required=True,
        help="robomimic file with agentview and robot0_eye_in_hand",
    )
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.5,
        help="least processor time of each contender per turn",
    )
    options = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    began = time.perf_counter()
    result = measure(options.dataset.expanduser().resolve(), options.turns, options.seconds)
    command = "python scripts/benchmarks/data_speed.py --dataset lift_human.hdf5"
    settings = {
        "turns": options.turns,
        "seconds": options.seconds,
        "window": WINDOW,
        "batch": BATCH,
        "seed": 0,
    }
    result |= results.described(__doc__, command, settings, began)
    print(table(result))
    if options.out:
        page = results.page(
            "Ready batches", result, "two cores", ("robomimic", "torch", "h5py"), table(result)
        )
        results.write(options.out, result, page)


if __name__ == "__main__":
    main()
