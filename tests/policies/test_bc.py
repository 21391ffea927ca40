from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.policies import PolicyConfig, Shapes, build_policy

OPTIONS = {"patch_size": 12, "width": 24, "depth": 1, "num_heads": 2, "keypoints": 4}
SHAPES = Shapes({"front_image": (24, 24)}, {"hand": 3}, 4)


def config(**changes: Any) -> PolicyConfig:
    return PolicyConfig(
        **{"encoder_options": OPTIONS, "hidden": 16, "horizon": 5, "n_action_steps": 2, **changes}
    )


def batch(size: int = 3, n_obs_steps: int = 1, horizon: int = 5) -> dict[str, Any]:
    obs = {
        "front_image": torch.randint(0, 256, (size, n_obs_steps, 24, 24, 3), dtype=torch.uint8),
        "hand": torch.rand(size, n_obs_steps, 3),
    }
    return {
        "obs": obs,
        "actions": torch.rand(size, horizon, 4),
        "action_mask": torch.ones(size, horizon, dtype=torch.bool),
    }


def statistics() -> dict[str, dict[str, np.ndarray]]:
    low, high = np.array([-0.5, 0.0, 0.2, 1.0]), np.array([0.5, 1.0, 0.4, 1.0])
    hand = {"min": np.zeros(3), "max": np.ones(3), "mean": np.full(3, 0.5), "std": np.full(3, 0.1)}
    return {
        "actions": {"min": low, "max": high, "mean": (low + high) / 2, "std": (high - low) / 4},
        "hand": hand,
    }


@pytest.mark.parametrize("n_obs_steps", [1, 3])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_loss_is_a_scalar_with_gradients_everywhere(n_obs_steps: int, loss: str) -> None:
    policy = build_policy(config(n_obs_steps=n_obs_steps, loss=loss), SHAPES)
    value, metrics = policy.loss(batch(n_obs_steps=n_obs_steps))
    value.backward()
    assert value.ndim == 0
    assert metrics["loss"] == pytest.approx(value.item())
    assert all(p.grad is not None for p in policy.parameters())


def test_padded_actions_do_not_count() -> None:
    policy = build_policy(config(), SHAPES).eval()
    samples = batch()
    samples["action_mask"][:, 3:] = False
    before = policy.loss(samples)[0]
    samples["actions"][:, 3:] = 1e3
    torch.testing.assert_close(policy.loss(samples)[0], before)
    samples["actions"][:, :3] += 1
    assert not torch.allclose(policy.loss(samples)[0], before)


def test_l1_and_l2_are_means_over_the_counted_entries() -> None:
    for loss, expected in (("l1", 2.0), ("l2", 4.0)):
        policy = build_policy(config(loss=loss), SHAPES).eval()
        samples = batch()
        samples["actions"] = policy.predict(samples["obs"]).detach() + 2
        assert float(policy.loss(samples)[0]) == pytest.approx(expected, rel=1e-5)


def test_act_returns_the_first_actions_in_range() -> None:
    policy = build_policy(config(), SHAPES).eval()
    policy.fit_normalizers(statistics())
    actions, state = policy.act(batch()["obs"])
    assert actions.shape == (3, 2, 4)
    assert actions.abs().max() <= 1
    assert state is None
    expected = policy.actions.invert(policy.predict(batch()["obs"]))
    assert expected.shape == (3, 5, 4)


def test_normalisation_is_stored_with_the_weights() -> None:
    policy = build_policy(config(), SHAPES)
    policy.fit_normalizers(statistics())
    other = build_policy(config(), SHAPES)
    other.load_state_dict(policy.state_dict())
    torch.testing.assert_close(other.actions.scale, torch.tensor([0.5, 0.5, 0.1, 1.0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "bcc"}, "did you mean 'bc'"),
        ({"n_action_steps": 6}, "n_action_steps must be between 1 and horizon = 5"),
        ({"loss": "l3"}, "unknown loss 'l3'"),
        ({"n_obs_steps": 0}, "n_obs_steps must be at least 1"),
        ({"crop": 30}, "crop 30 does not fit camera front_image of 24 x 24"),
        ({"action_normalization": "nothing"}, "unknown normalisation 'nothing'"),
        ({"encoder": "vit_tny"}, "did you mean 'vit_tiny'"),
    ],
)
def test_values_that_do_not_fit_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_policy(config(**changes), SHAPES)
