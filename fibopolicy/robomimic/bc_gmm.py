"""Behaviour cloning with a mixture of Gaussians over actions: robomimic's BC-GMM."""

from __future__ import annotations

from typing import Any

from fibopolicy.policies.base import register_policy
from fibopolicy.policies.robomimic_head import MIXTURE, RobomimicHead


@register_policy
class BCGMMPolicy(RobomimicHead):
    """Acts by drawing a mode and, with `low_noise_eval`, hardly leaving its mean."""

    name = "bc_gmm"
    option_defaults = MIXTURE

    def _network(self, **arguments: Any) -> Any:
        from robomimic.models.policy_nets import GMMActorNetwork

        return GMMActorNetwork(
            ac_dim=self.config.horizon * self.actions.dim,
            mlp_layer_dims=self.layer_dims,
            **{
                name: self.options[name]
                for name in ("num_modes", "min_std", "std_activation", "low_noise_eval")
            },
            **arguments,
        )
