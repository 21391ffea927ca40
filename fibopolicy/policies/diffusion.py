"""Diffusion Policy: actions by denoising diffusion (Chi et al. 2023), trained by DDPM
and sampled by DDIM.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fibopolicy.errors import UserError
from fibopolicy.policies.base import PolicyConfig, Shapes, register_policy
from fibopolicy.policies.denoising_head import DENOISING, DenoisingHead


@register_policy
class DiffusionPolicy(DenoisingHead):
    """Predicts the noise in a noisy chunk of actions.

    In Diffusion Policy's words: `n_obs_steps` is n_obs_steps, `n_action_steps` n_action_steps and
    `horizon` the horizon, all with its numbers, 2, 8 and 16. One difference: its horizon
    starts at the oldest observation, so that its first n_obs_steps - 1 actions lie in
    the past and are never executed; here a chunk starts with the action of now, so none
    of it does. Inpainting, its way of fixing parts of the chunk, is not done, as it is
    not there by default.

    Options beside those of `DenoisingHead`: `train_steps`, times of the diffusion,
    whose noise grows by the squared cosine schedule; `steps`, how many of them DDIM
    visits to act.
    """

    name = "diffusion"
    option_defaults = {**DENOISING, "train_steps": 100, "steps": 10}  # noqa: RUF012

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        super().__init__(config, shapes)
        total, visited = self.options["train_steps"], self.options["steps"]
        if visited > total:
            raise UserError(
                f"head diffusion: steps must be at most train_steps = {total}, got {visited}"
            )
        ddpm, ddim = _schedulers()
        # Clipping to the range of the data is right only where the data have that
        # range.
        schedule = {
            "num_train_timesteps": total,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "epsilon",
            "clip_sample": self.actions.bounded,
        }
        self.noising, self.sampling = ddpm(**schedule), ddim(**schedule)
        self.sampling.set_timesteps(visited)

    def error(self, actions: Tensor, noise: Tensor, times: Tensor, features: Tensor) -> Tensor:
        steps = (times * self.options["train_steps"]).long()  # (B,)
        noisy = self.noising.add_noise(actions, noise, steps)
        predicted: Tensor = self.denoiser(noisy, self._told(steps), features)
        return predicted - noise

    def denoise(self, noise: Tensor, features: Tensor) -> Tensor:
        actions = noise
        for step in self.sampling.timesteps:
            predicted = self.denoiser(
                actions, self._told(step.to(noise.device).expand(len(noise))), features
            )
            actions = self.sampling.step(predicted, step, actions).prev_sample
        return actions

    def _told(self, steps: Tensor) -> Tensor:
        times: Tensor = steps * (100 / self.options["train_steps"])
        return times


def _schedulers() -> tuple[Any, Any]:
    """Diffusers' DDPM and DDIM."""
    try:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    except ImportError as error:
        raise UserError(
            f"head diffusion needs diffusers, which cannot be imported ({error}): pip install"
            " 'fibopolicy[diffusion]'"
        ) from error
    return DDPMScheduler, DDIMScheduler
