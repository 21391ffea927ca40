"""What a run cost, from its own records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fibopolicy.evaluation.rows import Row
from fibopolicy.study.config import StudyConfig
from fibopolicy.training.config import OptimizerConfig


def measured_costs(run: Path, config: StudyConfig, rows: Sequence[Row], workers: int, peak_memory_mb: float) -> dict[str, Any]:
    """The contents of `done.json`: costs, and what tells the study's own evaluation from others of the run.

    Seconds are of gradient steps and of episodes, from `metrics.jsonl` and the rows, so that a run which was killed and resumed
    counts like one which was not; loading, checkpoints and the video are not in them.
    """
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples_per_s = statistics.median(row["samples_per_s"] for row in metrics)
    batch_size = OptimizerConfig(**config.optimizer).batch_size
    evaluate_s = sum(row.wall_s for row in rows) / workers  # simulators work side by side
    return {
        "train_s": config.steps * batch_size / samples_per_s,
        "evaluate_s": evaluate_s,
        "samples_per_s": samples_per_s,
        "peak_memory_mb": peak_memory_mb,
        "rollout_steps_per_s": sum(row.steps for row in rows) / max(evaluate_s, 1e-9),
        "steps": config.steps,
        "episodes": len(rows),
        "horizon": rows[0].horizon,
        "quality": rows[0].quality,
    }
