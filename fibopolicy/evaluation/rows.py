"""Episode rows: one JSON line per episode, from which every rate, table and picture is computed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fibopolicy.errors import UserError
from fibopolicy.evaluation.statistics import Rate, wilson


@dataclass(frozen=True)
class Row:
    """One episode.

    Args:
        task: task id.
        index: of the start state.
        seed: that the start state was drawn from.
        success: whether the goal was met at some step.
        steps: control steps taken.
        total_reward: summed over the episode.
        wall_s: seconds it took.
        checkpoint_step: gradient steps behind the weights.
        weights: "ema" or "model".
        starts_seed: which set of start states.
    """

    task: str
    index: int
    seed: int
    success: bool
    steps: int
    total_reward: float
    wall_s: float
    checkpoint_step: int
    weights: str
    starts_seed: int


def append_row(path: Path, row: Row) -> None:
    with path.open("a") as file:
        file.write(json.dumps(asdict(row)) + "\n")


def read_rows(path: Path) -> list[Row]:
    """The rows of a file in the order of their start states; a last line that a kill cut short is dropped."""
    rows = []
    lines = path.read_text().split("\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            rows.append(Row(**json.loads(line)))
        except (ValueError, TypeError) as error:
            if number == len(lines):  # no newline after it
                continue
            raise UserError(f"{path}: line {number} is not an episode row ({error})") from error
    return sorted(rows, key=lambda row: row.index)


def success_rate(rows: Sequence[Row]) -> Rate:
    """The rate over all rows with its 95 % Wilson interval."""
    return wilson(sum(row.success for row in rows), len(rows))
