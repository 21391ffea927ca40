"""Mixed precision: with "bf16" the forward pass runs under torch's autocast, products
in bfloat16, weights, sums and losses in float32.

"auto" depends on the device alone, never on a timing, so that a seed gives the same
weights on a quiet and on a busy machine: bf16 on GPUs that compute it, float32
elsewhere. On CPUs small networks are often slower under autocast, and several times as
slow without bfloat16 units.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "fp32" or "bf16" for what a run asks for, "auto" included."""
    if precision != "auto":
        return precision
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if capable else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Around a forward pass in "fp32" or "bf16"."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
