"""Every task of LIBERO once: loaded, restored to its initial states, stepped, and driven
into its goal.

    python scripts/benchmarks/libero_tasks.py --out docs/benchmarks/libero_tasks_<date>

Each task has a fresh process with the imports done, in quality `fast` with both cameras
at 128 x 128. Times are processor seconds of that process, which a busy machine changes
little; memory is its peak. A task passes if it

- is as wide as its 50 official initial states, and not successful in the first,
- shows the same frames whenever the first is restored: after another one, and after
  steps,
- takes its 10 idle steps, and ten more with both cameras rendered,
- is successful once all predicates of its goal are made true by moving joints and
  objects, as LIBERO's own objects define them, and not when restored again.

Saves after every task; start it again to resume. Writes `<out>.json` and `<out>.md`.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from typing import Any

import numpy as np
import results

from fibopolicy import envs
from fibopolicy.envs.libero.tasks import HORIZONS, IDLE_STEPS, LIBERO, suite_of
from fibopolicy.utils.system import environment, peak_memory_bytes

STEPS = 10
#: Heights above a goal's place at which an object is tried, metres.
HEIGHTS = np.arange(0.15, -0.05, -0.001)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--tasks", nargs="+", default=in_turns())
    options = parser.parse_args()
    path = options.out.with_name(options.out.name + ".json")
    rows = (
        {row["task"]: row for row in json.loads(path.read_text(encoding="utf-8"))["tasks"]}
        if path.exists()
        else {}
    )
    workers = multiprocessing.get_context("forkserver")
    workers.set_forkserver_preload(["fibopolicy.envs.libero.environment", "libero_tasks"])
    for task in options.tasks:
        if task in rows:
            continue
        with workers.Pool(1) as pool:
            rows[task] = pool.apply(examined, (task,))
        print(rows[task], flush=True)
        result = {
            "what": __doc__.split("\n\n")[0].replace("\n", " "),
            "command": "python scripts/benchmarks/libero_tasks.py",
            "environment": environment(),
            "suites": {suite: summary(suite, list(rows.values())) for suite in HORIZONS},
            "tasks": [rows[task] for task in LIBERO if task in rows],
        }
        results.write(options.out, result, f"# LIBERO's tasks\n\n{table(result)}\n")


def in_turns() -> list[str]:
    """All tasks, one of each suite after the other."""
    place = {
        task: number
        for suite in HORIZONS
        for number, task in enumerate(task for task in LIBERO if suite_of(task) == suite)
    }
    return sorted(LIBERO, key=lambda task: place[task])


# One task, in its process


def examined(task: str) -> dict[str, Any]:
    row: dict[str, Any] = {"task": task}
    try:
        row |= _examined(task)
    except Exception as error:  # recorded as the task's failure
        row["failures"] = [f"{type(error).__name__}: {error}"[:300]]
    return row | {"peak_memory_gb": round(peak_memory_bytes() / 1e9, 2)}


def _examined(task: str) -> dict[str, Any]:
    started = time.process_time()
    env = envs.make(task)
    loaded = time.process_time()
    states = env.benchmark_states()
    first = env.set_state(states[0])
    shown = time.process_time()
    failures = [] if len(states) == 50 else [f"{len(states)} initial states"]
    if env.success():
        failures.append("successful at the start")
    env.set_state(states[1])
    before = time.process_time()
    again = env.set_state(states[0])
    restored = time.process_time()
    if not same_frames(first, again):
        failures.append("other frames after another state")
    env.begin(again)
    begun = time.process_time()
    for _ in range(STEPS):
        env.step(np.array([0.1, 0, -0.1, 0, 0, 0, 1], dtype=np.float32))
    stepped = time.process_time()
    if not same_frames(first, env.set_state(states[0])):
        failures.append("other frames after steps")
    # Joints first, since they move places; then again, since an object may have been
    # moved from below another.
    for predicate in 2 * sorted(env.goal, key=len):
        if not env._env._eval_predicate(predicate) and not driven(env, predicate):
            failures.append(f"goal not reached: {' '.join(predicate)}")
    if not env.success():
        failures.append("not successful in the goal")
    if not same_frames(first, env.set_state(states[0])) or env.success():
        failures.append("the goal leaves traces")
    return {
        "failures": failures,
        "goal": [" ".join(predicate) for predicate in env.goal],
        "load_s": round(loaded - started, 2),
        "first_state_s": round(shown - loaded, 2),
        "restore_s": round(restored - before, 3),
        "physics_steps_per_s": round(IDLE_STEPS / (begun - restored), 1),
        "steps_per_s": round(STEPS / (stepped - begun), 1),
    }


def same_frames(one: envs.Observation, other: envs.Observation) -> bool:
    frames = [key for key, value in one.items() if value.dtype == np.uint8]
    return all(np.array_equal(one[key], other[key]) for key in frames)


def driven(env: Any, predicate: tuple[str, ...]) -> bool:
    """Move joints or an object until a predicate of the goal holds."""
    scene = env._env
    kind, name, *place = predicate
    if place:
        joint = scene.get_object(name).joints[-1]
        target = np.array(scene.object_states_dict[place[0]].get_geom_state()["pos"])
        pose = scene.sim.data.get_joint_qpos(joint).copy()
        for height in HEIGHTS:
            pose[:3] = target + [0, 0, height]
            scene.sim.data.set_joint_qpos(joint, pose)
            scene.sim.forward()
            if scene._eval_predicate(predicate):
                return True
        return False
    thing = scene.object_states_dict[name]
    owner = scene.get_object(getattr(thing, "parent_name", name))
    thing.set_joint(np.mean(owner.object_properties["articulation"][f"default_{kind}_ranges"]))
    scene.sim.forward()
    return bool(scene._eval_predicate(predicate))


# The table


def summary(suite: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over a suite's tasks, the largest memory, and the tasks that failed."""
    mine = [row for row in rows if suite_of(row["task"]) == suite]
    timed = [row for row in mine if "load_s" in row]
    names = ("load_s", "first_state_s", "restore_s", "physics_steps_per_s", "steps_per_s")
    return {
        "tasks": len(mine),
        "passed": sum(not row["failures"] for row in mine),
        **{name: statistics.median([row[name] for row in timed] or [0]) for name in names},
        "peak_memory_gb": max((row["peak_memory_gb"] for row in mine), default=0),
        "failures": {row["task"]: row["failures"] for row in mine if row["failures"]},
    }


def table(result: dict[str, Any]) -> str:
    lines = [
        "| suite | tasks passed | load, s | restore a state, s | steps/s without frames | steps/s"
        " with two frames | peak memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {suite} | {row['passed']} of {row['tasks']} | {row['load_s']:.1f} |"
        f" {row['restore_s']:.2f} | {row['physics_steps_per_s']:.0f} | {row['steps_per_s']:.1f} |"
        f" {row['peak_memory_gb']:.2f} |"
        for suite, row in result["suites"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
