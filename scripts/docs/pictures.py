"""Draws the pictures of the pages of results from the committed result files, and keeps
their numbers together. A hook of mkdocs, see mkdocs.yml.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from fibopolicy.attention.plot import plot_crossover
from fibopolicy.attention.profile import Report, Timing
from fibopolicy.report.plots import Interval, plot_forest
from fibopolicy.statistics.differences import Difference
from fibopolicy.study.report import write_report

DOCS = Path(__file__).parents[2] / "docs"
BENCHMARKS = DOCS / "benchmarks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pictures, and the reports of the published studies, to the folder `results`."""
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder)
        lift_human(drawn / "lift_human.svg")
        robosuite_tasks(drawn / "robosuite_tasks.svg")
        attention("attention_epyc-2-threads_2026-11-24", drawn / "attention_cpu.png")
        attention("attention_h200_float32_2026-11-26", drawn / "attention_gpu.png")
        for archive in (DOCS / "studies").glob("*.study.zip"):
            write_report(Path(shutil.copy(archive, drawn)))
        for path in sorted(drawn.rglob("*")):
            if path.suffix in (".svg", ".png", ".html", ".csv"):
                name = f"results/{path.relative_to(drawn)}"
                files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keep an interval, and a number and its percent sign, on one line."""
    together = re.sub(r"\[([-+\d.]+), ([-+\d.]+)\]", "[\\1,\u00a0\\2]", markdown)
    return re.sub(r"(?<=[\d\]]) %", "\u00a0%", together)


def outcomes(document: dict[str, Any], runs: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Success `(seeds, initial states)` of the runs whose name contains `runs`."""
    return np.array(
        [run["success"] for run in document["runs"] if f"{runs}_seed" in run["evaluation"]], bool
    )


def interval(document: dict[str, Any], name: str, folder: str, base: str, other: str) -> Interval:
    """The difference of two encoders of one folder of runs."""
    found = Difference(
        outcomes(document, f"{folder}/{base}"), outcomes(document, f"{folder}/{other}")
    )
    return Interval(name, found.value, found.low, found.high)


def lift_human(path: Path) -> None:
    document = json.loads(
        (BENCHMARKS / "lift_human_epyc-2-threads_2026-11-24.json").read_text(encoding="utf-8")
    )
    encoders = {"Fibottention": "fibottention_vit_tiny", "ResNet-18": "resnet18"}
    found = [
        interval(document, name, "lift_human", "vit_tiny", encoder)
        for name, encoder in encoders.items()
    ]
    plot_forest({"": found}, "dense attention", None, path)


def robosuite_tasks(path: Path) -> None:
    document = json.loads(
        (BENCHMARKS / "robosuite_tasks_h200_2026-11-26.json").read_text(encoding="utf-8")
    )
    tasks = {"Stack": "stack", "PickPlaceCan": "can", "NutAssemblySquare": "square"}
    groups = {
        f"minus {name}": [
            interval(document, task, folder, encoder, "fibottention_vit_tiny")
            for task, folder in tasks.items()
        ]
        for name, encoder in {"dense attention": "vit_tiny", "ResNet-18": "resnet18"}.items()
    }
    plot_forest(groups, "the other", None, path)


def attention(name: str, path: Path) -> None:
    document = json.loads((BENCHMARKS / f"{name}.json").read_text(encoding="utf-8"))
    timings = [Timing(**row) for row in document["timings"]]
    plot_crossover(Report(document["theme"], timings, document["environment"]), path)
