"""Study directories with a known truth: rates, effects of training seeds, difficulty of
initial states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fibopolicy.evaluation.episodes import EpisodeResult, write_rows
from fibopolicy.study import StudyEncoder, StudyPolicy, StudyTask
from fibopolicy.study.grid import Condition

STEPS = 1000


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def describe(
    directory: Path,
    tasks: Sequence[str],
    encoders: Sequence[str],
    *,
    policies: Sequence[str | dict[str, Any]] = ("bc",),
    inits: Sequence[str] = ("scratch",),
    seeds: Sequence[int] = (0, 1, 2),
    episodes: int = 100,
    margin: float | None = 0.05,
    **changes: Any,
) -> Path:
    """An empty study: its description, and no condition begun. Policies are names, or what
    `to_json` makes of a `StudyPolicy`.
    """
    weights = None if tuple(inits) == ("scratch",) else "/weights"
    document = {
        "name": directory.name,
        "tasks": [{"task": task, "dataset": None, "demos": 400} for task in tasks],
        "encoders": [{"name": name, "encoder": name, "weights": weights} for name in encoders],
        "policies": [
            {"policy": policy} if isinstance(policy, str) else policy for policy in policies
        ],
        "inits": list(inits),
        "seeds": list(seeds),
        "baseline": encoders[0],
        "steps": STEPS,
        "episodes": episodes,
        "init_seed": 0,
        "margin": margin,
        "versions": {"fibopolicy": "0.1.0", "torch": "2.6.0"},
    }
    write_json(directory / "study.json", document | changes)
    write_json(
        directory / "environment.json",
        {"date": "2026-11-24", "processor": "a processor", "gpu": None},
    )
    return directory


def begin(
    directory: Path, task: str, encoder: str, policy: str = "bc", init: str = "scratch"
) -> Path:
    """A condition's folder."""
    name = Condition(StudyTask(task), StudyEncoder(encoder), StudyPolicy(policy), init).name
    folder = directory / "conditions" / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def add_cost(condition: Path, speed: float = 1.0, **changes: Any) -> None:
    timed = {
        f"encoder_ms_batch_{n}": dict(
            zip(("median", "p25", "p75"), np.array([4, 3.8, 4.4]) * n**0.9 / speed, strict=True)
        )
        for n in (1, 64)
    }
    write_json(
        condition / "cost.json",
        {
            "parameters": 5_530_000,
            "encoder_parameters": 5_400_000,
            "encoder_macs": 1_080_000_000,
            "attention_pairs": 0.056,
            **timed,
            **changes,
        },
    )


def finish(
    condition: Path,
    seed: int,
    successes: Sequence[bool] | NDArray[np.bool_],
    *,
    speed: float = 1.0,
    curves: bool = False,
    trained: int = STEPS,
    **changes: Any,
) -> Path:
    """A finished run whose outcomes are these, on initial states 0, 1, ..."""
    run = condition / f"seed{seed}"
    run.mkdir(parents=True, exist_ok=True)
    document = json.loads((condition.parents[1] / "study.json").read_text())
    short = condition.name.split("__")[0]
    task = next(t["task"] for t in document["tasks"] if StudyTask(t["task"]).short == short)
    rng = np.random.default_rng(seed)
    rows = [
        EpisodeResult(
            **(
                {
                    "task": task,
                    "index": i,
                    "seed": i,
                    "success": bool(success),
                    "steps": 40 + i % 30 if success else 120,
                    "total_reward": float(success),
                    "wall_s": 0.5,
                    "checkpoint_step": trained,
                    "checkpoint": "ema",
                    "init_seed": 0,
                    "max_steps": 120,
                    "quality": "fast",
                    "init_state": f"{task}{i}",
                    "policy": f"{condition.name}{seed}",
                }
                | changes
            )
        )
        for i, success in enumerate(successes)
    ]
    write_rows(run / "episodes.jsonl", rows)
    if curves:
        steps = np.arange(0, trained, 10)
        loss = 0.2 * np.exp(-steps / (200 + 40 * seed)) * rng.lognormal(0, 0.1, len(steps)) + 0.01
        (run / "metrics.jsonl").write_text(
            "".join(
                json.dumps({"step": int(s), "loss": float(v), "lr": 1e-3}) + "\n"
                for s, v in zip(steps, loss, strict=True)
            )
        )
    write_json(
        run / "done.json",
        {
            "train_s": 300.0 / speed,
            "evaluate_s": 50.0,
            "samples_per_s": 420.0 * speed,
            "peak_mb": 900.0,
            "rollout_steps_per_s": 350.0,
            "steps": trained,
            "episodes": len(rows),
            "max_steps": rows[0].max_steps,
            "quality": rows[0].quality,
        },
    )
    return run


def fail(condition: Path, seed: int, error: str = "RuntimeError: out of memory") -> None:
    write_json(condition / f"seed{seed}" / "failed.json", {"error": error, "attempts": 2})
    (condition / f"seed{seed}.log").write_text(error)


def simulate(
    directory: Path,
    logits: Mapping[str, Mapping[str, float]],
    *,
    rng: np.random.Generator,
    seed_sd: float = 0.3,
    init_state_sd: float = 1.5,
    policies: Sequence[str | dict[str, Any]] = ("bc",),
    inits: Sequence[str] = ("scratch",),
    seeds: Sequence[int] = (0, 1, 2),
    episodes: int = 100,
    margin: float | None = 0.05,
    curves: bool = True,
) -> Path:
    """A finished study. `logits`: per task and encoder the logit of success at a
    middling initial state and training seed.

    An encoder's true rate is `simulated.rate(logit, hypot(seed_sd, init_state_sd))`; initial
    states are as hard for all encoders.
    """
    tasks = list(logits)
    encoders = list(logits[tasks[0]])
    describe(
        directory,
        tasks,
        encoders,
        policies=policies,
        inits=inits,
        seeds=seeds,
        episodes=episodes,
        margin=margin,
    )
    for task in tasks:
        difficulty = init_state_sd * rng.normal(size=episodes)
        for described in policies:
            policy, steps = (
                (described["name"], described["steps"])
                if isinstance(described, dict)
                else (described, None)
            )
            for init in inits:
                for i, encoder in enumerate(encoders):
                    condition = begin(directory, task, encoder, policy, init)
                    add_cost(condition, speed=1 + 0.3 * i)
                    for seed in seeds:
                        logit = logits[task][encoder] + seed_sd * rng.normal() + difficulty
                        solved = rng.random(episodes) < 1 / (1 + np.exp(-logit))
                        finish(
                            condition,
                            seed,
                            solved,
                            speed=1 + 0.3 * i,
                            curves=curves,
                            trained=steps or STEPS,
                        )
    return directory
