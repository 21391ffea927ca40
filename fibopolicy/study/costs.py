"""What an encoder costs: parameters, multiply-accumulates, kept token pairs, and
latency beside the study's other encoders.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fibopolicy.attention import AttentionPattern
from fibopolicy.attention.functional import BACKEND_VARIABLE
from fibopolicy.attention.profile import interleave
from fibopolicy.errors import UserError
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.study.built import Built
from fibopolicy.utils.system import resolve_device

#: Moments of one call, and at most so many timed turns of each encoder, which end after
#: so many seconds a batch size.
BATCHES = (1, 64)
TURNS = {1: 30, 64: 7}
SECONDS = 30.0


def encoder_costs(built: Sequence[Built], device: str | None) -> list[dict[str, Any]]:
    """The contents of each cell's `cost.json`, in the order of `built`.

    Latency is of all cameras' frames of one moment, forward only; encoders take turns
    in one process, so that whatever else the machine does falls on all alike. Cells
    whose encoder sees the same frames in the same way share one measurement.

    Raises:
        UserError: an encoder fails on its task's frames.
    """
    distinct = {_key(b): b for b in built}
    counted = {key: _counted(b) for key, b in distinct.items()}
    timed = {batch: latencies(distinct, batch, device) for batch in BATCHES}
    return [
        {
            "parameters": b.parameters,
            "encoder_parameters": b.encoder_parameters,
            "encoder_macs": counted[_key(b)][0],
            "attention_pairs": counted[_key(b)][1],
            **{f"encoder_ms_batch_{batch}": timed[batch][_key(b)] for batch in BATCHES},
        }
        for b in built
    ]


def _key(built: Built) -> str:
    sizes = sorted(built.encoder.image_sizes.values())
    return f"{built.cell.encoder.name} {built.encoder.views} {sizes}"


def _counted(built: Built) -> tuple[int, float | None]:
    try:
        return count_macs(built.encoder)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"encoder {built.cell.encoder.name} fails on frames of {built.encoder.image_sizes}"
            f" pixels ({reason}); it takes (B, 3, H, W) and returns tokens (B, N, D) and a feature"
            " (B, output_dim)"
        ) from error


def frames(
    encoder: ObservationEncoder, batch: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Random frames of every camera, as `ObservationEncoder.encode` takes them."""
    sizes = encoder.image_sizes
    return {camera: torch.rand(batch, 3, *size, device=device) for camera, size in sizes.items()}


def latencies(
    built: Mapping[str, Built], batch: int, device: str | None
) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass: median and quartiles over interleaved turns."""
    place = resolve_device(device)
    runs: dict[str, Callable[[], object]] = {}
    for key, one in built.items():
        runs[key] = _forward(one.encoder.to(place), frames(one.encoder, batch, place))
    with torch.no_grad():
        trial = interleave(runs, 1, str(place))
        turns = min(TURNS[batch], int(SECONDS / max(sum(t[0] for t in trial.values()), 1e-9)))
        seconds = interleave(runs, max(turns, 3), str(place))
    for one in built.values():
        one.encoder.to("cpu")
    return {key: _quartiles([1000 * s for s in times]) for key, times in seconds.items()}


def _forward(encoder: ObservationEncoder, images: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: encoder.encode(images)


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "p25": low, "p75": high}


def count_macs(encoder: ObservationEncoder) -> tuple[int, float | None]:
    """Multiply-accumulates for one moment of all cameras, and the share of patch pairs
    that attention keeps.

    Products and convolutions are torch's count; attention counts twice the head's width
    for each kept pair, prefix tokens included, whatever kernel computes it. The share
    is averaged over layers and heads; `None` without attention.
    """
    sparse, shares = 0, []

    def on_attention(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal sparse
        pattern: Any = module.pattern
        if isinstance(pattern, AttentionPattern):
            rows, length, width = arguments[0].shape
            # D = h d, so that h heads with their mean share of T^2 pairs take share *
            # T^2 * D twice.
            sparse += round(2 * rows * pattern.kept_share * length**2 * width)
            shares.append(pattern.density)

    hooks = [
        m.register_forward_pre_hook(on_attention)
        for m in encoder.modules()
        if hasattr(m, "pattern")
    ]
    try:
        with (
            torch.no_grad(),
            _sparse_kernels(),
            _Dense() as dense,
            FlopCounterMode(display=False) as counter,
        ):
            encoder.encode(frames(encoder, 1))
    finally:
        for hook in hooks:
            hook.remove()
    # Torch counts dense attention on some devices only, so it is counted here instead.
    counts = counter.get_flop_counts().get("Global", {})
    flops = sum(n for operator, n in counts.items() if "scaled_dot_product" not in str(operator))
    shares += [1.0] * dense.calls
    return flops // 2 + sparse + dense.macs, statistics.fmean(shares) if shares else None


class _Dense(TorchFunctionMode):
    """Counts calls of scaled dot product attention without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.macs, self.calls = 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            self.calls += 1
            self.macs += q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return func(*args, **(kwargs or {}))


@contextmanager
def _sparse_kernels() -> Iterator[None]:
    """Within it, sparse attention runs in kernels that torch does not count."""
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = "numba"
    try:
        yield
    finally:
        if before is None:
            del os.environ[BACKEND_VARIABLE]
        else:
            os.environ[BACKEND_VARIABLE] = before
