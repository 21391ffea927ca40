"""bfloat16 where it is quicker.

With "bf16" the forward pass runs under torch's autocast: products in bfloat16, weights, sums and losses in float32. "auto" means
float32 on a device without bfloat16 units: there a step of the smallest ViT took 8 times as long in bfloat16 (processor time on
a Zen 3 EPYC; batch 16, two cameras of 84 x 84). On a device that has them, the policy's own step is timed in both when the
run starts, since small networks are often slower under autocast. What was chosen is written to `config.json` and kept on resume.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from fibopolicy.policies import Policy

#: Flags in Linux's /proc/cpuinfo of processors that multiply bfloat16: Intel's AMX, AVX-512, and ARM's.
CPU_FLAGS = frozenset(("amx_bf16", "avx512_bf16", "bf16"))
#: bfloat16 rounds, so it has to be this many times as fast to be taken.
WORTHWHILE = 1.15
TURNS = 5


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Around a forward pass in "fp32" or "bf16"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def has_bf16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not CPU_FLAGS.isdisjoint(_cpu_flags())


def _cpu_flags() -> set[str]:
    """Of the first processor; none where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), []))


def quicker(policy: Policy, batch: Mapping[str, Any], device: torch.device) -> str:
    """ "bf16" or "fp32", by timing a copy of the policy, forward and backward, on a batch that is on its device."""
    trial = copy.deepcopy(policy).train()
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": []}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for turn in range(1 + TURNS):  # the first warms up
            for precision, times in seconds.items():
                took = step_seconds(trial, batch, device, precision)
                if turn:
                    times.append(took)
    gain = statistics.median(seconds["fp32"]) / statistics.median(seconds["bf16"])
    return "bf16" if gain >= WORTHWHILE else "fp32"


def step_seconds(policy: Policy, batch: Mapping[str, Any], device: torch.device, precision: str) -> float:
    """How long forward and backward take in "fp32" or "bf16"; the gradients are dropped."""
    began = time.perf_counter()
    with autocast(precision, device):
        loss, _ = policy.loss(batch)
    loss.backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    policy.zero_grad(set_to_none=True)
    return time.perf_counter() - began
