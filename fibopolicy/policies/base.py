"""The policy contract, the configuration of a policy, and the registry of policies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fibopolicy.errors import UserError, unknown
from fibopolicy.policies.rng import GLOBAL_RNG, SampleRng
from fibopolicy.policies.tasks import TaskEncoder
from fibopolicy.utils.imports import import_object, is_import_path
from fibopolicy.utils.registry import Registry

Statistics = Mapping[str, Mapping[str, NDArray[np.float64]]]
#: What a policy carries between calls of `act` within an episode; opaque to the caller.
State = Any
#: Scalars that a loss logs, by name.
Metrics = Mapping[str, float | Tensor]


@dataclass(frozen=True)
class Shapes:
    """Observations and actions of a policy, as in its dataset.

    Args:
        images: (H, W) in pixels per camera key.
        vectors: D per vector key.
        action_dim: A.
        absolute: actions are absolute (metres, radians, joint angles) and may lie
            outside [-1, 1].
        rotations: first column of each axis-angle rotation in absolute actions,
            ascending.
        tasks: names of the tasks that the policy is conditioned on; empty if it is not.
        task_dim: numbers in the vector that stands for a task.
    """

    images: Mapping[str, tuple[int, int]]
    vectors: Mapping[str, int]
    action_dim: int
    absolute: bool = False
    rotations: tuple[int, ...] = ()
    tasks: tuple[str, ...] = ()
    task_dim: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """All observation keys, cameras first."""
        return (*self.images, *self.vectors)


Views = Literal["separate", "shared", "joint"]
Rotation = Literal["6d", "axis_angle"]
# Readers of a PolicyConfig never see None, because its constructor replaces None by the
# policy's default; the command line must accept it.
if TYPE_CHECKING:
    IntOrDefault = int
    StrOrDefault = str
else:
    IntOrDefault = int | None
    StrOrDefault = str | None
_DEFAULT: Any = None
#: Largest integer setting (steps, units, layers): a larger one is a typo.
MAX_SETTING = 1 << 16
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
    """The settings of a policy, which do not depend on the task.

    On construction, a setting that is `None` becomes the policy's default.
    """

    policy: str = "bc"
    """Policy: bc, diffusion, flow, or robomimic's bc_gaussian, bc_gmm, bc_rnn_gmm and
    bc_transformer_gmm; or a custom class as "module:class"."""
    policy_options: Mapping[str, Option] = field(default_factory=dict)
    """Options of the policy, as pairs: num_modes 10 for bc_gmm, denoiser transformer for flow."""
    encoder: str = "fibottention_vit_tiny"
    """Image encoder: fibottention_vit_tiny, vit_tiny, resnet18, timm:NAME or others."""
    encoder_options: Mapping[str, Option] = field(default_factory=dict)
    """Options of the encoder, as pairs: depth 4 pool mean."""
    views: Views = "separate"
    """How several cameras are encoded: "separate" encoders, one "shared" encoder, or one
    encoder over "joint" tokens of all cameras."""
    n_obs_steps: IntOrDefault = _DEFAULT
    """Observations that the policy sees, the newest last; by default 1, for diffusion and flow
    2, for bc_transformer_gmm 10."""
    horizon: IntOrDefault = _DEFAULT
    """Actions that are predicted at once, or the length of bc_rnn_gmm's training sequences; by
    default 8 for bc, 16 for diffusion and flow, 10 for bc_rnn_gmm, 1 for others."""
    n_action_steps: IntOrDefault = _DEFAULT
    """Actions that are executed before the next prediction; by default 4 for bc, 8 for diffusion
    and flow, 1 for others and with temporal ensembling."""
    temporal_ensemble_coeff: float | None = None
    """Temporal ensembling for bc, diffusion and flow: execute the average of all predictions
    for a step, the n-th oldest weighted by exp(-coeff * n). ACT uses 0.01."""
    loss: Literal["l1", "l2"] = "l1"
    """Loss of bc, on normalised actions."""
    hidden: IntOrDefault = _DEFAULT
    """Width of the MLP, of the transformer denoiser, or of the U-Net's first level; by default
    256 for bc, 64 for diffusion and flow, 1024 for others."""
    layers: IntOrDefault = _DEFAULT
    """Hidden layers of the MLP, blocks of the transformer denoiser, or levels of the U-Net; by
    default 2, for bc_rnn_gmm 0."""
    action_normalization: StrOrDefault = _DEFAULT
    """"minmax" to [-1, 1], "gaussian" to mean 0 and variance 1, or "none"; by default minmax for
    bc, diffusion and flow, none for others."""
    rotation: Rotation = "6d"
    """How rotations in absolute actions are predicted: "6d", or "axis_angle" as in the dataset."""
    crop: int | None = None
    """Size in pixels of random crops in training and central crops otherwise; None keeps the
    whole frame."""
    shift: int = 0
    """Largest random shift of frames in training, in pixels; edges are repeated."""

    def __post_init__(self) -> None:
        policy = Policy
        if self.policy in POLICIES or is_import_path(self.policy):
            policy = policy_class(self.policy)
        if self.temporal_ensemble_coeff is not None and self.n_action_steps is None:
            object.__setattr__(self, "n_action_steps", 1)
        for name, value in asdict(policy.defaults).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        self._check(can_ensemble=policy.ensembles or policy is Policy)

    def _check(self, *, can_ensemble: bool) -> None:
        """Raise `UserError` for values that are out of range or contradict each other."""
        positive = ("n_obs_steps", "horizon", "n_action_steps", "hidden")
        for name in (*positive, "layers", "shift"):
            value, least = getattr(self, name), 1 if name in positive else 0
            if value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
            if value > MAX_SETTING:
                raise UserError(f"{name} must be at most {MAX_SETTING}, got {value}")
        if self.n_action_steps > self.horizon:
            raise UserError(
                f"n_action_steps must be between 1 and horizon = {self.horizon}, got"
                f" {self.n_action_steps}"
            )
        if self.temporal_ensemble_coeff is not None:
            if not can_ensemble:
                raise UserError(
                    f"policy {self.policy} predicts no chunks that could be averaged; leave out"
                    " temporal_ensemble_coeff"
                )
            if self.n_action_steps != 1 or not self.temporal_ensemble_coeff >= 0:
                raise UserError(
                    "temporal_ensemble_coeff must be at least 0 and needs n_action_steps 1, got"
                    f" {self.temporal_ensemble_coeff} with n_action_steps {self.n_action_steps}"
                )
        if self.rotation not in get_args(Rotation):
            raise unknown("rotation", self.rotation, get_args(Rotation))
        if self.crop is not None and self.crop < 1:
            raise UserError(f"crop must be at least 1 pixel, got {self.crop}")
        for name in ("image_size", "num_views"):
            if name in self.encoder_options:
                raise UserError(f"encoder_options: {name} is set by the data and is not an option")

    def without_pretrained(self) -> PolicyConfig:
        """This configuration without downloads of pretrained encoders.

        For a policy whose weights are loaded from elsewhere.
        """
        options = {k: v for k, v in self.encoder_options.items() if k != "pretrained"}
        return replace(self, encoder_options=options)


class Policy(nn.Module, ABC):
    """Maps observations to chunks of actions, and normalises both.

    A batch holds `obs` (camera keys uint8 `(B, T_o, H, W, 3)`, vector keys float32
    `(B, T_o, D)`), `actions` float32 `(B, horizon, A)` and `action_mask` bool
    `(B, horizon)`, false where an action repeats the last one of its demonstration.
    If the policy is conditioned on the task, `obs` also holds `task_index`, int64
    `(B,)`: places in `shapes.tasks`. `act` may leave it out, see `TaskEncoder.index`.

    Attributes:
        name: in the registry.
        defaults: for settings that the configuration leaves out.
        sequence: training batches hold an observation for every action of the horizon:
            T_o = n_obs_steps + horizon - 1.
        ensembles: supports `PolicyConfig.temporal_ensemble_coeff`.
        render_quality: quality of the frames in the training data, `None` if unknown.
    """

    name: ClassVar[str]
    defaults: ClassVar[PolicyDefaults] = PolicyDefaults()
    sequence: ClassVar[bool] = False
    ensembles: ClassVar[bool] = False
    config: PolicyConfig
    shapes: Shapes
    render_quality: str | None = None

    @property
    def task_encoder(self) -> TaskEncoder:
        """Encodes the task, if the policy is conditioned on it."""
        return next(module for module in self.modules() if isinstance(module, TaskEncoder))

    @abstractmethod
    def fit_normalizers(self, statistics: Statistics) -> None:
        """Fit the normalisation to the training data.

        Args:
            statistics: for each vector key and "actions", arrays `(D,)` named min, max,
                mean and std.
        """

    @abstractmethod
    def loss(self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG) -> tuple[Tensor, Metrics]:
        """A scalar to minimise, and metrics to log, best as tensors: to read a value
        from a GPU is to wait for it.

        Args:
            batch: see above; its observations are checked as in `act`.
            rng: generator of random numbers that belong to samples, such as
                augmentation and noise. Dropout draws from torch's global generator.
        """

    def loss_denominator(self, batch: Mapping[str, Any]) -> Tensor:
        """The number of terms that `loss` averages, a scalar: by default, the samples.

        With this number as its weight, the loss of parts averages to that of a batch.
        """
        mask: Tensor = batch["action_mask"]
        return torch.full((), float(len(mask)), device=mask.device)

    @abstractmethod
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        """Actions `(B, n_action_steps, A)` to execute before the next call.

        They lie in [-1, 1] unless they are absolute.

        Args:
            obs: the last T_o = `n_obs_steps` observations, as in a batch; at the start
                of an episode, its first observation stands for earlier ones. Keys that
                the policy does not read are ignored.
            state: what the previous call returned for these episodes, `None` at their
                start. It consists of dicts and tuples of tensors whose first dimension
                is B, so that episodes can be selected and joined.

        Raises:
            UserError: an observation is missing, or differs from those of training in
                size, type or layout.
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


def policy_class(name: str) -> type[Policy]:
    """The class of a registered policy, or of "module:class", which is imported from
    Python's path or the current folder.

    Raises:
        UserError: an unknown name, or a class that is not a `Policy`.
    """
    if not is_import_path(name):
        return POLICIES[name]
    found = import_object("policy", name)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise UserError(
            f"policy {name} must be a class derived from fibopolicy.policies.Policy, got {found!r}"[
                :300
            ]
        )
    return found


def build_policy(config: PolicyConfig, shapes: Shapes) -> Policy:
    """Build the policy that `config` describes, with fresh weights.

    Raises:
        UserError: an unknown policy, encoder or option, or values that do not fit the
            images.
    """
    factory: Callable[[PolicyConfig, Shapes], Policy] = policy_class(config.policy)
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
        if type(value) is int and abs(value) > MAX_SETTING:
            raise UserError(f"policy {policy}: {name} must be at most {MAX_SETTING}, got {value}")
    return {**defaults, **given}
