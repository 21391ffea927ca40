"""One training run as a value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fibopolicy.errors import UserError, unknown
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.training.watch_config import RolloutConfig, ValidationConfig
from fibopolicy.utils.files import expanded

PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up, then a cosine to zero."""

    steps: int = 2500
    """Gradient steps in all."""
    batch_size: int = 64
    """Windows per step."""
    learning_rate: float = 1e-3
    """At its highest, after the warm-up; it then falls to 0 along a cosine."""
    warmup: int = 100
    """Gradient steps in which the learning rate rises from 0."""
    weight_decay: float = 1e-2
    """On matrices only, not on biases, norms and positions."""
    encoder_rate: float = 1.0
    """The encoder's learning rate as a factor of the others'."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's mean and square."""
    clip: float = 1.0
    """Largest gradient norm; larger ones are scaled down to it."""
    ema: float = 0.995
    """Decay of the weights' moving average, which is what gets evaluated."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size > 1 << 20:
            raise UserError(f"batch_size must be at most {1 << 20}, got {self.batch_size}")
        for name in ("learning_rate", "encoder_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if not (
            self.warmup >= 0 and self.weight_decay >= 0 and self.clip > 0 and 0 <= self.ema < 1
        ):
            raise UserError(
                "expected warmup >= 0, weight_decay >= 0, clip > 0 and 0 <= ema < 1, got"
                f" {self.warmup}, {self.weight_decay}, {self.clip}, {self.ema}"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must be in [0, 1), got {self.betas}")


@dataclass(frozen=True)
class ComputeConfig:
    """How steps are computed: their speed and memory, not, rounding apart, what is
    learnt. May change on resume.
    """

    accumulate: int = 1
    """Parts of a batch that go through the network one after the other, for memory; the step is the whole batch's."""  # noqa: E501
    gradient_checkpointing: bool = False
    """Compute a vision transformer's activations twice instead of keeping them."""
    precision: str = "auto"
    """"fp32", "bf16" (autocast), or "auto": bf16 on a GPU that computes it, fp32 elsewhere; a resumed run keeps its own."""  # noqa: E501
    compile: bool = False
    """torch.compile the encoders; takes minutes at the start, and a C++ compiler on CPUs."""

    def __post_init__(self) -> None:
        if self.accumulate < 1:
            raise UserError(f"accumulate must be at least 1, got {self.accumulate}")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    dataset: Path | tuple[Path, ...]
    """Robomimic HDF5 file, or several."""
    out: Path
    """Run directory."""
    weights: tuple[float, ...] | None = None
    """With several files: the share of each in every batch, one number per file; by default as many as it has steps."""  # noqa: E501
    cameras: tuple[str, ...] | None = None
    """Image keys to see; all of the file's by default."""
    vectors: tuple[str, ...] | None = None
    """Vector keys to see; by default the proprioception among them."""
    filter_key: str | tuple[str, ...] | None = None
    """Which demos, for all files or one per file; "all" for all. By default "train" where a file has it, else all."""  # noqa: E501
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """What is trained."""
    encoder_weights: Path | None = None
    """Start the encoders from these: a run directory, or a safetensors or .pth file of the encoder or of its timm model."""  # noqa: E501
    freeze_encoder: bool = False
    """Train the head alone; the encoders stay as they are, batch norm included."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How it is optimised."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """With what speed and memory."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Loss on other demonstrations, and what is kept for it."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """Success while training."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""
    seed: int = 0
    """Decides initial weights, order and augmentation."""
    checkpoint_every: int = 250
    """Gradient steps between checkpoints: what a killed run loses at most."""
    log_every: int = 10
    """Gradient steps between lines of metrics.jsonl."""
    device: str | None = None
    """"cpu", "cuda", ...; by default a GPU where there is one."""

    def __post_init__(self) -> None:
        paths = tuple(
            expanded(p)
            for p in (self.dataset if isinstance(self.dataset, tuple | list) else (self.dataset,))
        )
        if not paths:
            raise UserError("dataset: name at least one file")
        for name in ("cameras", "vectors"):
            keys = getattr(self, name) or ()
            if len(set(keys)) < len(keys):
                raise UserError(
                    f"{name}: {', '.join(keys)} names one twice; name each observation once"
                )
        object.__setattr__(self, "dataset", paths[0] if len(paths) == 1 else paths)
        if isinstance(self.filter_key, tuple) and len(self.filter_key) not in (1, len(paths)):
            raise UserError(
                f"filter_key: got {len(self.filter_key)} for {len(paths)} files; give one for all"
                " or one per file"
            )
        object.__setattr__(self, "out", expanded(self.out))
        try:
            str(self.out).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self.out}: is not valid UTF-8, which TensorBoard needs; choose another --out"
            ) from error
        if self.encoder_weights is not None:
            object.__setattr__(self, "encoder_weights", expanded(self.encoder_weights).absolute())
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
