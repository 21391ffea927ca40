"""What the diffusion and the flow head share: a chunk of actions is drawn from noise,
given observations.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict

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
from fibopolicy.policies.denoisers import denoiser_class
from fibopolicy.policies.ensembling import Predictions, ensemble
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.policies.rng import GLOBAL_RNG, EpisodeRng, EpisodeRngState, SampleRng

DENOISING: dict[str, Option] = {"denoiser": "unet", "draws": 4}


class Memory(TypedDict):
    """What B episodes carry from one decision to the next, as tensors whose first
    dimension counts them.

    Attributes:
        rng: where their noise comes from.
        predictions: of earlier chunks, with ensembling.
    """

    rng: EpisodeRngState
    predictions: Predictions | None


class DenoisingHead(Policy):
    """A denoiser that is trained on noisy chunks of the demonstrations, and acts by
    denoising a chunk of pure noise.

    The noise of an episode's decisions follows from its first observation, so an
    episode repeats exactly, whatever runs beside it.

    Options: `denoiser`, unet or transformer, of the size that the settings hidden and
    layers give it; `draws`, how many noises at how many times each chunk is trained
    with per step: encoding the observations costs most of a step, so that further draws
    are cheap, and the loss is less noisy.

    Attributes:
        option_defaults: what `head_options` may set.
        options: as they are set.
    """

    defaults = PolicyDefaults(n_obs_steps=2, horizon=16, n_action_steps=8, hidden=64)
    ensembles = True
    option_defaults: ClassVar[Mapping[str, Option]]

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.options = checked_options(self.name, config.head_options, self.option_defaults)
        for name, value in self.options.items():
            if type(value) is int and value < 1:
                raise UserError(f"head {self.name}: {name} must be at least 1, got {value}")
        if config.layers < 1:
            raise UserError(f"head {self.name} needs layers of at least 1")
        self.observations = ObservationEncoder(config, shapes)
        self.actions = ActionNormalizer(config, shapes)
        self.denoiser = denoiser_class(self.options["denoiser"])(
            action_dim=self.actions.dim,
            horizon=config.horizon,
            n_obs_steps=config.n_obs_steps,
            feature_dim=self.observations.output_dim // config.n_obs_steps,
            width=config.hidden,
            layers=config.layers,
        )

    def fit_normalizers(self, statistics: Statistics) -> None:
        self.observations.fit(statistics)
        self.actions.fit(statistics["actions"])

    def features(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> Tensor:
        """What the denoiser is told of a window of observations, `(B, T_o, F)`."""
        features: Tensor = self.observations(obs, rng).unflatten(1, (self.config.n_obs_steps, -1))
        return features

    def loss(
        self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG
    ) -> tuple[Tensor, dict[str, float]]:
        draws, device = self.options["draws"], batch["actions"].device
        # (B * draws, T, D)
        actions = self.actions(batch["actions"]).repeat_interleave(draws, dim=0)
        # (B * draws, T_o, F)
        features = self.features(batch["obs"], rng).repeat_interleave(draws, dim=0)
        # (B * draws, T, 1)
        mask = batch["action_mask"].repeat_interleave(draws, dim=0).unsqueeze(-1)
        samples = len(batch["actions"])
        noise = rng.randn(samples, draws, *actions.shape[1:], device=device)
        noise = noise.flatten(0, 1).to(actions)
        times = rng.rand(samples, draws, device=device).flatten()
        error = self.error(actions, noise, times, features).square()
        loss = (error * mask).sum() / (mask.sum() * error.shape[-1])
        return loss, {"loss": float(loss.detach())}

    def loss_denominator(self, batch: Mapping[str, Any]) -> Tensor:
        counted: Tensor = batch["action_mask"].sum().float()
        return counted

    @abstractmethod
    def error(self, actions: Tensor, noise: Tensor, times: Tensor, features: Tensor) -> Tensor:
        """How far the denoiser is off, `(B, T, D)`, from normalised actions and noise
        `(B, T, D)` and times `(B,)` in [0, 1).
        """

    @abstractmethod
    def denoise(self, noise: Tensor, features: Tensor) -> Tensor:
        """Noise `(B, T, D)` to normalised actions `(B, T, D)`."""

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        features = self.features(obs)
        rng = EpisodeRng(**state["rng"]) if state else EpisodeRng.init(obs, self.shapes.keys)
        noise = rng.randn(self.config.horizon, self.actions.dim).to(features)
        chunk = self.denoise(noise, features)
        predictions = state["predictions"] if state else None
        if self.config.temporal_ensemble_coeff is not None:
            chunk, predictions = ensemble(chunk, self.config.temporal_ensemble_coeff, predictions)
        memory: Memory = {"rng": rng.advance().state, "predictions": predictions}
        return self.actions.invert(chunk[:, : self.config.n_action_steps]), memory
