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
    """AdamW with linear warm-up, then a cosine to zero."""

    steps: int = 2500
    """Gradient steps in all."""
    batch_size: int = 64
    """Windows per step."""
    learning_rate: float = 1e-3
    """The highest."""
    warmup: int = 100
    """Steps until then."""
    weight_decay: float = 1e-2
    """On matrices only, not on biases, norms and positions."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's."""
    clip: float = 1.0
    """Largest gradient norm; larger ones are scaled down to it."""
    ema: float = 0.995
    """Decay of the weights' moving average, which is what gets evaluated."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate must be positive, got {self.learning_rate}")
        if not (self.warmup >= 0 and self.weight_decay >= 0 and self.clip > 0 and 0 <= self.ema < 1):
            raise UserError(
                "expected warmup >= 0, weight_decay >= 0, clip > 0 and 0 <= ema < 1, got"
                f" {self.warmup}, {self.weight_decay}, {self.clip}, {self.ema}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must be in [0, 1), got {self.betas}")


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured on demonstrations that training does not see, and what is kept for it. Losses are those of the averaged
    weights."""

    validate_on: str | None = None
    """Filter key of demos to validate on, say valid; none by default."""
    validate_every: int = 250
    """Steps."""
    validate_samples: int = 2048
    """Windows at most, evenly spread over those demos."""
    keep_best: int = 0
    """Checkpoints to keep in best/ by the criterion, beside the last, which stays the result."""
    criterion: str = "validation_loss"
    """The lowest of this validation figure is best."""

    def __post_init__(self) -> None:
        if self.validate_every < 1 or self.validate_samples < 1 or self.keep_best < 0:
            raise UserError(
                "expected validate_every >= 1, validate_samples >= 1 and keep_best >= 0, got"
                f" {self.validate_every}, {self.validate_samples}, {self.keep_best}"
            )
        if self.validate_on is None and (self.keep_best or self.criterion != "validation_loss"):
            raise UserError(
                f"criterion {self.criterion} needs a validation, and there is none: name its demos with --validate-on"
            )
        if not self.criterion.startswith("validation_"):
            raise UserError(f"criterion must be a figure of the validation, such as validation_loss, got {self.criterion!r}")


@dataclass(frozen=True)
class RolloutConfig:
    """Rollouts of the averaged weights while training goes on, in a process of their own. They show where training stands; the
    result is what `fibopolicy evaluate` gives afterwards, on other start states."""

    rollout_every: int | None = None
    """Steps; none by default."""
    rollout_episodes: int = 20
    """Start states of each."""
    rollout_workers: int = 1
    """Simulators at once; each takes a core from the training while it runs."""

    def __post_init__(self) -> None:
        for name in ("rollout_every", "rollout_episodes", "rollout_workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    dataset: Path | tuple[Path, ...]
    """Robomimic HDF5 file, or several."""
    out: Path
    """Run directory."""
    weights: tuple[float, ...] | None = None
    """With several files: the share of each in every batch, one number per file; by default as many as it has steps."""
    cameras: tuple[str, ...] | None = None
    """Image keys to see; all of the file's by default."""
    vectors: tuple[str, ...] | None = None
    """Vector keys to see; by default the proprioception among them."""
    filter_key: str | tuple[str, ...] | None = None
    """Which demos, for all files or one per file; "all" for all. By default "train" where a file has it, else all."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """What is trained."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Loss on other demonstrations, and what is kept for it."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """Success while training."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""
    seed: int = 0
    """Decides initial weights, order and augmentation."""
    checkpoint_every: int = 250
    """Steps."""
    log_every: int = 10
    """Steps."""
    device: str | None = None
    """"cpu", "cuda", ...; by default a GPU where there is one."""

    def __post_init__(self) -> None:
        paths = tuple(Path(p).expanduser() for p in (self.dataset if isinstance(self.dataset, tuple | list) else (self.dataset,)))
        if not paths:
            raise UserError("dataset: name at least one file")
        object.__setattr__(self, "dataset", paths[0] if len(paths) == 1 else paths)
        if isinstance(self.filter_key, tuple) and len(self.filter_key) not in (1, len(paths)):
            raise UserError(f"filter_key: got {len(self.filter_key)} for {len(paths)} files; give one for all or one per file")
        object.__setattr__(self, "out", Path(self.out).expanduser())
        for name in ("checkpoint_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1 step, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"seed must be between 0 and {(1 << 31) - 1}, got {self.seed}")

    @property
    def files(self) -> tuple[tuple[Path, str | None], ...]:
        """Each file with the filter key that was asked of it."""
        paths = self.dataset if isinstance(self.dataset, tuple) else (self.dataset,)
        keys = self.filter_key if isinstance(self.filter_key, tuple) else (self.filter_key,)
        return tuple(zip(paths, keys * len(paths) if len(keys) == 1 else keys, strict=True))
