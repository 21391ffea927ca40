"""The training loop."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from fibopolicy.datasets import WindowDataset, batch_indices
from fibopolicy.devices import resolve_device
from fibopolicy.errors import UserError
from fibopolicy.files import claimed, refuse_both
from fibopolicy.policies import Policy, build_policy
from fibopolicy.training.checkpoint import TrainingState, load_state, open_run, save_checkpoint
from fibopolicy.training.config import OptimizerConfig, TrainConfig
from fibopolicy.training.data import open_dataset, shapes_of
from fibopolicy.training.ema import EMA
from fibopolicy.training.metrics import MetricsLog

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run gave: the averaged policy, the last step's number, seconds spent now (not before a resume)."""

    policy: Policy
    step: int
    seconds: float


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Trained:
    """Train a policy; everything lands in `config.out`.

    A step's batch, augmentation and learning rate are functions of (seed, step), so a run that was killed and is
    resumed ends with the same weights as one that was not, bit for bit on the same machine.

    Raises:
        UserError: the data or the configuration are at fault; `config.out` exists and neither `resume` nor `overwrite`
            is given, or it holds a run of another configuration; the loss stops being finite.
    """
    torch.manual_seed(config.seed)
    refuse_both(resume=resume, overwrite=overwrite)
    device = resolve_device(config.device)
    dataset = open_dataset(config)
    policy = build_policy(config.policy, shapes_of(dataset))
    policy.fit_normalizers(dataset.stats)
    policy.to(device)
    optimizer = build_optimizer(policy, config.optimizer)
    ema = EMA(policy, config.optimizer.ema)
    state = TrainingState(policy, ema, optimizer)
    with claimed(config.out):
        open_run(config, dataset, resume=resume, overwrite=overwrite)
        for oddity in dataset.warnings:
            warnings.warn(f"{config.dataset}: {oddity}", stacklevel=2)
        _log.info("training on %s, see %s", _seen(dataset), config.out)
        start = load_state(config.out, state) if resume else 0
        seconds = _run(start, config, dataset, state, device)
    return Trained(ema.average, max(start, config.optimizer.steps), seconds)


def _seen(dataset: WindowDataset) -> str:
    keys = ", ".join((*dataset.cameras, *dataset.vectors))
    return f"{dataset.num_demos} demos, {len(dataset)} steps: {keys}"


def _run(start: int, config: TrainConfig, dataset: WindowDataset, state: TrainingState, device: torch.device) -> float:
    """All steps from `start` on, logged and saved; returns the seconds they took."""
    total, began = config.optimizer.steps, time.perf_counter()
    with (
        MetricsLog(config.out, start) as log,
        tqdm(total=total, initial=start, desc="train", unit="step", disable=None) as bar,
    ):
        for step in range(start, total):
            figures = _step(step, config, dataset, state, device)
            last = step + 1 == total
            if last or step % config.log_every == 0:
                log.write(step, figures)
                bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
            if last or (step + 1) % config.checkpoint_every == 0:
                log.flush()
                save_checkpoint(config.out, state, step + 1)
            bar.update()
    return time.perf_counter() - began


def _step(step: int, config: TrainConfig, dataset: WindowDataset, state: TrainingState, device: torch.device) -> dict[str, float]:
    """One gradient step, numbered from 0; returns what to log."""
    began = time.perf_counter()
    indices = batch_indices(len(dataset), config.optimizer.batch_size, config.seed, step)
    batch = to_device(dataset.batch(indices), device)
    loaded = time.perf_counter()

    torch.manual_seed((config.seed << 32) + step)  # augmentation and dropout of this step
    rate = learning_rate(step, config.optimizer)
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    state.policy.train()
    loss, figures = state.policy.loss(batch)
    if not math.isfinite(float(loss.detach())):
        raise UserError(
            f"{config.out}: the loss is {float(loss.detach())} at step {step} (samples {indices[:8].tolist()}...);"
            " lower learning_rate or look at these samples"
        )
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    norm = nn.utils.clip_grad_norm_(state.policy.parameters(), config.optimizer.clip)
    state.optimizer.step()
    state.ema.update(state.policy, step)
    ended = time.perf_counter()
    return {
        **figures,
        "learning_rate": rate,
        "gradient_norm": float(norm),
        "samples_per_s": config.optimizer.batch_size / (ended - began),
        "data_share": (loaded - began) / (ended - began),
    }


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """Linear from 0 over `warmup` steps, then half a cosine to 0 at the last step."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(policy: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone."""
    parameters = [(n, p) for n, p in policy.named_parameters() if p.requires_grad]
    decayed = [p for n, p in parameters if p.ndim > 1 and not n.endswith(("positions", ".cls"))]
    others = [p for n, p in parameters if not (p.ndim > 1 and not n.endswith(("positions", ".cls")))]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, foreach=True)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same nested batch with torch tensors for numpy arrays."""
    moved: dict[str, Any] = {}
    for key, value in batch.items():
        if isinstance(value, Mapping):
            moved[key] = to_device(value, device)
        else:
            moved[key] = torch.from_numpy(np.ascontiguousarray(value)).to(device, non_blocking=True)
    return moved
