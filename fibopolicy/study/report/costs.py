"""What an encoder costs: its own figures, and those of the runs that use it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median

from fibopolicy.study.report.directory import Cell


@dataclass(frozen=True)
class Cost:
    """Of one cell, or the medians over several; `None` where something was not measured.

    Args:
        parameters: of the policy.
        encoder_parameters: of its encoder alone.
        encoder_macs: multiply-accumulates of one forward pass of one frame.
        attention_pairs: share of token pairs that attention keeps, in [0, 1].
        encoder_ms_1, encoder_ms_64: forward pass of a batch of 1 and of 64, milliseconds, median of repetitions.
        samples_per_s: windows trained on per second, data and optimiser included.
        peak_memory_mb: of a run's process.
        rollout_steps_per_s: control steps per second of evaluation.
        train_s, evaluate_s: of a run.
    """

    parameters: float | None = None
    encoder_parameters: float | None = None
    encoder_macs: float | None = None
    attention_pairs: float | None = None
    encoder_ms_1: float | None = None
    encoder_ms_64: float | None = None
    samples_per_s: float | None = None
    peak_memory_mb: float | None = None
    rollout_steps_per_s: float | None = None
    train_s: float | None = None
    evaluate_s: float | None = None


_OF_CELLS = ("parameters", "encoder_parameters", "encoder_macs", "attention_pairs")
_OF_RUNS = ("samples_per_s", "peak_memory_mb", "rollout_steps_per_s", "train_s", "evaluate_s")


def cost(cells: Iterable[Cell]) -> Cost:
    """Medians over the finished runs of a cell, and over cells."""
    cells = list(cells)
    found = {name: _median(cell.cost.get(name) for cell in cells) for name in _OF_CELLS}
    for batch in (1, 64):
        timed = [cell.cost.get(f"encoder_ms_batch_{batch}") for cell in cells]
        found[f"encoder_ms_{batch}"] = _median(one.get("median") for one in timed if isinstance(one, dict))
    for name in _OF_RUNS:
        found[name] = _median((run.figures or {}).get(name) for cell in cells for run in cell.done)
    return Cost(**found)


def _median(values: Iterable[object]) -> float | None:
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    return median(numbers) if numbers else None
