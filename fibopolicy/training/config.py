"""The configuration of a training run, and published runs by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from fibopolicy.errors import UserError, unknown
from fibopolicy.policies.base import PolicyConfig
from fibopolicy.utils.files import expanded
from fibopolicy.utils.registry import Registry

Precision = Literal["auto", "fp32", "bf16"]


def _check_at_least(config: object, least: int, *names: str) -> None:
    """Raise `UserError` for a setting below `least`; `None` is allowed."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise UserError(f"{name} must be at least {least}, got {value}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up, then a cosine to zero."""

    steps: int = 2500
    """Number of gradient steps."""
    batch_size: int = 64
    """Windows per step."""
    lr: float = 1e-3
    """Highest learning rate, reached after the warm-up; it then falls to 0 along a cosine."""
    warmup_steps: int = 100
    """Gradient steps in which the learning rate rises from 0."""
    weight_decay: float = 1e-2
    """Weight decay of matrices; biases, norms and positions have none."""
    encoder_lr_scale: float = 1.0
    """Learning rate of the encoder relative to that of the other parameters."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates of the gradient's mean and square."""
    grad_clip_norm: float = 1.0
    """Largest gradient norm; larger ones are scaled down to it."""
    ema: float = 0.995
    """Decay of the moving average of the weights; evaluation uses that average."""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "steps", "batch_size")
        _check_at_least(self, 0, "warmup_steps", "weight_decay")
        if self.batch_size > 1 << 20:
            raise UserError(f"batch_size must be at most {1 << 20}, got {self.batch_size}")
        for name in ("lr", "encoder_lr_scale", "grad_clip_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise UserError(f"ema must be in [0, 1), got {self.ema}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"betas must be in [0, 1), got {self.betas}")


@dataclass(frozen=True)
class ComputeConfig:
    """How steps are computed. Changes speed and memory, and results only by rounding.

    May change on resume.
    """

    accumulate: int = 1
    """Parts of a batch, computed one after the other to save memory; same gradients."""
    gradient_checkpointing: bool = False
    """Recompute the activations of a vision transformer instead of keeping them."""
    precision: Precision = "auto"
    """"fp32", "bf16" (autocast), or "auto": bf16 on GPUs that support it; kept on resume."""
    compile: bool = False
    """torch.compile the encoders. It takes minutes at the start, and on CPUs a C++ compiler."""
    cuda_graph: bool = True
    """On a GPU, launch forward and backward pass as one CUDA graph, for bc, diffusion and flow
    with our ViTs or resnet18."""
    frames_on_gpu: bool = True
    """Keep all frames in GPU memory if they fit into a quarter of what is free."""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "accumulate")
        if self.precision not in get_args(Precision):
            raise unknown("precision", self.precision, get_args(Precision))


@dataclass(frozen=True)
class ValidationConfig:
    """Losses of the averaged weights on held-out demonstrations, and checkpoints kept
    for them.
    """

    validate_on: str | None = None
    """Filter key of the demos to validate on, e.g. valid; by default no validation."""
    validate_every: int = 250
    """Gradient steps between validations."""
    validate_samples: int = 2048
    """Largest number of windows, evenly spread over those demos."""
    keep_best: int = 0
    """Number of checkpoints with the best criterion to keep in best/, besides the last."""
    criterion: str = "validation_loss"
    """Validation metric to select by; the lowest value is best."""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "validate_every", "validate_samples")
        _check_at_least(self, 0, "keep_best")
        if self.validate_on is None and (self.keep_best or self.criterion != "validation_loss"):
            raise UserError(
                f"criterion {self.criterion} needs a validation; name its demos with --validate-on"
            )
        if not self.criterion.startswith("validation_"):
            raise UserError(
                "criterion must be a metric of the validation, such as validation_loss, got"
                f" {self.criterion!r}"
            )


@dataclass(frozen=True)
class RolloutConfig:
    """Rollouts of the averaged weights during training, in a separate process.

    They show progress. The result of a run is what `fibopolicy evaluate` measures
    afterwards, from other initial states.
    """

    rollout_every: int | None = None
    """Gradient steps between rollouts; none by default."""
    rollout_episodes: int = 20
    """Episodes of each rollout."""
    rollout_workers: int = 1
    """Simulators at once; each takes a core from the training while it runs."""
    task: str | None = None
    """Task id, or module:class; by default the task that the data name."""

    def __post_init__(self) -> None:
        _check_at_least(self, 1, "rollout_every", "rollout_episodes", "rollout_workers")
        if self.task is not None and self.rollout_every is None:
            raise UserError(
                "task is for rollouts during training: set --rollout-every, or give --task to"
                " evaluate"
            )


@dataclass(frozen=True)
class TrainConfig:
    """A training run."""

    dataset: Path | tuple[Path, ...]
    """Robomimic HDF5 file, or several."""
    out: Path
    """Run directory."""
    dataset_weights: tuple[float, ...] | None = None
    """Share of each of several files in a batch; by default in proportion to their steps."""
    cameras: tuple[str, ...] | None = None
    """Image keys that the policy sees; by default all of the file's."""
    vectors: tuple[str, ...] | None = None
    """Vector keys that the policy sees; by default the proprioception."""
    map: tuple[str, ...] = ()
    """Arrays to read by another key, as PATH=KEY, e.g. obs/images/cam_high=front or
    joint_targets=actions. PATH starts in each demo."""
    task_embedding: str | None = None
    """Train one policy on several tasks, conditioned on the task: "learned", or an .npz file
    with a vector per task, such as the embedding of a sentence."""
    image_size: int | tuple[int, int] | None = None
    """Height and width to which larger frames are resized, pixels; by default they keep
    their size."""
    filter_key: str | tuple[str, ...] | None = None
    """Demos to use, one key for all files or per file, or "all"; by default "train", else all."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """What is trained."""
    encoder_weights: Path | None = None
    """Initial weights of the encoders: a run directory, or a .safetensors or .pth file."""
    freeze_encoder: bool = False
    """Train everything except the encoders, which stay fixed, batch norm included."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How steps are computed."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Losses on held-out demonstrations."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """Success rates during training."""
    wandb: str | None = None
    """Weights & Biases project to log to as well."""
    seed: int = 0
    """Seed of initial weights, order and augmentation."""
    checkpoint_every: int = 250
    """Gradient steps between checkpoints; a killed run loses at most this many."""
    log_every: int = 10
    """Gradient steps between lines of metrics.jsonl."""
    device: str | None = None
    """"cpu", "cuda", ...; by default a GPU if there is one."""

    def __post_init__(self) -> None:
        paths = self.dataset if isinstance(self.dataset, tuple | list) else (self.dataset,)
        if not paths:
            raise UserError("dataset: name at least one file")
        paths = tuple(expanded(path) for path in paths)
        object.__setattr__(self, "dataset", paths[0] if len(paths) == 1 else paths)
        object.__setattr__(self, "out", expanded(self.out))
        if self.encoder_weights is not None:
            object.__setattr__(self, "encoder_weights", expanded(self.encoder_weights).absolute())
        if isinstance(self.filter_key, tuple) and len(self.filter_key) not in (1, len(paths)):
            raise UserError(
                f"filter_key: got {len(self.filter_key)} for {len(paths)} files; give one for all"
                " or one per file"
            )
        if self.image_size is not None and np.min(self.image_size) < 1:
            raise UserError(f"image_size must be at least 1, got {self.image_size}")
        for name in ("cameras", "vectors"):
            keys = getattr(self, name) or ()
            if len(set(keys)) < len(keys):
                raise UserError(
                    f"{name}: {', '.join(keys)} lists an observation twice; list each once"
                )
        try:
            str(self.out).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{self.out}: is not valid UTF-8, which TensorBoard needs; choose another --out"
            ) from error
        _check_at_least(self, 1, "checkpoint_every", "log_every")
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"seed must be between 0 and {(1 << 31) - 1}, got {self.seed}")

    @property
    def files(self) -> tuple[tuple[Path, str | None], ...]:
        """Each file with its requested filter key."""
        paths = self.dataset if isinstance(self.dataset, tuple) else (self.dataset,)
        keys = self.filter_key if isinstance(self.filter_key, tuple) else (self.filter_key,)
        return tuple(zip(paths, keys * len(paths) if len(keys) == 1 else keys, strict=True))


#: Published training runs by name, each for a dataset and a run directory.
PRESETS = Registry[Callable[[Path, Path], TrainConfig]]("preset")


@PRESETS.register("released_robot")
def released_robot(dataset: Path, out: Path) -> TrainConfig:
    """The robot training of Fibottention's authors: their encoder in Diffusion Policy.

    Each camera has a ViT-B over 8 x 8 patches of a crop of 76 x 76 with their
    Fibottention (encoder `released_robot`). The rest is Diffusion Policy's: a U-Net of
    256, 512 and 1024 channels, DDPM with 100 steps, 2 observations, a horizon of 16 and
    8 actions, batches of 64, AdamW with rate 1e-4, its weight decay and warm-up, an
    EMA.

    The authors trained for about 500 epochs of a dataset, so set `steps` to 500 *
    windows / 64: 75,000 for robomimic's 200 Lift demonstrations. That takes a GPU. At
    inference, they use all 100 denoising steps; here DDIM uses 10.
    """
    return TrainConfig(
        dataset,
        out,
        policy=PolicyConfig(
            policy="diffusion",
            encoder="released_robot",
            crop=76,
            hidden=256,
            layers=3,
            policy_options={"noise_samples": 1},
        ),
        optimizer=OptimizerConfig(
            steps=75_000,
            batch_size=64,
            lr=1e-4,
            warmup_steps=500,
            weight_decay=1e-6,
            betas=(0.95, 0.999),
            ema=0.9999,
        ),
        checkpoint_every=1000,
    )
