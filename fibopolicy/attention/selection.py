"""Which backend runs when nobody says: `backend="auto"`."""

from __future__ import annotations

import logging
import os

import torch
from torch import Tensor

from fibopolicy.attention import cpu, cuda
from fibopolicy.attention.patterns import AttentionPattern

#: Names a backend for every call that says "auto".
VARIABLE = "FIBOPOLICY_ATTENTION_BACKEND"

#: The share of all T^2 pairs up to which the sparse CPU kernels are taken over masked dense attention. A coarse rule: timed
#: between T = 17 and 197 on a busy machine they mostly still won there, and a pattern this dense saves little either way.
_SPARSE_UP_TO = 0.5

_log = logging.getLogger(__name__)


def choose(q: Tensor, pattern: AttentionPattern) -> str:
    """The backend for a tensor `(B, h, T, d)` and its pattern, by device, dtype, T and the share of pairs that are kept."""
    if torch.compiler.is_exporting():
        return "sdpa"  # an exported program must not depend on our operators
    name = os.environ.get(VARIABLE) or _fastest(q.device.type, q.dtype, pattern)
    if not torch.compiler.is_compiling():
        _log.debug("attention backend %s for %s %s, T = %d", name, q.device.type, q.dtype, pattern.sequence_length)
    return name


def _fastest(device: str, dtype: torch.dtype, pattern: AttentionPattern) -> str:
    if pattern.keeps_all:
        return "sdpa"
    if device == "cuda":
        return "triton" if cuda.available() and cuda.supports(dtype, pattern) else "csr"
    if device != "cpu" or not cpu.available() or not cpu.supports(dtype):
        return "sdpa"
    return "numba" if kept_share(pattern) <= _SPARSE_UP_TO else "sdpa"


def kept_share(pattern: AttentionPattern) -> float:
    """Kept pairs over T^2, prefix tokens included, averaged over the heads."""
    length, prefix = pattern.sequence_length, pattern.num_prefix
    whole = length**2 - pattern.num_tokens**2 if prefix else 0
    return (whole + pattern.density * pattern.num_tokens**2) / length**2
