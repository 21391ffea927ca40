"""The policy contract, the configuration of a policy, and the registry of policies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fibopolicy.errors import UserError, unknown
from fibopolicy.policies.rng import GLOBAL_RNG, SampleRng
from fibopolicy.utils.registry import Registry

Statistics = Mapping[str, Mapping[str, NDArray[np.float64]]]
#: What a policy carries between calls of `act` within an episode; opaque to the caller.
State = Any


@dataclass(frozen=True)
class Shapes:
    """Observations and actions of a policy, as in its dataset.

    Args:
        images: (H, W) in pixels per camera key.
        vectors: D per vector key.
        action_dim: A.
        absolute: actions are absolute (metres, radians, joint angles) and may lie outside
            [-1, 1].
        rotations: first column of each axis-angle rotation in absolute actions, ascending.
    """

    images: Mapping[str, tuple[int, int]]
    vectors: Mapping[str, int]
    action_dim: int
    absolute: bool = False
    rotations: tuple[int, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """All observation keys, cameras first."""
        return (*self.images, *self.vectors)


ROTATIONS = ("6d", "axis_angle")
if TYPE_CHECKING:
    IntOrDefault = int
    StrOrDefault = str
else:  # None, as given, becomes the policy's default on construction
    IntOrDefault = int | None
    StrOrDefault = str | None
_DEFAULT: Any = None
#: Largest integer setting (steps, units, layers): more is a typing error.
MOST = 1 << 16
Option = int | float | bool | str


@dataclass(frozen=True)
class PolicyDefaults:
    """A policy's values for settings of a `PolicyConfig` that are `None`."""

    n_obs_steps: int = 1
    horizon: int = 8
    n_action_steps: int = 4
    hidden: int = 256
    layers: int = 2
    action_normalization: str = "minmax"


@dataclass(frozen=True)
class PolicyConfig:
    """What to build; the same for every task. Settings that are `None` get the
    policy's defaults on construction.
    """

    head: str = "bc"
    """Policy head: bc (a chunk, deterministic), diffusion, flow, or robomimic's bc_gaussian, bc_gmm, bc_rnn_gmm,
    bc_transformer_gmm."""  # noqa: E501
    head_options: Mapping[str, Option] = field(default_factory=dict)
    """Its options as pairs, e.g. num_modes 10, or for diffusion and flow denoiser transformer."""
    encoder: str = "fibottention_vit_tiny"
    """Image encoder, e.g. fibottention_vit_tiny, vit_tiny, resnet18."""
    encoder_options: Mapping[str, Option] = field(default_factory=dict)
    """Its options as pairs, e.g. depth 4 pool mean."""
    views: str = "separate"
    """Several cameras: "separate" encoders, one "shared", or "joint" tokens in one sequence."""
    n_obs_steps: IntOrDefault = _DEFAULT
    """Observations that the policy sees, the newest last; by default 1, diffusion and flow 2,
    bc_transformer_gmm 10."""
    horizon: IntOrDefault = _DEFAULT
    """Actions predicted at once, or the length of a recurrent head's sequences; by default bc 8, diffusion and flow 16,
    bc_rnn_gmm 10, others 1."""  # noqa: E501
    n_action_steps: IntOrDefault = _DEFAULT
    """How many of them are executed before the policy looks again; by default bc 4, diffusion and flow 8, others 1; with
    temporal ensembling 1."""  # noqa: E501
    temporal_ensemble_coeff: float | None = None
    """Execute the average of all chunks' predictions for a step, the n-th oldest weighing exp(-coeff * n): temporal
    ensembling, 0.01 in ACT. For bc, diffusion and flow."""  # noqa: E501
    loss: str = "l1"
    """"l1" or "l2", on normalised actions; for bc."""
    hidden: IntOrDefault = _DEFAULT
    """Width of the head's MLP, or of its denoiser (a U-Net's at full length); by default bc 256, diffusion and flow 64, others 1024."""  # noqa: E501
    layers: IntOrDefault = _DEFAULT
    """Hidden layers of the head's MLP, levels of its U-Net or blocks of its transformer; by default 2, bc_rnn_gmm none."""  # noqa: E501
    action_normalization: StrOrDefault = _DEFAULT
    """"minmax" to [-1, 1], "gaussian" to zero mean and unit variance, or "none"; by default bc, diffusion and flow minmax, others
    none."""  # noqa: E501
    rotation: str = "6d"
    """How rotations in absolute actions are predicted: "6d", or "axis_angle" as they are in the dataset."""  # noqa: E501
    crop: int | None = None
    """Pixels: train on random crops of this size, act on the central one. None keeps the whole frame."""  # noqa: E501
    shift: int = 0
    """Pixels: train on frames shifted by up to this much, edges repeated."""

    def __post_init__(self) -> None:
        policy = Policy
        if self.head in POLICIES:
            policy = POLICIES[self.head]
        if self.temporal_ensemble_coeff is not None and self.n_action_steps is None:
            object.__setattr__(self, "n_action_steps", 1)
        for name, value in asdict(policy.defaults).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        positive = ("n_obs_steps", "horizon", "n_action_steps", "hidden")
        for name in (*positive, "layers", "shift"):
            value, least = getattr(self, name), 1 if name in positive else 0
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
            if value > MOST:
                raise UserError(f"{name} must be at most {MOST}, got {value}")
        if self.n_action_steps > self.horizon:
            raise UserError(
                f"n_action_steps must be between 1 and horizon = {self.horizon}, got"
                f" {self.n_action_steps}"
            )
        if self.temporal_ensemble_coeff is not None:
            if policy is not Policy and not policy.ensembles:
                raise UserError(
                    f"policy {self.head} predicts no chunks that could be averaged; leave out"
                    " temporal_ensemble_coeff"
                )
            if self.n_action_steps != 1 or not self.temporal_ensemble_coeff >= 0:
                raise UserError(
                    "temporal_ensemble_coeff must be at least 0 and needs n_action_steps 1, got"
                    f" {self.temporal_ensemble_coeff} with n_action_steps {self.n_action_steps}"
                )
        if self.rotation not in ROTATIONS:
            raise unknown("rotation", self.rotation, ROTATIONS)
        if self.crop is not None and self.crop < 1:
            raise UserError(f"crop must be at least 1 pixel, got {self.crop}")
        for name in ("image_size", "num_views"):
            if name in self.encoder_options:
                raise UserError(
                    f"encoder_options: {name} follows from the data and is not an option"
                )

    def as_loaded(self) -> PolicyConfig:
        """This configuration without downloads of pretrained encoders.

        For a policy whose weights are loaded from elsewhere.
        """
        options = {k: v for k, v in self.encoder_options.items() if k != "pretrained"}
        return replace(self, encoder_options=options)


class Policy(nn.Module):
    """Maps observations to chunks of actions, and normalises both.

    A batch holds `obs` (camera keys uint8 `(B, T_o, H, W, 3)`, vector keys float32
    `(B, T_o, D)`), `actions` float32 `(B, horizon, A)` and `action_mask` bool
    `(B, horizon)`, false where an action repeats the last one of its demonstration.

    Attributes:
        name: in the registry.
        defaults: for settings that the configuration leaves out.
        sequence: training batches hold an observation for every action of the horizon:
            T_o = n_obs_steps + horizon - 1.
        ensembles: supports `PolicyConfig.temporal_ensemble_coeff`.
        render_quality: of the frames in the training data, `None` if unknown.
    """

    name: ClassVar[str]
    defaults: ClassVar[PolicyDefaults] = PolicyDefaults()
    sequence: ClassVar[bool] = False
    ensembles: ClassVar[bool] = False
    config: PolicyConfig
    shapes: Shapes
    render_quality: str | None = None

    @abstractmethod
    def fit_normalizers(self, statistics: Statistics) -> None:
        """Fit the normalisation to the training data.

        Args:
            statistics: for each vector key and "actions", arrays `(D,)` named min, max, mean
                and std.
        """

    @abstractmethod
    def loss(
        self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG
    ) -> tuple[Tensor, dict[str, float]]:
        """A scalar to minimise, and metrics to log.

        Args:
            batch: see above; its observations are checked as in `act`.
            rng: of random numbers that belong to samples, such as augmentation and noise.
                Dropout draws from torch's global generator.
        """

    def loss_denominator(self, batch: Mapping[str, Any]) -> Tensor:
        """The number of terms that `loss` averages, a scalar: by default, the samples.

        With this number as its weight, the loss of parts averages to that of a batch.
        """
        mask: Tensor = batch["action_mask"]
        return torch.tensor(float(len(mask)), device=mask.device)

    @abstractmethod
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        """Actions `(B, n_action_steps, A)` to execute before the next call.

        They lie in [-1, 1] unless they are absolute.

        Args:
            obs: the last T_o = `n_obs_steps` observations, as in a batch; at the start of
                an episode, its first observation stands for earlier ones. Keys that the
                policy does not read are ignored.
            state: what the previous call returned for these episodes, `None` at their
                start. It consists of dicts and tuples of tensors whose first dimension is
                B, so that episodes can be selected and joined.

        Raises:
            UserError: an observation is missing, or differs from those of training in size,
                type or layout.
        """


POLICIES: Registry[type[Policy]] = Registry(
    "policy",
    {
        "bc_gaussian": "fibopolicy.robomimic.policies:BCGaussianPolicy",
        "bc_gmm": "fibopolicy.robomimic.policies:BCGMMPolicy",
        "bc_rnn_gmm": "fibopolicy.robomimic.policies:BCRNNGMMPolicy",
        "bc_transformer_gmm": "fibopolicy.robomimic.policies:BCTransformerGMMPolicy",
    },
)


def register_policy(policy: type[Policy]) -> type[Policy]:
    """Class decorator: register a policy under its `name`."""
    return POLICIES.register(policy.name)(policy)


def build_policy(config: PolicyConfig, shapes: Shapes) -> Policy:
    """Build the policy that `config` describes, with fresh weights.

    Raises:
        UserError: an unknown policy, encoder or option, or values that do not fit the
            images.
    """
    factory: Callable[[PolicyConfig, Shapes], Policy] = POLICIES[config.head]
    return factory(config, shapes)


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean of `error` `(B, T, D)` over the actions that `mask` `(B, T)` counts."""
    mask = mask.unsqueeze(-1)  # (B, T, 1)
    return (error * mask).sum() / (mask.sum() * error.shape[-1])


def checked_options(
    policy: str, given: Mapping[str, Option], defaults: Mapping[str, Option]
) -> dict[str, Any]:
    """The options of a policy: `given`, and the defaults of the others.

    Raises:
        UserError: an option is unknown, or its value is not of the default's type.
    """
    for name, value in given.items():
        if name not in defaults:
            raise unknown(f"option of policy {policy}:", name, defaults)
        default = defaults[name]
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise UserError(f"policy {policy}: {name} must be like {default!r}, got {value!r}")
        if type(value) is int and abs(value) > MOST:
            raise UserError(f"policy {policy}: {name} must be at most {MOST}, got {value}")
    return {**defaults, **given}
