from __future__ import annotations

import numpy as np
import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.policies import PolicyConfig, Shapes, build_policy
from fibopolicy.policies.temporal_ensembling import ensemble

# nothing is clipped, so that averages may be compared
SHAPES = Shapes({}, {"hand": 3}, 2, absolute=True)


@pytest.mark.parametrize("decay", [0.0, 0.01, 0.5])
def test_it_is_the_weighted_average_of_a_plain_loop(decay: float) -> None:
    episodes, steps, chunk, dim = 3, 11, 4, 2
    predicted = torch.randn(steps, episodes, chunk, dim, dtype=torch.float64)
    carried = None
    for step in range(steps):
        now, carried = ensemble(predicted[step], decay, carried)
        # the decisions that predicted this step, the oldest first
        made_at = range(max(0, step - chunk + 1), step + 1)
        weights = np.exp(-decay * np.arange(len(made_at)))
        # (B, D, n)
        every = torch.stack([predicted[then, :, step - then] for then in made_at], dim=-1).numpy()
        expected = (every * weights).sum(-1) / weights.sum()
        np.testing.assert_allclose(now[:, 0].numpy(), expected, atol=1e-12)


def test_predictions_of_episodes_do_not_mix() -> None:
    predicted = torch.randn(5, 2, 4, 3)
    together = alone = None
    for step in range(5):
        now, together = ensemble(predicted[step], 0.1, together)
        single, alone = ensemble(predicted[step, 1:], 0.1, alone)
        torch.testing.assert_close(now[1:], single, rtol=0, atol=0)
        assert together is not None
        assert all(len(value) == 2 for value in together.values())


@pytest.mark.parametrize("name", ["bc", "flow", "diffusion"])
def test_a_policy_with_ensembling_acts_step_by_step_on_the_average(name: str) -> None:
    pytest.importorskip("diffusers" if name == "diffusion" else "torch")
    config = PolicyConfig(
        policy=name, temporal_ensemble_coeff=0.1, horizon=4, n_obs_steps=1, hidden=16
    )
    assert config.n_action_steps == 1
    torch.manual_seed(0)
    policy = build_policy(config, SHAPES).eval()
    plain = build_policy(
        PolicyConfig(policy=name, horizon=4, n_action_steps=4, n_obs_steps=1, hidden=16), SHAPES
    ).eval()
    plain.load_state_dict(policy.state_dict())
    seen = [{"hand": torch.randn(2, 1, 3)} for _ in range(6)]
    state = other = carried = None
    for obs in seen:
        actions, state = policy.act(obs, state)
        chunk, other = plain.act(obs, other)
        expected, carried = ensemble(chunk, 0.1, carried)
        torch.testing.assert_close(actions, expected)
    assert actions.shape == (2, 1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_action_steps": 2}, "needs n_action_steps 1"),
        ({"temporal_ensemble_coeff": -1.0}, "at least 0"),
        ({"policy": "bc_rnn_gmm"}, "predicts no chunks that could be averaged"),
    ],
)
def test_settings_that_do_not_fit_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PolicyConfig(**{"temporal_ensemble_coeff": 0.01, **changes})  # type: ignore[arg-type]
