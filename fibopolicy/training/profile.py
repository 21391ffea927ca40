"""Where the time of a training step goes: `fibopolicy profile train`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fibopolicy.datasets.profile import Part, parts_table, shares
from fibopolicy.encoders.base import Encoder
from fibopolicy.policies import Policy, build_policy
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.training.batches import to_device
from fibopolicy.training.config import TrainConfig
from fibopolicy.training.data import open_dataset, shapes_of
from fibopolicy.training.ema import EMA
from fibopolicy.training.optimizer import build_optimizer
from fibopolicy.utils.system import resolve_device

_WARM_UP = 3
_WHOLE = "step"


@dataclass(frozen=True)
class TrainProfile:
    """Training steps, part by part.

    Attributes:
        parts: reading the batch, bringing it to the device, preparing it (crop, shift,
            scale), each camera's encoder, the head, backward, the optimiser with
            clipping, the average; "step" is their sum.
        samples_per_s: of whole steps.
        parameters: trained ones.
    """

    head: str
    encoder: str
    device: str
    batch_size: int
    parameters: int
    samples_per_s: float
    parts: Sequence[Part]


def profile_train(config: TrainConfig, *, turns: int) -> TrainProfile:
    """Times `turns` steps after some that warm up; nothing is written.

    On a GPU every part is waited for before the next begins, so parts that would
    overlap count one after the other.
    """
    torch.manual_seed(config.seed)
    device = resolve_device(config.device)
    dataset = open_dataset(config)
    policy = build_policy(config.policy, shapes_of(dataset))
    policy.fit_normalizers(dataset.stats)
    policy.to(device).train()
    optimizer = build_optimizer(policy, config.optimizer)
    ema = EMA(policy, config.optimizer.ema)
    seconds: dict[str, list[float]] = {}
    with _Clock(device).of_parts(policy) as clock:
        for step in range(turns + _WARM_UP):
            clock.start()
            indices = dataset.indices(config.optimizer.batch_size, config.seed, step)
            arrays = dataset.batch(indices)
            clock.lap("data")
            batch = to_device(arrays, device)
            clock.lap("to the device")
            loss, _ = policy.loss(batch)
            clock.lap_forward()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            clock.lap("backward")
            nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer.clip)
            optimizer.step()
            clock.lap("optimiser")
            ema.update(policy, step)
            clock.lap("average of the weights")
            if step >= _WARM_UP:
                for name, value in {**clock.laps, _WHOLE: sum(clock.laps.values())}.items():
                    seconds.setdefault(name, []).append(value)
    parts = shares(seconds, _WHOLE)
    whole = next(part.seconds for part in parts if part.name == _WHOLE)
    return TrainProfile(
        config.policy.head,
        config.policy.encoder,
        str(device),
        config.optimizer.batch_size,
        sum(p.numel() for p in policy.parameters() if p.requires_grad),
        config.optimizer.batch_size / whole,
        parts,
    )


def table(profile: TrainProfile) -> str:
    """A profile as a Markdown table and a line."""
    told = (
        f"{profile.samples_per_s:.0f} samples/s in batches of {profile.batch_size} on"
        f" {profile.device}: {profile.head} with {profile.encoder}, {profile.parameters / 1e6:.2f}"
        " million parameters"
    )
    return "\n".join([*parts_table(profile.parts), "", told])


class _Clock:
    """Laps of one step; what runs within another part is taken out of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.laps: dict[str, float] = {}
        self._inner: dict[str, float] = {}
        self._last = 0.0

    def start(self) -> None:
        self.laps, self._inner = {}, {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        now = self._now()
        self.laps[name], self._last = now - self._last, now

    def lap_forward(self) -> None:
        """The parts that were seen within the forward pass, and the rest of it as the head's."""
        self.lap("head")
        head = self.laps.pop("head")
        self.laps |= self._inner
        self.laps["head"] = head - sum(self._inner.values())

    @contextmanager
    def of_parts(self, policy: Policy) -> Iterator[_Clock]:
        """Within it, this clock sees the preparation of frames and every encoder."""
        handles = []
        for name, module in _encoders(policy).items():
            began: list[float] = []
            handles.append(
                module.register_forward_pre_hook(lambda *_, began=began: began.append(self._now()))
            )
            handles.append(
                module.register_forward_hook(
                    lambda *_, began=began, name=name: self._add(f"encoder, {name}", began.pop())
                )
            )
        observations: Any = getattr(policy, "observations", None)
        prepare: Callable[..., Any] | None = getattr(observations, "prepare", None)
        if prepare is not None:

            def timed(*arguments: Any) -> Any:
                since = self._now()
                prepared = prepare(*arguments)
                self._add("preparing frames", since)
                return prepared

            observations.prepare = timed
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            if prepare is not None:
                del observations.prepare

    def _add(self, name: str, since: float) -> None:
        self._inner[name] = self._inner.get(name, 0.0) + self._now() - since

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _encoders(policy: Policy) -> dict[str, nn.Module]:
    """Every encoder under the name of its camera, or of all that it sees."""
    cameras = tuple(policy.shapes.images)
    found: dict[str, nn.Module] = {}
    for path, module in policy.named_modules():
        if isinstance(module, ObservationEncoder) and module.views == "separate":
            found |= {camera: module.encoder_of(camera) for camera in module.cameras}
        elif isinstance(module, Encoder) and not any(module is known for known in found.values()):
            # robomimic's networks keep the cores by observation key; one encoder for
            # several cameras is nobody's own.
            found[
                next((camera for camera in cameras if f".{camera}." in f".{path}."), "all cameras")
            ] = module
    return found
