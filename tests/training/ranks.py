"""Two processes of one training, for tests; and an encoder with a weight that no loss
reaches.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fibopolicy.encoders import Encoder, register_encoder
from fibopolicy.errors import UserError
from fibopolicy.training import TrainConfig, trainer

#: Seconds that a test waits for both processes, which should have ended long before.
PATIENCE = 300.0


@register_encoder("tiny_cnn")
class TinyCNN(Encoder):
    def __init__(self, *, image_size: tuple[int, int], batch_norm: bool = False) -> None:
        super().__init__()
        # Without biases: before a norm their gradient is rounding alone, which Adam scales.
        convolutions = nn.Conv2d(3, 8, 6, 6, bias=False), nn.Conv2d(8, 8, 2, bias=False)
        norms = [nn.BatchNorm2d(8) if batch_norm else nn.GroupNorm(2, 8) for _ in range(2)]
        self.net = nn.Sequential(convolutions[0], norms[0], nn.ReLU(), convolutions[1], norms[1])
        self.unused = nn.Parameter(torch.zeros(3))
        self.output_dim = 8

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.net(images).flatten(2).transpose(1, 2)  # (B, 9, 8)
        return tokens, tokens[:, 1]


@dataclass(frozen=True)
class Call:
    """One `train(config, **options)` of both processes; with `dies_at`, rank 1 is
    killed at that step.
    """

    config: TrainConfig
    options: dict[str, bool]
    dies_at: int | None = None


@dataclass(frozen=True)
class Outcome:
    """Per rank: how a call ended ("done", an error's text, or the code of a
    `SystemExit`), and all that the rank printed.
    """

    endings: tuple[list[object], list[object]]
    printed: tuple[str, str]
    exit_codes: tuple[int | None, int | None]


def in_two_processes(calls: Sequence[Call], folder: Path) -> Outcome:
    """Runs the calls one after the other, in two fresh processes that torchrun might
    have started.
    """
    context = multiprocessing.get_context("spawn")
    ports = [_free_port() for _ in calls]
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    logs = [folder / f"rank{rank}.txt" for rank in range(2)]
    processes = [
        context.Process(target=_work, args=(r, calls, ports, logs[r], pipes[r][1]))
        for r in range(2)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    endings: tuple[list[object], list[object]] = ([], [])
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.join()
    for (receiver, _), received in zip(pipes, endings, strict=True):
        with contextlib.suppress(EOFError):
            while True:
                received.append(receiver.recv())
    return Outcome(
        endings,
        (logs[0].read_text(), logs[1].read_text()),
        (processes[0].exitcode, processes[1].exitcode),
    )


def _work(rank: int, calls: Sequence[Call], ports: Sequence[int], log: Path, tell: Any) -> None:
    torch.set_num_threads(1)
    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    step = trainer.Trainer.train_step
    for call, port in zip(calls, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        mortal = _mortal(step, call.dies_at) if rank == 1 else step
        trainer.Trainer.train_step = mortal  # type: ignore[method-assign]
        try:
            trainer.train(call.config, **call.options)
            tell.send("done")
        except UserError as error:
            tell.send(str(error))
        except SystemExit as end:
            tell.send(end.code)


def _mortal(
    step: Callable[..., dict[str, float]], dies_at: int | None
) -> Callable[..., dict[str, float]]:
    def until_then(self: trainer.Trainer, number: int) -> dict[str, float]:
        if number == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, number)

    return until_then


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
