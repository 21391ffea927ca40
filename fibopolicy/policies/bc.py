"""Behaviour cloning: an MLP predicts a chunk of actions, with an L1 or L2 loss."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from fibopolicy.errors import unknown
from fibopolicy.policies.actions import ActionNormalizer
from fibopolicy.policies.base import (
    Metrics,
    Policy,
    PolicyConfig,
    Shapes,
    State,
    Statistics,
    checked_options,
    masked_mean,
    register_policy,
)
from fibopolicy.policies.observations import ObservationEncoder
from fibopolicy.policies.rng import GLOBAL_RNG, SampleRng
from fibopolicy.policies.temporal_ensembling import ensemble


@register_policy
class BCPolicy(Policy):
    """Predicts `horizon` actions and executes the first `n_action_steps` of them."""

    name = "bc"
    ensembles = True

    def __init__(self, config: PolicyConfig, shapes: Shapes) -> None:
        super().__init__()
        if config.loss not in ("l1", "l2"):
            raise unknown("loss", config.loss, ("l1", "l2"))
        checked_options(self.name, config.policy_options, {})
        self.config, self.shapes = config, shapes
        self.observations = ObservationEncoder(config, shapes)
        self.actions = ActionNormalizer(config, shapes)
        widths = [self.observations.output_dim, *[config.hidden] * config.layers]
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.GELU())]
        self.mlp = nn.Sequential(*layers, nn.Linear(widths[-1], config.horizon * self.actions.dim))

    def fit_normalizers(self, statistics: Statistics) -> None:
        self.observations.fit(statistics)
        self.actions.fit(statistics["actions"])

    def predict(self, obs: Mapping[str, Tensor], rng: SampleRng = GLOBAL_RNG) -> Tensor:
        """Normalised actions `(B, horizon, D)` from the last T_o observations."""
        flat: Tensor = self.mlp(self.observations(obs, rng))
        return flat.view(flat.shape[0], self.config.horizon, self.actions.dim)

    def loss(self, batch: Mapping[str, Any], rng: SampleRng = GLOBAL_RNG) -> tuple[Tensor, Metrics]:
        predicted = self.predict(batch["obs"], rng)  # (B, horizon, D)
        error = predicted - self.actions(batch["actions"])
        error = error.abs() if self.config.loss == "l1" else error.square()
        loss = masked_mean(error, batch["action_mask"])
        return loss, {"loss": loss.detach()}

    def loss_denominator(self, batch: Mapping[str, Any]) -> Tensor:
        counted: Tensor = batch["action_mask"].sum().float()
        return counted

    @torch.no_grad()
    def act(self, obs: Mapping[str, Tensor], state: State = None) -> tuple[Tensor, State]:
        chunk = self.predict(obs)
        if self.config.temporal_ensemble_coeff is not None:
            chunk, state = ensemble(chunk, self.config.temporal_ensemble_coeff, state)
        return self.actions.invert(chunk[:, : self.config.n_action_steps]), state
