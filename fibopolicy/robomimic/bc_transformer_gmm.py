"""Behaviour cloning with a transformer over the history and a mixture of Gaussians:
robomimic's BC-Transformer-GMM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fibopolicy.policies.base import register_policy
from fibopolicy.policies.rng import GLOBAL_RNG, SampleRng
from fibopolicy.policies.robomimic_head import MIXTURE, ROBOMIMIC, RobomimicHead


@register_policy
class BCTransformerGMMPolicy(RobomimicHead):
    """Attends over `n_obs_steps` observations (robomimic's `context_length` and
    `frame_stack`); the newest one's output counts.
    """

    name = "bc_transformer_gmm"
    defaults = replace(ROBOMIMIC, n_obs_steps=10)
    option_defaults = {  # noqa: RUF012
        **MIXTURE,
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
        pass  # any history and chunk

    def _network(self, **arguments: Any) -> Any:
        from robomimic.models.policy_nets import TransformerGMMActorNetwork

        own = [name for name in self.options if name not in MIXTURE]
        return TransformerGMMActorNetwork(
            ac_dim=self.config.horizon * self.actions.dim,
            transformer_context_length=self.config.n_obs_steps,
            **{f"transformer_{name}": self.options[name] for name in own},
            **{
                name: self.options[name]
                for name in ("num_modes", "min_std", "std_activation", "low_noise_eval")
            },
            **arguments,
        )

    def distribution(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> Any:
        """Over chunks of normalised actions `(horizon * D,)`, of the newest step."""
        every = self.network.forward_train(self.inputs(obs, rng))
        normal = every.component_distribution.base_dist
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=every.mixture_distribution.logits[:, -1]),
            torch.distributions.Independent(
                torch.distributions.Normal(normal.loc[:, -1], normal.scale[:, -1]), 1
            ),
        )

    def inputs(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> dict[str, Tensor]:
        return self.prepared(obs, rng)  # (B, T, ...)
