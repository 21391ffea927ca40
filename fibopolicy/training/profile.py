"""Where the time of a training step goes: `fibopolicy profile train`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fibopolicy.datasets.profile import Part, parts_table, shares
from fibopolicy.policies import Policy
from fibopolicy.training.config import TrainConfig
from fibopolicy.training.distributed import World
from fibopolicy.training.encoders import camera_encoders
from fibopolicy.training.logging import Throughput
from fibopolicy.training.optim import autocast
from fibopolicy.training.trainer import Trainer

#: Steps before the timed ones. On a GPU, a CUDA graph is recorded in them.
_WARM_UP = 5
_WHOLE, _FORWARD = "step", "forward"


@dataclass(frozen=True)
class TrainProfile:
    """Training steps as they are trained, then part by part.

    Attributes:
        samples_per_s: samples per second of steps as they are trained.
        data_share: the share of their time in which they waited for data, in [0, 1].
        parameters: number of trained parameters.
        parts: the batch on the device, preparing its frames (crop, shift, scale), each
            camera's encoder, the rest of the policy, backward, the optimizer with
            clipping, the average of the weights; "step" is their sum. On a GPU they are
            launched one by one, not as a CUDA graph.
    """

    policy: str
    encoder: str
    device: str
    batch_size: int
    parameters: int
    samples_per_s: float
    data_share: float
    parts: Sequence[Part]


def profile_train(config: TrainConfig, *, turns: int) -> TrainProfile:
    """Time `turns` steps after some that warm up, twice; nothing is written."""
    trainer = Trainer(config, World())
    try:
        samples_per_s, data_share = _as_trained(trainer, turns)
        parts = shares(_part_by_part(trainer, turns), _WHOLE)
    finally:
        trainer.batches.close()
    return TrainProfile(
        config.policy.policy,
        config.policy.encoder,
        str(trainer.device),
        config.optimizer.batch_size,
        sum(p.numel() for p in trainer.parameters if p.requires_grad),
        samples_per_s,
        data_share,
        parts,
    )


def _as_trained(trainer: Trainer, turns: int) -> tuple[float, float]:
    """Samples per second, and the share of the time spent waiting for data."""
    for step in range(_WARM_UP):
        trainer.train_step(step)
    trainer.throughput = Throughput()
    _wait(trainer.device)
    began = time.perf_counter()
    for step in range(_WARM_UP, _WARM_UP + turns):
        trainer.train_step(step)
    _wait(trainer.device)
    seconds = time.perf_counter() - began
    return trainer.throughput.samples / seconds, trainer.throughput.data_seconds / seconds


def _part_by_part(trainer: Trainer, turns: int) -> dict[str, list[float]]:
    """Seconds of each part in each step."""
    config, policy, device = trainer.config, trainer.policy, trainer.device
    seconds: dict[str, list[float]] = {}
    clock = _Clock(device)
    with clock.inner_calls(policy):
        for step in range(turns + _WARM_UP):
            clock.start()
            (batch,) = trainer.load_batch(step)
            clock.lap("data")
            with autocast(config.compute.precision, device):
                loss, _ = policy.loss(batch)
            clock.lap(_FORWARD)
            trainer.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            clock.lap("backward")
            nn.utils.clip_grad_norm_(trainer.parameters, config.optimizer.grad_clip_norm)
            trainer.optimizer.step()
            clock.lap("optimizer")
            trainer.ema.update(policy, step)
            clock.lap("average of the weights")
            laps = clock.laps()
            if step >= _WARM_UP:
                for name, value in {**laps, _WHOLE: sum(laps.values())}.items():
                    seconds.setdefault(name, []).append(value)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_table(profile: TrainProfile) -> str:
    """A profile as a Markdown table and a line."""
    parameters = f"{profile.parameters / 1e6:.2f} million parameters"
    summary = (
        f"{profile.samples_per_s:.0f} samples/s in batches of {profile.batch_size} on"
        f" {profile.device}: {profile.policy} with {profile.encoder}, {parameters};"
        f" {profile.data_share:.1%} of the time waiting for data"
    )
    return "\n".join([*parts_table(profile.parts), "", summary])


class _Clock:
    """Laps of one step; the time of inner calls is taken out of the forward pass.

    On a GPU, CUDA events mark the laps, so that the GPU need not wait between them. A
    lap then also contains the time in which the GPU waits for its next kernel.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []
        self._inner: list[tuple[str, Any, Any]] = []

    def start(self) -> None:
        self._marks, self._inner = [("", self._mark())], []

    def lap(self, name: str) -> None:
        """End the lap with this name."""
        self._marks.append((name, self._mark()))

    def laps(self) -> dict[str, float]:
        """Seconds of each lap and inner call since `start`."""
        _wait(self._device)
        found: dict[str, float] = {}
        for (_, began), (name, ended) in pairwise(self._marks):
            whole = _seconds(began, ended)
            if name == _FORWARD:
                inner: dict[str, float] = {}
                for call, *marks in self._inner:
                    inner[call] = inner.get(call, 0.0) + _seconds(*marks)
                found |= inner
                name, whole = "policy", whole - sum(inner.values())
            found[name] = whole
        return found

    @contextmanager
    def inner_calls(self, policy: Policy) -> Iterator[None]:
        """Time the preparation of frames and every encoder as inner calls."""
        methods: list[tuple[Any, str, str]] = []
        observations = getattr(policy, "observations", None)
        if hasattr(observations, "prepare"):
            methods.append((observations, "prepare", "preparing frames"))
        encoders = camera_encoders(policy)
        shared = len(encoders) > 1 and len({id(encoder) for encoder in encoders.values()}) == 1
        for camera, encoder in list(encoders.items())[: 1 if shared else None]:
            name = f"encoder, {'all cameras' if shared else camera}"
            methods.append((encoder, "forward", name))
        for owner, method, name in methods:
            setattr(owner, method, self._timed(getattr(owner, method), name))
        try:
            yield
        finally:
            for owner, method, _ in methods:
                delattr(owner, method)

    def _timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = self._mark()
            result = call(*arguments, **options)
            self._inner.append((name, began, self._mark()))
            return result

        return timed

    def _mark(self) -> Any:
        """This moment: seconds, or on a GPU an event."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


def _seconds(began: Any, ended: Any) -> float:
    """Between two marks of a `_Clock`."""
    return float(ended - began if isinstance(began, float) else began.elapsed_time(ended) / 1e3)
