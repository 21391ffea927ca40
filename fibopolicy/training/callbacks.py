"""Rollouts while training goes on: a process of its own evaluates a snapshot of the
averaged weights.

Evaluation stands beside training and neither imports the other, so what connects them
is a command, a folder in the form of a run directory, and a file with the result.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import safe_open
from torch import nn

from fibopolicy.policies.run_directory import CONFIG, EMA_WEIGHTS
from fibopolicy.training.checkpoint import save_weights
from fibopolicy.training.watch_config import RolloutConfig

_log = logging.getLogger(__name__)

#: The folder in a run directory; a run directory itself, whose weights are those of the
#: last snapshot.
MONITORING = "monitoring"
RESULT = "result.json"
LOG = "log.txt"
_MODULE = "fibopolicy.evaluation.monitor"
Write = Callable[[int, dict[str, float]], None]


class Rollouts:
    """Evaluates every `rollout_every` steps and writes `monitoring_...` figures as they
    come; a context manager.

    One evaluation runs at a time: one that falls due before the last has ended is left
    out, except at the end of training. The process ends with this one, however this one
    ends. That an evaluation fails is told and stops nothing.

    Args:
        out: the run directory.
        weights: the averaged weights, which change while training goes on.
        write: takes a row's step and figures.
        done: rows that the log holds already have these steps.
        start: gradient steps done before. An evaluation of them that was cut short goes
            on where it was.
    """

    def __init__(
        self,
        out: Path,
        config: RolloutConfig,
        weights: nn.Module,
        write: Write,
        device: str,
        *,
        start: int = 0,
        done: set[int],
    ) -> None:
        self._folder, self._config, self._weights, self._write, self._device = (
            out / MONITORING,
            config,
            weights,
            write,
            device,
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._steps = 0  # gradient steps of the weights that the process evaluates
        self._left_out = False
        if (
            config.rollout_every is not None
            and 0 < (steps := self._snapshot_steps()) <= start
            and steps - 1 not in done
        ):
            self._begin(steps, resume=True)

    def after(self, steps: int) -> None:
        """After `steps` gradient steps: take in what has ended, begin what is due."""
        if self._config.rollout_every is None:
            return
        self._take_in(wait=False)
        if steps % self._config.rollout_every:
            return
        self._left_out = self._process is not None
        if self._left_out:
            _log.info(
                "monitoring at step %d is left out: that of step %d still runs", steps, self._steps
            )
            return
        self._folder.mkdir(exist_ok=True)
        shutil.copyfile(self._folder.parent / CONFIG, self._folder / CONFIG)
        save_weights(self._folder / EMA_WEIGHTS, self._weights, {"step": str(steps)})
        self._begin(steps, resume=False)

    def finish(self, steps: int) -> None:
        """At the end of training: wait for what runs, and catch up on the last
        evaluation if it was left out.
        """
        if self._process is not None:
            _log.info("waiting for the rollouts of step %d", self._steps)
            self._take_in(wait=True)
        if self._left_out:
            self.after(steps)
            self._take_in(wait=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _begin(self, steps: int, *, resume: bool) -> None:
        (self._folder / RESULT).unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            _MODULE,
            str(self._folder),
            "--result",
            str(self._folder / RESULT),
        ]
        command += [
            "--episodes",
            str(self._config.rollout_episodes),
            "--workers",
            str(self._config.rollout_workers),
        ]
        command += ["--device", self._device, *(["--resume"] if resume else [])]
        with (self._folder / LOG).open("wb") as log:
            # It ends when the other end of its standard input is gone, even if this
            # process is killed.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
            )
        self._steps = steps

    def _take_in(self, *, wait: bool) -> None:
        if self._process is None or (not wait and self._process.poll() is None):
            return
        code, self._process = self._process.wait(), None
        try:
            result: dict[str, Any] = json.loads((self._folder / RESULT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            lines = (
                (self._folder / LOG)
                .read_text(errors="replace", encoding="utf-8")
                .strip()
                .splitlines()
            )
            reason = lines[-1] if lines else f"exit code {code}"
            _log.warning(
                "monitoring at step %d failed (%s); see %s", self._steps, reason, self._folder / LOG
            )
            return
        told = "monitoring at step %d: %s; no result, since evaluate measures on other start states"
        _log.info(told, self._steps, result["text"])
        names = ("success", "low", "high", "episodes", "errors", "seconds")
        self._write(self._steps - 1, {f"monitoring_{name}": result[name] for name in names})

    def _snapshot_steps(self) -> int:
        with (
            contextlib.suppress(Exception),
            safe_open(self._folder / EMA_WEIGHTS, framework="pt") as file,
        ):
            return int((file.metadata() or {})["step"])
        return 0
