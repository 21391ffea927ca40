"""Success rate and cost of generating demonstrations.

    python scripts/benchmarks/generate.py --out docs/benchmarks/generate_<date>.json

Downloads the sources. Rows that the output already has are kept, so start it again to
resume.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from usage import processor_seconds

from fibopolicy.datasets import download
from fibopolicy.datasets.generate import generate
from fibopolicy.utils.files import atomic_write
from fibopolicy.utils.system import environment

#: Source, task, demos, noise on the executed position actions.
CASES = [
    ("lift-human", "Lift", 500, 0.2),
    ("lift-human", "Lift", 100, 0.0),
    ("stack-one", "Stack", 50, 0.05),
    ("pick-place-one", "PickPlaceCan", 50, 0.05),
    ("nut-assembly-one", "NutAssemblySquare", 50, 0.05),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--only", nargs="*", help="only these sources")
    parser.add_argument(
        "--demos", type=int, help="number of demonstrations, instead of each case's own"
    )
    arguments = parser.parse_args()
    rows = (
        json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
        if arguments.out.exists()
        else []
    )
    for source, task, demos, noise in CASES:
        demos = arguments.demos or demos
        known = any((row["source"], row["noise"]) == (source, noise) for row in rows)
        if known or (arguments.only and source not in arguments.only):
            continue
        rows.append(measure(source, task, demos, noise, arguments.workers))
        with atomic_write(arguments.out) as temporary:
            where = environment()
            temporary.write_text(
                json.dumps({"environment": where, "rows": rows}, indent=1) + "\n", encoding="utf-8"
            )
        print(rows[-1], flush=True)


def measure(
    source: str, task: str, demos: int, noise: float, workers: int | None
) -> dict[str, object]:
    path = download(source)
    start, cpu = time.perf_counter(), processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        done = generate(
            path, demos, Path(folder) / "more.hdf5", task=task, noise=noise, workers=workers
        )
        size = done.path.stat().st_size
    return {
        "source": source,
        "task": task,
        "noise": noise,
        "seed": 0,
        "demos": done.demos,
        "attempts": done.attempts,
        "success_rate": done.demos / done.attempts,
        "interval_95": [done.low, done.high],
        "steps_per_demo": done.steps / done.demos,
        "bytes_per_demo": size // done.demos,
        "wall_s": time.perf_counter() - start,
        "cpu_s": processor_seconds() - cpu,
        "workers": workers,
    }


if __name__ == "__main__":
    main()
