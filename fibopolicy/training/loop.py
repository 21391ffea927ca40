"""The training loop."""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from fibopolicy.datasets import Windows
from fibopolicy.devices import resolve_device
from fibopolicy.errors import UserError
from fibopolicy.files import claimed, refuse_both
from fibopolicy.policies import Policy, build_policy
from fibopolicy.training.batches import to_device
from fibopolicy.training.checkpoint import TrainingState, describe, load_state, open_run, save_checkpoint
from fibopolicy.training.config import OptimizerConfig, TrainConfig
from fibopolicy.training.data import open_dataset, open_validation, shapes_of
from fibopolicy.training.ema import EMA
from fibopolicy.training.meter import Meter, Summary, peak_gb
from fibopolicy.training.metrics import MetricsLog
from fibopolicy.training.wandb_log import require_wandb
from fibopolicy.training.watch import Watch

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run gave: the averaged policy, the last step's number, what it took now (not before a resume)."""

    policy: Policy
    step: int
    summary: Summary


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
    require_wandb(config.wandb)
    device = resolve_device(config.device)
    dataset = open_dataset(config)
    validation = open_validation(config, dataset)
    policy = build_policy(config.policy, shapes_of(dataset))
    policy.fit_normalizers(dataset.stats)
    policy.to(device)
    optimizer = build_optimizer(policy, config.optimizer)
    ema = EMA(policy, config.optimizer.ema)
    state = TrainingState(policy, ema, optimizer)
    with claimed(config.out):
        open_run(config, dataset, resume=resume, overwrite=overwrite)
        for oddity in dataset.warnings:
            warnings.warn(oddity, stacklevel=2)
        _log.info("training on %s, see %s", _seen(dataset), config.out)
        start = load_state(config.out, state) if resume else 0
        summary = _run(start, config, dataset, validation, state, device)
    return Trained(ema.average, summary.steps, summary)


def _seen(dataset: Windows) -> str:
    keys = ", ".join((*dataset.cameras, *dataset.vectors))
    return f"{dataset.num_demos} demos, {len(dataset)} steps: {keys}"


def _run(
    start: int, config: TrainConfig, dataset: Windows, validation: Windows | None, state: TrainingState, device: torch.device
) -> Summary:
    """All steps from `start` on, logged, watched and saved."""
    total, began, meter = config.optimizer.steps, time.perf_counter(), Meter(device)
    with (
        MetricsLog(config.out, start, wandb=config.wandb, config=describe(config, dataset)) as log,
        Watch(config, state.ema.average, validation, log, device, start) as watch,
        tqdm(total=total, initial=start, desc="train", unit="step", disable=None) as bar,
    ):
        for step in range(start, total):
            figures = _step(step, config, dataset, state, device, meter)
            last = step + 1 == total
            if last or step % config.log_every == 0:
                log.write(step, figures | meter.figures())
                bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
            watch.after(step)
            if last or (step + 1) % config.checkpoint_every == 0:
                log.flush()
                save_checkpoint(config.out, state, step + 1)
            bar.update()
        watch.finish()
        return Summary(
            steps=max(start, total),
            loss=log.recent("loss"),
            validation_loss=log.last("validation_loss"),
            seconds=time.perf_counter() - began,
            samples_per_s=meter.total.samples_per_s,
            data_share=meter.total.data_share,
            peak_gb=peak_gb(),
            gpu_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        )


def _step(
    step: int, config: TrainConfig, dataset: Windows, state: TrainingState, device: torch.device, meter: Meter
) -> dict[str, float]:
    """One gradient step, numbered from 0; returns what to log."""
    began = time.perf_counter()
    indices = dataset.indices(config.optimizer.batch_size, config.seed, step)
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
    meter.add(config.optimizer.batch_size, loaded - began, time.perf_counter() - began)
    return {**figures, "learning_rate": rate, "gradient_norm": float(norm)}


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
