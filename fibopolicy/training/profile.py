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
from fibopolicy.policies import Policy, build_policy
from fibopolicy.training.config import TrainConfig
from fibopolicy.training.data import open_dataset, shapes_of, to_device
from fibopolicy.training.encoders import camera_encoders
from fibopolicy.training.optim import EMA, build_optimizer
from fibopolicy.utils.system import resolve_device

_WARM_UP = 3
_WHOLE = "step"


@dataclass(frozen=True)
class TrainProfile:
    """Training steps, part by part.

    Attributes:
        parts: loading the batch, moving it to the device, preparing its frames (crop,
            shift, scale), each camera's encoder, the rest of the policy, backward, the
            optimizer with clipping, the average of the weights; "step" is their sum.
        samples_per_s: of whole steps.
        parameters: number of trained parameters.
    """

    policy: str
    encoder: str
    device: str
    batch_size: int
    parameters: int
    samples_per_s: float
    parts: Sequence[Part]


def profile_train(config: TrainConfig, *, turns: int) -> TrainProfile:
    """Time `turns` steps after some that warm up; nothing is written.

    On a GPU each part ends before the next begins, so parts that overlap in training do
    not overlap here.
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
    clock = _Clock(device)
    with clock.inner_calls(policy):
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
            nn.utils.clip_grad_norm_(policy.parameters(), config.optimizer.grad_clip_norm)
            optimizer.step()
            clock.lap("optimizer")
            ema.update(policy, step)
            clock.lap("average of the weights")
            if step >= _WARM_UP:
                for name, value in {**clock.laps, _WHOLE: sum(clock.laps.values())}.items():
                    seconds.setdefault(name, []).append(value)
    parts = shares(seconds, _WHOLE)
    whole = next(part.seconds for part in parts if part.name == _WHOLE)
    return TrainProfile(
        config.policy.policy,
        config.policy.encoder,
        str(device),
        config.optimizer.batch_size,
        sum(p.numel() for p in policy.parameters() if p.requires_grad),
        config.optimizer.batch_size / whole,
        parts,
    )


def train_table(profile: TrainProfile) -> str:
    """A profile as a Markdown table and a line."""
    parameters = f"{profile.parameters / 1e6:.2f} million parameters"
    summary = (
        f"{profile.samples_per_s:.0f} samples/s in batches of {profile.batch_size} on"
        f" {profile.device}: {profile.policy} with {profile.encoder}, {parameters}"
    )
    return "\n".join([*parts_table(profile.parts), "", summary])


class _Clock:
    """Laps of one step; the time of inner calls is taken out of their lap."""

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
        """A lap per inner call; the rest of the forward pass is the policy's."""
        self.lap("policy")
        whole = self.laps.pop("policy")
        self.laps |= self._inner
        self.laps["policy"] = whole - sum(self._inner.values())

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
            since = self._now()
            result = call(*arguments, **options)
            self._inner[name] = self._inner.get(name, 0.0) + self._now() - since
            return result

        return timed

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
