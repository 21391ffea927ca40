"""The policy contract, what a policy is built from, and the registry of heads."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fibopolicy.errors import UserError, unknown

Statistics = Mapping[str, Mapping[str, NDArray[np.float64]]]
#: What a policy carries from one call of `act` to the next within an episode; opaque to the caller.
State = Any


@dataclass(frozen=True)
class Shapes:
    """What a policy sees and does, taken from the data.

    Args:
        images: (H, W) per camera key.
        vectors: size per vector key.
        action_dim: A.
    """

    images: Mapping[str, tuple[int, int]]
    vectors: Mapping[str, int]
    action_dim: int


@dataclass(frozen=True)
class PolicyConfig:
    """What to build; the same for every task."""

    head: str = "bc"
    """Policy head: bc."""
    encoder: str = "fibottention_vit_tiny"
    """Image encoder, e.g. fibottention_vit_tiny, vit_tiny, resnet18."""
    encoder_options: Mapping[str, int | float | bool | str] = field(default_factory=dict)
    """Its options as pairs, e.g. depth 4 pool mean."""
    views: str = "separate"
    """Several cameras: "separate" encoders, one "shared", or "joint" tokens in one sequence."""
    history: int = 1
    """Observations that the policy sees, the newest last."""
    chunk: int = 8
    """Actions predicted at once."""
    execute: int = 4
    """How many of them are executed before the policy looks again."""
    loss: str = "l1"
    """"l1" or "l2", on normalised actions."""
    hidden: int = 256
    """Width of the head's MLP."""
    layers: int = 2
    """Hidden layers of the head's MLP."""
    action_normalization: str = "minmax"
    """"minmax" to [-1, 1], or "gaussian" to zero mean and unit variance."""
    crop: int | None = None
    """Pixels: train on random crops of this size, act on the central one. None keeps the whole frame."""
    shift: int = 0
    """Pixels: train on frames shifted by up to this much, edges repeated."""

    def __post_init__(self) -> None:
        for name, least in (("history", 1), ("chunk", 1), ("execute", 1), ("hidden", 1), ("layers", 0), ("shift", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.execute > self.chunk:
            raise UserError(f"execute must be between 1 and chunk = {self.chunk}, got {self.execute}")
        if self.crop is not None and self.crop < 1:
            raise UserError(f"crop must be at least 1 pixel, got {self.crop}")
        for name in ("image_size", "num_views"):
            if name in self.encoder_options:
                raise UserError(f"encoder_options: {name} follows from the data and is not an option")


class Policy(nn.Module):
    """Observations to action chunks; owns its normalisation.

    A batch holds `obs` (camera keys uint8 `(B, T_o, H, W, 3)`, vector keys float32 `(B, T_o, D)`), `actions` float32
    `(B, chunk, A)` and `action_mask` bool `(B, chunk)`, false where an action repeats the demonstration's last.
    """

    name: ClassVar[str]
    config: PolicyConfig
    shapes: Shapes

    @abstractmethod
    def fit_normalizers(self, statistics: Statistics) -> None:
        """Set the normalisation from the data: per vector key and "actions", arrays min, max, mean and std `(D,)`."""

    @abstractmethod
    def loss(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """A scalar to minimise, and figures to log. Random augmentation draws from torch's global generator."""

    @abstractmethod
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        """Actions `(B, execute, A)` in [-1, 1], to execute before the next call.

        Args:
            obs: the last T_o = `history` control steps as in a batch; an episode's first observation stands for those
                before it.
            state: what the previous call of this episode returned, `None` at its start.
        """


_POLICIES: dict[str, type[Policy]] = {}


def register_policy(policy: type[Policy]) -> type[Policy]:
    """Class decorator: make a head known to `build_policy` under its `name`."""
    _POLICIES[policy.name] = policy
    return policy


def policy_names() -> tuple[str, ...]:
    return tuple(sorted(_POLICIES))


def build_policy(config: PolicyConfig, shapes: Shapes) -> Policy:
    """Build the policy that `config` describes, with fresh weights.

    Raises:
        UserError: an unknown head, encoder or option, or values that do not fit the images.
    """
    if config.head not in _POLICIES:
        raise unknown("policy head", config.head, _POLICIES)
    factory: Callable[[PolicyConfig, Shapes], Policy] = _POLICIES[config.head]
    return factory(config, shapes)
