"""Training curves as a picture, and one self-contained HTML page of a run's results."""

from __future__ import annotations

import base64
import contextlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fibopolicy.environment import environment
from fibopolicy.evaluation.evaluate_run import Evaluation
from fibopolicy.evaluation.rows import Row, success_rate
from fibopolicy.evaluation.statistics import Rate
from fibopolicy.files import written_aside
from fibopolicy.policies.run_directory import read_config

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff }}
body {{ margin: 0 auto; padding: 1.5rem; max-width: 60rem }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.15rem; margin-top: 2rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: .35rem .6rem; border-bottom: 1px solid #d1d9e0 }}
td.number, th.number {{ text-align: right; font-variant-numeric: tabular-nums }}
img, video {{ max-width: 100%; height: auto }} .wide {{ overflow-x: auto }} p.note {{ color: #59636e }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def read_metrics(run: Path) -> list[dict[str, float]]:
    """The whole rows of a run's `metrics.jsonl`; none where there is no such file."""
    path = run / "metrics.jsonl"
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):  # a kill may have cut it short
            rows.append(json.loads(line))
    return [row for row in rows if {"step", "loss", "learning_rate"} <= row.keys()]


def plot_curves(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """A PNG of loss and learning rate over the gradient steps, from the rows of `read_metrics`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row["step"] for row in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(steps, [row["loss"] for row in rows], color="#0969da", linewidth=1)
    left.set(title="training loss, batch by batch", xlabel="gradient step", yscale="log")
    right.plot(steps, [row["learning_rate"] for row in rows], color="#0969da")
    right.set(title="learning rate", xlabel="gradient step", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=120)
    pyplot.close(figure)


def rate_table(rates: Mapping[str, Rate]) -> str:
    """A plain-text table: name, successes, rate and 95 % interval."""
    width = max(len("policy"), *(len(name) for name in rates))
    lines = [f"{'policy':<{width}}  successes   rate    95 % Wilson interval"]
    for name, rate in rates.items():
        counts = f"{rate.successes}/{rate.episodes}"
        interval = f"[{100 * rate.low:.1f}, {100 * rate.high:.1f}] %{_errors(rate)}"
        lines.append(f"{name:<{width}}  {counts:>9}  {100 * rate.value:5.1f} %  {interval}")
    return "\n".join(lines)


def _errors(rate: Rate) -> str:
    return f"  and {rate.errors} that the simulator could not run to their end" if rate.errors else ""


def report(run: Path, evaluation: Evaluation, stages: Mapping[str, float] | None = None) -> Path:
    """Write `curves.png` and `report.html` into a run directory; returns the page.

    Args:
        stages: wall time by stage, seconds; the evaluation's own by default.
    """
    document = read_config(run)
    metrics = read_metrics(run)
    curves = run / "curves.png" if metrics else None
    if curves:
        plot_curves(metrics, curves)
    page = run / "report.html"
    facts = {
        "task": evaluation.rows[0].task,
        "encoder": f"{document['policy']['encoder']} {document['policy']['encoder_options'] or ''}".strip(),
        "policy head": document["policy"]["head"],
        "demonstrations": f"{document['train']['demos']} from {Path(document['train']['dataset']).name}",
        "gradient steps": str(evaluation.rows[0].checkpoint_step),
        "training seed": str(document["train"]["seed"]),
        "start states": f"{len(evaluation.rows)}, set of seed {evaluation.rows[0].starts_seed}, held out from training",
        "render quality of the data": _quality(document["env_args"]),
        "versions": ", ".join(f"{k} {v}" for k, v in document["versions"].items()),
    }
    write_page(
        page,
        title=f"{run.resolve().name}: {evaluation.rate}",
        rates={document["policy"]["encoder"]: evaluation.rate},
        facts=facts,
        stages=stages or {"evaluation": evaluation.seconds},
        curves=curves,
        video=evaluation.video_path,
    )
    return page


def _quality(env_args: Mapping[str, Any]) -> str:
    stored = env_args.get("render_quality") or env_args.get("env_kwargs", {}).get("quality")
    return str(stored or "not recorded in the file")


def write_results(path: Path, found: Mapping[str, Sequence[Row]]) -> None:
    """Write evaluations as one JSON file, small enough to be committed: rates, and per episode its start, outcome and steps."""
    runs = []
    for name, rows in found.items():
        rate = success_rate(rows)
        runs.append(
            {
                "evaluation": name,
                "task": rows[0].task,
                "successes": rate.successes,
                "episodes": rate.episodes,
                "errors": rate.errors,
                "wilson_95": [round(rate.low, 4), round(rate.high, 4)],
                "index": [row.index for row in rows],
                "success": [int(row.success) for row in rows],
                "steps": [row.steps for row in rows],
            }
        )
    with written_aside(path) as aside:
        aside.write_text(json.dumps({"environment": environment(), "runs": runs}) + "\n")


def write_page(
    path: Path,
    *,
    title: str,
    rates: Mapping[str, Rate],
    facts: Mapping[str, str],
    stages: Mapping[str, float],
    curves: Path | None,
    video: Path | None,
) -> None:
    """Write one HTML page that needs no other file: table, facts, wall times in seconds, curves and video embedded."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=number>{r.successes}/{r.episodes}</td>"
        f"<td class=number>{100 * r.value:.1f} %</td>"
        f"<td class=number>{100 * r.low:.1f} to {100 * r.high:.1f} %{_errors(r)}</td></tr>"
        for name, r in rates.items()
    )
    parts = [
        "<h2>Success rate</h2><div class=wide><table><tr><th>policy</th><th class=number>successes</th><th class=number>rate</th>"
        f"<th class=number>95 % Wilson interval</th></tr>{rows}</table></div>"
    ]
    if video is not None:
        parts.append(
            "<h2>Episodes</h2><video controls autoplay loop muted playsinline"
            f' src="data:video/mp4;base64,{_base64(video)}"></video>'
            "<p class=note>Grey frame: running. Green: success. Red: not solved within the horizon.</p>"
        )
    if curves is not None:
        parts.append(f'<h2>Training</h2><img alt="training curves" src="data:image/png;base64,{_base64(curves)}">')
    parts.append(f"<h2>Wall time</h2>{_pairs({name: f'{seconds:.1f} s' for name, seconds in stages.items()})}")
    parts.append(f"<h2>How it was made</h2>{_pairs(facts)}")
    with written_aside(path) as aside:
        aside.write_text(PAGE.format(title=html.escape(title), body="\n".join(parts)))


def _pairs(pairs: Mapping[str, str]) -> str:
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in pairs.items())
    return f"<div class=wide><table>{rows}</table></div>"


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
