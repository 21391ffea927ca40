"""One training run as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fibopolicy.errors import UserError
from fibopolicy.policies.base import PolicyConfig

#: Proprioception under the names of the built-in tasks and of robosuite. Object poses are never taken by default:
#: a policy that reads them has no use for its cameras.
PROPRIOCEPTION = (
    "hand_position",
    "gripper_opening",
    "robot0_eef_pos",
    "robot0_eef_quat",
    "robot0_gripper_qpos",
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a cosine to zero.

    Args:
        steps: gradient steps in all.
        batch_size: windows per step.
        learning_rate: the highest.
        warmup: steps until then.
        weight_decay: on matrices only, not on biases, norms and positions.
        betas: of Adam.
        clip: largest gradient norm; larger ones are scaled down to it.
        ema: decay of the weights' moving average, which is what gets evaluated.
    """

    steps: int = 2500
    batch_size: int = 64
    learning_rate: float = 1e-3
    warmup: int = 100
    weight_decay: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    ema: float = 0.995

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive, got {self.learning_rate}")
        if self.warmup < 0 or self.weight_decay < 0 or not self.clip > 0 or not 0 <= self.ema < 1:
            raise UserError(
                "expected warmup >= 0, weight_decay >= 0, clip > 0 and 0 <= ema < 1, got"
                f" {self.warmup}, {self.weight_decay}, {self.clip}, {self.ema}"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Args:
        dataset: robomimic HDF5 file.
        out: run directory.
        cameras: image keys to see; `None` takes all of the file's.
        vectors: vector keys to see; `None` takes the proprioception among them.
        filter_key: which demos; `None` takes "train" where the file has it, else all.
        policy, optimizer: what is trained, and how.
        seed: decides initial weights, order and augmentation.
        checkpoint_every, log_every: steps.
        device: "cpu", "cuda", ...; `None` takes a GPU where there is one.
    """

    dataset: Path
    out: Path
    cameras: tuple[str, ...] | None = None
    vectors: tuple[str, ...] | None = None
    filter_key: str | None = None
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    seed: int = 0
    checkpoint_every: int = 250
    log_every: int = 25
    device: str | None = None
