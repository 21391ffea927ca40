"""Diffusion and flow matching: a chunk of actions is sampled by denoising noise.

Both policies encode the observations once and train a denoiser, a network that sees a
noisy chunk, how noisy it is, and the features. They differ in what the denoiser
predicts:

- diffusion (Diffusion Policy, Chi et al. 2023): the noise. DDPM trains, DDIM samples.
- flow (flow matching, Lipman et al. 2023; rectified flow, Liu et al. 2023): the
  velocity that carries noise to actions along a straight line. Euler's method samples.

This file holds, in this order, what the two share, the two policies, and the denoisers.

Shapes: B samples, T = `horizon` actions of D numbers, T_o = `n_obs_steps` observations
of F features each. Timesteps run from 0 to 100 for every denoiser.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fibopolicy.errors import UserError
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
    masked_mean,
    register_policy,
)
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.policies.rng import GLOBAL_RNG, EpisodeRng, EpisodeRngState, SampleRng
from fibopolicy.policies.temporal_ensembling import Predictions, ensemble
from fibopolicy.utils.registry import Registry

MAX_TIMESTEP = 100
OPTIONS: dict[str, Option] = {"denoiser": "unet", "noise_samples": 4}


class DenoisingState(TypedDict):
    """What B episodes carry from one decision to the next.

    Attributes:
        rng: where their noise comes from.
        predictions: those of earlier chunks, with temporal ensembling.
    """

    rng: EpisodeRngState
    predictions: Predictions | None


class DenoisingPolicy(Policy):
    """What the diffusion and the flow policy share: everything but the noise process.

    Options:
        denoiser: "unet" or "transformer"; `hidden` and `layers` of the config set its
            size.
        noise_samples: samples of noise and timestep per chunk in a training step.
            Encoding the observations costs most of a step, so more samples are cheap
            and make the loss less noisy.

    Attributes:
        option_defaults: what `policy_options` may set.
        options: the options of this policy.
    """

    defaults = PolicyDefaults(n_obs_steps=2, horizon=16, n_action_steps=8, hidden=64)
    ensembles = True
    option_defaults: ClassVar[Mapping[str, Option]]

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        super().__init__()
        self.config, self.shapes = config, shapes
        self.options = checked_options(self.name, config.policy_options, self.option_defaults)
        for name, value in self.options.items():
            if type(value) is int and value < 1:
                raise UserError(f"policy {self.name}: {name} must be at least 1, got {value}")
        if config.layers < 1:
            raise UserError(f"policy {self.name}: layers must be at least 1, got {config.layers}")
        self.observations = ObservationEncoder(config, shapes)
        self.actions = ActionNormalizer(config, shapes)
        self.denoiser = DENOISERS[self.options["denoiser"]](
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

    def conditioning(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> Tensor:
        """Features `(B, T_o, F)` of the observations, which the denoiser sees."""
        features: Tensor = self.observations(obs, rng).unflatten(1, (self.config.n_obs_steps, -1))
        return features

    def loss(self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG) -> tuple[Tensor, Metrics]:
        """Mean squared error of the denoiser's prediction over all actions but padding.

        Every chunk occurs K = `noise_samples` times, each time with different noise.
        """
        k, size = self.options["noise_samples"], len(batch["actions"])
        device = batch["actions"].device
        actions = self.actions(batch["actions"]).repeat_interleave(k, dim=0)  # (B K, T, D)
        conditioning = self.conditioning(batch["obs"], rng).repeat_interleave(k, dim=0)
        mask = batch["action_mask"].repeat_interleave(k, dim=0)  # (B K, T)

        noise = rng.randn(size, k, *actions.shape[1:], device=device).flatten(0, 1).to(actions)
        t = rng.rand(size, k, device=device).flatten()  # (B K,)
        noisy, timesteps, target = self.add_noise(actions, noise, t)
        predicted = self.denoiser(noisy, timesteps, conditioning)
        loss = masked_mean((predicted - target).square(), mask)
        return loss, {"loss": loss.detach()}

    def loss_denominator(self, batch: Mapping[str, Any]) -> Tensor:
        counted: Tensor = batch["action_mask"].sum().float()
        return counted

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        conditioning = self.conditioning(obs)
        rng = EpisodeRng(**state["rng"]) if state else EpisodeRng.init(obs, self.shapes.keys)
        noise = rng.randn(self.config.horizon, self.actions.dim).to(conditioning)
        chunk = self.sample(noise, conditioning)
        predictions = state["predictions"] if state else None
        if self.config.temporal_ensemble_coeff is not None:
            chunk, predictions = ensemble(chunk, self.config.temporal_ensemble_coeff, predictions)
        actions = self.actions.invert(chunk[:, : self.config.n_action_steps])
        return actions, DenoisingState(rng=rng.advance().state, predictions=predictions)

    @abstractmethod
    def add_noise(self, actions: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy actions, their timesteps, and what the denoiser should predict from
        them.

        Args:
            actions: normalised, `(B, T, D)`.
            noise: standard normal, `(B, T, D)`.
            t: uniform in [0, 1), `(B,)`.
        """

    @abstractmethod
    def sample(self, noise: Tensor, conditioning: Tensor) -> Tensor:
        """Noise `(B, T, D)` and features `(B, T_o, F)` to normalised actions `(B, T, D)`."""


@register_policy
class DiffusionPolicy(DenoisingPolicy):
    """Predicts the noise in a noisy chunk of actions.

    The noise of Diffusion Policy's squared cosine schedule grows with the timestep. One
    difference: there, the horizon begins with the action of the oldest observation, so
    the first `n_obs_steps` - 1 actions are past and never executed; here, it begins
    with the current action.

    Options besides those of `DenoisingPolicy`:
        num_train_timesteps: timesteps of the diffusion.
        num_inference_steps: how many of them DDIM visits to act, a divisor of that.
    """

    name = "diffusion"
    option_defaults = {**OPTIONS, "num_train_timesteps": 100, "num_inference_steps": 10}  # noqa: RUF012

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        num_train_timesteps = self.options["num_train_timesteps"]
        num_inference_steps = self.options["num_inference_steps"]
        if num_inference_steps > num_train_timesteps:
            raise UserError(
                "policy diffusion: num_inference_steps must be at most num_train_timesteps ="
                f" {num_train_timesteps}, got {num_inference_steps}"
            )
        if num_train_timesteps % num_inference_steps:
            divisors = [
                n for n in range(1, num_train_timesteps + 1) if num_train_timesteps % n == 0
            ]
            below = max(n for n in divisors if n < num_inference_steps)
            above = min(n for n in divisors if n > num_inference_steps)
            raise UserError(
                "policy diffusion: num_inference_steps must divide num_train_timesteps ="
                f" {num_train_timesteps}, or sampling would not start from pure noise; got"
                f" {num_inference_steps}, use {below} or {above}"
            )
        ddpm, ddim = _schedulers()
        schedule = {
            "num_train_timesteps": num_train_timesteps,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "epsilon",
            "clip_sample": self.actions.bounded,  # to [-1, 1], if the data lie in it
        }
        self.ddpm, self.ddim = ddpm(**schedule), ddim(**schedule)
        self.ddim.set_timesteps(num_inference_steps)

    def add_noise(self, actions: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        steps = (t * self.options["num_train_timesteps"]).long()  # (B,)
        return self.ddpm.add_noise(actions, noise, steps), self._timesteps(steps), noise

    def sample(self, noise: Tensor, conditioning: Tensor) -> Tensor:
        actions = noise
        for step in self.ddim.timesteps:
            timesteps = self._timesteps(step.to(noise.device).expand(len(noise)))
            predicted = self.denoiser(actions, timesteps, conditioning)
            actions = self.ddim.step(predicted, step, actions).prev_sample
        return actions

    def _timesteps(self, steps: Tensor) -> Tensor:
        """Steps of the diffusion, from 0 to `num_train_timesteps`, as the denoiser's timesteps."""
        timesteps: Tensor = steps * (MAX_TIMESTEP / self.options["num_train_timesteps"])
        return timesteps


@register_policy
class FlowPolicy(DenoisingPolicy):
    """Predicts the velocity from noise (time 0) to a chunk of actions (time 1).

    On the straight line between them, x_t = (1 - t) noise + t actions, the velocity is
    actions - noise at every time.

    Options besides those of `DenoisingPolicy`:
        num_inference_steps: Euler steps to act; 1 to 10 are usual.
    """

    name = "flow"
    option_defaults = {**OPTIONS, "num_inference_steps": 5}  # noqa: RUF012

    def add_noise(self, actions: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        noisy = torch.lerp(noise, actions, t[:, None, None].to(noise))
        return noisy, MAX_TIMESTEP * t, actions - noise

    def sample(self, noise: Tensor, conditioning: Tensor) -> Tensor:
        actions, steps = noise, self.options["num_inference_steps"]
        for step in range(steps):
            timestep = MAX_TIMESTEP * step / steps
            timesteps = torch.full((len(noise),), timestep, device=noise.device)
            actions = actions + self.denoiser(actions, timesteps, conditioning) / steps
        return actions


def _schedulers() -> tuple[Any, Any]:
    """Diffusers' DDPM and DDIM."""
    try:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    except ImportError as error:
        raise UserError(
            f"policy diffusion needs diffusers, which cannot be imported ({error}): pip install"
            " 'fibopolicy[diffusion]'"
        ) from error
    return DDPMScheduler, DDIMScheduler


# The denoisers.


class Denoiser(nn.Module, ABC):
    """Predicts noise or velocity `(B, T, D)` from noisy actions `(B, T, D)`.

    Args of the constructor, by keyword:
        action_dim: D.
        horizon: T.
        n_obs_steps: T_o.
        feature_dim: F.
        width, layers: width and number of layers of the network, at least 1.

    Raises:
        UserError: the network does not support this width or number of layers.
    """

    @abstractmethod
    def forward(self, actions: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        """Noisy actions `(B, T, D)`, timesteps `(B,)` and features `(B, T_o, F)` to
        `(B, T, D)`.
        """


DENOISERS: Registry[Callable[..., Denoiser]] = Registry("denoiser")


class TimestepEmbedding(nn.Module):
    """Timesteps `(B,)` to `(B, dim)`: sines and cosines of many wavelengths, then an MLP."""

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = dim // 2
        frequencies = torch.exp(-math.log(1e4) * torch.arange(half) / max(1, half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.mlp = nn.Sequential(nn.Linear(2 * half, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps.float()[:, None] * self.frequencies  # (B, dim / 2)
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1).to(self.frequencies.dtype)
        embedded: Tensor = self.mlp(waves)
        return embedded


@DENOISERS.register("unet")
class UNetDenoiser(Denoiser):
    """A 1-D U-Net: convolutions over the chunk at `layers` resolutions.

    After Janner et al. 2022 and Chi et al. 2023, whose network has width 256 and 3
    layers. Each level down halves the number of actions, rounded up, and doubles the
    channels, starting at `width`. Each level up also reads the output of its level
    down. The timestep and all features, joined to one vector, scale and shift the
    channels of every residual block (FiLM).
    """

    groups = 8  # of the group norms
    timestep_dim = 128

    def __init__(
        self,
        *,
        action_dim: int,
        horizon: int,
        n_obs_steps: int,
        feature_dim: int,
        width: int,
        layers: int,
    ) -> None:
        super().__init__()
        if width % self.groups:
            raise UserError(f"a U-Net's hidden must be divisible by {self.groups}, got {width}")
        channels = [width << level for level in range(layers)]
        above, below = channels[:-1], channels[1:]
        cond_dim = self.timestep_dim + n_obs_steps * feature_dim
        self.timestep = TimestepEmbedding(self.timestep_dim)
        self.down = nn.ModuleList(
            self._blocks(a, b, cond_dim)
            for a, b in zip([action_dim, *above], channels, strict=True)
        )
        self.downsample = nn.ModuleList(nn.Conv1d(c, c, 3, stride=2, padding=1) for c in above)
        self.middle = self._blocks(channels[-1], channels[-1], cond_dim)
        self.up = nn.ModuleList(
            self._blocks(2 * b, a, cond_dim) for a, b in zip(above, below, strict=True)
        )
        self.upsample = nn.ModuleList(nn.Conv1d(c, c, 3, padding=1) for c in above)
        self.out = nn.Sequential(
            *_convolution(width, width, self.groups), nn.Conv1d(width, action_dim, 1)
        )

    def _blocks(self, channels: int, out: int, cond_dim: int) -> nn.ModuleList:
        blocks = [ResidualBlock(a, out, cond_dim, self.groups) for a in (channels, out)]
        return nn.ModuleList(blocks)

    def forward(self, actions: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        # No activation on the features: if they do not fill vector registers, the last
        # bits of a row would depend on its place in the batch.
        cond = torch.cat([F.mish(self.timestep(timesteps)), conditioning.flatten(1)], dim=-1)
        x = actions.transpose(1, 2)  # (B, D, T)
        skips = []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]
                x = block(x, cond)  # (B, C, T / 2^level)
            skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)
        for block in self.middle:
            x = block(x, cond)
        for level in reversed(range(len(self.up))):
            x = torch.cat([x, skips[level + 1]], dim=1)
            for block in self.up[level]:  # type: ignore[attr-defined]
                x = block(x, cond)
            size = skips[level].shape[-1]
            x = self.upsample[level](F.interpolate(x, size=size, mode="nearest"))
        predicted: Tensor = self.out(x)
        return predicted.transpose(1, 2)  # (B, T, D)


class ResidualBlock(nn.Module):
    """Two convolutions `(B, C, T)` -> `(B, C', T)`; FiLM by `(B, cond_dim)` after the first."""

    def __init__(self, channels: int, out: int, cond_dim: int, groups: int) -> None:
        super().__init__()
        self.first = _convolution(channels, out, groups)
        self.second = _convolution(out, out, groups)
        self.film = nn.Linear(cond_dim, 2 * out)
        self.skip = nn.Identity() if channels == out else nn.Conv1d(channels, out, 1)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.film(cond).unsqueeze(-1).chunk(2, dim=1)  # (B, C', 1) each
        y: Tensor = self.second(self.first(x) * (1 + scale) + shift) + self.skip(x)
        return y


def _convolution(channels: int, out: int, groups: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(channels, out, kernel_size=5, padding=2), nn.GroupNorm(groups, out), nn.Mish()
    )


@DENOISERS.register("transformer")
class TransformerDenoiser(Denoiser):
    """A transformer decoder with one token per action.

    Each block attends to the actions up to its own, then to the timestep and the
    observations. After Chi et al. 2023, whose decoder is 256 wide with 8 blocks and 4
    attention heads; here a head is 32 wide.
    """

    head_dim = 32
    causal_mask: Tensor

    def __init__(
        self,
        *,
        action_dim: int,
        horizon: int,
        n_obs_steps: int,
        feature_dim: int,
        width: int,
        layers: int,
    ) -> None:
        super().__init__()
        if width % self.head_dim:
            raise UserError(
                f"a transformer's hidden must be divisible by {self.head_dim}, got {width}"
            )
        self.actions = nn.Linear(action_dim, width)
        self.conditioning = nn.Linear(feature_dim, width)
        self.timestep = TimestepEmbedding(width)
        self.positions = nn.Parameter(torch.randn(1, horizon, width) * 0.02)
        self.memory_positions = nn.Parameter(torch.randn(1, 1 + n_obs_steps, width) * 0.02)
        self.blocks = nn.ModuleList(
            nn.TransformerDecoderLayer(
                d_model=width,
                nhead=width // self.head_dim,
                dim_feedforward=4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, action_dim)
        mask = nn.Transformer.generate_square_subsequent_mask(horizon)
        self.register_buffer("causal_mask", mask, persistent=False)

    def forward(self, actions: Tensor, timesteps: Tensor, conditioning: Tensor) -> Tensor:
        tokens = [self.timestep(timesteps).unsqueeze(1), self.conditioning(conditioning)]
        memory = torch.cat(tokens, dim=1) + self.memory_positions  # (B, 1 + T_o, width)
        x = self.actions(actions) + self.positions  # (B, T, width)
        for block in self.blocks:
            x = block(x, memory, tgt_mask=self.causal_mask, tgt_is_causal=True)
        predicted: Tensor = self.out(self.norm(x))
        return predicted
