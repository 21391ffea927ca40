"""Meta-World: success of the 50 experts over 20 layouts each, and the speed of fast
rendering.

    .venv/bin/python scripts/benchmarks/metaworld_experts.py \\
        --out docs/benchmarks/metaworld_experts_<date>.json

Times are processor time. Every attempted episode counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import mujoco
from tqdm import tqdm

from fibopolicy import envs
from fibopolicy.datasets.collect import Plan, run_expert
from fibopolicy.envs.metaworld.tasks import METAWORLD
from fibopolicy.statistics.rates import wilson
from fibopolicy.utils.system import environment

RENDERED = ("metaworld/reach-v3", "metaworld/assembly-v3", "metaworld/door-open-v3")


def expert_rate(task: str, episodes: int, noise: float) -> dict[str, Any]:
    """Success of the expert in the first episodes that `collect` would attempt."""
    plan = Plan(task, cameras=(), noise=noise)
    env = plan.make_env()
    began = time.process_time()
    attempts = [run_expert(env, plan, index) for index in range(episodes)]
    spent = time.process_time() - began
    env.close()
    steps = [len(episode["actions"]) for episode in attempts]
    solved = [bool(episode["success"]) for episode in attempts]
    rate = wilson(sum(solved), episodes)
    return {
        "task": task,
        "noise": noise,
        "successes": rate.successes,
        "wilson_95": [round(rate.low, 3), round(rate.high, 3)],
        "failed_episodes": [index for index, good in enumerate(solved) if not good],
        "median_steps_of_successes": statistics.median(
            [n for n, good in zip(steps, solved, strict=True) if good] or [0]
        ),
        "steps_per_s": round(sum(steps) / spent),
    }


def seconds_per_frame(env: envs.TaskEnv, frames: int) -> float:
    began = time.process_time()
    for _ in range(frames):
        env.observe()
    return (time.process_time() - began) / frames


def rendering(task: str, rounds: int = 5, frames: int = 5) -> dict[str, Any]:
    """Fast and full rendering of one 84 x 84 frame from corner2, in turns."""
    fast, full = (
        envs.make(task, cameras=("corner2",), image_size=84, quality=quality)
        for quality in ("fast", "full")
    )
    for env in (fast, full):
        env.reset(seed=0)
        seconds_per_frame(env, 2)
    pairs = [
        (seconds_per_frame(fast, frames), seconds_per_frame(full, frames)) for _ in range(rounds)
    ]
    for env in (fast, full):
        env.close()
    ratios = [slow / quick for quick, slow in pairs]
    return {
        "task": task,
        "fast_ms": round(1000 * statistics.median(quick for quick, _ in pairs), 2),
        "full_ms": round(1000 * statistics.median(slow for _, slow in pairs), 2),
        "full_over_fast": {
            name: round(f(ratios), 1)
            for name, f in (("median", statistics.median), ("min", min), ("max", max))
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--episodes", type=int, default=20)
    parser.add_argument(
        "--noise", type=float, nargs="+", default=[0.0], help="`collect` adds 0.2 by default"
    )
    arguments = parser.parse_args()
    rows = []
    for task in tqdm(METAWORLD, desc="experts", unit="task"):
        rows += [expert_rate(task, arguments.episodes, noise) for noise in arguments.noise]
    frames = [rendering(task) for task in RENDERED]
    totals = {}
    for noise in arguments.noise:
        rate = wilson(
            sum(row["successes"] for row in rows if row["noise"] == noise),
            arguments.episodes * len(METAWORLD),
        )
        totals[str(noise)] = str(rate)
    result = {
        "what": (
            "Meta-World's scripted experts in the first episodes of `collect` with seed 0, horizon"
            " 500, each ends at success"
        ),
        "environment": {
            **environment(),
            "mujoco": mujoco.__version__,
            "metaworld": metadata.version("metaworld"),
        },
        "episodes": arguments.episodes,
        "totals_by_noise": totals,
        "experts": rows,
        "rendering_84x84_corner2_cpu_time": frames,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({"totals": totals, "rendering": frames}, indent=2))


if __name__ == "__main__":
    main()
