"""Speed of a training step with bfloat16 and torch.compile, by encoder.

    python scripts/benchmarks/precision_and_compile.py \\
        --out docs/benchmarks/precision_and_compile_<hardware>_<date>

Forward and backward of a `bc` policy on random frames of two 84 x 84 cameras, batch 16,
as the training loop runs them: in float32, with `--precision bf16`, with `--compile`
(with the sparse kernel), and with both. The variants take turns in one process. A ratio
is the time of float32 over that of the variant within a turn: above 1 is faster.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import results
from results import ratio_text, spread

from fibopolicy.utils.processes import set_up

ENCODERS = ("fibottention_vit_tiny", "vit_tiny", "resnet18")
FLOAT32 = "float32"
#: Precision, and whether the encoders are compiled.
VARIANTS = {
    FLOAT32: ("fp32", False),
    "bf16": ("bf16", False),
    "compiled": ("fp32", True),
    "compiled, bf16": ("bf16", True),
}
SIZE, BATCH = 84, 16


def step_seconds(policy: Any, batch: Mapping[str, Any], device: Any, precision: str) -> float:
    """Seconds of forward and backward in "fp32" or "bf16"; the gradients are dropped."""
    import torch

    from fibopolicy.training.optim import autocast

    began = time.perf_counter()
    with autocast(precision, device):
        loss, _ = policy.loss(batch)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    policy.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def measure(encoder: str, turns: int, device: Any) -> dict[str, Any]:
    import torch

    from fibopolicy.policies import PolicyConfig, build_policy
    from fibopolicy.policies.base import Shapes
    from fibopolicy.training.encoders import compile_encoders

    cameras = ("front", "wrist")
    shapes = Shapes(dict.fromkeys(cameras, (SIZE, SIZE)), {"hand": 3}, action_dim=4)
    frames = {
        camera: torch.randint(256, (BATCH, 1, SIZE, SIZE, 3), dtype=torch.uint8)
        for camera in cameras
    }
    batch: dict[str, Any] = {
        "obs": {
            **{camera: image.to(device) for camera, image in frames.items()},
            "hand": torch.rand(BATCH, 1, 3, device=device),
        },
        "actions": torch.rand(BATCH, 8, 4, device=device),
        "action_mask": torch.ones(BATCH, 8, dtype=torch.bool, device=device),
    }

    policies, first = {}, {}
    torch.compiler.reset()
    for name, (precision, compiled) in VARIANTS.items():
        torch.manual_seed(0)
        policies[name] = build_policy(PolicyConfig(encoder=encoder), shapes).to(device).train()
        if compiled:
            compile_encoders(policies[name], device)
        first[name] = step_seconds(policies[name], batch, device, precision)
    print(f"{encoder}: timing", flush=True)
    seconds = np.array(
        [
            [
                step_seconds(policies[name], batch, device, precision)
                for name, (precision, _) in VARIANTS.items()
            ]
            for _ in range(turns)
        ]
    )
    print(f"{encoder}: done", flush=True)
    return {
        "seconds": {name: spread(seconds[1:, i], 4) for i, name in enumerate(VARIANTS)},
        "ratios": {
            name: spread(seconds[1:, 0] / seconds[1:, i], 3) for i, name in enumerate(VARIANTS) if i
        },
        "first_step_seconds": {name: round(value, 1) for name, value in first.items()},
    }


def main() -> None:
    parser = results.parser(__doc__)
    parser.add_argument("--turns", type=int, default=21, help="at least 2; the first warms up")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    began = time.perf_counter()
    set_up()
    import torch

    torch.set_num_threads(arguments.threads)
    device = torch.device("cpu")
    settings = {
        "turns": arguments.turns,
        "threads": arguments.threads,
        "device": str(device),
        "bf16_units": torch.cpu._is_avx512_bf16_supported(),
    }
    command = (
        f"scripts/benchmarks/precision_and_compile.py --turns {arguments.turns} --threads"
        f" {arguments.threads}"
    )
    result = results.described(__doc__, command, settings, began)
    result["encoders"] = {
        encoder: measure(encoder, arguments.turns, device) for encoder in ENCODERS
    }
    result["seconds"] = round(time.perf_counter() - began)
    variants = [name for name in VARIANTS if name != FLOAT32]
    rows = [
        (
            f"| encoder | float32, ms | {' | '.join(variants)} | first compiled step, s (torch's"
            " cache not cleared) |"
        ),
        f"|---|---|{'---|' * len(variants)}---|",
    ]
    for encoder, measured in result["encoders"].items():
        ratios = " | ".join(ratio_text(measured["ratios"][name]) for name in variants)
        base = 1000 * measured["seconds"][FLOAT32]["median"]
        rows.append(
            f"| `{encoder}` | {base:.0f} | {ratios} |"
            f" {measured['first_step_seconds']['compiled']:.0f} |"
        )
    table = "\n".join(rows)
    print(table)
    if arguments.out:
        units = "with" if settings["bf16_units"] else "without"
        cores = f"{arguments.threads} threads, {units} bfloat16 units"
        results.write(
            arguments.out,
            result,
            results.page(
                "bfloat16 and torch.compile", result, cores, ("torch",), table, load=False
            ),
        )


if __name__ == "__main__":
    main()
