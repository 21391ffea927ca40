"""What a run logs: JSON lines and TensorBoard events, and Weights & Biases where asked for."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch.utils.tensorboard import SummaryWriter

from fibopolicy.training.wandb_log import WandbLog
from fibopolicy.utils.files import atomic_write

METRICS = "metrics.jsonl"
#: How many rows `recent` averages over.
RECENT = 10


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard events; rows from `start` on, left by
    a killed run, are dropped first.

    Args:
        out: the run directory.
        start: steps done before.
        wandb: a project of Weights & Biases that gets the same figures.
        config: what it is told about the run.
    """

    def __init__(
        self,
        out: Path,
        start: int,
        *,
        wandb: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        path = out / METRICS
        self._recent: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._steps: defaultdict[str, set[int]] = defaultdict(set)
        if path.exists():
            kept = [
                line
                for line in path.read_text(encoding="utf-8").splitlines()
                if _step_of(line) < start
            ]
            with atomic_write(path) as aside:
                aside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            for line in kept:
                self._remember(json.loads(line))
        self._wandb = WandbLog(out, wandb, config or {}) if wandb is not None else None
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(out), purge_step=start if start else None)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One row: `{"step": ..., "loss": ..., ...}`. Several rows may be of one step."""
        row = {"step": step, **figures}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._remember(row)
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(row)

    def recent(self, name: str) -> float | None:
        """The mean of a figure over its last rows; `None` where there are none."""
        values = self._recent.get(name)
        return sum(values) / len(values) if values else None

    def last(self, name: str) -> float | None:
        """A figure's last value; `None` where there is none."""
        values = self._recent.get(name)
        return values[-1] if values else None

    def steps_with(self, name: str) -> set[int]:
        """The steps of the rows that hold a figure."""
        return set(self._steps.get(name, ()))

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

    def _remember(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            self._recent[name].append(value)
            self._steps[name].add(int(row["step"]))


def _step_of(line: str) -> float:
    """A row's step; infinite for a row that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
