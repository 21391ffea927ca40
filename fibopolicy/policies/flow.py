"""Flow matching: actions along straight lines from noise, the fast alternative to diffusion."""

from __future__ import annotations

import torch
from torch import Tensor

from fibopolicy.policies.base import register_policy
from fibopolicy.policies.denoising_head import DENOISING, DenoisingHead


@register_policy
class FlowPolicy(DenoisingHead):
    """Predicts the velocity that carries noise (time 0) to a chunk of actions (time 1)
    on a straight line.

    Lipman et al. 2023, "Flow Matching for Generative Modeling", and Liu et al. 2023,
    "Flow Straight and Fast" (rectified flow): x_t = (1 - t) noise + t actions, velocity
    actions - noise, t uniform. To act, Euler's rule takes `steps` equal steps along it.
    `n_obs_steps`, `horizon` and `n_action_steps` mean what they mean in `DiffusionPolicy`; options
    beside those of `DenoisingHead`: `steps`, 1 to 10 are usual.
    """

    name = "flow"
    option_defaults = {**DENOISING, "steps": 5}  # noqa: RUF012

    def error(self, actions: Tensor, noise: Tensor, times: Tensor, features: Tensor) -> Tensor:
        noisy = torch.lerp(noise, actions, times[:, None, None].to(noise))
        predicted: Tensor = self.denoiser(noisy, 100 * times, features)
        return predicted - (actions - noise)

    def denoise(self, noise: Tensor, features: Tensor) -> Tensor:
        actions, steps = noise, self.options["steps"]
        for step in range(steps):
            time = torch.full((len(noise),), 100 * step / steps, device=noise.device)
            actions = actions + self.denoiser(actions, time, features) / steps
        return actions
