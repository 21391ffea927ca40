"""Run directories with episode rows made by hand."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fibopolicy.evaluation.episodes import EpisodeResult, read_rows, write_rows


def row(index: int, success: bool, **changes: Any) -> EpisodeResult:
    fields = {
        "task": "fibopolicy/Lift-v0",
        "index": index,
        "seed": index,
        "success": success,
        "steps": 30 + index % 20 if success else 100,
        "total_reward": float(success),
        "wall_s": 1.0,
        "checkpoint_step": 1000,
        "checkpoint": "ema",
        "init_seed": 0,
        "max_steps": 100,
        "quality": "fast",
        "init_state": f"s{index}",
    }
    return EpisodeResult(**(fields | changes))


def make_run(run: Path, successes: Iterable[bool], **changes: Any) -> Path:
    """Add an evaluation to a run directory: one row per outcome, on initial states 0, 1, ..."""
    run.mkdir(parents=True, exist_ok=True)
    rows = [row(index, bool(success), **changes) for index, success in enumerate(successes)]
    write_rows(run / "episodes.jsonl", [*read_rows(run / "episodes.jsonl"), *rows])
    return run
