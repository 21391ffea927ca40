"""robosuite's scripted experts: success and steps over held-out layouts, without noise
and with the default noise of `fibopolicy collect`.

    .venv/bin/python scripts/benchmarks/robosuite_experts.py \\
        --out docs/benchmarks/robosuite_experts_<date>.json

Takes about 20 minutes on one core. Saves every ten episodes; start it again to
resume.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from fibopolicy import envs
from fibopolicy.datasets.collect import perturbed
from fibopolicy.envs.base import episode_seed
from fibopolicy.envs.robosuite.environment import RobosuiteEnv, import_robosuite
from fibopolicy.envs.robosuite.experts import EXPERTS
from fibopolicy.statistics.rates import wilson
from fibopolicy.utils.files import atomic_write
from fibopolicy.utils.system import environment


def steps_to_success(env: envs.TaskEnv, noise: float, index: int) -> int | None:
    """Control steps of the expert in layout `index` of the evaluation's seed 0, or `None`
    if it fails.
    """
    seed = episode_seed("evaluate", 0, index)
    env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for count in range(1, env.horizon + 1):
        _, succeeded, _, _ = env.advance(perturbed(env.expert_action(), noise, rng))
        if succeeded:
            return count
    return None


def row(task: str, noise: float, steps: list[int | None]) -> dict[str, Any]:
    """One row of the table from the steps to success of episodes 0, 1, ..."""
    successful = [count for count in steps if count is not None]
    rate = wilson(len(successful), len(steps))
    return {
        "task": task,
        "noise": noise,
        "successes": rate.successes,
        "episodes": rate.episodes,
        "wilson_95": [round(rate.low, 3), round(rate.high, 3)],
        "mean_steps": round(statistics.mean(successful), 1) if successful else None,
        "steps_to_success": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(EXPERTS))
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, RobosuiteEnv.expert_noise])
    arguments = parser.parse_args()
    stored = (
        json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
        if arguments.out.exists()
        else []
    )
    rows = {(row["task"], row["noise"]): row for row in stored}
    for noise in arguments.noise:
        for task in arguments.tasks:
            steps = rows[task, noise]["steps_to_success"] if (task, noise) in rows else []
            if len(steps) >= arguments.episodes:
                continue
            env = envs.make(task, cameras=())
            for index in range(len(steps), arguments.episodes):
                steps.append(steps_to_success(env, noise, index))
                if len(steps) % 10 == 0 or len(steps) == arguments.episodes:
                    rows[task, noise] = row(task, noise, steps)
                    write(arguments.out, env.horizon, list(rows.values()))
                    print(rows[task, noise], flush=True)
            env.close()


def write(out: Path, horizon: int, rows: list[dict[str, Any]]) -> None:
    result = {
        "what": (
            "robosuite's scripted experts over the layouts of episode_seed('evaluate', 0, 0 ..),"
            f" no rendering, {horizon} control steps at most; noise: standard deviation on executed"
            " arm actions, action units"
        ),
        "environment": {
            **environment(),
            "mujoco": mujoco.__version__,
            "robosuite": import_robosuite().__version__,
        },
        "rows": rows,
    }
    with atomic_write(out) as temporary:
        temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
