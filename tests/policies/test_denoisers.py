from __future__ import annotations

from typing import Any

import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.policies.denoisers import DENOISERS, denoiser_class


def build(name: str, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "action_dim": 3,
        "horizon": 8,
        "n_obs_steps": 2,
        "feature_dim": 5,
        "width": 32,
        "layers": 2,
    }
    return denoiser_class(name)(**{**sizes, **changes}).eval()


@pytest.mark.parametrize("horizon", [1, 2, 7, 8, 15])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("name", DENOISERS)
def test_any_chunk_keeps_its_shape_and_every_weight_gets_a_gradient(
    name: str, layers: int, horizon: int
) -> None:
    denoiser = build(name, layers=layers, horizon=horizon)
    out = denoiser(torch.randn(4, horizon, 3), torch.rand(4) * 100, torch.randn(4, 2, 5))
    assert out.shape == (4, horizon, 3)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())


@pytest.mark.parametrize("name", DENOISERS)
def test_time_and_every_observation_matter_and_rows_do_not_mix(name: str) -> None:
    denoiser = build(name)
    actions, time, features = torch.randn(2, 8, 3), torch.tensor([10.0, 60.0]), torch.randn(2, 2, 5)
    before = denoiser(actions, time, features)
    for index in range(2):
        other = features.clone()
        other[0, index] += 1
        after = denoiser(actions, time, other)
        assert not torch.allclose(after[0], before[0])
        torch.testing.assert_close(after[1], before[1], rtol=0, atol=0)
    assert not torch.allclose(denoiser(actions, time + 1, features), before)


def test_an_action_of_the_transformer_sees_those_before_it_alone() -> None:
    denoiser = build("transformer")
    actions, time, features = torch.randn(1, 8, 3), torch.tensor([10.0]), torch.randn(1, 2, 5)
    other = actions.clone()
    other[:, 5] += 1
    change = (
        (denoiser(other, time, features) - denoiser(actions, time, features))
        .detach()
        .abs()
        .amax(-1)[0]
    )
    assert float(change[:5].max()) < 1e-6
    assert float(change[5:].min()) > 1e-6


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("unett", {}, "did you mean 'unet'"),
        ("unet", {"width": 30}, "divisible by 8, got 30"),
        ("transformer", {"width": 40}, "divisible by 32, got 40"),
    ],
)
def test_sizes_that_do_not_fit_are_named(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(name, **changes)
