"""The optimizer, its learning rate, the average of the weights, divergence and precision."""

from __future__ import annotations

import copy
import math
import statistics
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from fibopolicy.training.config import OptimizerConfig, Precision
from fibopolicy.training.encoders import encoders_of

M = TypeVar("M", bound=nn.Module)

#: Learned tokens and positions, ours, timm's and robomimic's: matrices by shape, but not
#: weights of a product.
NOT_DECAYED = (
    *("positions", "memory_positions", "pos_embed", "embed_timestep"),
    *("cls", "cls_token", "reg_token", "dist_token"),
)
#: Key in a parameter group: its learning rate relative to the schedule's.
LR_SCALE = "lr_scale"


def build_optimizer(policy: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the parameters that need gradients.

    Weight decay acts on matrices only. Encoders have their own learning rate. On a GPU,
    a step is one fused kernel per group.
    """
    encoded = {id(p) for encoder in encoders_of(policy) for p in encoder.parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            own = name.removesuffix(".weight").rsplit(".", 1)[-1]  # positions or an embedding
            decayed = parameter.ndim > 1 and own not in NOT_DECAYED
            scale = config.encoder_lr_scale if id(parameter) in encoded else 1.0
            key = (scale, config.weight_decay if decayed else 0.0)
            groups.setdefault(key, []).append(parameter)
    # Sorted, because a resumed run finds its groups by position.
    described = [
        {"params": groups[key], LR_SCALE: key[0], "weight_decay": key[1]}
        for key in sorted(groups, reverse=True)
    ]
    fused = all(p.device.type == "cuda" for group in groups.values() for p in group)
    return torch.optim.AdamW(
        described, lr=config.lr, betas=config.betas, foreach=not fused, fused=fused
    )


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Restore the state of an optimizer that may have run on another kind of device."""
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=False):
        saved |= {name: group[name] for name in ("foreach", "fused")}
    optimizer.load_state_dict(state)


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Linear from 0 over `warmup_steps` steps, then half a cosine to 0 at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of the next step in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group[LR_SCALE]


class EMA(Generic[M]):
    """Keeps `average`, a copy of a module whose parameters follow it: a <- d a + (1 -
    d) w.

    The decay d grows from 0.1 at the first step to its full value, so that the random
    initial weights are forgotten. Buffers, such as batch-norm statistics, are copied.
    """

    def __init__(self, module: M, decay: float) -> None:
        self.average: M = copy.deepcopy(module).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Follow `module` after gradient step number `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [parameter.detach() for parameter in self.average.parameters()]
        weights = [parameter.detach() for parameter in module.parameters()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        if buffers := list(module.buffers()):
            torch._foreach_copy_(list(self.average.buffers()), buffers)


#: Number of losses that make up the usual level, and how many are needed before
#: judging.
WINDOW, LEAST = 200, 20
#: A loss is high if it exceeds the median of the recent losses by this many times their
#: size.
FACTOR = 10.0
#: Number of high losses in a row that count as divergence.
PATIENCE = 50


class Divergence:
    """Ends a training run whose loss is not finite or stays far above its usual level.

    The usual level is the median of the last `WINDOW` losses that were not high. Their
    size is the magnitude of that median or their interquartile range, whichever is
    larger, because log-likelihoods may have any sign. One high loss is an outlier,
    `PATIENCE` of them in a row are divergence. No checkpoint is written while losses
    are high, so the newest one on disk is from before the divergence.

    Attributes:
        recent: the losses that make up the usual level.
        num_bad: number of high losses in a row, up to now.
    """

    def __init__(self) -> None:
        self.recent: deque[float] = deque(maxlen=WINDOW)
        self.num_bad = 0

    @property
    def is_stable(self) -> bool:
        return self.num_bad == 0

    def check(self, loss: float, gradient_norm: float) -> str | None:
        """Take in the next step; return the reason to stop training, or `None`."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient norm is {gradient_norm}"
        limit = self._limit()
        if loss <= limit:
            self.num_bad = 0
            self.recent.append(loss)
            return None
        self.num_bad += 1
        if self.num_bad < PATIENCE:
            return None
        return (
            f"the loss has been above {limit:.4g} for {PATIENCE} steps, {FACTOR:g} times its"
            f" usual size, and is {loss:.4g}"
        )

    def _limit(self) -> float:
        if len(self.recent) < LEAST:
            return math.inf
        low, median, high = statistics.quantiles(self.recent, n=4)
        return median + FACTOR * max(abs(median), high - low)


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """ "fp32" or "bf16"; "auto" is bf16 on GPUs that support it and fp32 elsewhere.

    The choice depends only on the device, never on a timing, so that a seed gives the
    same weights on a quiet and on a busy machine. Small networks on CPUs are often
    slower under autocast.
    """
    if precision != "auto":
        return precision
    capable = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if capable else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Context of a forward pass in "fp32" or "bf16".

    With "bf16", products are computed in bfloat16; weights, sums and losses stay
    float32.
    """
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
