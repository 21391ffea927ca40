"""Speed of `fast` rendering against robosuite's own renderer, with one and two
processes.

    python scripts/benchmarks/robosuite_render.py \\
        --out docs/benchmarks/robosuite_render_<hardware>_<date>

robosuite Lift, cameras agentview and robot0_eye_in_hand at 84 x 84. Each contender has
its own process, pinned to one core, and they take turns: robosuite from
`robosuite.make`, with its off-screen renderer and camera observations, and ours in
quality `fast` and `full`. In each turn they render the same number of frames, then take
control steps with both cameras rendered. Ratios of rates are medians over turns, with
quartiles, in wall time. Then one of our processes is compared with two at once, on two
cores. Creation, resets, restored states and memory are those of ours, `fast`. Linux
only.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import results
from results import spread

from fibopolicy.utils.system import peak_memory_bytes

CAMERAS = ("agentview", "robot0_eye_in_hand")
SIZE = 84
CREATION_S, RESET_S, MEMORY_GB = 6.0, 0.5, 1.2
FRAMES_RATIO, STEPS_RATIO, TWO_PROCESSES = 3.0, 2.5, 1.7


# The contenders


class Theirs:
    """robosuite with its own renderer."""

    def __init__(self) -> None:
        import robosuite

        self.env = robosuite.make(
            "Lift",
            robots="Panda",
            has_renderer=False,
            has_offscreen_renderer=True,
            use_camera_obs=True,
            camera_names=list(CAMERAS),
            camera_heights=SIZE,
            camera_widths=SIZE,
            control_freq=20,
            ignore_done=True,
            hard_reset=False,
        )
        self.env.reset()

    def frames(self, count: int) -> None:
        for _ in range(count):
            for camera in CAMERAS:
                self.env.sim.render(camera_name=camera, height=SIZE, width=SIZE)

    def steps(self, count: int) -> None:
        for action in actions(count):
            self.env.step(action)


class Ours:
    """The same task as our environment."""

    def __init__(self, quality: str) -> None:
        from fibopolicy.envs import make

        self.env = make("robosuite/Lift", cameras=CAMERAS, image_size=SIZE, quality=quality)
        self.env.reset(seed=0)

    def frames(self, count: int) -> None:
        for _ in range(count):
            for camera in CAMERAS:
                self.env.render_camera(camera)

    def steps(self, count: int) -> None:
        self.env.reset(seed=0)
        for action in actions(count):
            self.env.step(action)

    def resets(self, count: int) -> list[float]:
        """Seconds of each soft reset, with both cameras rendered."""
        return [seconds(lambda seed=seed: self.env.reset(seed=seed)) for seed in range(count)]

    def restores(self, count: int) -> list[float]:
        """Seconds to restore each initial state, with both cameras rendered."""
        states = []
        for seed in range(count):
            self.env.reset(seed=seed)
            states.append(self.env.get_state())
        return [seconds(lambda state=state: self.env.set_state(state)) for state in states]


def actions(count: int) -> np.ndarray[Any, Any]:
    """Small movements, the same for all contenders."""
    return np.random.default_rng(0).uniform(-0.3, 0.3, (count, 7))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def serve(connection: Connection, kind: str, core: int) -> None:
    """A contender's process: makes it, then executes requests and answers with `(seconds,
    result)`.
    """
    os.sched_setaffinity(0, {core})
    began = time.perf_counter()
    contender: Any = Theirs() if kind == "robosuite" else Ours(kind)
    connection.send((time.perf_counter() - began, None))
    while (order := connection.recv()) is not None:
        name, count = order
        began = time.perf_counter()
        result = (
            peak_memory_bytes() / 2**30 if name == "memory" else getattr(contender, name)(count)
        )
        connection.send((time.perf_counter() - began, result))


class Contender:
    """The parent's end of a contender's process."""

    def __init__(self, kind: str, core: int) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=serve, args=(theirs, kind, core))
        self.process.start()
        self.creation_s, _ = self.answer()

    def ask(self, name: str, count: int = 0) -> None:
        self.pipe.send((name, count))

    def answer(self) -> tuple[float, Any]:
        return self.pipe.recv()

    def do(self, name: str, count: int = 0) -> tuple[float, Any]:
        self.ask(name, count)
        return self.answer()

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


# The measurements


def side_by_side(turns: int, frames: int, steps: int, core: int) -> dict[str, Any]:
    """Contenders in turns on one core: the rates of each, and the ratios of our rates to
    robosuite's within a turn.
    """
    contenders = {kind: Contender(kind, core) for kind in ("robosuite", "full", "fast")}
    rates: dict[str, dict[str, list[float]]] = {
        work: {kind: [] for kind in contenders} for work in ("frames", "steps")
    }
    for contender in contenders.values():
        contender.do("frames", 2)
        contender.do("steps", 2)
    for _ in range(turns):
        for work, count in (("frames", frames), ("steps", steps)):
            for kind, contender in contenders.items():
                spent, _ = contender.do(work, count)
                rates[work][kind].append(count * (len(CAMERAS) if work == "frames" else 1) / spent)
    memory = {kind: round(contender.do("memory")[1], 2) for kind, contender in contenders.items()}
    for contender in contenders.values():
        contender.close()
    ratios = {
        f"{work}, {kind} over robosuite": spread(
            np.divide(rates[work][kind], rates[work]["robosuite"]), 3
        )
        for work in rates
        for kind in ("fast", "full")
    }
    return {
        "per_second": {
            work: {kind: spread(values, 3) for kind, values in by.items()}
            for work, by in rates.items()
        },
        "ratios": ratios,
        "peak_memory_gb": memory,
    }


def together(turns: int, steps: int, cores: tuple[int, int]) -> dict[str, Any]:
    """One process alone, then two at once on two cores: the ratio of steps per second
    within a turn.
    """
    pair = [Contender("fast", core) for core in cores]
    for contender in pair:
        contender.do("steps", 2)
    ratios = []
    for _ in range(turns):
        alone, _ = pair[0].do("steps", steps)
        began = time.perf_counter()
        for contender in pair:
            contender.ask("steps", steps)
        for contender in pair:
            contender.answer()
        ratios.append(2 * alone / (time.perf_counter() - began))
    for contender in pair:
        contender.close()
    return spread(ratios, 3)


def lifecycle(core: int, creations: int, count: int) -> dict[str, Any]:
    """Ours, `fast`: creation with the first reset and frames, soft resets, restored
    initial states, peak memory.
    """
    made = []
    for _ in range(creations):
        contender = Contender("fast", core)
        made.append(contender.creation_s)
        resets, restores = contender.do("resets", count)[1], contender.do("restores", count)[1]
        memory = contender.do("memory")[1]
        contender.close()
    return {
        "creation_with_imports_s": spread(made, 3),
        "soft_reset_s": spread(resets, 3),
        "restored_init_state_s": spread(restores, 3),
        "peak_memory_gb": round(memory, 2),
    }


def targets(result: dict[str, Any]) -> list[tuple[str, dict[str, float], str, bool]]:
    """Name, values, target, and whether the target is met."""
    one, life = result["one_process"]["ratios"], result["lifecycle"]
    memory = {"median": life["peak_memory_gb"]}
    rows = [
        ("rendering, fast over robosuite", one["frames, fast over robosuite"], ">=", FRAMES_RATIO),
        (
            "control steps with two cameras, fast over robosuite",
            one["steps, fast over robosuite"],
            ">=",
            STEPS_RATIO,
        ),
        ("control steps, two processes over one", result["two_processes"], ">=", TWO_PROCESSES),
        (
            "creation with imports and first frames, s",
            life["creation_with_imports_s"],
            "<=",
            CREATION_S,
        ),
        ("soft reset, s", life["soft_reset_s"], "<=", RESET_S),
        ("restored initial state, s", life["restored_init_state_s"], "<=", RESET_S),
        ("peak memory of a process, GB", memory, "<=", MEMORY_GB),
    ]
    met = {">=": lambda value, bound: value >= bound, "<=": lambda value, bound: value <= bound}
    return [
        (name, numbers, f"{sign} {bound}", met[sign](numbers["median"], bound))
        for name, numbers, sign, bound in rows
    ]


def table(result: dict[str, Any]) -> str:
    lines = ["| | median | quartiles | target | met |", "|---|---|---|---|---|"]
    for name, numbers, target, met in targets(result):
        quartiles = f"{numbers['q1']} .. {numbers['q3']}" if "q1" in numbers else ""
        lines.append(
            f"| {name} | {numbers['median']} | {quartiles} | {target} | {'yes' if met else 'no'} |"
        )
    lines += ["", "| per second, one process | robosuite | full | fast |", "|---|---|---|---|"]
    for work, by in result["one_process"]["per_second"].items():
        cells = " | ".join(f"{by[kind]['median']:.1f}" for kind in ("robosuite", "full", "fast"))
        lines.append(
            f"| {'frames' if work == 'frames' else 'control steps, two frames each'} | {cells} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--frames", type=int, default=20, help="frames of each camera per turn")
    parser.add_argument("--steps", type=int, default=20, help="control steps per turn")
    options = parser.parse_args()
    multiprocessing.set_start_method("spawn")
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("needs two cores")
    os.environ["MUJOCO_GL"] = "egl"  # for all contenders
    began = time.perf_counter()
    result: dict[str, Any] = {
        "lifecycle": lifecycle(cores[0], 3, 20),
        "one_process": side_by_side(options.turns, options.frames, options.steps, cores[0]),
        "two_processes": together(options.turns, 3 * options.steps, (cores[0], cores[1])),
    }
    settings = {name: getattr(options, name) for name in ("turns", "frames", "steps")}
    command = "python scripts/benchmarks/robosuite_render.py"
    result |= results.described(__doc__, command, settings, began)
    print(table(result))
    if options.out:
        versions = ("robosuite", "mujoco")
        page = results.page(
            "Rendering robosuite Lift", result, "two cores", versions, table(result), load=False
        )
        results.write(options.out, result, page)


if __name__ == "__main__":
    main()
