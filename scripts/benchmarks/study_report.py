"""Seconds to write the HTML report of simulated studies with 100 conditions, 3 training
seeds and 100 initial states each.

    python scripts/benchmarks/study_report.py --out result.json

Each report is written in a fresh process, timed from import to page.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from fibopolicy.envs.metaworld.tasks import METAWORLD
from fibopolicy.utils.system import environment

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "study"))
from made_study import simulate

ENCODERS = {
    "vit_tiny": 0.0,
    "fibottention_vit_tiny": 0.05,
    "local_vit_tiny": -0.8,
    "random_vit_tiny": -0.3,
    "resnet18": 0.3,
}
#: Tasks, policies and inits of each study.
GRIDS = {
    "20 tasks": (20, ("bc",), ("scratch",)),
    "5 tasks, 2 policies, 2 inits": (5, ("bc", "bc_gmm"), ("scratch", "frozen")),
    "1 task, 20 policies": (1, tuple(f"policy{i}" for i in range(20)), ("scratch",)),
}
REPORT = """
import resource, sys
from pathlib import Path
from fibopolicy.study.report import write_report
write_report(Path(sys.argv[1]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime)
"""


@dataclass(frozen=True)
class Args:
    out: Path | None = None
    """JSON file for the result."""
    repeats: int = 3
    """Number of reports per study; the median is reported."""


def main(args: Args) -> None:
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (tasks, policies, inits) in GRIDS.items():
            study = Path(folder) / name.replace(",", "").replace(" ", "_")
            logits = {
                METAWORLD[i]: {encoder: 1 + i % 4 + shift for encoder, shift in ENCODERS.items()}
                for i in range(tasks)
            }
            simulate(study, logits, rng=np.random.default_rng(0), policies=policies, inits=inits)
            wall, cpu = [], []
            for _ in range(args.repeats):
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", REPORT, str(study)],
                    check=True,
                    capture_output=True,
                    encoding="utf-8",
                    errors="replace",
                )
                wall.append(time.perf_counter() - began)
                cpu.append(float(done.stdout))
            size = (study / "report" / "report.html").stat().st_size / 1e6
            found[name] = {
                "wall_s": float(np.median(wall)),
                "cpu_s": float(np.median(cpu)),
                "page_mb": size,
            }
            print(
                f"{name}: {np.median(wall):.1f} s wall, {np.median(cpu):.1f} s CPU, page"
                f" {size:.1f} MB",
                flush=True,
            )
    if args.out is not None:
        args.out.write_text(
            json.dumps({"environment": environment(), "reports": found}, indent=1) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
