"""robomimic's four behaviour-cloning policies, trained here with our encoders.

The networks are those of `robomimic.models.policy_nets`. Options have the names and
defaults of robomimic's configuration of BC.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn

from fibopolicy.errors import UserError, one_line
from fibopolicy.policies.actions import ActionNormalizer
from fibopolicy.policies.base import (
    Metrics,
    Option,
    Policy,
    PolicyConfig,
    PolicyDefaults,
    Shapes,
    State,
    Statistics,
    checked_options,
)
from fibopolicy.policies.observations import ObservationPreprocessor, module_name, vector_dims
from fibopolicy.policies.rng import GLOBAL_RNG, EpisodeRng, EpisodeRngState, SampleRng

#: Size of the linear layer after each encoder; robomimic's own cores have one, too.
FEATURES: dict[str, Option] = {"feature_dimension": 64}
#: Options of a mixture of Gaussians, which robomimic's networks take by these names.
MIXTURE: dict[str, Option] = {
    "num_modes": 5,
    "min_std": 0.0001,
    "std_activation": "softplus",
    "low_noise_eval": True,
}
DEFAULTS = PolicyDefaults(horizon=1, n_action_steps=1, hidden=1024, action_normalization="none")


class RobomimicPolicy(Policy):
    """A robomimic network that predicts a distribution over actions and is trained by
    maximum likelihood.

    A chunk of several actions is one larger action to the network; robomimic itself
    predicts one.

    Attributes:
        option_defaults: what `policy_options` may set, with the defaults.
        network_class: class of the network in `robomimic.models.policy_nets`.
        algo_sections: sections of robomimic's `config.algo` that enable it.
        options: `option_defaults`, updated by `policy_options`.
        network: the network, with one encoder per camera.
    """

    defaults = DEFAULTS
    option_defaults: ClassVar[Mapping[str, Option]]
    network_class: ClassVar[str]
    algo_sections: ClassVar[tuple[str, ...]] = ("gmm",)

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        from fibopolicy.robomimic.encoder_core import (
            encoder_kwargs,
            network_shapes,
            observation_modalities,
        )

        super().__init__()
        self.config, self.shapes = config, shapes
        self.options = checked_options(self.name, config.policy_options, self.option_defaults)
        if config.views != "separate":
            raise UserError(
                f"policy {self.name} has one encoder per camera, as in robomimic; use"
                " views='separate'"
            )
        self._check()
        self.observations = ObservationPreprocessor(config, shapes, sequence=self.sequence)
        self.actions = ActionNormalizer(config, shapes)
        shapes = replace(shapes, vectors=vector_dims(shapes))  # the network sees the task, too
        with observation_modalities(shapes):
            from robomimic.models import policy_nets

            try:
                self.network = getattr(policy_nets, self.network_class)(
                    obs_shapes=network_shapes(shapes, self.observations.image_sizes),
                    encoder_kwargs=encoder_kwargs(config, self.options),
                    **self._network_options(),
                )
            except (AssertionError, KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = one_line(error)
                raise UserError(
                    f"policy {self.name} cannot be built with {self.options}: {reason}"
                ) from error
        for layer in self.network.nets["decoder"].nets.values():
            layer.__class__ = Float32Linear

    def _check(self) -> None:
        """Raise `UserError` for settings that this policy does not support."""
        if self.config.n_obs_steps != 1:
            raise UserError(
                f"policy {self.name} sees one observation, as in robomimic, got n_obs_steps"
                f" {self.config.n_obs_steps}; use bc_rnn_gmm or bc_transformer_gmm"
            )
        if self.config.layers < 1:
            raise UserError(
                f"policy {self.name}: layers must be at least 1 as in robomimic's MLP, got"
                f" {self.config.layers}"
            )

    def _network_options(self) -> dict[str, Any]:
        """Arguments of the network's constructor that do not describe observations."""
        return {
            "ac_dim": self.config.horizon * self.actions.dim,
            "mlp_layer_dims": self.layer_dims,
            **{name: self.options[name] for name in MIXTURE if name in self.options},
        }

    @property
    def layer_dims(self) -> tuple[int, ...]:
        """Widths of the MLP: robomimic's `actor_layer_dims`."""
        return (self.config.hidden,) * self.config.layers

    def fit_normalizers(self, statistics: Statistics) -> None:
        if self.actions.kind == "gaussian":
            raise UserError(
                f"policy {self.name} predicts numbers in [-1, 1], which action normalization"
                " gaussian confines to the mean +- one standard deviation; pass"
                " --action-normalization minmax"
            )
        self.observations.fit(statistics)
        self.actions.fit(statistics["actions"])
        largest = max(self.actions.largest(statistics["actions"][name]) for name in ("min", "max"))
        # robomimic's networks bound their means by tanh.
        if self.actions.kind == "none" and largest > 1 + 1e-6:
            raise UserError(
                f"policy {self.name} predicts actions in [-1, 1], but those of the data reach"
                f" {largest:.3g}; pass --action-normalization minmax"
            )

    def loss(self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG) -> tuple[Tensor, Metrics]:
        actions = self.actions(batch["actions"])  # (B, horizon, D)
        mask = batch["action_mask"].unsqueeze(-1).expand_as(actions)
        with learned_noise(self.network):
            distribution = self.distribution(batch["obs"], rng)
        likelihood = log_likelihood(distribution, actions.flatten(1), mask.flatten(1))  # (B,)
        loss = -likelihood.mean()
        return loss, {"loss": loss.detach()}

    def distribution(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> Any:
        """Distribution over chunks of normalised actions `(horizon * D,)`, one per sample."""
        return self.network.forward_train(self.inputs(obs, rng))

    def inputs(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> dict[str, Tensor]:
        """The observations that the network reads: the newest, `(B, ...)` per key."""
        return {key: value[:, -1] for key, value in self.prepared(obs, rng).items()}

    def prepared(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> dict[str, Tensor]:
        """All observations, `(B, T_o, ...)`, by the names of the network's modules."""
        prepared = self.observations.prepare(obs, rng)
        return {module_name(key): value for key, value in prepared.items()}

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        inputs = self.inputs(obs)  # checks the observations
        memory = state or init_memory(obs, self.shapes.keys)
        flat, memory = act_feedforward(self.network, inputs, memory)
        chunk = flat.view(-1, self.config.horizon, self.actions.dim)
        return self.actions.invert(chunk[:, : self.config.n_action_steps]), memory


class BCGaussianPolicy(RobomimicPolicy):
    """An MLP that predicts a diagonal Gaussian. It acts with the mean if
    `low_noise_eval` is set.
    """

    name = "bc_gaussian"
    network_class = "GaussianActorNetwork"
    algo_sections = ("gaussian",)
    option_defaults = {  # noqa: RUF012  (see RobomimicPolicy)
        "fixed_std": False,
        "init_std": 0.1,
        "min_std": 0.01,
        "std_activation": "softplus",
        "low_noise_eval": True,
        **FEATURES,
    }

    def _network_options(self) -> dict[str, Any]:
        options = super()._network_options()
        limits = (options.pop("min_std"), 7.5)
        own = {name: self.options[name] for name in ("fixed_std", "init_std")}
        return {**options, **own, "std_limits": limits}


class BCGMMPolicy(RobomimicPolicy):
    """An MLP that predicts a mixture of Gaussians. It acts by sampling;
    `low_noise_eval` reduces the standard deviations to 1e-4.
    """

    name = "bc_gmm"
    network_class = "GMMActorNetwork"
    option_defaults = {**MIXTURE, **FEATURES}  # noqa: RUF012


class BCRNNGMMPolicy(RobomimicPolicy):
    """An LSTM or GRU that predicts a mixture of Gaussians at every step.

    It is trained on sequences of `horizon` steps (`seq_length` in robomimic). It acts
    step by step and resets its memory after `horizon` steps. By default no MLP follows
    the recurrent network, as in the configurations of robomimic's paper.
    """

    name = "bc_rnn_gmm"
    network_class = "RNNGMMActorNetwork"
    algo_sections = ("gmm", "rnn")
    sequence = True
    defaults = replace(DEFAULTS, horizon=10, layers=0)
    option_defaults = {  # noqa: RUF012
        **MIXTURE,
        **FEATURES,
        "hidden_dim": 400,
        "rnn_type": "LSTM",
        "num_layers": 2,
        "open_loop": False,
    }

    def _check(self) -> None:
        if self.config.n_obs_steps != 1 or self.config.n_action_steps != 1:
            raise UserError(
                f"policy {self.name} takes one observation and one action at a time; got"
                f" n_obs_steps {self.config.n_obs_steps} and n_action_steps"
                f" {self.config.n_action_steps}, leave both out"
            )
        if self.options["rnn_type"] not in ("LSTM", "GRU"):
            raise UserError(
                f"policy {self.name}: rnn_type must be LSTM or GRU, got"
                f" {self.options['rnn_type']!r}"
            )

    def _network_options(self) -> dict[str, Any]:
        return {
            **super()._network_options(),
            "ac_dim": self.actions.dim,
            "rnn_hidden_dim": self.options["hidden_dim"],
            "rnn_num_layers": self.options["num_layers"],
            "rnn_type": self.options["rnn_type"],
            "rnn_kwargs": {"bidirectional": False},
        }

    def loss(self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG) -> tuple[Tensor, Metrics]:
        actions, mask = self.actions(batch["actions"]), batch["action_mask"]  # (B, T, D), (B, T)
        with learned_noise(self.network):
            distribution = self.distribution(batch["obs"], rng)
        likelihood = log_likelihood(distribution, actions, mask.unsqueeze(-1))  # (B, T)
        loss = -(likelihood * mask).sum() / mask.sum()
        return loss, {"loss": loss.detach()}

    def loss_denominator(self, batch: Mapping[str, Any]) -> Tensor:
        counted: Tensor = batch["action_mask"].sum().float()
        return counted

    def distribution(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> Any:
        """Distribution over normalised actions `(D,)`, one per sample and step."""
        sequence = self.prepared(obs, rng)  # (B, T, ...)
        if self.options["open_loop"]:
            sequence = {key: value[:, :1].expand_as(value) for key, value in sequence.items()}
        return self.network.forward_train(sequence)

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        actions, memory = act_recurrent(
            self.network,
            self.inputs(obs),
            state or init_memory(obs, self.shapes.keys),
            horizon=self.config.horizon,
            open_loop=self.options["open_loop"],
        )
        return self.actions.invert(actions).unsqueeze(1), memory


class BCTransformerGMMPolicy(RobomimicPolicy):
    """A transformer over `n_obs_steps` observations (robomimic's `context_length` and
    `frame_stack`). The output for the newest observation predicts a mixture of
    Gaussians.
    """

    name = "bc_transformer_gmm"
    network_class = "TransformerGMMActorNetwork"
    algo_sections = ("gmm", "transformer")
    defaults = replace(DEFAULTS, n_obs_steps=10)
    option_defaults = {  # noqa: RUF012
        **MIXTURE,
        **FEATURES,
        "embed_dim": 512,
        "num_layers": 6,
        "num_heads": 8,
        "emb_dropout": 0.1,
        "attn_dropout": 0.1,
        "block_output_dropout": 0.1,
        "sinusoidal_embedding": False,
        "activation": "gelu",
        "nn_parameter_for_timesteps": True,
    }

    def _check(self) -> None:
        pass  # any n_obs_steps and horizon

    def _network_options(self) -> dict[str, Any]:
        options = super()._network_options()
        del options["mlp_layer_dims"]
        own = self.options.keys() - MIXTURE.keys() - FEATURES.keys()
        options |= {f"transformer_{name}": self.options[name] for name in own}
        return {**options, "transformer_context_length": self.config.n_obs_steps}

    def inputs(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> dict[str, Tensor]:
        return self.prepared(obs, rng)  # (B, T_o, ...)

    def distribution(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> Any:
        """Distribution over chunks of normalised actions, from the newest step."""
        every = super().distribution(obs, rng)
        normal = every.component_distribution.base_dist
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=every.mixture_distribution.logits[:, -1]),
            torch.distributions.Independent(
                torch.distributions.Normal(normal.loc[:, -1], normal.scale[:, -1]), 1
            ),
        )


class Float32Linear(nn.Linear):
    """Stays in float32 under autocast, which would round means and scales in training,
    but not in validation and evaluation.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


@contextmanager
def learned_noise(network: Any) -> Iterator[None]:
    """Let a network predict its learned standard deviations in evaluation mode, too.

    With `low_noise_eval` it would replace them by 1e-4, and the likelihood of held-out
    actions would mean nothing.
    """
    low_noise, network.low_noise_eval = network.low_noise_eval, False
    try:
        yield
    finally:
        network.low_noise_eval = low_noise


def log_likelihood(distribution: Any, actions: Tensor, mask: Tensor) -> Tensor:
    """Log-density `(...)` of actions `(..., D)` under a Gaussian or a mixture of
    Gaussians, over the dimensions where `mask` is true.
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


# One control step of a network, for a batch of episodes.
#
# robomimic acts for one episode and keeps the memory inside its algorithm. Here the
# memory is a value, and random numbers come from `EpisodeRng`: an episode repeats
# exactly, regardless of the other episodes.

Observations = Mapping[str, Tensor]


class Memory(TypedDict):
    """The state of B episodes between two steps: tensors whose first dimension is B.

    Attributes:
        rng: state of the episodes' `EpisodeRng`.
        hidden: `(B, layers, H)` each: two for an LSTM, one for a GRU, none for others.
        first: for an open-loop recurrent network, the observations `(B, ...)` that it
            acts on; else empty.
    """

    rng: EpisodeRngState
    hidden: tuple[Tensor, ...]
    first: dict[str, Tensor]


def init_memory(obs: Observations, keys: Iterable[str]) -> Memory:
    """Memory of episodes that begin with a simulator's observations, `(B, ...)` per key."""
    return {"rng": EpisodeRng.init(obs, keys).state, "hidden": (), "first": {}}


def act_feedforward(
    network: Any, obs: Observations, memory: Memory, *, step: int = -1
) -> tuple[Tensor, Memory]:
    """Actions `(B, A)` of a feed-forward or transformer network.

    Args:
        network: an actor of `robomimic.models.policy_nets`.
        obs: inputs of the network: `(B, ...)` per key, or `(B, T_o, ...)` of a
            transformer.
        step: index of the transformer's output that is executed.
    """
    out = getattr(network, "forward_train", network)(obs)
    rng = EpisodeRng(**memory["rng"])
    return _draw(network, out, rng.seeds(), step), {**memory, "rng": rng.advance().state}


def act_recurrent(
    network: Any, obs: Observations, memory: Memory, *, horizon: int, open_loop: bool = False
) -> tuple[Tensor, Memory]:
    """Actions `(B, A)` of a recurrent network.

    Args:
        obs: `(B, ...)` per key.
        horizon: steps after which the hidden state is reset: the length of the
            sequences that the network was trained on.
        open_loop: act on the observation of the last reset.
    """
    device, rng = next(iter(obs.values())).device, EpisodeRng(**memory["rng"])
    reset = (rng.step % horizon == 0).to(device)  # (B,)
    zeros = network.get_rnn_init_state(batch_size=len(reset), device=device)
    lstm = isinstance(zeros, tuple)
    zeros = zeros if lstm else (zeros,)  # (layers, B, H) each
    before = tuple(part.transpose(0, 1) for part in memory["hidden"]) or zeros
    hidden = tuple(
        torch.where(reset[None, :, None], zero, part).contiguous()
        for zero, part in zip(zeros, before, strict=True)
    )
    first: dict[str, Tensor] = {}
    if open_loop:
        for key, value in obs.items():
            rows = reset.view(-1, *[1] * (value.ndim - 1))  # broadcasts over (B, ...)
            first[key] = torch.where(rows, value, memory["first"].get(key, value))
        obs = first
    sequence = {key: value.unsqueeze(1) for key, value in obs.items()}  # (B, 1, ...)
    step = getattr(network, "forward_train", network)
    out, after = step(sequence, rnn_init_state=hidden if lstm else hidden[0], return_state=True)
    after = tuple(part.transpose(0, 1) for part in (after if lstm else (after,)))
    actions = _draw(network, out, rng.seeds())
    return actions, {"rng": rng.advance().state, "hidden": after, "first": first}


def _draw(network: Any, out: Any, seeds: Sequence[int], step: int = -1) -> Tensor:
    """Actions `(B, A)` from the output of a network: actions, or a Gaussian or a
    mixture of Gaussians to draw from.

    Of several steps, `(B, T, ...)`, `step` is used. With `low_noise_eval` a Gaussian
    gives its mean, as in robomimic.
    """
    if isinstance(out, Tensor):
        return out[:, step] if out.ndim == 3 else out
    mixture = getattr(out, "mixture_distribution", None)
    if mixture is None:
        if network.low_noise_eval and not network.training:
            mean: Tensor = out.mean
            return mean
        normal, logits = out.base_dist, None
        loc, scale = normal.loc, normal.scale  # (B, A)
    else:
        normal, logits = out.component_distribution.base_dist, mixture.logits
        loc, scale = normal.loc, normal.scale  # (B, K, A), or (B, T, K, A)
        if loc.ndim == 4:
            loc, scale, logits = loc[:, step], scale[:, step], logits[:, step]
    rows = []
    for b, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        mean, std = loc[b], scale[b]
        if logits is not None:
            mode = int(torch.multinomial(logits[b].softmax(-1).cpu(), 1, generator=generator))
            mean, std = mean[mode], std[mode]
        rows.append(mean + std * torch.randn(mean.shape, generator=generator).to(mean.device))
    return torch.stack(rows)
