"""robosuite's scripted experts: success and steps over held-out layouts, without noise
and with the default noise of `fibopolicy collect`.

    .venv/bin/python scripts/benchmarks/robosuite_experts.py \\
        --out docs/benchmarks/robosuite_experts_<date>.json

Takes about 20 minutes on one core. Saves every ten episodes; start it again to
resume. `--suite libero` measures LIBERO's experts on the official initial states, ten
episodes for each task.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mujoco
import numpy as np

from fibopolicy import envs
from fibopolicy.datasets.collect import perturbed
from fibopolicy.envs.base import SimState, episode_seed
from fibopolicy.envs.libero.experts import EXPERT_TASKS
from fibopolicy.envs.libero.installation import PACKAGE
from fibopolicy.envs.robosuite.environment import RobosuiteEnv, import_robosuite
from fibopolicy.envs.robosuite.experts import EXPERTS
from fibopolicy.statistics.rates import wilson
from fibopolicy.utils.files import atomic_write
from fibopolicy.utils.system import environment, versions


def steps_to_success(
    env: envs.TaskEnv, prescribed: Sequence[SimState], noise: float, index: int
) -> int | None:
    """Control steps of the expert from the prescribed initial state `index`, or else in
    that layout of the evaluation's seed 0; `None` if it fails.
    """
    seed = episode_seed("evaluate", 0, index)
    if prescribed:
        env.begin(env.set_state(prescribed[index]))
    else:
        env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    for count in range(1, env.horizon + 1):
        _, succeeded, _, _ = env.advance(perturbed(env.expert_action(), noise, rng))
        if succeeded:
            return count
    return None


def row(task: str, noise: float, horizon: int, steps: list[int | None]) -> dict[str, Any]:
    """One row of the table from the steps to success of episodes 0, 1, ..."""
    successful = [count for count in steps if count is not None]
    rate = wilson(len(successful), len(steps))
    return {
        "task": task,
        "noise": noise,
        "horizon": horizon,
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
    parser.add_argument("--suite", choices=("robosuite", "libero"), default="robosuite")
    parser.add_argument("--tasks", nargs="+", help="by default all of the suite's with an expert")
    parser.add_argument("--episodes", type=int, help="by default 100, of LIBERO 10")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0, RobosuiteEnv.expert_noise])
    arguments = parser.parse_args()
    libero = arguments.suite == "libero"
    tasks = arguments.tasks or (EXPERT_TASKS if libero else EXPERTS)
    episodes = arguments.episodes or (10 if libero else 100)
    stored = (
        json.loads(arguments.out.read_text(encoding="utf-8"))["rows"]
        if arguments.out.exists()
        else []
    )
    rows = {(row["task"], row["noise"]): row for row in stored}
    for noise in arguments.noise:
        for task in tasks:
            steps = rows[task, noise]["steps_to_success"] if (task, noise) in rows else []
            if len(steps) >= episodes:
                continue
            env = envs.make(task, cameras=())
            prescribed = env.benchmark_states()
            for index in range(len(steps), episodes):
                steps.append(steps_to_success(env, prescribed, noise, index))
                if len(steps) % 10 == 0 or len(steps) == episodes:
                    rows[task, noise] = row(task, noise, env.horizon, steps)
                    write(arguments.out, libero, list(rows.values()))
                    print(rows[task, noise], flush=True)
            env.close()


def write(out: Path, libero: bool, rows: list[dict[str, Any]]) -> None:
    over = (
        "LIBERO's scripted expert over the first official initial states"
        if libero
        else "robosuite's scripted experts over the layouts of episode_seed('evaluate', 0, 0 ..)"
    )
    result = {
        "what": (
            f"{over}, no rendering; horizon: control steps at most; noise: standard deviation on"
            " executed arm actions, action units"
        ),
        "environment": {
            **environment(),
            "mujoco": mujoco.__version__,
            "robosuite": import_robosuite().__version__,
            **({PACKAGE: versions()[PACKAGE]} if libero else {}),
        },
        "rows": rows,
    }
    with atomic_write(out) as temporary:
        temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
