"""Built-in tasks: success of the experts over 200 layouts, and control steps per second
with one camera rendered per step.

    taskset -c 0 .venv/bin/python scripts/benchmarks/env_speed.py \\
        --out docs/benchmarks/tabletop_<hardware>_<date>.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import mujoco

from fibopolicy import envs
from fibopolicy.envs.registry import BUILT_IN
from fibopolicy.utils.system import environment


def expert_successes(task: str, episodes: int) -> int:
    """Number of layouts, seeds 0 .. episodes - 1, that the expert solves without noise."""
    env = envs.make(task, cameras=())
    successes = 0
    for seed in range(episodes):
        env.reset(seed=seed)
        done = False
        while not done:
            _, terminated, truncated, info = env.advance(env.expert_action())
            done = terminated or truncated
        successes += info["success"]
    env.close()
    return successes


def steps_per_second(env: envs.TaskEnv, steps: int) -> float:
    """Control steps per second of the expert, each with its observation; resets are not
    counted.
    """
    spent = 0.0
    env.reset(seed=0)
    for _ in range(steps):
        action = env.expert_action()
        began = time.perf_counter()
        _, _, terminated, truncated, _ = env.step(action)
        spent += time.perf_counter() - began
        if terminated or truncated:
            env.reset(seed=0)
    return steps / spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--episodes", type=int, default=200)
    arguments = parser.parse_args()
    rows = []
    for task in BUILT_IN:
        env = envs.make(task, cameras=("workspace",))
        steps_per_second(env, 100)
        rates = [steps_per_second(env, 300) for _ in range(7)]
        env.close()
        rows.append(
            {
                "task": task,
                "expert_successes": expert_successes(task, arguments.episodes),
                "episodes": arguments.episodes,
                "steps_per_s_median": round(statistics.median(rates)),
                "steps_per_s_min": round(min(rates)),
                "steps_per_s_max": round(max(rates)),
            }
        )
        print(rows[-1])
    result = {
        "what": (
            "experts over seeds 0.., and control steps/s with one 84x84 camera rendered at every"
            " step, one process"
        ),
        "environment": {**environment(), "mujoco": mujoco.__version__},
        "rows": rows,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
