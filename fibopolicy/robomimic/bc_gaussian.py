"""Behaviour cloning with a diagonal Gaussian over actions: robomimic's BC-Gaussian."""

from __future__ import annotations

from typing import Any

from fibopolicy.policies.base import register_policy
from fibopolicy.policies.robomimic_head import FEATURES, RobomimicHead


@register_policy
class BCGaussianPolicy(RobomimicHead):
    """Acts with the mean where `low_noise_eval` is set, as it is by default."""

    name = "bc_gaussian"
    option_defaults = {  # noqa: RUF012
        "fixed_std": False,
        "init_std": 0.1,
        "min_std": 0.01,
        "std_activation": "softplus",
        "low_noise_eval": True,
        **FEATURES,
    }

    def _network(self, **arguments: Any) -> Any:
        from robomimic.models.policy_nets import GaussianActorNetwork

        return GaussianActorNetwork(
            ac_dim=self.config.horizon * self.actions.dim,
            mlp_layer_dims=self.layer_dims,
            fixed_std=self.options["fixed_std"],
            init_std=self.options["init_std"],
            std_limits=(self.options["min_std"], 7.5),
            std_activation=self.options["std_activation"],
            low_noise_eval=self.options["low_noise_eval"],
            **arguments,
        )
