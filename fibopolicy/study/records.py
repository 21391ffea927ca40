"""What a run cost, from its own records."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fibopolicy.evaluation.episodes import EpisodeResult, Selector
from fibopolicy.policies.run_directory import RunDirectory
from fibopolicy.training.config import OptimizerConfig


def own_rows(
    run: Path, done: Mapping[str, Any], steps: int, starts_seed: int
) -> tuple[EpisodeResult, ...]:
    """The rows of the study's own evaluation of a run, by index: it may have been
    evaluated again, otherwise or on more starts.

    Args:
        done: its `done.json`.

    Raises:
        UserError: there are none.
    """
    selector = Selector(
        steps, "ema", starts_seed, horizon=done.get("horizon"), quality=done.get("quality")
    )
    episodes = done.get("episodes")
    return tuple(row for row in selector.of(run) if episodes is None or row.index < episodes)


def measured_costs(
    run: Path,
    optimizer: OptimizerConfig,
    rows: Sequence[EpisodeResult],
    workers: int,
    peak_mb: float,
) -> dict[str, Any]:
    """The contents of `done.json`: costs, and what tells the study's own evaluation
    from others of the run.

    Seconds are of gradient steps and of episodes, from `metrics.jsonl` and the rows, so
    that a run which was killed and resumed counts like one which was not; loading,
    checkpoints and the video are not in them.
    """
    metrics = [
        json.loads(line)
        for line in RunDirectory(run).metrics.read_text(encoding="utf-8").splitlines()
    ]
    samples_per_s = statistics.median(row["samples_per_s"] for row in metrics)
    evaluate_s = sum(row.wall_s for row in rows) / workers  # simulators work side by side
    return {
        "train_s": optimizer.steps * optimizer.batch_size / samples_per_s,
        "evaluate_s": evaluate_s,
        "samples_per_s": samples_per_s,
        # Under another name than once, when it could be that of the process which
        # started the run.
        "peak_mb": peak_mb,
        "rollout_steps_per_s": sum(row.steps for row in rows) / max(evaluate_s, 1e-9),
        "steps": optimizer.steps,
        "episodes": len(rows),
        "horizon": rows[0].horizon,
        "quality": rows[0].quality,
    }
