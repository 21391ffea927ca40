"""Callbacks of the training loop, in the main process: validation and rollouts of the
averaged weights. Neither changes the trained weights.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from fibopolicy.datasets import Windows
from fibopolicy.envs.registry import resolve, unavailable
from fibopolicy.errors import UserError, unknown
from fibopolicy.evaluation.config import EvaluateConfig
from fibopolicy.policies import Policy
from fibopolicy.policies.rng import batch_seed
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.training.checkpoint import TopKCheckpoints, save_weights
from fibopolicy.training.config import TrainConfig
from fibopolicy.training.data import to_device
from fibopolicy.utils.imports import import_object, is_import_path
from fibopolicy.utils.processes import WorkerProcess

_log = logging.getLogger(__name__)

#: Takes the number of a step, from 0, and metrics of the weights after it.
Write = Callable[[int, dict[str, float]], None]

#: Seed of the initial states of rollouts. It is unlikely for `fibopolicy evaluate`.
SEED = 730_001
#: Added to the niceness of rollouts, so that training has priority.
NICENESS = 5


class Callback:
    """Called after every step and at the end."""

    def after_step(self, steps: int) -> None:
        """Called after `steps` gradient steps."""

    def finish(self, steps: int) -> None:
        """Called after the last step."""

    def close(self) -> None:
        """Called at the end, also after an error."""


def check_callbacks(
    config: TrainConfig,
    dataset: Windows,
    validation: Windows | None,
    average: Policy,
    device: torch.device,
) -> None:
    """Check settings that would fail only during training.

    Raises:
        UserError: the task cannot be simulated, or the criterion is not a metric.
    """
    if config.rollouts.rollout_every is not None:
        task = config.rollouts.task
        if task is not None:
            task = resolve(task)
        elif (reason := unavailable(dataset.env_args)) is not None:
            raise UserError(f"--rollout-every: {reason}; or name a task with --task")
        if is_import_path(task := task or str(dataset.env_args["env_name"])):
            import_object("task", task)
    if validation is not None:
        metrics = validation_metrics(average, validation, samples=1, batch_size=1, device=device)
        if config.validation.criterion not in metrics:
            raise unknown("criterion", config.validation.criterion, metrics)


class Validation(Callback):
    """The loss of the averaged weights on held-out windows; keeps the best checkpoints."""

    def __init__(
        self,
        config: TrainConfig,
        average: Policy,
        dataset: Windows,
        write: Write,
        device: torch.device,
    ) -> None:
        self._config, self._average, self._dataset = config, average, dataset
        self._write, self._device = write, device
        validation = config.validation
        self._best = TopKCheckpoints(config.out, validation.keep_best, validation.criterion)

    def after_step(self, steps: int) -> None:
        optimizer, validation = self._config.optimizer, self._config.validation
        if steps % validation.validate_every and steps != optimizer.steps:
            return
        metrics = validation_metrics(
            self._average,
            self._dataset,
            samples=validation.validate_samples,
            batch_size=optimizer.batch_size,
            device=self._device,
        )
        self._write(steps - 1, metrics)
        self._best.update(steps, metrics, self._average)


def validation_metrics(
    policy: Policy,
    dataset: Windows,
    *,
    samples: int,
    batch_size: int,
    device: torch.device,
    seed: int = 0,
) -> dict[str, float]:
    """The loss and the metrics of `policy.loss`, as `validation_<name>`, without
    augmentation.

    Args:
        policy: in evaluation mode.
        samples: largest number of windows, evenly spread over the dataset.
        seed: seed of a loss that draws random numbers. Every call draws the same, so
            that losses of several steps compare. The random state of training is not
            changed.
    """
    count = min(samples, len(dataset))
    chosen = np.linspace(0, len(dataset) - 1, count).round().astype(np.int64)
    sums: dict[str, float] = {}
    total = 0.0
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        for start in range(0, count, batch_size):
            torch.manual_seed(batch_seed(seed, start))
            batch = to_device(dataset.batch(chosen[start : start + batch_size]), device)
            loss, metrics = policy.loss(batch)
            weight = float(policy.loss_denominator(batch))
            total += weight
            for name, value in {**metrics, "loss": float(loss)}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * weight
    return {f"validation_{name}": value / total for name, value in sums.items()}


class Rollouts(Callback):
    """Success rates of snapshots of the averaged weights, as metrics `rollout_...`.

    Another process evaluates a snapshot every `rollout_every` steps. A snapshot that is
    due while an evaluation runs is skipped, except at the end of training. The process
    ends with this one, even if this one is killed. A failed evaluation is logged and
    does not stop the training.

    Args:
        average: averaged weights, which change during training.
        start: gradient steps done before. An interrupted evaluation is resumed.
        done: steps whose results are logged already.
    """

    def __init__(
        self,
        config: TrainConfig,
        average: nn.Module,
        write: Write,
        device: torch.device,
        *,
        start: int,
        done: set[int],
    ) -> None:
        self._training, self._config = RunDirectory(config.out), config.rollouts
        self._run = RunDirectory(self._training.rollouts)
        self._average, self._write, self._device = average, write, device
        self._process: WorkerProcess | None = None
        self._result: Connection
        self._steps = 0  # of the weights that the process evaluates
        self._skipped = False
        steps = self._snapshot_steps()
        if 0 < steps <= start and steps - 1 not in done:
            self._begin(steps, resume=True)

    def after_step(self, steps: int) -> None:
        assert self._config.rollout_every is not None
        if self._process is not None and not self._process.is_alive():
            self._collect()
        if steps % self._config.rollout_every:
            return
        self._skipped = self._process is not None
        if self._skipped:
            message = "rollouts at step %d are skipped: those at step %d are still running"
            _log.info(message, steps, self._steps)
            return
        self._run.path.mkdir(exist_ok=True)
        shutil.copyfile(self._training.config, self._run.config)
        save_weights(self._run.ema, self._average, {"step": str(steps)})
        self._begin(steps, resume=False)

    def finish(self, steps: int) -> None:
        """Wait for running rollouts, and run the last ones if they were skipped."""
        if self._process is not None:
            _log.info("waiting for the rollouts of step %d", self._steps)
            self._collect()
        if self._skipped:
            self.after_step(steps)
            self._collect()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()

    def _begin(self, steps: int, *, resume: bool) -> None:
        config = EvaluateConfig(
            self._run.path,
            self._config.rollout_episodes,
            init_seed=SEED,
            video=0,
            workers=self._config.rollout_workers,
            device=str(self._device),
            task=self._config.task,
        )
        log = self._run.rollout_log
        log.write_bytes(b"")
        self._result, sender = Pipe(duplex=False)
        arguments = (config, resume, log, sender)
        self._process = WorkerProcess(target=_evaluate_snapshot, args=arguments)
        self._process.start()
        sender.close()
        self._steps = steps

    def _collect(self) -> None:
        """Wait for the process and write its result."""
        if self._process is None:
            return
        self._process.join()
        code, self._process = self._process.exitcode, None
        try:
            text, metrics = self._result.recv()
        except (EOFError, OSError):
            log = self._run.rollout_log
            lines = log.read_text(errors="replace", encoding="utf-8").strip().splitlines()
            reason = lines[-1] if lines else f"exit code {code}"
            _log.warning("rollouts at step %d failed (%s); see %s", self._steps, reason, log)
            return
        message = (
            "rollouts at step %d: %s; `fibopolicy evaluate` measures the result, on other initial"
            " states"
        )
        _log.info(message, self._steps, text)
        self._write(self._steps - 1, metrics)

    def _snapshot_steps(self) -> int:
        path = self._run.ema
        with contextlib.suppress(Exception), safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["step"])
        return 0


def _evaluate_snapshot(config: EvaluateConfig, resume: bool, log: Path, result: Connection) -> None:
    """Evaluate in the rollouts' process; send a text and metrics, and print to `log`."""
    with log.open("wb") as file:
        for output in (1, 2):
            os.dup2(file.fileno(), output)
    os.nice(NICENESS)
    from fibopolicy.evaluation.episodes import success_rate
    from fibopolicy.evaluation.evaluate import evaluate_run, tasks_to_evaluate

    try:
        done = [
            evaluate_run(replace(config, task=task), resume=resume, overwrite=not resume)
            for task in tasks_to_evaluate(config)
        ]
    except UserError as error:
        sys.exit(str(error))
    rate = success_rate([row for one in done for row in one.rows])
    metrics: dict[str, Any] = {
        "success": rate.value,
        "low": rate.low,
        "high": rate.high,
        "episodes": rate.episodes,
        "errors": rate.errors,
        "seconds": sum(one.seconds for one in done),
    }
    result.send((str(rate), {f"rollout_{name}": value for name, value in metrics.items()}))
