"""What robomimic's behaviour-cloning heads share: its network with our encoders in it,
its loss, acting with memory.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from fibopolicy.errors import UserError
from fibopolicy.policies.actions import ActionNormalizer
from fibopolicy.policies.base import (
    Option,
    Policy,
    PolicyConfig,
    PolicyDefaults,
    Shapes,
    State,
    Statistics,
    checked_options,
)
from fibopolicy.policies.observations import ObservationPreprocessor
from fibopolicy.policies.rng import GLOBAL_RNG, SampleRng
from fibopolicy.policies.robomimic_actor import forward, init_memory

#: Of the linear layer behind an encoder, which robomimic's own cores have too.
FEATURES: dict[str, Option] = {"feature_dimension": 64}
MIXTURE: dict[str, Option] = {
    "num_modes": 5,
    "min_std": 0.0001,
    "std_activation": "softplus",
    "low_noise_eval": True,
    **FEATURES,
}
ROBOMIMIC = PolicyDefaults(horizon=1, n_action_steps=1, hidden=1024, action_normalization="none")


class RobomimicHead(Policy):
    """A network of `robomimic.models.policy_nets` that predicts a distribution over
    actions, trained by its log-likelihood.

    Options have the names and defaults of robomimic's configuration of BC, and
    `feature_dimension` that of its cores. Several actions at once (`horizon`) are one
    larger action to the network; robomimic itself predicts one.

    Attributes:
        option_defaults: what `head_options` may set.
        options: as they are set.
        network: robomimic's; one core of its own per camera.
    """

    defaults = ROBOMIMIC
    option_defaults: ClassVar[Mapping[str, Option]]

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.options = checked_options(self.name, config.head_options, self.option_defaults)
        if config.views != "separate":
            raise UserError(
                f"head {self.name} has one encoder per camera, as robomimic has; use"
                " views='separate'"
            )
        self._check()
        self.observations = ObservationPreprocessor(config, shapes, sequence=self.sequence)
        self.actions = ActionNormalizer(config, shapes)
        with robomimic_observations(shapes):
            try:
                self.network = self._network(
                    obs_shapes=network_shapes(shapes, self.observations.image_sizes),
                    encoder_kwargs=encoder_kwargs(config, self.options),
                )
            except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise UserError(
                    f"head {self.name} cannot be built with {self.options}: {reason}"
                ) from error

    @abstractmethod
    def _network(self, **arguments: Any) -> Any:
        """The robomimic network; `arguments` are those that all of them take."""

    def _check(self) -> None:
        """Refuse settings that this head cannot follow."""
        if self.config.n_obs_steps != 1:
            raise UserError(
                f"head {self.name} sees one observation, as in robomimic, got n_obs_steps"
                f" {self.config.n_obs_steps}; use bc_rnn_gmm or bc_transformer_gmm"
            )
        if self.config.layers < 1:
            raise UserError(f"head {self.name} needs layers of at least 1, as robomimic's MLP does")

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """robomimic's `actor_layer_dims`."""
        return (self.config.hidden,) * self.config.layers

    def fit_normalizers(self, statistics: Statistics) -> None:
        self.observations.fit(statistics)
        self.actions.fit(statistics["actions"])
        largest = max(self.actions.largest(statistics["actions"][name]) for name in ("min", "max"))
        # robomimic's networks put their means through tanh
        if self.actions.kind == "none" and largest > 1 + 1e-6:
            raise UserError(
                f"head {self.name} predicts actions in [-1, 1], and those of the data reach"
                f" {largest:.3g}; pass --action-normalization minmax"
            )

    def loss(
        self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG
    ) -> tuple[Tensor, dict[str, float]]:
        actions = self.actions(batch["actions"])  # (B, horizon, D)
        mask = batch["action_mask"].unsqueeze(-1).expand_as(actions)
        with learned_noise(self.network):
            distribution = self.distribution(batch["obs"], rng)
        likelihood = log_likelihood(distribution, actions.flatten(1), mask.flatten(1))  # (B,)
        loss = -likelihood.mean()
        return loss, {"loss": float(loss.detach())}

    def distribution(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> Any:
        """Over chunks of normalised actions `(horizon * D,)`, one per sample."""
        return self.network.forward_train(self.inputs(obs, rng))

    def inputs(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> dict[str, Tensor]:
        """Observations as the network takes them."""
        return {key: value[:, -1] for key, value in self.prepared(obs, rng).items()}

    def prepared(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> dict[str, Tensor]:
        """All steps of the observations, `(B, T_o, ...)`, under the names of the
        network's modules.
        """
        prepared = self.observations.prepare(obs, rng)
        return {module_name(key): value for key, value in prepared.items()}

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        inputs, memory = self.inputs(obs), state or init_memory(obs, self.shapes.keys)
        flat, carried = forward(self.network, inputs, memory)
        chunk = flat.view(-1, self.config.horizon, self.actions.dim)[
            :, : self.config.n_action_steps
        ]
        return self.actions.invert(chunk), carried


@contextmanager
def learned_noise(network: Any) -> Iterator[None]:
    """Within it a network in evaluation mode predicts the standard deviations that it
    has learned, as in training.

    Otherwise, with `low_noise_eval`, it puts 1e-4 in their place, and a likelihood of
    held-out actions says nothing.
    """
    low_noise, network.low_noise_eval = network.low_noise_eval, False
    try:
        yield
    finally:
        network.low_noise_eval = low_noise


def log_likelihood(distribution: Any, actions: Tensor, mask: Tensor) -> Tensor:
    """Log-density `(...)` of actions `(..., D)` under a Gaussian or a mixture of them,
    of the numbers that `mask` counts.
    """
    mixture = getattr(distribution, "mixture_distribution", None)
    normal = (distribution if mixture is None else distribution.component_distribution).base_dist
    if mixture is not None:
        actions, mask = actions.unsqueeze(-2), mask.unsqueeze(-2)  # (..., 1, D)
    error = (actions - normal.loc) / normal.scale
    terms = -0.5 * error.square() - normal.scale.log() - 0.5 * math.log(2 * math.pi)
    summed: Tensor = (terms * mask).sum(-1)  # (...) or (..., K)
    if mixture is None:
        return summed
    return torch.logsumexp(summed + mixture.logits.log_softmax(-1), dim=-1)


def module_name(key: str) -> str:
    """An observation key as the name of a module, which may hold no dot."""
    return key.replace(".", "|")


def network_shapes(
    shapes: Shapes, sizes: Mapping[str, tuple[int, int]]
) -> OrderedDict[str, list[int]]:
    """Shapes per observation in robomimic's order, which is alphabetical; images (3, H,
    W) of `sizes`.
    """
    every: dict[str, list[int]] = {module_name(key): [3, *size] for key, size in sizes.items()}
    every |= {module_name(key): [dim] for key, dim in shapes.vectors.items()}
    return OrderedDict(sorted(every.items()))


def encoder_kwargs(config: PolicyConfig, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """robomimic's `observation.encoder` for our encoders."""
    from fibopolicy.encoders.robomimic_core import CORE

    core = {
        "encoder": config.encoder,
        "encoder_options": dict(config.encoder_options),
        "feature_dimension": options["feature_dimension"],
    }
    none: dict[str, Any] = {"obs_randomizer_class": None, "obs_randomizer_kwargs": {}}
    return {
        "rgb": {"core_class": CORE, "core_kwargs": core, **none},
        "low_dim": {"core_class": None, "core_kwargs": {}, **none},
    }


@contextmanager
def robomimic_observations(shapes: Shapes) -> Iterator[None]:
    """Within it robomimic's global table of modalities knows the keys of `shapes`, and
    robomimic prints nothing.
    """
    # registers the core; says what to install
    importlib.import_module("fibopolicy.encoders.robomimic_core")
    import robomimic.utils.obs_utils as obs_utils

    before = obs_utils.OBS_KEYS_TO_MODALITIES
    table = obs_utils.ObservationKeyToModalityDict()
    table.update(
        {module_name(key): "rgb" for key in shapes.images}
        | {module_name(key): "low_dim" for key in shapes.vectors}
    )
    obs_utils.OBS_KEYS_TO_MODALITIES = table
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        # robomimic's networks look into it when they are printed
        obs_utils.OBS_KEYS_TO_MODALITIES = before or table
