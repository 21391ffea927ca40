"""When training has gone wrong for good."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable

#: Losses that make up the usual level, and how many of them there must be before any is
#: judged.
WINDOW, LEAST = 200, 20
#: A loss is high when it lies this many times their usual size above the median of the
#: losses before it.
FACTOR = 10.0
#: So many high losses in a row are no outlier.
PATIENCE = 50


class Divergence:
    """Watches losses and gradients: a loss that is not finite, or that stays far above
    its usual level, ends the training.

    The usual level is the median of the last `WINDOW` losses that were not high; the
    usual size is that median's magnitude or the spread of those losses (between
    quartiles), whichever is larger, since log-likelihoods may be of any sign. A high
    loss alone is an outlier; `PATIENCE` of them in a row are divergence. While the last
    one is high, `calm` is false and no checkpoint is written, so that the newest one on
    disk is from before.

    Attributes:
        recent: the losses that make up the usual level.
        streak: high losses in a row, up to now.
    """

    def __init__(self, recent: Iterable[float] = (), streak: int = 0) -> None:
        self.recent = deque(recent, maxlen=WINDOW)
        self.streak = streak

    @property
    def calm(self) -> bool:
        return self.streak == 0

    def reason(self, loss: float, gradient_norm: float) -> str | None:
        """Takes the next step's figures; says why the training has to stop, or `None`."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(gradient_norm):
            return f"the gradient norm is {gradient_norm}"
        limit = self._limit()
        if loss <= limit:
            self.streak = 0
            self.recent.append(loss)
            return None
        self.streak += 1
        if self.streak < PATIENCE:
            return None
        return (
            f"the loss has been above {limit:.4g} for {PATIENCE} steps, {FACTOR:g} times what is"
            f" usual, and is {loss:.4g}"
        )

    def _limit(self) -> float:
        if len(self.recent) < LEAST:
            return math.inf
        low, middle, high = statistics.quantiles(self.recent, n=4)
        return middle + FACTOR * max(abs(middle), high - low)
