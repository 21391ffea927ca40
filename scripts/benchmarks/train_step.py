"""One training step of the same network: our loop against robomimic's.

    python scripts/benchmarks/train_step.py --dataset lift_human.hdf5 \\
        --out docs/benchmarks/train_step_<hardware>_<date>

BC-RNN-GMM as robomimic 0.3 builds it by default (LSTM 2 x 400, MLP 1024-1024, 5 modes),
its ResNet-18 with 32 keypoints and 64 features per camera, two cameras of 84 x 84,
proprioception, sequences of 10, batch 16, no cropping. robomimic: `run_epoch`, its
Adam, on its DataLoader with the file in memory ("all"). Ours:
`fibopolicy.training.trainer.train`, with AdamW, gradient clipping and an average of the
weights, which robomimic does not have. Each runs in its own process, in turns.

The `fibopolicy` command changes two settings before torch is loaded: waiting threads
sleep, and freed memory is kept. "robomimic, same process settings" has them too, so
that it differs from ours only in the loop.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import results
from results import ratio_text, spread

CAMERAS = ["agentview_image", "robot0_eye_in_hand_image"]
VECTORS = ["robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"]
WINDOW, BATCH = 10, 16
OURS, PLAIN, SAME = "fibopolicy", "robomimic", "robomimic, same process settings"
DATA_SHARE = 0.05


def theirs(path: Path, connection: Connection) -> None:
    """robomimic's loop; runs the requested number of steps at a time."""
    import robomimic.utils.obs_utils as obs_utils
    import torch
    from robomimic.algo import algo_factory
    from robomimic.config import config_factory
    from robomimic.utils.file_utils import get_shape_metadata_from_dataset
    from robomimic.utils.train_utils import load_data_for_training, run_epoch
    from torch.utils.data import DataLoader

    config = config_factory("bc")
    config.train.data, config.train.batch_size, config.train.seq_length = str(path), BATCH, WINDOW
    config.train.hdf5_cache_mode = "all"
    config.algo.gmm.enabled = config.algo.rnn.enabled = True
    config.algo.rnn.horizon = WINDOW
    config.observation.modalities.obs.rgb, config.observation.modalities.obs.low_dim = (
        CAMERAS,
        VECTORS,
    )
    rgb = config.observation.encoder.rgb
    rgb.core_class, rgb.obs_randomizer_class = "VisualCore", None
    rgb.core_kwargs.backbone_class, rgb.core_kwargs.pool_class = "ResNet18Conv", "SpatialSoftmax"
    rgb.core_kwargs.feature_dimension = 64
    rgb.core_kwargs.backbone_kwargs.pretrained = (
        rgb.core_kwargs.backbone_kwargs.input_coord_conv
    ) = False
    rgb.core_kwargs.pool_kwargs.num_kp = 32
    rgb.core_kwargs.pool_kwargs.learnable_temperature = False
    rgb.core_kwargs.pool_kwargs.temperature, rgb.core_kwargs.pool_kwargs.noise_std = 1.0, 0.0
    obs_utils.initialize_obs_utils_with_config(config)
    shapes = get_shape_metadata_from_dataset(str(path), all_obs_keys=[*CAMERAS, *VECTORS])
    model = algo_factory("bc", config, shapes["all_shapes"], shapes["ac_dim"], torch.device("cpu"))
    dataset, _ = load_data_for_training(config, obs_keys=shapes["all_obs_keys"])
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=0, drop_last=True)
    connection.send(sum(p.numel() for p in model.nets.parameters()))
    while (steps := connection.recv()) is not None:
        began, busy = time.perf_counter(), time.process_time()
        log = run_epoch(model, loader, epoch=1, num_steps=steps)
        seconds, busy = time.perf_counter() - began, time.process_time() - busy
        connection.send((seconds / steps, busy / steps, 60 * log["Time_Data_Loading"] / seconds))


def ours(path: Path, connection: Connection) -> None:
    """Our training, paused before each step until more steps are requested."""
    from fibopolicy.datasets import WindowDataset
    from fibopolicy.policies import PolicyConfig
    from fibopolicy.training import OptimizerConfig, TrainConfig
    from fibopolicy.training.trainer import train

    held: dict[str, Any] = {"left": 0, "asked": 0, "began": 0.0, "busy": 0.0, "data": 0.0}
    indices, batch = WindowDataset.indices, WindowDataset.batch

    def gate(self: WindowDataset, batch_size: int, seed: int, step: int) -> Any:
        if held["left"] == 0:
            if held["asked"]:
                seconds, busy = (
                    time.perf_counter() - held["began"],
                    time.process_time() - held["busy"],
                )
                connection.send(
                    (seconds / held["asked"], busy / held["asked"], held["data"] / seconds)
                )
            steps = connection.recv()
            if steps is None:
                raise SystemExit
            held.update(
                left=steps,
                asked=steps,
                began=time.perf_counter(),
                busy=time.process_time(),
                data=0.0,
            )
        held["left"] -= 1
        return timed(indices, self, batch_size, seed, step)

    def timed(read: Callable[..., Any], *arguments: Any) -> Any:
        began = time.perf_counter()
        result = read(*arguments)
        held["data"] += time.perf_counter() - began
        return result

    with tempfile.TemporaryDirectory(prefix="fibopolicy-step-") as folder:
        out = Path(folder) / "run"
        config = TrainConfig(
            path,
            out,
            cameras=tuple(CAMERAS),
            vectors=tuple(VECTORS),
            filter_key="all",
            policy=PolicyConfig(policy="bc_rnn_gmm", encoder="resnet18", horizon=WINDOW, layers=2),
            optimizer=OptimizerConfig(steps=10**6, batch_size=BATCH, lr=1e-4),
            log_every=1,
            checkpoint_every=10**6,
            device="cpu",
        )
        from fibopolicy.policies import build_policy
        from fibopolicy.training.data import open_dataset, shapes_of

        policy = build_policy(config.policy, shapes_of(open_dataset(config)))
        connection.send(sum(p.numel() for p in policy.parameters()))
        del policy
        WindowDataset.indices = gate  # type: ignore[method-assign]
        WindowDataset.batch = lambda *arguments: timed(batch, *arguments)  # type: ignore[method-assign]
        train(config)


def serve(connection: Connection, kind: str, path: Path, threads: int) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    warnings.simplefilter("ignore")
    if kind != PLAIN:
        from fibopolicy.utils.processes import set_up

        set_up()
    import torch

    from fibopolicy.utils.imports import make_torchvision_importable

    torch.set_num_threads(threads)
    make_torchvision_importable()
    with open(os.devnull, "w", encoding="utf-8") as sink:
        os.dup2(sink.fileno(), 1)  # robomimic prints
    contender: Callable[[Path, Connection], None] = ours if kind == OURS else theirs
    contender(path, connection)


def measure(path: Path, turns: int, steps: int, threads: int) -> dict[str, Any]:
    names = (OURS, PLAIN, SAME)
    pipes, processes, parameters = {}, [], {}
    for name in names:
        pipes[name], end = multiprocessing.Pipe()
        processes.append(
            multiprocessing.Process(target=serve, args=(end, name, path, threads), daemon=True)
        )
        processes[-1].start()
    for name in names:
        parameters[name] = pipes[name].recv()
    if len(set(parameters.values())) > 1:
        raise SystemExit(f"the networks differ: {parameters} parameters")
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for turn in range(turns + 1):
        for name in names:
            pipes[name].send(steps)
            answer = pipes[name].recv()
            if turn:  # the first warms up
                seen[name].append(answer)
    for name, process in zip(names, processes, strict=True):
        pipes[name].send(None)
        process.join()
    every = {name: np.array(rows) for name, rows in seen.items()}  # (turns, 3)
    return {
        "parameters": parameters[OURS],
        "data_share": {name: spread(rows[:, 2], 4) for name, rows in every.items()},
    } | {
        clock: {
            "seconds_per_step": {name: spread(rows[:, column], 4) for name, rows in every.items()},
            "ratios": {
                name: spread(every[name][:, column] / every[OURS][:, column], 4)
                for name in (PLAIN, SAME)
            },
        }
        for column, clock in enumerate(("wall_time", "processor_time"))
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        (
            "| | s/step | its time over fibopolicy's (quartiles) | in processor time | waiting for"
            " data |"
        ),
        "|---|---|---|---|---|",
    ]
    wall, busy = result["wall_time"], result["processor_time"]
    for name, took in wall["seconds_per_step"].items():
        by_wall, by_processor = (ratio_text(clock["ratios"].get(name)) for clock in (wall, busy))
        lines.append(
            f"| {name} | {took['median']:.2f} | {by_wall} | {by_processor} |"
            f" {100 * result['data_share'][name]['median']:.2f} % |"
        )
    slower, share = wall["ratios"][PLAIN]["median"] < 1, result["data_share"][OURS]["median"]
    lines += ["", f"At least as fast as robomimic's loop: {'missed' if slower else 'met'}."]
    lines += [
        f"Waiting for data under {100 * DATA_SHARE:.0f} %:"
        f" {'met' if share < DATA_SHARE else 'missed'}."
    ]
    return "\n".join(lines)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument(
        "--dataset",
        type=Path,
        required=True,
        help="robomimic file with agentview and robot0_eye_in_hand",
    )
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="steps of each contender per turn")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    began = time.perf_counter()
    result = measure(
        options.dataset.expanduser().resolve(), options.turns, options.steps, options.threads
    )
    command = "python scripts/benchmarks/train_step.py --dataset lift_human.hdf5"
    settings = {
        **{name: getattr(options, name) for name in ("turns", "steps", "threads")},
        "window": WINDOW,
        "batch": BATCH,
    }
    result |= results.described(__doc__, command, settings, began)
    print(table(result))
    if options.out:
        page = results.page(
            "One training step",
            result,
            f"{options.threads} threads",
            ("robomimic", "torch"),
            table(result),
        )
        results.write(options.out, result, page)


if __name__ == "__main__":
    main()
