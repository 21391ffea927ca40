"""What training does to a policy's encoders: freezes them, trades time for memory,
compiles them.
"""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from fibopolicy.encoders import Encoder
from fibopolicy.errors import UserError


def encoders_of(policy: nn.Module) -> list[Encoder]:
    """Each once, in the order of the policy's modules."""
    return [module for module in policy.modules() if isinstance(module, Encoder)]


def freeze(policy: nn.Module) -> None:
    """No gradients for the encoders; `training_mode` keeps them as they are in evaluation."""
    for encoder in encoders_of(policy):
        encoder.requires_grad_(False)


def training_mode(policy: nn.Module) -> None:
    """As `train()`, but frozen encoders stay in evaluation mode: batch norm keeps its
    statistics, nothing is dropped.
    """
    policy.train()
    for encoder in encoders_of(policy):
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            encoder.eval()


def checkpoint_gradients(policy: nn.Module) -> None:
    """See `Encoder.checkpoint_gradients`."""
    for encoder in encoders_of(policy):
        encoder.checkpoint_gradients()


def compile_encoders(policy: nn.Module, device: torch.device) -> None:
    """torch.compile, in place; names of weights stay, and the sparse attention kernel
    is called from inside.

    Raises:
        UserError: on a CPU without a C++ compiler.
    """
    compiler = os.environ.get("CXX") or "g++"  # as torch chooses
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"--compile needs a C++ compiler on a CPU and found no {compiler}; install g++, or"
            " leave --compile out"
        )
    for encoder in encoders_of(policy):
        encoder.compile()
