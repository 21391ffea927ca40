"""The results of a run: its HTML page, and a JSON file of several evaluations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fibopolicy.policies.run_directory import RunDirectory, render_quality
from fibopolicy.report.document import (
    FRAME_COLOURS,
    DocumentBlock,
    Facts,
    Heading,
    Note,
    Picture,
    Table,
    Video,
    write_html,
)
from fibopolicy.report.plots import SUCCESS_BY_STEP, plot_success_by_step, plot_training
from fibopolicy.report.tables import Rows, percent, points, points_interval, rate_rows
from fibopolicy.statistics.differences import Difference
from fibopolicy.statistics.rates import Rate
from fibopolicy.utils.files import atomic_write
from fibopolicy.utils.system import environment

if TYPE_CHECKING:
    from fibopolicy.evaluation.episodes import EpisodeResult
    from fibopolicy.evaluation.evaluate import Evaluation

_WEIGHTS = {"ema": "moving average of the last checkpoint", "model": "last checkpoint"}


def write_run_page(
    run: Path, evaluation: Evaluation, stages: Mapping[str, float] | None = None
) -> Path:
    """Write `report.html` and its plots into a run directory. An evaluation on another
    set of initial states than that of seed 0 or on another task gets a separate page,
    such as `report_seed1.html`.

    Args:
        stages: wall time of each stage, seconds; by default that of the evaluation.

    Returns:
        path of the page.
    """
    from fibopolicy.envs.registry import named_task  # here, since tables do not need it

    files = RunDirectory(run)
    document = files.read_config()
    first = evaluation.rows[0]
    encoder = document["policy"]["encoder"]
    task = named_task(first.task, document)
    seconds = stages or {"evaluation": evaluation.seconds}

    success = files.success_by_step(first.checkpoint, first.init_seed, task)
    plot_success_by_step({"": [[row for row in evaluation.rows if not row.error]]}, success)
    blocks: list[DocumentBlock] = [
        Heading("Success rate"),
        Table(rate_rows({encoder: evaluation.rate})),
    ]
    if evaluation.rate.errors:
        blocks.append(
            Note(
                f"{evaluation.rate.errors} more episodes ended in a simulator error and are not"
                " counted."
            )
        )
    if evaluation.perturbed:
        blocks += [Heading("Robustness"), Table(perturbation_table(evaluation)), Note(_PERTURBED)]
    if evaluation.perturbed_video_path is not None:
        blocks.append(Video(evaluation.perturbed_video_path))
    if evaluation.video_path is not None:
        blocks += [Heading("Episodes"), Video(evaluation.video_path), Note(FRAME_COLOURS)]
    blocks += [
        Heading("Success against time"),
        Picture(success, SUCCESS_BY_STEP),
        Note(SUCCESS_BY_STEP),
    ]
    metrics = [row for row in files.read_metrics() if {"step", "loss", "lr"} <= row.keys()]
    if metrics:
        plot_training(metrics, files.curves)
        blocks += [Heading("Training"), Picture(files.curves, "loss and learning rate")]
    blocks += [
        Heading("Wall time"),
        Facts({name: f"{s:.1f} s" for name, s in seconds.items()}),
        Heading("How it was made"),
        Facts(_facts(document, evaluation)),
    ]
    path = files.report(first.checkpoint, first.init_seed, task)
    write_html(path, f"{run.resolve().name}: {evaluation.rate}", blocks)
    return path


_PERTURBED = (
    "Every perturbation is evaluated on the initial states of the clean evaluation. Change: success"
    " with the perturbation minus without, in percentage points, with the 95 % interval of the"
    " paired difference."
)


def perturbation_table(evaluation: Evaluation) -> Rows:
    """A row for each perturbation: its success and the paired change from the clean
    evaluation, in percentage points.
    """
    table = [["perturbation", "successes", "rate", "change, 95 % interval"]]
    for name, rows in evaluation.perturbed.items():
        pairs = [
            (clean.success, row.success)
            for clean, row in zip(evaluation.rows, rows, strict=True)
            if not clean.error and not row.error
        ]
        if not pairs:
            table.append([name, "0/0", "-", "-"])
            continue
        before, after = np.array(pairs, dtype=np.bool_).T
        change = Difference(before[None], after[None])
        successes = f"{after.sum()}/{len(after)}"
        shown = f"{points(change.value)} {points_interval(change)}"
        table.append([name, successes, percent(float(after.mean())), shown])
    return table


def _facts(document: Mapping[str, Any], evaluation: Evaluation) -> dict[str, str]:
    policy, training, first = document["policy"], document["train"], evaluation.rows[0]
    options = [f"{name} {value}" for name, value in policy["encoder_options"].items()]
    datasets = training["dataset"]
    datasets = [datasets] if isinstance(datasets, str) else datasets
    return {
        "task": first.task,
        "encoder": ", ".join([policy["encoder"], *options]),
        "policy": policy["policy"],
        "demonstrations": f"{training['demos']} from {', '.join(Path(d).name for d in datasets)}",
        "gradient steps": str(first.checkpoint_step),
        "checkpoint": _WEIGHTS.get(
            first.checkpoint,
            f"{first.checkpoint}, selected by validation; the last checkpoint is the run's result",
        ),
        "training seed": str(training["seed"]),
        "initial states": f"{len(evaluation.rows)}, set of seed {first.init_seed}, not used in"
        " training",
        "device of the policy": first.device,
        "render quality of the data": render_quality(document["env_args"]) or "not recorded",
        "trained with": ", ".join(f"{n} {value}" for n, value in _trained_with(document).items()),
    }


def trained_with(run: Path) -> dict[str, str]:
    """The versions and the hardware that a run was trained with, as far as recorded."""
    files = RunDirectory(run)
    return _trained_with(files.read_config() if files.config.exists() else {})


def _trained_with(document: Mapping[str, Any]) -> dict[str, str]:
    recorded = {**document.get("versions", {}), **document.get("hardware", {})}
    return {name: value for name, value in recorded.items() if value is not None}


def write_results(
    path: Path,
    evaluations: Mapping[str, Sequence[EpisodeResult]],
    rates: Mapping[str, Rate],
    trained: Mapping[str, Mapping[str, str]],
) -> None:
    """Write evaluations as one JSON file, small enough to be committed: rates, and the
    initial state, outcome (`null` after a simulator error) and steps of each episode.

    Args:
        evaluations: episode results of each evaluation.
        rates: rate of each evaluation.
        trained: what each was trained with; see `trained_with`.
    """
    runs = [
        {
            "evaluation": name,
            "task": rows[0].task,
            "trained_with": trained[name],
            "successes": rates[name].successes,
            "episodes": rates[name].episodes,
            "errors": rates[name].errors,
            "wilson_95": [round(rates[name].low, 4), round(rates[name].high, 4)],
            "index": [row.index for row in rows],
            "success": [None if row.error else int(row.success) for row in rows],
            "steps": [row.steps for row in rows],
        }
        for name, rows in evaluations.items()
    ]
    with atomic_write(path) as partial:
        partial.write_text(
            json.dumps({"environment": environment(), "runs": runs}) + "\n", encoding="utf-8"
        )
