"""What looks on while training goes on: validation, the checkpoints kept for it,
rollouts. None of it changes the weights.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch

from fibopolicy.datasets import Windows
from fibopolicy.policies import Policy
from fibopolicy.training.best import BestWeights
from fibopolicy.training.config import TrainConfig
from fibopolicy.training.metrics import MetricsLog
from fibopolicy.training.rollouts import Rollouts
from fibopolicy.training.validation import validation_figures


class Watch:
    """Called after every step, by one process of a run; a context manager, whose end
    ends the rollouts.

    Args:
        average: the averaged weights, in evaluation mode.
        validation: the windows to validate on, or `None`.
        start: steps done before.
    """

    def __init__(
        self,
        config: TrainConfig,
        average: Policy,
        validation: Windows | None,
        log: MetricsLog,
        device: torch.device,
        start: int,
    ) -> None:
        self._config, self._average, self._validation, self._log, self._device = (
            config,
            average,
            validation,
            log,
            device,
        )
        self._best = BestWeights(
            config.out, config.validation.keep_best, config.validation.criterion
        )
        done = log.steps_with("monitoring_success")
        self._rollouts = Rollouts(
            config.out, config.rollouts, average, log.write, str(device), start=start, done=done
        )

    def after(self, step: int) -> None:
        """After gradient step number `step`, from 0."""
        steps = step + 1
        due = (
            steps % self._config.validation.validate_every == 0
            or steps == self._config.optimizer.steps
        )
        if self._validation is not None and due:
            figures = validation_figures(
                self._average,
                self._validation,
                samples=self._config.validation.validate_samples,
                batch_size=self._config.optimizer.batch_size,
                device=self._device,
            )
            self._log.write(step, figures)
            self._best.offer(steps, figures, self._average)
        self._rollouts.after(steps)

    def finish(self) -> None:
        """At the end of training: wait for rollouts that still run."""
        self._rollouts.finish(self._config.optimizer.steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._rollouts.__exit__(kind, error, trace)
