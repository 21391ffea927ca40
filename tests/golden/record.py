"""The golden record: results of seeded computations, which a refactoring must not
change.

`python tests/golden/record.py` computes and writes `record.json`. Run it only in a
commit that changes a number on purpose, and say there which one and why. All inputs are
in this folder or drawn from a seed; only the library's highest-level functions are
called.

- `losses`: 20 training steps of four policies on generated demonstrations.
- `masks`: SHA-256 of the masks of 12 attention patterns.
- `rollouts`: episodes of two stored policies, `[success, control steps, digest of the
    initial state]` each.
- `statistics`: rates, differences and p values of the outcomes in `outcomes.json`.

The policies in `policies/` are run directories, trained for 600 steps by `bc` on 30
scripted demonstrations of Reach and 20 of robosuite's Lift at 24 x 24 pixels. They
solve some of the episodes, not all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from fibopolicy import attention
from fibopolicy.evaluation import evaluate_policy
from fibopolicy.policies import PolicyConfig, load_policy
from fibopolicy.statistics.differences import Difference, MeanDifference, holm
from fibopolicy.statistics.rates import Rate, pooled
from fibopolicy.training import ComputeConfig, OptimizerConfig, TrainConfig, train

HERE = Path(__file__).parent
RECORD = HERE / "record.json"
#: Largest relative difference of a loss on another machine or with other versions.
LOSS_TOLERANCE = 1e-4
#: The same for statistics, where only the last digits depend on the machine.
STATISTICS_TOLERANCE = 1e-9
#: Largest difference of a success rate on another machine, where contacts amplify
#: rounding: 5 of 20 episodes, 1 of 4.
RATE_TOLERANCE = 0.25

VIT = {"patch_size": 4, "width": 24, "depth": 2, "num_heads": 3, "keypoints": 4}
POLICIES = {
    "bc, vit_tiny": PolicyConfig(encoder="vit_tiny", encoder_options=VIT, hidden=32, shift=1),
    "bc, fibottention_vit_tiny": PolicyConfig(
        encoder="fibottention_vit_tiny", encoder_options=VIT, hidden=32, shift=1
    ),
    "diffusion, vit_tiny": PolicyConfig(
        "diffusion", encoder="vit_tiny", encoder_options=VIT, hidden=16, shift=1
    ),
    "bc_rnn_gmm, vit_tiny": PolicyConfig(
        "bc_rnn_gmm",
        {"hidden_dim": 16},
        encoder="vit_tiny",
        encoder_options=VIT,
        hidden=32,
        horizon=4,
        shift=1,
    ),
}
#: Policy -> task, episodes, control steps after which an episode ends.
ROLLOUTS = {"reach": ("fibopolicy/Reach-v0", 20, 80), "robosuite_lift": ("robosuite/Lift", 4, 60)}


def write_demos(path: Path) -> None:
    """Four demonstrations in robomimic's format, drawn from a seed: one camera, one
    vector, four actions; three are for training.
    """
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["env_args"] = json.dumps({"env_name": "Drawn", "type": 4, "env_kwargs": {}})
        for number in range(4):
            demo = data.create_group(f"demo_{number}")
            demo.attrs["num_samples"] = 16
            position = random.uniform(-1, 1, (16, 3))
            demo["obs/front_image"] = random.integers(0, 256, (16, 24, 24, 3), dtype=np.uint8)
            demo["obs/robot0_eef_pos"] = position
            demo["actions"] = np.column_stack([-position, random.uniform(-1, 1, 16)])
        data.attrs["total"] = 64
        file["mask/train"] = np.array([b"demo_0", b"demo_1", b"demo_2"])
        file["mask/valid"] = np.array([b"demo_3"])


def losses() -> dict[str, list[float]]:
    """The loss of each of 20 steps, per policy."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        demos, out = Path(folder) / "demos.hdf5", Path(folder) / "run"
        write_demos(demos)
        for name, policy in POLICIES.items():
            optimizer = OptimizerConfig(steps=20, batch_size=8, warmup_steps=2)
            compute = ComputeConfig(precision="fp32")
            config = TrainConfig(
                demos,
                out,
                policy=policy,
                optimizer=optimizer,
                compute=compute,
                log_every=1,
                device="cpu",
            )
            train(config, overwrite=True)
            rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            found[name] = [row["loss"] for row in rows]
    return found


def patterns() -> dict[str, attention.AttentionPattern]:
    fibottention = attention.FibottentionPattern(36, 6)
    return {
        "fibottention": fibottention,
        "fibottention of layer 3": attention.FibottentionPattern(36, 6, layer=3),
        "fibottention, 196 tokens, 12 heads": attention.FibottentionPattern(196, 12),
        "fibottention, modified, main diagonal": attention.FibottentionPattern(
            36, 6, modified=True, main_diagonal=True
        ),
        "fibottention, not permuted, window 3 to 20": attention.FibottentionPattern(
            36, 6, w_min=3, w_max=20, permuted=False
        ),
        "fibottention with registers": attention.FibottentionPattern(36, 6, cls_token=5),
        **{
            baseline: attention.like(fibottention, baseline)
            for baseline in ("bigbird", "dense", "dilated", "local", "random")
        },
        "shared": attention.like(attention.FibottentionPattern(36, 6, cls_token=False), "shared"),
    }


def masks() -> dict[str, str]:
    """SHA-256 of each pattern's mask: its shape, then its bits."""
    found = {}
    for name, pattern in patterns().items():
        mask = pattern.mask().numpy()
        found[name] = hashlib.sha256(
            str(mask.shape).encode() + np.packbits(mask).tobytes()
        ).hexdigest()
    return found


def rollouts(name: str) -> list[list[Any]]:
    """`[success, control steps, digest of the initial state]` of each episode of one of
    `ROLLOUTS`.
    """
    task, episodes, horizon = ROLLOUTS[name]
    policy = load_policy(HERE / "policies" / name).policy
    # On a busy machine a step may take long, which must not give an error row.
    rows = evaluate_policy(
        policy,
        task,
        episodes,
        workers=1,
        batch_size=4,
        threads=1,
        horizon=horizon,
        step_timeout=600,
    )
    return [[row.success, row.steps, row.init_state] for row in rows]


def statistics() -> dict[str, dict[str, float]]:
    """A study's statistics for two methods with three training seeds each on two tasks."""
    outcomes = json.loads((HERE / "outcomes.json").read_text())["outcomes"]
    solved = {
        (task, method): np.array([[episode == "1" for episode in seed] for seed in seeds])
        for task, methods in outcomes.items()
        for method, seeds in methods.items()
    }
    found: dict[str, dict[str, float]] = {}
    differences = []
    for task in outcomes:
        dense, sparse = solved[task, "vit_tiny"], solved[task, "fibottention_vit_tiny"]
        found[f"{task}: rate of seed 0"] = _rate(pooled(sparse[:1]))
        found[f"{task}: rate"] = _rate(pooled(sparse))
        found[f"{task}: difference of seed 0"] = _difference(Difference(dense[:1], sparse[:1]))
        differences.append(Difference(dense, sparse))
        found[f"{task}: difference"] = _difference(differences[-1])
    found["mean difference"] = _difference(MeanDifference(tuple(differences)))
    found["adjusted p values"] = dict(
        zip(outcomes, holm([each.p for each in differences]), strict=True)
    )
    return found


def _rate(rate: Rate) -> dict[str, float]:
    return {"value": rate.value, "low": rate.low, "high": rate.high}


def _difference(difference: Difference | MeanDifference) -> dict[str, float]:
    planned = difference.expected(seeds=5, init_states=200)
    return {
        **{name: getattr(difference, name) for name in ("value", "low", "high", "p", "seed_share")},
        "p_inferior": difference.p_inferior(0.05),
        "expected_error": planned.error,
        "expected_df": planned.df,
    }


def machine() -> dict[str, str | None]:
    """What the last bits of a result depend on: the processor and the library versions."""
    found: dict[str, str | None] = {
        "processor": _processor(),
        "vector units": torch.backends.cpu.get_cpu_capability(),
    }
    found["system"] = f"{platform.system()} {platform.machine()}"
    for package in ("torch", "numpy", "scipy", "numba", "mujoco", "robosuite"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    return (
        f"{facts.get('model name')}, family {facts.get('cpu family')}, model {facts.get('model')}"
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread in torch, because sums over several threads are rounded differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


#: Part of the record -> the function that computes it.
PARTS: dict[str, Callable[[], Any]] = {
    "losses": losses,
    "masks": masks,
    "rollouts, reach": lambda: rollouts("reach"),
    "rollouts, robosuite_lift": lambda: rollouts("robosuite_lift"),
    "statistics": statistics,
}


def compute(part: str) -> Any:
    """One of `PARTS`, after a round trip through JSON."""
    with one_thread():
        return json.loads(json.dumps(PARTS[part]()))


def differences(part: str, recorded: Any, found: Any, *, exact: bool) -> list[str]:
    """Differences of `found` from the record, one line each.

    Args:
        exact: to the last bit, as on one machine; otherwise within the tolerances
            above. Masks are always exact.
    """
    if part.startswith("rollouts") and not exact:
        rates = [sum(success for success, *_ in rows) / len(rows) for rows in (recorded, found)]
        if len(recorded) == len(found) and abs(rates[0] - rates[1]) <= RATE_TOLERANCE:
            return []
        return [
            f"{part}: success rate {rates[0]} of {len(recorded)} in the record, now {rates[1]} of"
            f" {len(found)}"
        ]
    tolerance = (
        0.0
        if exact
        else {"losses": LOSS_TOLERANCE, "statistics": STATISTICS_TOLERANCE}.get(part, 0.0)
    )
    return list(_differences(part, recorded, found, tolerance))


def _differences(where: str, recorded: Any, found: Any, tolerance: float) -> Iterator[str]:
    if isinstance(recorded, dict) and isinstance(found, dict) and recorded.keys() == found.keys():
        for key in recorded:
            yield from _differences(f"{where}, {key}", recorded[key], found[key], tolerance)
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for index, (before, now) in enumerate(zip(recorded, found, strict=True)):
            yield from _differences(f"{where}[{index}]", before, now, tolerance)
    elif isinstance(recorded, float) and isinstance(found, float):
        if not math.isclose(recorded, found, rel_tol=tolerance, abs_tol=0.0):
            yield f"{where}: {recorded!r} in the record, now {found!r}"
    elif recorded != found:
        yield f"{where}: {recorded!r} in the record, now {found!r}"


def main() -> None:
    """Compute everything, print the differences from the record, and replace it."""
    before = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    record = {"machine": machine(), **{part: compute(part) for part in PARTS}}
    for part in before:
        for line in differences(part, before[part], record.get(part), exact=True):
            print(line)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":  # simulator processes import this file
    sys.exit(main())
