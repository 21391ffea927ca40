"""Evaluation in LIBERO with two workers against a plain loop over LIBERO's own
environment: same policy, same initial states, in turns within one run.

    python scripts/benchmarks/libero_evaluation.py \\
        --out docs/benchmarks/libero_evaluation_<hardware>_<date>

The plain loop is the usual one: `OffScreenRenderEnv` with its default rendering and
cameras, and for every episode a reset, the official initial state, 10 idle steps, then
control steps; the policy acts on one observation. Ours is the `Evaluator` with quality
`fast`. The policy is untrained and executes 4 actions of each prediction. Ratios are
medians over rounds: of wall time, and of processor time, which says what two free
cores would give where the machine is busy. Start-up is not counted. Linux only.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import results
import torch
from results import spread

from fibopolicy import envs
from fibopolicy.envs.libero.tasks import IDLE_STEPS
from fibopolicy.evaluation.evaluate import Evaluator
from fibopolicy.evaluation.init_states import InitStates, make_init_states
from fibopolicy.policies import Policy, PolicyConfig, Shapes, build_policy

WORKERS = 2
SIZE = 128
VECTORS = {"robot0_eef_pos": 3, "robot0_eef_quat": 4, "robot0_gripper_qpos": 2}
CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")


class PlainLoop:
    """LIBERO's own environment, with its defaults."""

    def __init__(self, policy: Policy, task: str, init_states: InitStates, steps: int) -> None:
        from fibopolicy.envs.libero.installation import import_libero, problem_file

        libero = import_libero()
        self.env = libero.OffScreenRenderEnv(
            bddl_file_name=str(problem_file(task)), camera_heights=SIZE, camera_widths=SIZE
        )
        self.policy, self.init_states, self.steps = policy, init_states, steps
        self.reset_s = 0.0

    def run(self, episodes: int) -> None:
        for index in range(episodes):
            began = time.perf_counter()
            self.env.reset()
            obs = self.env.set_init_state(self.init_states.states[index].state)
            self.reset_s += time.perf_counter() - began
            for _ in range(IDLE_STEPS):
                obs, *_ = self.env.step([0] * 6 + [-1])
            queue: list[Any] = []
            for _ in range(self.steps):
                if not queue:
                    seen = {key: obs[key][::-1] for key in CAMERAS}
                    seen |= {key: obs[key].astype(np.float32) for key in VECTORS}
                    batch = {
                        key: torch.from_numpy(np.array(value)[None, None])
                        for key, value in seen.items()
                    }
                    queue = list(self.policy.act(batch)[0][0].numpy())
                obs, *_ = self.env.step(queue.pop(0))

    def processor_s(self) -> float:
        return time.process_time()


class Ours:
    """The evaluator, with its simulators started."""

    def __init__(
        self, policy: Policy, make: Callable[[], envs.TaskEnv], init_states: InitStates
    ) -> None:
        self.evaluator, self.init_states = Evaluator(policy, make, WORKERS), init_states
        self.run(WORKERS)
        slots = self.evaluator.scheduler._slots
        self.processes = [slot.simulator.process.pid for slot in slots]

    def run(self, episodes: int) -> None:
        rows = list(self.evaluator.run(self.init_states, range(episodes)))
        assert not any(row.error for row in rows)

    def processor_s(self) -> float:
        ticks = os.sysconf("SC_CLK_TCK")
        stats = [Path(f"/proc/{pid}/stat").read_text(encoding="utf-8") for pid in self.processes]
        return time.process_time() + sum(
            sum(map(int, stat.rpartition(")")[2].split()[11:13])) / ticks for stat in stats
        )


def timed(contender: PlainLoop | Ours, episodes: int) -> dict[str, float]:
    wall, processor = time.perf_counter(), contender.processor_s()
    contender.run(episodes)
    return {
        "wall_s": round(time.perf_counter() - wall, 2),
        "processor_s": round(contender.processor_s() - processor, 2),
    }


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--task", default="libero/goal/put_the_bowl_on_the_plate")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=2, help="episodes of a round")
    parser.add_argument("--steps", type=int, default=100, help="control steps of an episode")
    options = parser.parse_args()
    began = time.perf_counter()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images = dict.fromkeys(CAMERAS, (SIZE, SIZE))
    policy = build_policy(PolicyConfig(crop=120), Shapes(images, VECTORS, 7)).eval()
    make = partial(envs.make, options.task, horizon=options.steps)
    with make() as env:
        init_states = make_init_states(env, options.episodes, 0)
    ours = Ours(policy, make, init_states)
    plain = PlainLoop(policy, options.task, init_states, options.steps)
    rounds = [
        {"plain": timed(plain, options.episodes), "ours": timed(ours, options.episodes)}
        for _ in range(options.rounds)
    ]
    ours.evaluator.close()
    cores = min(WORKERS, len(os.sched_getaffinity(0)))
    wall = [row["plain"]["wall_s"] / row["ours"]["wall_s"] for row in rounds]
    free = [row["plain"]["processor_s"] / (row["ours"]["processor_s"] / cores) for row in rounds]
    settings = {name: getattr(options, name) for name in ("task", "rounds", "episodes", "steps")}
    command = "python scripts/benchmarks/libero_evaluation.py"
    result = {
        **results.described(__doc__, command, settings, began),
        "plain_loop_reset_s": round(plain.reset_s / options.rounds / options.episodes, 2),
        "rounds": rounds,
        "times_plain_wall": spread(wall, 2),
        "times_plain_processor_time": spread(free, 2),
    }
    table = "\n".join(
        [
            "| two workers over the plain loop | times as fast (quartiles) |",
            "|---|---|",
            f"| wall time | {results.ratio_text(result['times_plain_wall'])} |",
            f"| processor time, {cores} cores |"
            f" {results.ratio_text(result['times_plain_processor_time'])} |",
        ]
    )
    print(table)
    if options.out:
        page = results.page("Evaluation in LIBERO", result, "two cores", ("mujoco",), table)
        results.write(options.out, result, page)


if __name__ == "__main__":
    main()
