"""From actions, as a dataset and a simulator have them, to the numbers that a head
predicts, and back.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fibopolicy.policies.base import PolicyConfig, Shapes
from fibopolicy.policies.normalizer import Normalizer
from fibopolicy.policies.rotations import axis_angle_from_6d, axis_angle_to_6d


class ActionNormalizer(Normalizer):
    """Actions `(..., A)` to `(..., dim)`: axis-angle rotations of absolute actions
    become 6-D, the rest is normalised.

    A 6-D rotation takes the place of its axis-angle vector and has its own range, so it
    is not normalised. `invert` gives actions that may be executed: within [-1, 1],
    unless they are absolute (metres and radians).

    Attributes:
        dim: D, what a head predicts per action: A, and 3 more for each 6-D rotation.
        bounded: normalised actions of the training data lie in [-1, 1].
    """

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        rotations = shapes.rotations if config.rotation == "6d" else ()
        dim = shapes.action_dim + 3 * len(rotations)
        super().__init__(dim, config.action_normalization)
        self.rotations, self.dim = rotations, dim
        self.absolute = shapes.absolute
        self.bounded = self.kind == "minmax" or (self.kind == "none" and not shapes.absolute)

    def fit(self, statistics: Mapping[str, NDArray[np.float64]]) -> None:
        # Mean 0 and deviation 1, minimum -1 and maximum 1: either kind then leaves a
        # rotation as it is.
        own = {"min": -1.0, "max": 1.0, "mean": 0.0, "std": 1.0}
        super().fit(
            {name: self._with_rotations(values, own[name]) for name, values in statistics.items()}
        )

    def largest(self, values: NDArray[np.float64]) -> float:
        """The largest magnitude of `values` `(A,)`, an action's least or greatest
        numbers, 6-D rotations apart.
        """
        return float(np.abs(self._with_rotations(values, 0.0)).max(initial=0.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self._converted(x))

    def invert(self, x: Tensor) -> Tensor:
        actions = self._restored(super().invert(x))
        return actions if self.absolute else actions.clamp(-1, 1)

    def _with_rotations(self, values: NDArray[np.float64], own: float) -> NDArray[np.float64]:
        parts, done = [], 0
        for start in self.rotations:
            parts += [values[done:start], np.full(6, own)]
            done = start + 3
        return np.concatenate([*parts, values[done:]])

    def _converted(self, actions: Tensor) -> Tensor:
        parts, done = [], 0
        for start in self.rotations:
            parts += [actions[..., done:start], axis_angle_to_6d(actions[..., start : start + 3])]
            done = start + 3
        return torch.cat([*parts, actions[..., done:]], dim=-1)

    def _restored(self, converted: Tensor) -> Tensor:
        parts, done = [], 0
        for nth, start in enumerate(self.rotations):
            at = start + 3 * nth
            parts += [converted[..., done:at], axis_angle_from_6d(converted[..., at : at + 6])]
            done = at + 6
        return torch.cat([*parts, converted[..., done:]], dim=-1)
