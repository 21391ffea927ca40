"""AdamW over groups of parameters, and its learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from fibopolicy.encoders import Encoder
from fibopolicy.training.config import OptimizerConfig

#: Matrices by shape, but not weights of a product: positions and learned tokens, ours
#: and timm's.
NOT_DECAYED = ("positions", "cls", "pos_embed", "cls_token", "reg_token", "dist_token")
#: In a group of the optimiser: its learning rate as a factor of the schedule's.
FACTOR = "factor"


def build_optimizer(policy: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over what is trained: weight decay on matrices alone, encoders at their own
    learning rate.
    """
    encoders = {
        id(p)
        for module in policy.modules()
        if isinstance(module, Encoder)
        for p in module.parameters()
    }
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in NOT_DECAYED
            factor = config.encoder_rate if id(parameter) in encoders else 1.0
            groups.setdefault((factor, config.weight_decay if decayed else 0.0), []).append(
                parameter
            )
    # In an order of their own, since a resumed run finds its groups by position.
    described = [
        {"params": groups[key], FACTOR: key[0], "weight_decay": key[1]}
        for key in sorted(groups, reverse=True)
    ]
    return torch.optim.AdamW(described, lr=config.learning_rate, betas=config.betas, foreach=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """For the next step, to every group its share."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[FACTOR]


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Linear from 0 over `warmup` steps, then half a cosine to 0 at the last step."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
