"""Evaluation against a plain serial loop: same policy, same initial states, measured in
turns within one run.

    python scripts/benchmarks/evaluation_speed.py \\
        --run runs/quickstart/fibottention_vit_tiny_seed0 \\
        --out docs/benchmarks/evaluation_<hardware>_<date>

The run is a quickstart's (built-in Lift, `n_action_steps` 4). Writes `<out>.json` and
`<out>.md`. Needs Linux, and robosuite for that part. The plain loop acts on one
observation with torch's default number of threads and renders every step, as
robomimic's rollouts do. Start-up is not counted, except where a whole command is timed.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
import results
import torch
from usage import resident_mb

from fibopolicy import envs
from fibopolicy.evaluation.evaluate import Evaluator, default_workers
from fibopolicy.evaluation.init_states import InitStates, default_init_states, make_init_states
from fibopolicy.policies import Policy, PolicyConfig, Shapes, build_policy
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.statistics.rates import wilson
from fibopolicy.utils.system import environment

PARTS = ("tabletop", "robosuite", "command", "growth")
CORES = len(os.sched_getaffinity(0))


def plain_loop(
    policy: Policy, env: envs.TaskEnv, init_states: InitStates, indices: range
) -> tuple[int, int]:
    """The usual loop: one episode after the other, every frame rendered. Returns
    successes and control steps.
    """
    successes = steps = 0
    for index in indices:
        obs, queue, done, info = (
            env.set_state(init_states.states[index]),
            [],
            False,
            {"success": False},
        )
        while not done:
            if not queue:
                batch = {
                    key: torch.from_numpy(np.array(value)[None, None]) for key, value in obs.items()
                }
                queue = list(policy.act(batch)[0][0].numpy())
            obs, _, terminated, truncated, info = env.step(queue.pop(0))
            steps, done = steps + 1, terminated or truncated
        successes += info["success"]
    return successes, steps


class Ours:
    """An evaluation with open simulators, timed from its first episode to its last."""

    def __init__(
        self,
        policy: Policy,
        make_env: Callable[[], envs.TaskEnv],
        init_states: InitStates,
        workers: int,
        batch_size: int | None,
    ) -> None:
        began = time.perf_counter()
        self.evaluator = Evaluator(policy, make_env, workers, batch_size=batch_size)
        self.init_states, self.workers = init_states, workers
        self.run(range(min(workers, len(init_states))))  # opens every simulator
        self.start_s = time.perf_counter() - began

    def run(self, indices: range) -> tuple[int, int]:
        rows = list(self.evaluator.run(self.init_states, indices))
        assert not any(row.error for row in rows)
        return sum(row.success for row in rows), sum(row.steps for row in rows)


def in_turn(
    rounds: int, episodes: int, contenders: dict[str, Callable[[range], tuple[int, int]]]
) -> dict[str, dict[str, Any]]:
    """Run each contender on the same episodes, in turns, several times. Rates are medians
    over the rounds.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    counts: dict[str, tuple[int, int]] = {}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            counts[name] = run(range(episodes))
            times[name].append(time.perf_counter() - began)
    return {
        name: {
            "episodes_per_minute": round(60 * episodes / statistics.median(times[name]), 1),
            "steps_per_s": round(counts[name][1] / statistics.median(times[name]), 1),
            "steps": counts[name][1],
            "success": str(wilson(counts[name][0], episodes)),
            "seconds": [round(t, 2) for t in times[name]],
        }
        for name in contenders
    }


def tabletop(policy: Policy, init_states: InitStates, rounds: int, episodes: int) -> dict[str, Any]:
    """Built-in Lift: the plain loop, and ours with several numbers of workers and
    largest batches.
    """
    make = functools.partial(envs.make, "Lift-v0")
    standard = default_workers("fibopolicy/Lift-v0", episodes)
    kinds = {
        "1 worker": (1, None),
        f"{CORES} workers": (CORES, None),
        f"{standard} workers (default)": (standard, None),
        f"{CORES} workers, batch 1": (CORES, 1),
        f"{standard} workers, batch 8": (standard, 8),
    }
    env = make()
    contenders: dict[str, Callable[[range], tuple[int, int]]] = {
        "plain loop": functools.partial(plain_loop, policy, env, init_states)
    }
    open_: dict[str, Ours] = {}
    for name, (workers, batch_size) in kinds.items():
        open_[name] = Ours(policy, make, init_states, workers, batch_size)
        contenders[name] = open_[name].run
    result = in_turn(rounds, episodes, contenders)
    for name, ours in open_.items():
        load = ours.evaluator.scheduler.throughput
        result[name] |= {
            "start_s": round(ours.start_s, 2),
            "policy_busy": round(load.policy_s / load.wall_s, 3),
            "episodes_per_call": round(load.rows / load.calls, 2),
        }
        ours.evaluator.close()
    env.close()
    base = result["plain loop"]["episodes_per_minute"]
    for entry in result.values():
        entry["times_plain"] = round(entry["episodes_per_minute"] / base, 2)
    one = result["1 worker"]["episodes_per_minute"]
    result[f"{CORES} workers"]["share_of_ideal"] = round(
        result[f"{CORES} workers"]["episodes_per_minute"] / one / CORES, 3
    )
    return result


def robosuite(rounds: int, episodes: int) -> dict[str, Any]:
    """robosuite Lift, `n_action_steps` 4, 60 steps per episode: a plain loop in full
    quality against ours in fast quality.
    """
    torch.manual_seed(0)
    shapes = Shapes(
        {"agentview_image": (84, 84), "robot0_eye_in_hand_image": (84, 84)},
        {"robot0_eef_pos": 3, "robot0_gripper_qpos": 2},
        7,
    )
    policy = build_policy(PolicyConfig(), shapes).eval()
    full, fast = (
        functools.partial(envs.make, "robosuite/Lift", quality=q, horizon=60)
        for q in ("full", "fast")
    )
    env = full()
    init_states = make_init_states(env, episodes, 0)
    with fast() as other:
        fast_init_states = make_init_states(other, episodes, 0)
    contenders: dict[str, Callable[[range], tuple[int, int]]] = {
        "plain loop, full quality": functools.partial(plain_loop, policy, env, init_states)
    }
    open_ = {
        f"{workers} workers, fast": Ours(policy, fast, fast_init_states, workers, None)
        for workers in sorted({1, 2, CORES})
    }
    contenders |= {name: ours.run for name, ours in open_.items()}
    result = in_turn(rounds, episodes, contenders)
    for name, ours in open_.items():
        load = ours.evaluator.scheduler.throughput
        result[name] |= {
            "start_s": round(ours.start_s, 2),
            "policy_busy": round(load.policy_s / load.wall_s, 3),
        }
        ours.evaluator.close()
    env.close()
    base, one = (
        result[name]["episodes_per_minute"]
        for name in ("plain loop, full quality", "1 workers, fast")
    )
    for entry in result.values():
        entry["times_plain"] = round(entry["episodes_per_minute"] / base, 2)
    for name, ours in open_.items():
        result[name]["share_of_ideal"] = round(
            result[name]["episodes_per_minute"] / one / min(ours.workers, CORES), 3
        )
    return result


def whole_command(run: Path, rounds: int) -> dict[str, list[float]]:
    """Wall seconds of the command `fibopolicy evaluate RUN --episodes 50` on a copy of
    the run.
    """
    seconds: dict[str, list[float]] = {"with a video": [], "without a video": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("config.json", "ema.safetensors"):
            (Path(folder) / name).write_bytes((run / name).read_bytes())
        command = [
            sys.executable,
            "-m",
            "fibopolicy",
            "evaluate",
            folder,
            "--episodes",
            "50",
            "--overwrite",
        ]
        for _ in range(rounds):
            for name, more in (("with a video", []), ("without a video", ["--video", "0"])):
                began = time.perf_counter()
                subprocess.run([*command, *more], check=True, capture_output=True)
                seconds[name].append(round(time.perf_counter() - began, 2))
    return seconds


def growth(policy: Policy, init_states: InitStates, episodes: int) -> list[dict[str, Any]]:
    """Resident memory and open files of this process and its simulators, while many
    episodes run.
    """
    make = functools.partial(envs.make, "Lift-v0")
    ours = Ours(policy, make, init_states, CORES, None)
    processes = [
        os.getpid(),
        *(slot.simulator.process.pid or 0 for slot in ours.evaluator.scheduler._slots),
    ]
    readings = []
    for done in range(0, episodes + 1, 100):
        if done:
            ours.run(range(100))
        readings.append(
            {
                "episodes": done,
                "MB": [round(resident_mb(pid)["resident"]) for pid in processes],
                "files": [*map(_open_files, processes)],
            }
        )
    ours.evaluator.close()
    return readings


def _open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def as_markdown(result: dict[str, Any]) -> str:
    where = result["environment"]
    lines = [
        "# Evaluation speed",
        "",
        (
            f"{where['processor']}, {CORES} cores, {where['date']}, torch {where['torch']}, mujoco"
            f" {where['mujoco']}; medians of {result['rounds']} rounds in which all contenders took"
            f" turns. Command: `{result['invocation']}`."
        ),
    ]
    for title, key in (
        ("Built-in Lift, quickstart policy, n_action_steps 4", "tabletop"),
        ("robosuite Lift, n_action_steps 4", "robosuite"),
    ):
        if key in result:
            lines += [
                "",
                f"## {title}",
                "",
                "| | episodes/min | times the plain loop | policy busy | of ideal scaling |",
            ]
            lines.append("|---|---|---|---|---|")
            for name, entry in result[key].items():
                busy = f"{100 * entry['policy_busy']:.0f} %" if "policy_busy" in entry else ""
                ideal = (
                    f"{100 * entry['share_of_ideal']:.0f} %" if "share_of_ideal" in entry else ""
                )
                lines.append(
                    f"| {name} | {entry['episodes_per_minute']} | {entry['times_plain']} | {busy} |"
                    f" {ideal} |"
                )
    if "command" in result:
        lines += ["", "## `fibopolicy evaluate RUN --episodes 50`, start-up included", ""]
        lines += [
            f"- {name}: {statistics.median(times)} s" for name, times in result["command"].items()
        ]
    if "growth" in result:
        lines += [
            "",
            "## Growth",
            "",
            "| episodes | MB of policy and simulators | open files |",
            "|---|---|---|",
        ]
        lines += [
            f"| {r['episodes']} | {', '.join(map(str, r['MB']))} |"
            f" {', '.join(map(str, r['files']))} |"
            for r in result["growth"]
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="a quickstart's run directory")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--episodes", type=int, default=50, help="episodes of built-in Lift per round"
    )
    parser.add_argument(
        "--robosuite-episodes", type=int, default=4, help="episodes of robosuite Lift per round"
    )
    parser.add_argument("--growth-episodes", type=int, default=1000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    arguments = parser.parse_args()
    policy = load_policy(arguments.run).policy
    with envs.make("Lift-v0") as env:
        init_states = default_init_states(env, 100, 0)
    result: dict[str, Any] = {
        "invocation": "python scripts/benchmarks/evaluation_speed.py " + " ".join(sys.argv[1:]),
        "environment": {**environment(), "mujoco": mujoco.__version__, "cores": CORES},
        "rounds": arguments.rounds,
    }
    parts: dict[str, Callable[[], Any]] = {
        "tabletop": lambda: tabletop(policy, init_states, arguments.rounds, arguments.episodes),
        "robosuite": lambda: robosuite(arguments.rounds, arguments.robosuite_episodes),
        "command": lambda: whole_command(arguments.run, arguments.rounds),
        "growth": lambda: growth(policy, init_states, arguments.growth_episodes),
    }
    for name in arguments.parts:
        result[name] = parts[name]()
        print(json.dumps({name: result[name]}, indent=1), flush=True)
    print(as_markdown(result))
    if arguments.out:
        results.write(arguments.out, result, as_markdown(result), indent=1)


if __name__ == "__main__":
    main()
