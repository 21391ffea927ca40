"""What an encoder costs: its own figures, and those of the runs that use it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from statistics import median

from fibopolicy.study.records import ConditionRecord


@dataclass(frozen=True)
class Cost:
    """Of one cell, or the medians over several; `None` where something was not
    measured.

    Args:
        parameters: of the policy.
        encoder_parameters: of its encoder alone.
        encoder_macs: multiply-accumulates of one forward pass of one frame.
        attention_pairs: share of token pairs that attention keeps, in [0, 1].
        encoder_ms_1, encoder_ms_64: forward pass of a batch of 1 and of 64,
            milliseconds, median of repetitions.
        samples_per_s: windows trained on per second, data and optimiser included.
        peak_mb: of a run's process.
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
    peak_mb: float | None = None
    rollout_steps_per_s: float | None = None
    train_s: float | None = None
    evaluate_s: float | None = None


_OF_CELLS = ("parameters", "encoder_parameters", "encoder_macs", "attention_pairs")
_OF_RUNS = ("samples_per_s", "peak_mb", "rollout_steps_per_s", "train_s", "evaluate_s")


def cost(cells: Iterable[ConditionRecord]) -> Cost:
    """Medians over the finished runs of a cell, and over cells."""
    cells = list(cells)
    found = {field.name: values(cells, field.name) for field in fields(Cost)}
    return Cost(**{name: median(numbers) if numbers else None for name, numbers in found.items()})


def values(cells: Iterable[ConditionRecord], name: str) -> list[float]:
    """What was measured for one field of `Cost`: a value per cell, or per finished run
    of a cell.
    """
    found: list[object] = []
    for cell in cells:
        if name in _OF_RUNS:
            found += [(run.costs).get(name) for run in cell.done]
        elif name in _OF_CELLS:
            found.append(cell.cost.get(name))
        else:
            timed = cell.cost.get(name.replace("_ms_", "_ms_batch_"))
            found.append(timed.get("median") if isinstance(timed, dict) else None)
    return [float(value) for value in found if isinstance(value, int | float)]
