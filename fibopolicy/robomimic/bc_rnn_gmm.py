"""Behaviour cloning with a recurrent network and a mixture of Gaussians: robomimic's BC-RNN-GMM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fibopolicy.errors import UserError
from fibopolicy.policies.base import State, register_policy
from fibopolicy.policies.rng import GLOBAL_RNG, SampleRng
from fibopolicy.policies.robomimic_actor import forward_recurrent, init_memory
from fibopolicy.policies.robomimic_head import (
    MIXTURE,
    ROBOMIMIC,
    RobomimicHead,
    learned_noise,
    log_likelihood,
)


@register_policy
class BCRNNGMMPolicy(RobomimicHead):
    """Trained on sequences of `horizon` steps (robomimic's `horizon` and `seq_length`);
    acts step by step, forgetting as often.

    No MLP follows the recurrent network by default, as in the configurations of
    robomimic's paper.
    """

    name = "bc_rnn_gmm"
    sequence = True
    defaults = replace(ROBOMIMIC, horizon=10, layers=0)
    option_defaults = {  # noqa: RUF012
        **MIXTURE,
        "hidden_dim": 400,
        "rnn_type": "LSTM",
        "num_layers": 2,
        "open_loop": False,
    }

    def _check(self) -> None:
        if self.config.n_obs_steps != 1 or self.config.n_action_steps != 1:
            raise UserError(
                f"head {self.name} takes one observation and one action at a time, got n_obs_steps"
                f" {self.config.n_obs_steps} and n_action_steps {self.config.n_action_steps}; leave"
                " both out"
            )
        if self.options["rnn_type"] not in ("LSTM", "GRU"):
            raise UserError(
                f"head {self.name}: rnn_type must be LSTM or GRU, got {self.options['rnn_type']!r}"
            )

    def _network(self, **arguments: Any) -> Any:
        from robomimic.models.policy_nets import RNNGMMActorNetwork

        return RNNGMMActorNetwork(
            ac_dim=self.actions.dim,
            mlp_layer_dims=self.layer_dims,
            rnn_hidden_dim=self.options["hidden_dim"],
            rnn_num_layers=self.options["num_layers"],
            rnn_type=self.options["rnn_type"],
            rnn_kwargs={"bidirectional": False},
            **{
                name: self.options[name]
                for name in ("num_modes", "min_std", "std_activation", "low_noise_eval")
            },
            **arguments,
        )

    def loss(
        self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG
    ) -> tuple[Tensor, dict[str, float]]:
        actions, mask = self.actions(batch["actions"]), batch["action_mask"]  # (B, T, D), (B, T)
        with learned_noise(self.network):
            distribution = self.distribution(batch["obs"], rng)
        likelihood = log_likelihood(distribution, actions, mask.unsqueeze(-1))  # (B, T)
        loss = -(likelihood * mask).sum() / mask.sum()
        return loss, {"loss": float(loss.detach())}

    def loss_denominator(self, batch: Mapping[str, Any]) -> Tensor:
        counted: Tensor = batch["action_mask"].sum().float()
        return counted

    def distribution(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> Any:
        """Over normalised actions `(D,)`, one per sample and step."""
        sequence = self.prepared(obs, rng)  # (B, T, ...)
        if self.options["open_loop"]:
            sequence = {key: value[:, :1].expand_as(value) for key, value in sequence.items()}
        return self.network.forward_train(sequence)

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        inputs, memory = self.inputs(obs), state or init_memory(obs, self.shapes.keys)
        actions, carried = forward_recurrent(
            self.network,
            inputs,
            memory,
            horizon=self.config.horizon,
            open_loop=self.options["open_loop"],
        )
        return self.actions.invert(actions).unsqueeze(1), carried
