"""Logs of a run: JSON lines, TensorBoard, Weights & Biases, and its speed and memory."""

from __future__ import annotations

import importlib
import json
import resource
import secrets
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils.tensorboard import SummaryWriter

from fibopolicy.errors import UserError, message_of
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.utils.files import atomic_write
from fibopolicy.utils.system import peak_memory_bytes


class MetricsLogger:
    """Appends rows to `metrics.jsonl`, TensorBoard and, if asked for, Weights & Biases.

    Rows from step `start` on, left by a killed run, are dropped first.

    Args:
        out: run directory.
        start: steps done before.
        wandb: project of Weights & Biases.
        config: description of the run for Weights & Biases.
    """

    def __init__(
        self, out: Path, start: int, *, wandb: str | None = None, config: dict[str, Any]
    ) -> None:
        self._run = RunDirectory(out)
        if self._run.metrics.exists():
            kept = [row for row in self._run.read_metrics() if row.get("step", start) < start]
            with atomic_write(self._run.metrics) as partial:
                partial.write_text("".join(map(_line, kept)), encoding="utf-8")
        self._wandb = WandbLogger(out, wandb, config) if wandb is not None else None
        self._file = self._run.metrics.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(out), purge_step=start if start else None)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Write one row `{"step": ..., "loss": ..., ...}`; a step may have several."""
        row = {"step": step, **metrics}
        self._file.write(_line(row))
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(row)

    def values(self, name: str) -> dict[int, float]:
        """Step -> the value of a metric, for all rows that hold it."""
        return {row["step"]: row[name] for row in self._run.read_metrics() if name in row}

    def last(self, name: str, count: int = 1) -> float | None:
        """The mean of the last `count` values of a metric; `None` if there are none."""
        values = list(self.values(name).values())[-count:]
        return fmean(values) if values else None

    def flush(self) -> None:
        self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._events.close()
        if self._wandb is not None:
            self._wandb.close(failed=error is not None)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


class WandbLogger:
    """One run of a Weights & Biases project.

    Without a network, `WANDB_MODE=offline` keeps everything in the run directory.

    Raises:
        UserError: wandb is not installed, or refuses to start (no key, no network).
    """

    def __init__(self, out: Path, project: str, config: dict[str, Any]) -> None:
        require_wandb(project)
        import wandb

        try:
            self._run = wandb.init(
                project=project,
                id=_wandb_identity(out),
                name=out.name,
                dir=str(out),
                config=config,
                resume="allow",
            )
        except (wandb.errors.Error, OSError, ValueError) as error:
            reason = message_of(error)
            raise UserError(
                f"wandb: {reason}; log in with `wandb login`, set WANDB_MODE=offline, or leave out"
                " --wandb"
            ) from error
        # wandb's own step only grows, but results of rollouts come after rows of later
        # steps.
        self._run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, float]) -> None:
        self._run.log(row)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=1 if failed else 0)


def require_wandb(project: str | None) -> None:
    """Raise `UserError` if a project is named and wandb is not installed."""
    if project is None:
        return
    try:
        importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"--wandb needs Weights & Biases ({error}): pip install 'fibopolicy[wandb]'"
        ) from error


def _wandb_identity(out: Path) -> str:
    path = RunDirectory(out).wandb
    if path.exists():
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    identity = secrets.token_hex(4)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps({"id": identity}) + "\n", encoding="utf-8")
    return identity


@dataclass
class Throughput:
    """Samples and seconds of some steps."""

    samples: int = 0
    data_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, samples: int, data_seconds: float, seconds: float) -> None:
        """Add a step of `samples` that took `seconds`, `data_seconds` of them for loading."""
        self.samples += samples
        self.data_seconds += data_seconds
        self.seconds += seconds

    def metrics(self) -> dict[str, float]:
        """`samples_per_s`, and `data_share`, the share of the time spent loading data."""
        return {
            "samples_per_s": self.samples / self.seconds if self.seconds else 0.0,
            "data_share": self.data_seconds / self.seconds if self.seconds else 0.0,
        }


def memory_metrics(device: torch.device) -> dict[str, float]:
    """`memory_gb`, resident now, mapped frames included; on a GPU also `gpu_memory_gb`,
    the peak so far.

    On systems other than Linux, `memory_gb` is the peak so far.
    """
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        metrics = {"memory_gb": pages * resource.getpagesize() / 1e9}
    except OSError:
        metrics = {"memory_gb": peak_memory_bytes() / 1e9}
    if device.type == "cuda":
        metrics["gpu_memory_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return metrics


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory so far: `peak_gb` of the process, on a GPU `gpu_gb` of its tensors."""
    peak = {"peak_gb": peak_memory_bytes() / 1e9}
    if device.type == "cuda":
        peak["gpu_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak


@dataclass(frozen=True)
class Summary:
    """Outcome and cost of a training run.

    Attributes:
        steps: gradient steps of the weights.
        loss: mean over the last 10 logged rows; `None` in processes that do not log.
        validation_loss: the last; `None` without validation.
        seconds: wall time, without the time before a resume.
        samples_per_s, data_share: see `Throughput`; 0 without new steps.
        peak_gb, gpu_gb: see `peak_memory`; no `gpu_gb` without a GPU.
    """

    steps: int
    loss: float | None
    validation_loss: float | None
    seconds: float
    samples_per_s: float
    data_share: float
    peak_gb: float
    gpu_gb: float | None = None

    def table(self) -> str:
        """Plain text, one value per line."""
        timed = bool(self.samples_per_s)
        rows = {
            "steps": f"{self.steps}",
            "loss": "" if self.loss is None else f"{self.loss:.5g}",
            "validation loss": ""
            if self.validation_loss is None
            else f"{self.validation_loss:.5g}",
            "time": f"{self.seconds:.1f} s",
            "throughput": f"{self.samples_per_s:.0f} samples/s" if timed else "",
            "waiting for data": f"{100 * self.data_share:.1f} % of the steps" if timed else "",
            "peak memory": f"{self.peak_gb:.2f} GB",
            "GPU memory": "" if self.gpu_gb is None else f"{self.gpu_gb:.2f} GB",
        }
        rows = {name: value for name, value in rows.items() if value}
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
