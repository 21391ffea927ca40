"""The costs of an encoder: parameters, multiply-accumulates, kept token pairs, and the
latency, measured interleaved with the other encoders of the study.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fibopolicy.attention import AttentionPattern, functional
from fibopolicy.attention.profile import interleave
from fibopolicy.errors import UserError, one_line
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.study.preflight import ModelSize
from fibopolicy.utils.system import resolve_device

#: Batch sizes, and for each the highest number of timed turns of every encoder.
TURNS = {1: 30, 64: 7}
#: Time limit for the turns of a batch size, in seconds.
MAX_SECONDS = 30.0


def encoder_costs(sizes: Sequence[ModelSize], device: str | None) -> list[dict[str, Any]]:
    """The content of each condition's `cost.json`, in the order of `sizes`.

    Latency is the forward pass of one frame of every camera. Encoders take turns in one
    process, so that other work on the machine slows all of them equally. Conditions
    whose encoder sees the same frames in the same way share one measurement.

    Raises:
        UserError: an encoder fails on the frames of its task.
    """
    distinct = {_key(size): size for size in sizes}
    counted = {key: _count(size) for key, size in distinct.items()}
    timed = {batch: latencies(distinct, batch, device) for batch in TURNS}
    return [
        {
            "parameters": size.parameters,
            "encoder_parameters": size.encoder_parameters,
            "encoder_macs": counted[_key(size)][0],
            "attention_pairs": counted[_key(size)][1],
            **{f"encoder_ms_batch_{batch}": timed[batch][_key(size)] for batch in TURNS},
        }
        for size in sizes
    ]


def _key(size: ModelSize) -> str:
    image_sizes = sorted(size.encoder.image_sizes.values())
    return f"{size.condition.encoder.name} {size.encoder.views} {image_sizes}"


def _count(size: ModelSize) -> tuple[int, float | None]:
    try:
        return count_macs(size.encoder)
    except Exception as error:
        raise UserError(
            f"encoder {size.condition.encoder.name} fails on frames of"
            f" {size.encoder.image_sizes} pixels ({one_line(error)}); it must take (B, 3, H, W)"
            " and return tokens (B, N, D) and a feature (B, output_dim)"
        ) from error


def random_frames(
    encoder: ObservationEncoder, batch: int, device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """Random frames of every camera, as `ObservationEncoder.encode` takes them."""
    sizes = encoder.image_sizes
    return {camera: torch.rand(batch, 3, *size, device=device) for camera, size in sizes.items()}


def latencies(
    sizes: Mapping[str, ModelSize], batch: int, device: str | None
) -> dict[str, dict[str, float]]:
    """Milliseconds of a forward pass: median and quartiles over interleaved turns."""
    place = resolve_device(device)
    calls = {
        key: _forward(size.encoder.to(place), random_frames(size.encoder, batch, place))
        for key, size in sizes.items()
    }
    with torch.no_grad():
        trial = interleave(calls, 1, str(place))
        turn_s = sum(times[0] for times in trial.values())
        turns = min(TURNS[batch], int(MAX_SECONDS / max(turn_s, 1e-9)))
        seconds = interleave(calls, max(turns, 3), str(place))
    for size in sizes.values():
        size.encoder.to("cpu")
    return {key: _quartiles([1000 * s for s in times]) for key, times in seconds.items()}


def _forward(encoder: ObservationEncoder, images: dict[str, Tensor]) -> Callable[[], object]:
    return lambda: encoder.encode(images)


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "p25": low, "p75": high}


def count_macs(encoder: ObservationEncoder) -> tuple[int, float | None]:
    """Multiply-accumulates of the forward pass of one frame per camera, and the share
    of patch pairs that attention keeps.

    Torch counts matrix products and convolutions. Each pair that attention keeps,
    prefix tokens included, counts twice the width of a head, with any kernel. The share
    is the mean over layers and heads; `None` without attention.
    """
    with (
        torch.no_grad(),
        _sparse_kernels() as sparse,
        _Dense() as dense,
        FlopCounterMode(display=False) as counter,
    ):
        encoder.encode(random_frames(encoder, 1))
    # Torch counts dense attention on some devices only, so `_Dense` counts it
    # everywhere.
    counts = counter.get_flop_counts().get("Global", {})
    flops = sum(n for operator, n in counts.items() if "scaled_dot_product" not in str(operator))
    shares = sparse.shares + [1.0] * dense.calls
    return flops // 2 + sparse.macs + dense.macs, statistics.fmean(shares) if shares else None


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


@dataclass
class _Sparse:
    """Calls of sparse attention: their kept pairs, and the share of patch pairs of each."""

    macs: int = 0
    shares: list[float] = field(default_factory=list)


@contextmanager
def _sparse_kernels() -> Iterator[_Sparse]:
    """Count sparse attention, and run it in kernels that torch does not count."""
    found, choose = _Sparse(), functional.choose_backend

    def count(
        x: Tensor, heads: int, length: int, pattern: AttentionPattern, masking: str, _: str
    ) -> str:
        pairs = round(len(x) * heads * pattern.kept_share * length**2)
        found.macs += 2 * pairs * x.shape[-1]
        found.shares.append(pattern.density)
        return choose(x, heads, length, pattern, masking, "numba")

    functional.choose_backend = count  # type: ignore[assignment]
    try:
        yield found
    finally:
        functional.choose_backend = choose
