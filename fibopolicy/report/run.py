"""The results of a run: table, JSON, and one self-contained HTML page."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fibopolicy.policies.run_directory import CONFIG, read_config, suffix
from fibopolicy.report import page
from fibopolicy.report.comparison import columns
from fibopolicy.report.plots import plot_curves, plot_success_by_step
from fibopolicy.statistics.rates import Rate
from fibopolicy.utils.files import atomic_write
from fibopolicy.utils.system import environment

if TYPE_CHECKING:
    from fibopolicy.evaluation.episodes import EpisodeResult
    from fibopolicy.evaluation.evaluate_run import Evaluation

_WEIGHTS = {"ema": "moving average of the last checkpoint", "model": "last checkpoint"}


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The whole rows of a run's `metrics.jsonl`; none where there is no such file."""
    path = run / "metrics.jsonl"
    rows = []
    for line in (
        path.read_text(errors="replace", encoding="utf-8").splitlines() if path.is_file() else []
    ):
        with contextlib.suppress(ValueError):  # a kill may have cut it short
            rows.append(json.loads(line))
    return [row for row in rows if {"step", "loss", "learning_rate"} <= row.keys()]


def rate_table(rates: Mapping[str, Rate]) -> str:
    """A plain-text table: name, successes, rate and 95 % interval."""
    return columns(_rate_rows(rates))


def _rate_rows(rates: Mapping[str, Rate]) -> list[list[str]]:
    table = [["policy", "successes", "rate", "95 % Wilson interval"]]
    for name, rate in rates.items():
        interval = f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}] %"
        table.append(
            [name, f"{rate.successes}/{rate.episodes}", f"{100 * rate.value:.1f} %", interval]
        )
    if any(rate.errors for rate in rates.values()):
        table[0].insert(1, "errors")
        for line, rate in zip(table[1:], rates.values(), strict=True):
            line.insert(1, str(rate.errors))
    return table


def _errors(rate: Rate) -> str:
    return (
        f"{rate.errors} more episodes, which the simulator could not run to their end, count"
        " nowhere."
        if rate.errors
        else ""
    )


def report(run: Path, evaluation: Evaluation, stages: Mapping[str, float] | None = None) -> Path:
    """Write `report.html` and its pictures into a run directory; returns the page.

    Another set of start states than that of seed 0 has a page of its own, such as
    `report_seed1.html`.

    Args:
        stages: wall time by stage, seconds; the evaluation's own by default.
    """
    document = read_config(run)
    metrics = read_metrics(run)
    curves = run / "curves.png" if metrics else None
    if curves:
        plot_curves(metrics, curves)
    weights, starts_seed = evaluation.rows[0].weights, evaluation.rows[0].starts_seed
    ending = suffix(weights) + (f"_seed{starts_seed}" if starts_seed else "")
    success = run / f"success_by_step{ending}.png"
    plot_success_by_step({"": [[row for row in evaluation.rows if not row.error]]}, success)
    path = run / f"report{ending}.html"
    policy = document["policy"]
    facts = {
        "task": evaluation.rows[0].task,
        "encoder": ", ".join(
            [
                policy["encoder"],
                *(f"{name} {value}" for name, value in policy["encoder_options"].items()),
            ]
        ),
        "policy head": policy["head"],
        "demonstrations": (
            f"{document['train']['demos']} from {_names(document['train']['dataset'])}"
        ),
        "gradient steps": str(evaluation.rows[0].checkpoint_step),
        "weights": _WEIGHTS.get(
            weights, f"{weights}, which a validation liked; the last checkpoint is the run's result"
        ),
        "training seed": str(document["train"]["seed"]),
        "start states": (
            f"{len(evaluation.rows)}, set of seed {starts_seed}, held out from training"
        ),
        "render quality of the data": _quality(document["env_args"]),
        "trained with": ", ".join(
            f"{name} {value}" for name, value in _trained_with(document).items()
        ),
    }
    parts = [
        page.heading("Success rate"),
        page.table(_rate_rows({policy["encoder"]: evaluation.rate})),
        page.note(_errors(evaluation.rate)),
    ]
    if evaluation.video_path is not None:
        parts += [
            page.heading("Episodes"),
            page.video(evaluation.video_path),
            page.note("Grey frame: running. Green: success. Red: not solved within the horizon."),
        ]
    parts += [
        page.heading("Success against time"),
        page.picture(success, "share of episodes solved by each control step, with its 95 % band"),
        page.note("The share of episodes solved by each control step, with its 95 % interval."),
    ]
    if curves is not None:
        parts += [page.heading("Training"), page.picture(curves, "training curves")]
    seconds = stages or {"evaluation": evaluation.seconds}
    parts += [
        page.heading("Wall time"),
        page.pairs({name: f"{s:.1f} s" for name, s in seconds.items()}),
    ]
    parts += [page.heading("How it was made"), page.pairs(facts)]
    page.write_page(path, f"{run.resolve().name}: {evaluation.rate}", parts)
    return path


def _names(dataset: str | list[str]) -> str:
    return ", ".join(
        Path(path).name for path in ([dataset] if isinstance(dataset, str) else dataset)
    )


def _quality(env_args: Mapping[str, Any]) -> str:
    stored = env_args.get("render_quality") or env_args.get("env_kwargs", {}).get("quality")
    return str(stored or "not recorded in the file")


def trained_with(run: Path) -> dict[str, str]:
    """The versions and the hardware that a run was trained with, as far as it tells."""
    return _trained_with(read_config(run) if (run / CONFIG).exists() else {})


def _trained_with(document: Mapping[str, Any]) -> dict[str, str]:
    told = {**document.get("versions", {}), **document.get("hardware", {})}
    return {name: value for name, value in told.items() if value is not None}


def write_results(
    path: Path,
    found: Mapping[str, Sequence[EpisodeResult]],
    rates: Mapping[str, Rate],
    trained: Mapping[str, Mapping[str, str]],
) -> None:
    """Write evaluations as one JSON file, small enough to be committed: rates, and per
    episode its start, outcome and steps.

    Args:
        found: the rows of each evaluation.
        rates: of each evaluation.
        trained: what each was trained with; `environment` in the file is where it was
            written.
    """
    runs = []
    for name, rows in found.items():
        rate = rates[name]
        runs.append(
            {
                "evaluation": name,
                "task": rows[0].task,
                "trained_with": trained[name],
                "successes": rate.successes,
                "episodes": rate.episodes,
                "errors": rate.errors,
                "wilson_95": [round(rate.low, 4), round(rate.high, 4)],
                "index": [row.index for row in rows],
                "success": [int(row.success) for row in rows],
                "steps": [row.steps for row in rows],
            }
        )
    with atomic_write(path) as aside:
        aside.write_text(
            json.dumps({"environment": environment(), "runs": runs}) + "\n", encoding="utf-8"
        )
