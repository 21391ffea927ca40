"""Time that a study's runner adds to its runs: processes, checks, costs, files.

    python scripts/benchmarks/study_overhead.py --steps 400 --episodes 50

Runs a study of two encoders and one seed, one run at a time, then the same training runs
and evaluations in this process, in another directory. Demonstrations are collected
before. Prints wall time and processor time of both. Processor time includes all child
processes and depends less on other work on the machine.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from usage import processor_seconds

from fibopolicy.evaluation.evaluate import evaluate_run
from fibopolicy.study import StudyConfig, StudyTask
from fibopolicy.study.directory import StudyDirectory
from fibopolicy.study.executors import Local
from fibopolicy.study.grid import runs
from fibopolicy.study.runner import prepare_task, run_study
from fibopolicy.training.trainer import train
from fibopolicy.utils.system import environment


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400, help="gradient steps of each run")
    parser.add_argument("--episodes", type=int, default=50, help="episodes of each run")
    parser.add_argument("--demos", type=int, default=50, help="demonstrations")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fibopolicy-overhead-") as folder:
        config = StudyConfig(
            "overhead",
            tasks=[StudyTask("Lift-v0", demos=options.demos)],
            encoders=["fibottention_vit_tiny", "vit_tiny"],
            seeds=(0,),
            steps=options.steps,
            episodes=options.episodes,
        )
        data = Path(folder) / "lift.hdf5"
        source = StudyDirectory(Path(folder) / "source", config)
        prepare_task(source, config.tasks[0])
        source.dataset(config.tasks[0]).rename(data)
        config = replace(config, tasks=(StudyTask("Lift-v0", dataset=data),))

        torch.set_num_threads(config.threads)
        began = now()
        run_study(config, Path(folder) / "study", Local(1, config.threads, "cpu"), Path(folder))
        whole = since(began)

        alone = StudyDirectory(Path(folder) / "alone", config)
        prepare_task(alone, config.tasks[0])
        began = now()
        for run in runs(config):
            train(alone.train_config(run))
            evaluate_run(alone.evaluate_config(run))
        runs_alone = since(began)
    result = {
        clock: {
            "study_s": whole[clock],
            "runs_s": runs_alone[clock],
            "overhead": whole[clock] / runs_alone[clock] - 1,
            "added_s_per_run": (whole[clock] - runs_alone[clock]) / len(runs(config)),
        }
        for clock in whole
    }
    print(json.dumps({**result, **vars(options), "environment": environment()}, indent=1))


def now() -> dict[str, float]:
    """Wall and processor seconds, including ended child processes."""
    return {"wall": time.perf_counter(), "processors": processor_seconds()}


def since(began: dict[str, float]) -> dict[str, float]:
    return {clock: seconds - began[clock] for clock, seconds in now().items()}


if __name__ == "__main__":
    main()
