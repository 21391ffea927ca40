"""The training loop."""

from __future__ import annotations

import logging
import time
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fibopolicy.datasets import Windows
from fibopolicy.envs.registry import unavailable
from fibopolicy.errors import UserError
from fibopolicy.policies import Policy, build_policy
from fibopolicy.policies.rng import SampleRng
from fibopolicy.policies.run_directory import render_quality
from fibopolicy.training.batches import rows, to_device
from fibopolicy.training.checkpoint import (
    STATE,
    TrainingState,
    describe,
    load_state,
    open_run,
    save_checkpoint,
    stored_precision,
)
from fibopolicy.training.config import TrainConfig
from fibopolicy.training.data import (
    left_out,
    narrow_distributions,
    open_dataset,
    open_validation,
    shapes_of,
)
from fibopolicy.training.distributed import PolicyLoss, World, joined, unsynchronised
from fibopolicy.training.divergence import Divergence
from fibopolicy.training.ema import EMA
from fibopolicy.training.encoder_weights import load_encoder_weights
from fibopolicy.training.encoders import (
    checkpoint_gradients,
    compile_encoders,
    freeze,
    training_mode,
)
from fibopolicy.training.meter import Meter, Summary
from fibopolicy.training.metrics import MetricsLog
from fibopolicy.training.optimizer import build_optimizer, learning_rate, set_learning_rate
from fibopolicy.training.precision import autocast, resolve_precision
from fibopolicy.training.validation import check_criterion
from fibopolicy.training.wandb_log import require_wandb
from fibopolicy.training.watch import Watch
from fibopolicy.utils.files import check_resume_or_overwrite, directory_lock
from fibopolicy.utils.imports import import_object, is_import_path
from fibopolicy.utils.system import peak_memory_bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """What a run gave: the averaged policy, the last step's number, what it took now
    (not before a resume).
    """

    policy: Policy
    step: int
    summary: Summary


@dataclass(frozen=True)
class Engine:
    """What a step needs.

    Attributes:
        validation: the windows to validate on, or `None`.
        module: `state.policy.loss` as a module; its gradients are the mean over all
            processes.
    """

    config: TrainConfig
    dataset: Windows
    validation: Windows | None
    state: TrainingState
    module: nn.Module
    world: World
    device: torch.device
    meter: Meter


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> Trained:
    """Train a policy; everything lands in `config.out`. Under torchrun, this process is
    one of several that train it together.

    A step's batch, augmentation and learning rate are functions of (seed, step), so a
    run that was killed and is resumed ends with the same weights as one that was not,
    bit for bit on the same machine. They depend neither on the number of processes nor
    on `accumulate`, which may both change on resume; then weights agree up to rounding.
    Two things do depend on them: what dropout drops, and batch norm, which sees one
    part of a batch (of all processes) at a time.

    Raises:
        UserError: the data or the configuration are at fault; `config.out` exists and
            neither `resume` nor `overwrite` is given, or it holds a run of another
            configuration or of data with other statistics; the loss diverges.
    """
    with joined(config.device) as world, ExitStack() as until_done:
        engine = world.in_turn(lambda: _prepare(config, world, resume=resume, overwrite=overwrite))
        out, state = config.out, engine.state

        def open_run_here() -> str:
            until_done.enter_context(directory_lock(out))
            # A resumed run keeps what it was started with, also on another device.
            kept = stored_precision(out) if resume and config.compute.precision == "auto" else None
            precision = kept or resolve_precision(config.compute.precision, engine.device)
            resolved = replace(config, compute=replace(config.compute, precision=precision))
            open_run(resolved, engine.dataset, resume=resume, overwrite=overwrite)
            for oddity in (
                *engine.dataset.warnings,
                *narrow_distributions(state.policy, engine.dataset),
            ):
                warnings.warn(oddity, stacklevel=2)
            _log.info(
                "training on %s; on %s in %s, see %s", _seen(engine), engine.device, precision, out
            )
            for line in left_out(engine.dataset):
                _log.info("%s", line)
            return precision

        precision = world.lead(open_run_here)
        start = world.in_turn(lambda: load_state(out, state, writes=world.leads)) if resume else 0
        config = replace(config, compute=replace(config.compute, precision=precision))
        module = world.wrapped(PolicyLoss(state.policy), _load(0, engine)[1][0])
        summary = _run(start, replace(engine, config=config, module=module))
    return Trained(state.ema.average, summary.steps, summary)


def _prepare(config: TrainConfig, world: World, *, resume: bool, overwrite: bool) -> Engine:
    """The dataset, and a fresh policy with all that goes with it, on the device;
    nothing is written.
    """
    check_resume_or_overwrite(resume=resume, overwrite=overwrite)
    require_wandb(config.wandb)
    parts = world.size * config.compute.accumulate
    if config.optimizer.batch_size % parts:
        raise UserError(
            f"batch_size {config.optimizer.batch_size} cannot be split evenly into {world.size}"
            f" processes x accumulate {config.compute.accumulate} parts; choose a multiple of"
            f" {parts}"
        )
    device = world.device(config.device)
    torch.manual_seed(config.seed)
    dataset = open_dataset(config)
    # told before the first step, not by every rollout
    if config.rollouts.rollout_every is not None:
        if (reason := unavailable(dataset.env_args)) is not None:
            raise UserError(f"--rollout-every: {reason}")
        if is_import_path(task := str(dataset.env_args["env_name"])):
            import_object("task", task)
    validation = open_validation(config, dataset)
    resumes = resume and (config.out / STATE).exists()
    policy = build_policy(
        config.policy.as_loaded() if resumes else config.policy, shapes_of(dataset)
    )
    policy.fit_normalizers(dataset.stats)
    policy.render_quality = render_quality(dataset.env_args)
    if config.encoder_weights is not None and not resumes:
        load_encoder_weights(policy, config.encoder_weights)
    if config.freeze_encoder:
        freeze(policy)
        if config.encoder_weights is None and not config.policy.encoder_options.get("pretrained"):
            warnings.warn(
                "the frozen encoder has random weights; name others by --encoder-weights",
                stacklevel=2,
            )
    if config.compute.gradient_checkpointing:
        checkpoint_gradients(policy)
    policy.to(device)
    ema = EMA(policy, config.optimizer.ema)
    if config.compute.compile:  # once the average is copied, which nobody trains
        compile_encoders(policy, device)
    if validation is not None:
        check_criterion(config.validation.criterion, ema.average, validation, device)
    state = TrainingState(policy, ema, build_optimizer(policy, config.optimizer), Divergence())
    return Engine(
        config, dataset, validation, state, PolicyLoss(policy), world, device, Meter(device)
    )


def _seen(engine: Engine) -> str:
    keys = ", ".join((*engine.dataset.cameras, *engine.dataset.vectors))
    several = f" in {engine.world.size} processes" if engine.world.size > 1 else ""
    return f"{engine.dataset.num_demos} demos, {len(engine.dataset)} steps: {keys}{several}"


def _run(start: int, engine: Engine) -> Summary:
    """All steps from `start` on, logged, watched and saved by the process that leads."""
    config, state, leads = engine.config, engine.state, engine.world.leads
    total, began, meter = config.optimizer.steps, time.perf_counter(), engine.meter
    with ExitStack() as until_done:
        log = watch = None
        if leads:
            log = MetricsLog(
                config.out, start, wandb=config.wandb, config=describe(config, engine.dataset)
            )
            until_done.enter_context(log)
            watch = Watch(config, state.ema.average, engine.validation, log, engine.device, start)
            until_done.enter_context(watch)
        bar = until_done.enter_context(
            tqdm(
                total=total,
                initial=start,
                desc="train",
                unit="step",
                disable=None if leads else True,
            )
        )
        for step in range(start, total):
            figures = _step(step, engine)
            last = step + 1 == total
            if log and (last or step % config.log_every == 0):
                log.write(step, figures | meter.figures())
                bar.set_postfix(loss=f"{figures['loss']:.4f}", refresh=False)
            if watch:
                watch.after(step)
            if log and (
                last or ((step + 1) % config.checkpoint_every == 0 and state.divergence.calm)
            ):
                log.flush()
                save_checkpoint(config.out, state, step + 1)
            bar.update()
        if watch:
            watch.finish()
        return Summary(
            steps=max(start, total),
            loss=log.recent("loss") if log else None,
            validation_loss=log.last("validation_loss") if log else None,
            seconds=time.perf_counter() - began,
            samples_per_s=meter.total.samples_per_s,
            data_share=meter.total.data_share,
            peak_gb=peak_memory_bytes() / 1e9,
            gpu_gb=(
                torch.cuda.max_memory_allocated(engine.device) / 1e9
                if engine.device.type == "cuda"
                else None
            ),
        )


def _step(step: int, engine: Engine) -> dict[str, float]:
    """One gradient step, numbered from 0; returns what to log."""
    config, state, world, device = engine.config, engine.state, engine.world, engine.device
    began = time.perf_counter()
    indices, parts = _load(step, engine)
    loaded = time.perf_counter()

    rate = learning_rate(step, config.optimizer)
    set_learning_rate(state.optimizer, rate)
    training_mode(state.policy)
    state.optimizer.zero_grad(set_to_none=True)
    # The loss is a mean over what parts may hold unequal amounts of, say actions that
    # are no padding.
    weights = torch.stack([state.policy.loss_denominator(part) for part in parts])
    shares = weights / world.sum(weights.sum())
    sums: dict[str, Tensor] = {}
    for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
        position = world.rank * len(parts) + number
        _seed(config.seed, step, position)
        start = position * len(indices) // (world.size * len(parts))
        generator = torch.Generator(device).manual_seed((config.seed << 32) + step)
        rng = SampleRng(generator, len(indices), start)
        with unsynchronised(engine.module, last=number + 1 == len(parts)):
            with autocast(config.compute.precision, device):
                loss, figures = engine.module(part, rng)
            # which the mean over the processes divides by again
            (loss * (share * world.size)).backward()
        for name, value in {**figures, "loss": loss.detach()}.items():
            sums[name] = sums.get(name, 0) + share * value
    norm = float(nn.utils.clip_grad_norm_(state.policy.parameters(), config.optimizer.clip))
    logged = dict(
        zip(sums, world.sum(torch.stack(list(sums.values())).float()).tolist(), strict=True)
    )
    reason = state.divergence.reason(logged["loss"], norm)
    if reason is not None:
        kept = "; the last checkpoint is from before" if (config.out / STATE).exists() else ""
        raise world.same(
            UserError(
                f"{config.out}: {reason} at step {step} (samples {', '.join(map(str, indices))});"
                f" lower learning_rate or look at these samples{kept}"
            )
        )
    state.optimizer.step()
    state.ema.update(state.policy, step)
    engine.meter.add(config.optimizer.batch_size, loaded - began, time.perf_counter() - began)
    return {**logged, "learning_rate": rate, "gradient_norm": norm}


def _load(
    step: int, engine: Engine
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], list[dict[str, Any]]]:
    """The samples of a step's whole batch, and this process's rows of it on the device,
    in `accumulate` parts.
    """
    config, world = engine.config, engine.world
    indices = engine.dataset.indices(config.optimizer.batch_size, config.seed, step)
    mine = indices[world.rows(len(indices))]
    batch = to_device(engine.dataset.batch(mine), engine.device)
    size = len(mine) // config.compute.accumulate
    return indices, [rows(batch, slice(start, start + size)) for start in range(0, len(mine), size)]


def _seed(seed: int, step: int, part: int) -> None:
    """Torch's global generators, from which dropout draws, for one part of a step's batch."""
    torch.manual_seed(
        int(np.random.SeedSequence((seed, step, part)).generate_state(1, np.uint64)[0])
    )
