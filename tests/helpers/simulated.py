"""Simulated outcomes with known rates: logit-normal effects of training seeds and
initial states.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm


def outcomes(
    rng: np.random.Generator,
    seeds: int,
    init_states: NDArray[np.floating],
    mean: float,
    seed_sd: float,
) -> NDArray[np.bool_]:
    """Success `(S, n)`: the logit is `mean`, plus one draw per seed, plus the given
    effect of the initial state.
    """
    logits = mean + seed_sd * rng.normal(size=(seeds, 1)) + init_states
    return rng.random(logits.shape) < 1 / (1 + np.exp(-logits))


def rate(mean: float, sd: float) -> float:
    """Expected success rate if the effects on the logit have this total standard deviation."""
    x = np.linspace(-8, 8, 4001)
    weights = norm.pdf(x) / norm.pdf(x).sum()
    return float((weights / (1 + np.exp(-(mean + sd * x)))).sum())
