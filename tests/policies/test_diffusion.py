from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.evaluation.policy_runner import PolicyRunner
from fibopolicy.policies import Policy, PolicyConfig, Shapes, build_policy
from fibopolicy.policies.diffusion import DENOISERS

POLICIES = ("diffusion", "flow")
TINY = {"patch_size": 12, "width": 12, "depth": 1, "num_heads": 2, "keypoints": 4}
SIZE = 24
SHAPES = Shapes({"front_image": (SIZE, SIZE), "wrist_image": (SIZE, SIZE)}, {"hand": 3}, 4)
pytest.importorskip("diffusers", reason="install fibopolicy[diffusion]")


def config(policy: str, **changes: Any) -> PolicyConfig:
    return PolicyConfig(
        **{
            "policy": policy,
            "encoder_options": TINY,
            "hidden": 32,
            "horizon": 6,
            "n_action_steps": 3,
            **changes,
        }
    )


def observations(settings: PolicyConfig, rows: int = 3) -> dict[str, torch.Tensor]:
    images = {
        key: torch.randint(0, 256, (rows, settings.n_obs_steps, SIZE, SIZE, 3), dtype=torch.uint8)
        for key in SHAPES.images
    }
    return images | {"hand": torch.rand(rows, settings.n_obs_steps, 3)}


def batch(settings: PolicyConfig, rows: int = 3) -> dict[str, Any]:
    return {
        "obs": observations(settings, rows),
        "actions": torch.rand(rows, settings.horizon, 4) * 2 - 1,
        "action_mask": torch.ones(rows, settings.horizon, dtype=torch.bool),
    }


def test_defaults_are_those_of_diffusion_policy() -> None:
    for policy in POLICIES:
        settings = PolicyConfig(policy=policy)
        assert (
            settings.n_obs_steps,
            settings.horizon,
            settings.n_action_steps,
            settings.action_normalization,
        ) == (2, 16, 8, "minmax")
        assert PolicyConfig(**asdict(settings)) == settings


@pytest.mark.parametrize("views", ["separate", "shared", "joint"])
@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_loss_reaches_every_weight(policy: str, denoiser: str, views: str) -> None:
    settings = config(policy, views=views, policy_options={"denoiser": denoiser})
    policy = build_policy(settings, SHAPES)
    loss, metrics = policy.loss(batch(settings))
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item())
    assert all(parameter.grad is not None for parameter in policy.parameters())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("encoder", ["resnet18", "released_robot"])
def test_other_encoders_train_and_act(policy: str, encoder: str) -> None:
    options = {"width": 12, "depth": 1, "num_heads": 2} if encoder == "released_robot" else {}
    settings = config(
        policy, encoder=encoder, encoder_options=options, n_obs_steps=1, views="shared"
    )
    policy = build_policy(settings, SHAPES)
    policy.loss(batch(settings, 2))[0].backward()
    assert policy.eval().act(observations(settings, 1))[0].shape == (1, 3, 4)


@pytest.mark.parametrize("policy", POLICIES)
def test_padded_actions_do_not_count(policy: str) -> None:
    settings = config(policy, policy_options={"noise_samples": 1})
    policy = build_policy(settings, SHAPES).eval()
    samples = batch(settings)
    samples["action_mask"][:, 4:] = False
    policy.add_noise = lambda actions, noise, t: (noise, t, actions)
    policy.denoiser = Zero()
    before = float(policy.loss(samples)[0])
    samples["actions"][:, 4:] = 9
    assert float(policy.loss(samples)[0]) == pytest.approx(before)
    samples["actions"][:, :4] *= 2
    assert float(policy.loss(samples)[0]) == pytest.approx(4 * before)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_perfect_denoiser_has_no_error_and_acts_as_demonstrated(policy: str) -> None:
    """If all data are one chunk, the ideal network is known in closed form."""
    settings = config(policy, n_obs_steps=1)
    policy = build_policy(settings, Shapes({}, {"hand": 3}, 4)).eval()
    shown = (torch.rand(1, 6, 4) * 2 - 1).expand(5, 6, 4)
    policy.denoiser = Ideal(policy, shown[:1])
    noisy, timesteps, target = policy.add_noise(shown, torch.randn(5, 6, 4), torch.rand(5))
    predicted = policy.denoiser(noisy, timesteps, torch.zeros(5, 1, 3))
    assert float((predicted - target).abs().max()) < 2e-3
    actions, _ = policy.act({"hand": torch.rand(2, 1, 3)})
    torch.testing.assert_close(actions, shown[:2, :3], atol=2e-3, rtol=0)


class Zero(torch.nn.Module):
    def forward(
        self, noisy: torch.Tensor, timesteps: torch.Tensor, conditioning: torch.Tensor
    ) -> torch.Tensor:
        return torch.zeros_like(noisy)


class Ideal(torch.nn.Module):
    """Predicts the noise in, or the velocity of, noisy versions of one chunk."""

    def __init__(self, policy: Any, chunk: torch.Tensor) -> None:
        super().__init__()
        self.policy, self.chunk = policy, chunk

    def forward(
        self, noisy: torch.Tensor, time: torch.Tensor, features: torch.Tensor
    ) -> torch.Tensor:
        if self.policy.name == "flow":
            return (self.chunk - noisy) / (1 - time / 100)[:, None, None].clamp(min=1e-6)
        kept = self.policy.ddim.alphas_cumprod[time.long()][:, None, None]
        return (noisy - kept.sqrt() * self.chunk) / (1 - kept).sqrt()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_episode_repeats_exactly_alone_and_beside_others(policy: str) -> None:
    torch.manual_seed(3)
    policy = build_policy(config(policy), SHAPES).eval()
    seen = [observations(policy.config, 4) for _ in range(3)]
    runs = []
    for rows in (slice(0, 4), slice(1, 2), [3, 1, 1, 0]):
        torch.manual_seed(len(runs))  # another state of torch's generator changes nothing
        state, acted = None, []
        for obs in seen:
            actions, state = policy.act({key: value[rows] for key, value in obs.items()}, state)
            acted.append(actions)
        runs.append(torch.stack(acted, dim=1))  # (B, decisions, execute, A)
    torch.testing.assert_close(runs[0][1], runs[1][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(runs[0][[3, 1, 1, 0]], runs[2], rtol=0, atol=0)


@pytest.mark.parametrize("policy", POLICIES)
def test_noise_differs_between_decisions_and_between_episodes(policy: str) -> None:
    policy = build_policy(config(policy), SHAPES).eval()
    policy.sample = lambda noise, conditioning: noise  # type: ignore[method-assign]
    first, state = policy.act(observations(policy.config, 2))
    second, _ = policy.act(observations(policy.config, 2), state)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("denoiser", ["unet", "transformer"])
@pytest.mark.parametrize("policy", POLICIES)
def test_rows_of_a_batch_do_not_depend_on_each_other(policy: str, denoiser: str) -> None:
    policy: Policy = build_policy(
        config(policy, policy_options={"denoiser": denoiser}), SHAPES
    ).eval()
    layout = {key: ((SIZE, SIZE, 3), np.dtype(np.uint8)) for key in SHAPES.images} | {
        "hand": ((3,), np.dtype(np.float32))
    }
    assert PolicyRunner(policy, batch_size=4).is_row_independent(layout)


def test_ddim_visits_fewer_steps_than_were_trained_and_more_change_the_answer() -> None:
    settings = config(
        "diffusion", policy_options={"num_train_timesteps": 50, "num_inference_steps": 10}
    )
    policy: Any = build_policy(settings, SHAPES).eval()
    assert len(policy.ddim.timesteps) == 10
    assert policy.ddim.config.num_train_timesteps == 50
    assert policy.ddim.config.clip_sample
    unbounded: Any = build_policy(config("diffusion", action_normalization="gaussian"), SHAPES)
    assert not unbounded.ddim.config.clip_sample


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        (
            "diffusion",
            {"policy_options": {"inference_steps": 3}},
            "did you mean 'num_inference_steps'",
        ),
        (
            "diffusion",
            {"policy_options": {"num_inference_steps": 101}},
            "at most num_train_timesteps = 100, got 101",
        ),
        (
            "diffusion",
            {"policy_options": {"num_inference_steps": 60}},
            "must divide num_train_timesteps = 100, .* got 60, use 50 or 100",
        ),
        (
            "flow",
            {"policy_options": {"num_inference_steps": 0}},
            "num_inference_steps must be at least 1",
        ),
        (
            "flow",
            {"policy_options": {"noise_samples": "4"}},
            "noise_samples must be like 4, got '4'",
        ),
        ("flow", {"policy_options": {"denoiser": "mlp"}}, "unknown denoiser 'mlp'"),
        ("flow", {"layers": 0}, "layers must be at least 1"),
        ("flow", {"hidden": 30}, "divisible by 8"),
    ],
)
def test_mistakes_in_the_settings(policy: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_policy(config(policy, **changes), SHAPES)


def test_without_diffusers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers.schedulers.scheduling_ddim", None)
    with pytest.raises(UserError, match=r"pip install 'fibopolicy\[diffusion\]'"):
        build_policy(config("diffusion"), SHAPES)
    build_policy(config("flow"), SHAPES)


# The denoisers.


def denoiser_of(name: str, **changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {
        "action_dim": 3,
        "horizon": 8,
        "n_obs_steps": 2,
        "feature_dim": 5,
        "width": 32,
        "layers": 2,
    }
    return DENOISERS[name](**{**sizes, **changes}).eval()


@pytest.mark.parametrize("horizon", [1, 2, 7, 8, 15])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("name", DENOISERS.names())
def test_any_chunk_keeps_its_shape_and_every_weight_gets_a_gradient(
    name: str, layers: int, horizon: int
) -> None:
    denoiser = denoiser_of(name, layers=layers, horizon=horizon)
    out = denoiser(torch.randn(4, horizon, 3), torch.rand(4) * 100, torch.randn(4, 2, 5))
    assert out.shape == (4, horizon, 3)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in denoiser.parameters())


@pytest.mark.parametrize("name", DENOISERS.names())
def test_time_and_every_observation_matter_and_rows_do_not_mix(name: str) -> None:
    denoiser = denoiser_of(name)
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
    denoiser = denoiser_of("transformer")
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
def test_sizes_of_a_denoiser_that_do_not_fit_are_named(
    name: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        denoiser_of(name, **changes)
