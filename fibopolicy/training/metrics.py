"""What a run logs: JSON lines and TensorBoard events."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Self

from torch.utils.tensorboard import SummaryWriter

from fibopolicy.files import written_aside


class MetricsLog:
    """Appends to `metrics.jsonl` and TensorBoard events; rows from `start` on, left by a killed run, are dropped first."""

    def __init__(self, out: Path, start: int) -> None:
        path = out / "metrics.jsonl"
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) < start]
            with written_aside(path) as aside:
                aside.write_text("".join(line + "\n" for line in kept))
        self._file = path.open("a")
        self._events = SummaryWriter(str(out), purge_step=start if start else None)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """One row: `{"step": ..., "loss": ..., ...}`."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        self._events.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._events.close()


def _step_of(line: str) -> float:
    """A row's step; infinite for a row that a kill cut short."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
