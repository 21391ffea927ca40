"""The training loop."""

from __future__ import annotations

import gc
import logging
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from fibopolicy.errors import UserError
from fibopolicy.policies import Policy, build_policy
from fibopolicy.policies.rng import SampleRng, batch_seed
from fibopolicy.policies.run_directory import RunDirectory, render_quality
from fibopolicy.training import checkpoint, cuda_graph, data, encoders, loader, optim
from fibopolicy.training.callbacks import Callback, Rollouts, Validation, check_callbacks
from fibopolicy.training.config import TrainConfig
from fibopolicy.training.cuda_graph import WARM_UP
from fibopolicy.training.distributed import PolicyLoss, World, init_distributed, no_sync
from fibopolicy.training.logging import (
    MetricsLogger,
    Summary,
    Throughput,
    memory_metrics,
    peak_memory,
    require_wandb,
)
from fibopolicy.utils.files import check_resume_or_overwrite, directory_lock
from fibopolicy.utils.gpu_memory import batch_that_fits

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """The averaged policy, and a summary of its training."""

    policy: Policy
    summary: Summary


class Diverged(UserError):
    """The loss of a training run is not finite, or stays far above its usual level."""


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> TrainResult:
    """Train a policy in `config.out`; under torchrun, together with other processes.

    The batch, augmentation and learning rate of a step are functions of (seed, step).
    Therefore a killed and resumed run ends with the same weights as an uninterrupted
    one, bit for bit on the same machine. The number of processes and `accumulate` may
    change on resume; weights then agree up to rounding, except for dropout, whose
    random numbers depend on them, and batch norm, which sees one part of a batch (of
    all processes) at a time.

    Raises:
        UserError: invalid data or configuration; `config.out` exists and neither
            `resume` nor `overwrite` is given, or it holds a run of another
            configuration or of data with other statistics; the loss diverges; the
            memory of the GPU is too small.
    """
    with init_distributed(config.device) as world:
        trainer = world.main_process_first(
            lambda: _trainer(config, world, resume=resume, overwrite=overwrite)
        )
        result = None
        with suppress(torch.OutOfMemoryError):
            result = trainer.train()
        if result is None:
            raise trainer.out_of_memory()
        if trainer.device.type == "cuda":
            del trainer  # its references to itself would keep the memory of the GPU
            gc.collect()
            torch.cuda.empty_cache()
        return result


class Trainer:
    """One run: `__init__` builds what a step needs and leaves the run directory alone,
    `train` is the loop.

    Attributes:
        config: with the precision resolved.
        validation: the windows to validate on, or `None`.
        state: what a checkpoint holds: the policy, its average, the optimizer,
            divergence.
        loss: `policy.loss` as a module; its gradients are averaged over all processes.
        backward: adds up the gradients of a batch, see `_backward`; on a GPU as one
            CUDA graph where that is possible.
        unread: the metrics of steps that have not been read from the device.
    """

    def __init__(
        self, config: TrainConfig, world: World, *, resume: bool = False, overwrite: bool = False
    ) -> None:
        check_resume_or_overwrite(resume=resume, overwrite=overwrite)
        require_wandb(config.wandb)
        _check_parts(config, world)
        self.world, self.run = world, RunDirectory(config.out)
        self.resume, self.overwrite = resume, overwrite
        self.device = world.device(config.device)
        self.config = _resolve_precision(config, self.run, self.device, resume=resume)
        torch.manual_seed(config.seed)
        self.dataset = data.open_dataset(config)
        self.validation = data.open_validation(config, self.dataset)
        self.policy = self._build_policy().to(self.device)
        self.ema = optim.EMA(self.policy, config.optimizer.ema)
        check_callbacks(config, self.dataset, self.validation, self.ema.average, self.device)
        if config.compute.compile:  # after the copy, which is not trained
            encoders.compile_encoders(self.policy, self.device)
        world.sync_batch_norms(self.policy)
        self.optimizer = optim.build_optimizer(self.policy, config.optimizer)
        self.divergence = optim.Divergence()
        self.state = checkpoint.TrainingState(
            self.policy, self.ema, self.optimizer, self.divergence
        )
        self.loss: nn.Module = PolicyLoss(self.policy)
        self.parameters = list(self.policy.parameters())
        self.generator = torch.Generator(self.device)
        self.backward: Callable[..., Tensor] = self._backward
        if cuda_graph.can_record(self.policy, self.config.compute, self.device, world.size):
            self.backward = cuda_graph.Recorded(
                self._backward, self.generator, self.optimizer.zero_grad
            )
        self.metric_names: tuple[str, ...] = ()
        self.unread: dict[int, Tensor] = {}
        own = world.rows(config.optimizer.batch_size)
        self.batches = loader.make_loader(
            self.dataset, lambda step: self._indices(step)[own], self.device, config.compute
        )
        self.throughput, self.recent_throughput = Throughput(), Throughput()

    def train(self) -> TrainResult:
        """Run the remaining steps; the main process logs, validates and saves."""
        config, world, total = self.config, self.world, self.config.optimizer.steps
        with ExitStack() as stack:
            world.main_process_only(lambda: self._open_run(stack))
            start = world.main_process_first(self._load_checkpoint)
            if world.size > 1:
                self.loss = world.wrap(self.loss, self.load_batch(0)[0])
            stack.callback(self.batches.close)
            began = time.perf_counter()
            logger = stack.enter_context(self._logger(start)) if world.is_main else None
            callbacks = self._callbacks(logger, start) if logger else []
            for callback in callbacks:
                stack.callback(callback.close)
            hide = None if world.is_main else True
            bar = tqdm(total=total, initial=start, desc="train", unit="step", disable=hide)
            stack.enter_context(bar)

            for step in range(start, total):
                metrics = self.train_step(step)
                last = step + 1 == total
                if logger and (last or step % config.log_every == 0):
                    logger.write(step, metrics | self._performance())
                    bar.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
                for callback in callbacks:
                    callback.after_step(step + 1)
                due = (step + 1) % config.checkpoint_every == 0 and self.divergence.is_stable
                if logger and (last or due):
                    logger.flush()
                    checkpoint.save_checkpoint(config.out, self.state, step + 1)
                bar.update()

            for callback in callbacks:
                callback.finish(total)
            summary = Summary(
                steps=max(start, total),
                loss=logger.last("loss", count=10) if logger else None,
                validation_loss=logger.last("validation_loss") if logger else None,
                seconds=time.perf_counter() - began,
                **self.throughput.metrics(),
                **peak_memory(self.device),
            )
            return TrainResult(self.ema.average, summary)

    def train_step(self, step: int) -> dict[str, float]:
        """One gradient step, numbered from 0; returns its metrics.

        To read a number from a GPU is to wait until it has done all its work. There,
        only steps that are logged return metrics, see `_read_metrics`.
        """
        config, world = self.config, self.world
        began = time.perf_counter()
        parts = self.load_batch(step)
        loaded = time.perf_counter()

        lr = optim.learning_rate(step, config.optimizer)
        optim.set_learning_rate(self.optimizer, lr)
        # The loss is a mean over values that are not padding, unequally many per part.
        weights = torch.stack([self.policy.loss_denominator(part) for part in parts])
        shares = weights / world.sum(weights.sum())
        means: Tensor | float = 0.0
        for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
            rng = self._seed(step, number, len(parts))
            with no_sync(self.loss, last=number + 1 == len(parts)):
                means = means + self.backward({"part": part, "share": share}, rng, number == 0)
        norm = nn.utils.clip_grad_norm_(self.parameters, config.optimizer.grad_clip_norm)
        self.unread[step] = torch.cat([world.sum(torch.as_tensor(means)), norm.float().view(1)])
        metrics = self._read_metrics() if self._reads_metrics(step) else {}
        self.optimizer.step()
        self.ema.update(self.policy, step)

        for throughput in (self.throughput, self.recent_throughput):
            batch_size = config.optimizer.batch_size
            throughput.add(batch_size, loaded - began, time.perf_counter() - began)
        return {**metrics, "lr": lr} if metrics else {}

    def load_batch(self, step: int) -> list[dict[str, Any]]:
        """This process's samples of a step, on the device, in `accumulate` parts."""
        batch, parts = self.batches(step), self.config.compute.accumulate
        size = len(batch["action_mask"]) // parts
        return [data.rows(batch, slice(i * size, (i + 1) * size)) for i in range(parts)]

    def _indices(self, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The samples of the whole batch of a step."""
        return self.dataset.indices(self.config.optimizer.batch_size, self.config.seed, step)

    def _seed(self, step: int, number: int, count: int) -> SampleRng:
        """Seed all generators for part `number` of `count` parts of this process.

        Random numbers per sample are drawn for the whole batch from one generator, so
        that they do not depend on how the batch is split. Dropout uses torch's global
        generators.
        """
        config, size = self.config, self.config.optimizer.batch_size
        position = self.world.rank * count + number
        seeds = np.random.SeedSequence((config.seed, step, position))
        torch.manual_seed(int(seeds.generate_state(1, np.uint64)[0]))
        self.generator.manual_seed(batch_seed(config.seed, step))
        return SampleRng(self.generator, size, start=position * size // (self.world.size * count))

    def _backward(self, batch: dict[str, Any], rng: SampleRng, first: bool) -> Tensor:
        """Add the gradients of a part of a batch to those of earlier parts.

        Args:
            batch: "part", the samples, and "share", their weight in the batch.
            first: there are no earlier parts.

        Returns:
            the part's share of each metric in `metric_names`, float32 `(M,)`.
        """
        if first:
            self.optimizer.zero_grad(set_to_none=True)
        with optim.autocast(self.config.compute.precision, self.device):
            loss, metrics = self.loss(batch["part"], rng)
        # Times the number of processes, because their gradients are averaged.
        (loss * (batch["share"] * self.world.size)).backward()
        metrics = {**metrics, "loss": loss.detach()}
        self.metric_names = tuple(metrics)
        return torch.stack([batch["share"] * value for value in metrics.values()]).float()

    def _reads_metrics(self, step: int) -> bool:
        """Whether a step may wait for the device: on a GPU, if it is logged or saved."""
        config = self.config
        last = step + 1 == config.optimizer.steps
        logged, saved = step % config.log_every == 0, (step + 1) % config.checkpoint_every == 0
        return self.device.type != "cuda" or last or logged or saved

    def _read_metrics(self) -> dict[str, float]:
        """Check the losses of all steps since the last call; return the newest metrics.

        Raises:
            Diverged: one of these steps diverged.
        """
        metrics: dict[str, float] = {}
        values = torch.stack(list(self.unread.values())).tolist()
        for step, row in zip(self.unread, values, strict=True):
            metrics = dict(zip((*self.metric_names, "gradient_norm"), row, strict=True))
            self._check_divergence(step, metrics["loss"], metrics["gradient_norm"])
        self.unread.clear()
        return metrics

    def _performance(self) -> dict[str, float]:
        """Throughput since the last call, and memory."""
        throughput, self.recent_throughput = self.recent_throughput, Throughput()
        return throughput.metrics() | memory_metrics(self.device)

    def _check_divergence(self, step: int, loss: float, norm: float) -> None:
        reason = self.divergence.check(loss, norm)
        if reason is None:
            return
        samples = ", ".join(map(str, self._indices(step)))
        kept = "; the last checkpoint is from an earlier step" if self.run.state.exists() else ""
        message = f"{reason} at step {step} (samples {samples}); lower lr or check these samples"
        raise self.world.once(Diverged(f"{self.run.path}: {message}{kept}"))

    def _build_policy(self) -> Policy:
        config, dataset = self.config, self.dataset
        resumes = self.resume and self.run.state.exists()
        # The weights of a checkpoint replace any initial ones.
        recipe = config.policy.without_pretrained() if resumes else config.policy
        policy = build_policy(recipe, data.shapes_of(dataset))
        policy.fit_normalizers(dataset.stats)
        if dataset.tasks:
            vectors = np.stack([*dataset.tasks.values()])
            policy.task_encoder.fit(torch.from_numpy(vectors))
        policy.render_quality = render_quality(dataset.env_args)
        if config.encoder_weights is not None and not resumes:
            encoders.load_encoder_weights(policy, config.encoder_weights)
        if config.freeze_encoder:
            encoders.freeze(policy)
            pretrained = config.policy.encoder_options.get("pretrained")
            if config.encoder_weights is None and not pretrained:
                message = "the frozen encoder has random weights; set others with --encoder-weights"
                warnings.warn(message, stacklevel=2)
        if config.compute.gradient_checkpointing:
            encoders.checkpoint_gradients(policy)
        return policy

    def _open_run(self, stack: ExitStack) -> None:
        """Lock the run directory, write or check its configuration, log what is trained."""
        config, dataset = self.config, self.dataset
        stack.enter_context(directory_lock(config.out))
        checkpoint.prepare_run(config, dataset, resume=self.resume, overwrite=self.overwrite)
        for warning in (*dataset.warnings, *data.narrow_distributions(self.policy, dataset)):
            warnings.warn(warning, stacklevel=2)
        several = f" in {self.world.size} processes" if self.world.size > 1 else ""
        _log.info(
            "training on %d demos, %d steps: %s%s; on %s in %s, see %s",
            dataset.num_demos,
            len(dataset),
            ", ".join((*dataset.cameras, *dataset.vectors)),
            several,
            self.device,
            config.compute.precision,
            config.out,
        )
        for line in (*data.converted(dataset), *data.left_out(dataset)):
            _log.info("%s", line)

    def _load_checkpoint(self) -> int:
        """Steps done before; 0 unless the run is resumed."""
        if not self.resume:
            return 0
        return checkpoint.load_checkpoint(self.config.out, self.state, export=self.world.is_main)

    def _logger(self, start: int) -> MetricsLogger:
        description = checkpoint.describe(self.config, self.dataset)
        return MetricsLogger(self.config.out, start, wandb=self.config.wandb, config=description)

    def out_of_memory(self) -> UserError:
        """What to tell the user when the memory of the GPU was too small for a step."""
        config, rng = self.config, SampleRng()
        size, parts = config.optimizer.batch_size, self.world.size * config.compute.accumulate
        found = f"{config.out}: the memory of {self.device} is too small for a step of"
        found += f" {size // parts} samples"
        options = ""
        if isinstance(self.backward, cuda_graph.Recorded) and self.backward.calls > WARM_UP:
            options += " --no-cuda-graph"
        if self.batches.frames:
            options += " --no-frames-on-gpu"
        also = options and f"; to save memory, also pass{options}"
        if self.world.size > 1:  # gradients would wait for those of the other processes
            return UserError(f"{found}; pass a larger --accumulate or a smaller --batch-size{also}")
        self.backward = self._backward
        self.optimizer.zero_grad()
        self.unread.clear()
        gc.collect()  # errors of a recording refer to themselves, and to tensors

        def run(samples: int) -> None:
            batch = data.to_device(self.dataset.batch(self._indices(0)[:samples]), self.device)
            share = torch.ones((), device=self.device)
            self._backward({"part": batch, "share": share}, rng, True)

        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        later = 0 if self.optimizer.state else 2 * sum(p.nbytes for p in trained)
        fits = batch_that_fits(run, size // parts, self.device, later)
        if not fits:
            return UserError(
                f"{found}, and even for one; end other programs on the GPU, or use a smaller"
                f" encoder or smaller frames (--image-size){also}"
            )
        accumulate = next(n for n in range(1, size + 1) if size % n == 0 and size // n <= fits)
        return UserError(
            f"{found}; about {fits} fit: pass --accumulate {accumulate}, which computes the same"
            f" batch in parts, or --batch-size {fits * parts}{also}"
        )

    def _callbacks(self, logger: MetricsLogger, start: int) -> list[Callback]:
        config, average, device = self.config, self.ema.average, self.device
        done = set(logger.values("rollout_success"))
        callbacks: list[Callback] = []
        if self.validation is not None:
            callbacks.append(Validation(config, average, self.validation, logger.write, device))
        if config.rollouts.rollout_every is not None:
            callbacks.append(
                Rollouts(config, average, logger.write, device, start=start, done=done)
            )
        return callbacks


def _trainer(config: TrainConfig, world: World, *, resume: bool, overwrite: bool) -> Trainer:
    try:
        return Trainer(config, world, resume=resume, overwrite=overwrite)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{config.out}: the memory of the GPU is too small for the policy and its average; end"
            " other programs on the GPU, or use a smaller encoder"
        ) from error


def _check_parts(config: TrainConfig, world: World) -> None:
    parts = world.size * config.compute.accumulate
    if config.optimizer.batch_size % parts:
        raise UserError(
            f"batch_size {config.optimizer.batch_size} cannot be split evenly into {world.size}"
            f" processes x accumulate {config.compute.accumulate} parts; choose a multiple of"
            f" {parts}"
        )


def _resolve_precision(
    config: TrainConfig, run: RunDirectory, device: torch.device, *, resume: bool
) -> TrainConfig:
    """The configuration with "fp32" or "bf16"; a resumed run keeps its precision."""
    precision = config.compute.precision
    if precision == "auto" and resume and run.config.exists():
        precision = run.read_config()["train"].get("compute", {}).get("precision", "auto")
    precision = optim.resolve_precision(precision, device)
    return replace(config, compute=replace(config.compute, precision=precision))
