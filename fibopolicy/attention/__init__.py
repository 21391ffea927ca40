"""Fibottention: sparse attention whose heads keep different, Fibonacci-like diagonals.

Needs only torch and numpy; with numba its CPU kernels are compiled, with triton those
for CUDA.
"""

from fibopolicy.attention.baselines import (
    BASELINES,
    BigBirdPattern,
    DensePattern,
    DilatedPattern,
    LocalPattern,
    RandomPattern,
    SharedPattern,
    like,
)
from fibopolicy.attention.functional import BACKENDS, fibottention, fibottention_qkvpacked
from fibopolicy.attention.patterns import (
    AttentionPattern,
    FibottentionPattern,
    OffsetPattern,
    generate_fibomask,
    get_fibonacci,
    wythoff,
)

__all__ = [
    "BACKENDS",
    "BASELINES",
    "AttentionPattern",
    "BigBirdPattern",
    "DensePattern",
    "DilatedPattern",
    "FibottentionPattern",
    "LocalPattern",
    "OffsetPattern",
    "RandomPattern",
    "SharedPattern",
    "fibottention",
    "fibottention_qkvpacked",
    "generate_fibomask",
    "get_fibonacci",
    "like",
    "wythoff",
]
