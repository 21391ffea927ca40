"""Which backend runs when nobody says: `backend="auto"`."""

from __future__ import annotations

import logging
import math
import os

import torch
from torch import Tensor

from fibopolicy.attention import cpu, cuda
from fibopolicy.attention.patterns import AttentionPattern

#: Names a backend for every call that says "auto".
VARIABLE = "FIBOPOLICY_ATTENTION_BACKEND"

#: (T, share): up to T tokens the sparse CPU kernels are taken where at most this share
#: of all T^2 pairs is kept. Beyond it masked dense attention won, forward and backward
#: together: `docs/benchmarks/attention_auto_*.json` has the timings.
_CPU_TABLE = ((101, 0.95), (197, 0.75), (math.inf, 0.6))

#: Up to so many tokens a GPU takes masked dense attention: what is launched costs more
#: than what is computed, and ours launches more, forward and backward together.
#: `docs/benchmarks/attention_h200_*.md` has the timings.
_CUDA_SHORT = 197

_log = logging.getLogger(__name__)


def choose(q: Tensor, pattern: AttentionPattern) -> str:
    """The backend for a tensor `(B, h, T, d)` and its pattern, by device, dtype, T and
    the share of pairs that are kept.
    """
    if torch.compiler.is_exporting() or (torch.jit.is_tracing() and torch.onnx.is_in_onnx_export()):  # type: ignore[attr-defined,no-untyped-call]
        return "sdpa"  # an exported program must not depend on our operators
    name = os.environ.get(VARIABLE) or _fastest(q.device.type, q.dtype, pattern)
    if not torch.compiler.is_compiling():
        _log.debug(
            "attention backend %s for %s %s, T = %d",
            name,
            q.device.type,
            q.dtype,
            pattern.sequence_length,
        )
    return name


def _fastest(device: str, dtype: torch.dtype, pattern: AttentionPattern) -> str:
    if pattern.keeps_all:
        return "sdpa"
    if device == "cuda" and pattern.sequence_length > _CUDA_SHORT:
        return "triton" if cuda.available() and cuda.supports(dtype, pattern) else "csr"
    if device != "cpu" or not cpu.available() or not cpu.supports(dtype):
        return "sdpa"
    limit = next(share for length, share in _CPU_TABLE if pattern.sequence_length <= length)
    return "numba" if _kept_share(pattern.spec) <= limit else "sdpa"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _kept_share(spec: str) -> float:
    """`kept_share` of a pattern by its `spec`, which a compiler can take for a constant."""
    return kept_share(AttentionPattern.from_spec(spec))


def kept_share(pattern: AttentionPattern) -> float:
    """Kept pairs over T^2, prefix tokens included, averaged over the heads."""
    length, prefix = pattern.sequence_length, pattern.num_prefix
    whole = length**2 - pattern.num_tokens**2 if prefix else 0
    return (whole + pattern.density * pattern.num_tokens**2) / length**2
