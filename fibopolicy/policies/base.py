"""The policy contract, what a policy is built from, and the registry of heads."""

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
#: What a policy carries from one call of `act` to the next within an episode; opaque to
#: the caller.
State = Any


@dataclass(frozen=True)
class Shapes:
    """What a policy sees and does, taken from the data.

    Args:
        images: (H, W) per camera key.
        vectors: size per vector key.
        action_dim: A.
        absolute: actions may lie outside [-1, 1], say poses in metres and radians or
            joint angles.
        rotations: the first of three columns of each axis-angle rotation in absolute
            actions, ascending.
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
#: More of anything (steps seen, units, layers) is a slip of the keyboard; far beyond
#: it, torch's own numbers overflow.
MOST = 1 << 16
Option = int | float | bool | str


@dataclass(frozen=True)
class PolicyDefaults:
    """What a head takes for the settings of a `PolicyConfig` that are left to it."""

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
        head = Policy
        if self.head in POLICIES:
            head = POLICIES[self.head]
        if self.temporal_ensemble_coeff is not None and self.n_action_steps is None:
            object.__setattr__(self, "n_action_steps", 1)
        for name, value in asdict(head.defaults).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, least in (
            ("n_obs_steps", 1),
            ("horizon", 1),
            ("n_action_steps", 1),
            ("hidden", 1),
            ("layers", 0),
            ("shift", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
            if getattr(self, name) > MOST:
                raise UserError(f"{name} must be at most {MOST}, got {getattr(self, name)}")
        if self.n_action_steps > self.horizon:
            raise UserError(
                f"n_action_steps must be between 1 and horizon = {self.horizon}, got"
                f" {self.n_action_steps}"
            )
        if self.temporal_ensemble_coeff is not None:
            if head is not Policy and not head.ensembles:
                raise UserError(
                    f"head {self.head} predicts no chunks that could be averaged; leave"
                    " ensemble out"
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
        """The same network, whose encoders fetch no published weights: others are
        loaded into it.
        """
        return replace(
            self,
            encoder_options={k: v for k, v in self.encoder_options.items() if k != "pretrained"},
        )


class Policy(nn.Module):
    """Observations to action chunks; owns its normalisation.

    A batch holds `obs` (camera keys uint8 `(B, T_o, H, W, 3)`, vector keys float32 `(B,
    T_o, D)`), `actions` float32 `(B, horizon, A)` and `action_mask` bool `(B, horizon)`,
    false where an action repeats the demonstration's last.

    Attributes:
        name: in the registry.
        defaults: for the settings that are left to the head.
        sequence: the observations of a training batch go on beyond the newest, to that
            of the last action: T_o = n_obs_steps + horizon - 1.
        ensembles: its chunks may be averaged over time, see `PolicyConfig.temporal_ensemble_coeff`.
        render_quality: how the frames that it was trained on were rendered, where its
            data say so.
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
        """Set the normalisation from the data: per vector key and "actions", arrays
        min, max, mean and std `(D,)`.
        """

    @abstractmethod
    def loss(
        self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG
    ) -> tuple[Tensor, dict[str, float]]:
        """A scalar to minimise, and metrics to log.

        Args:
            batch: as above; observations are checked as in `act`.
            rng: of random numbers that belong to samples (augmentation, noise). Dropout
                draws from torch's global generator.
        """

    def loss_denominator(self, batch: Mapping[str, Any]) -> Tensor:
        """How many terms `loss` is the mean of, a scalar; by default the batch's samples.

        The loss of a batch that is computed in parts is the mean of the parts' losses,
        weighted by this number.
        """
        mask: Tensor = batch["action_mask"]
        return torch.tensor(float(len(mask)), device=mask.device)

    @abstractmethod
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        """Actions `(B, n_action_steps, A)` in [-1, 1], or absolute ones, to execute before the
        next call.

        Args:
            obs: the last T_o = `n_obs_steps` control steps as in a batch; an episode's
                first observation stands for those before it. Keys that the policy does
                not read are ignored.
            state: what the previous call of these episodes returned, `None` at their
                start. A head with memory returns dicts and tuples of tensors whose
                first dimension counts the episodes, so that rows may be taken and
                joined.

        Raises:
            UserError: observations that are not like those of training: a key is
                missing, or another size, type or layout.
        """


POLICIES: Registry[type[Policy]] = Registry(
    "policy head",
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
        UserError: an unknown head, encoder or option, or values that do not fit the
            images.
    """
    factory: Callable[[PolicyConfig, Shapes], Policy] = POLICIES[config.head]
    return factory(config, shapes)


def checked_options(
    head: str, given: Mapping[str, Option], defaults: Mapping[str, Option]
) -> dict[str, Any]:
    """A head's options, with its defaults for those that are not given.

    Raises:
        UserError: no such option, with the nearest match suggested, or a value of
            another type than the default's.
    """
    for name, value in given.items():
        if name not in defaults:
            raise unknown(f"option of head {head}:", name, defaults)
        default = defaults[name]
        if type(value) is not type(default) and not (type(default) is float and type(value) is int):
            raise UserError(f"head {head}: {name} must be like {default!r}, got {value!r}")
        if type(value) is int and abs(value) > MOST:
            raise UserError(f"head {head}: {name} must be at most {MOST}, got {value}")
    return {**defaults, **given}
