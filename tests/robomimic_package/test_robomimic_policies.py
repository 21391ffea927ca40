from __future__ import annotations

import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from robomimic_rollout import observed, rollout_policy
from safetensors.torch import save_file

from fibopolicy.errors import UserError
from fibopolicy.policies import PolicyConfig, Shapes, build_policy
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.robomimic.policies import log_likelihood
from fibopolicy.training import OptimizerConfig, TrainConfig
from fibopolicy.training.optim import autocast
from fibopolicy.training.trainer import train

if importlib.util.find_spec("robomimic") is None:
    pytest.skip(
        "robomimic is not installed; install fibopolicy[robomimic]", allow_module_level=True
    )

TINY = {"patch_size": 12, "width": 12, "depth": 1, "num_heads": 2, "keypoints": 4}
SMALL = {
    "bc_gaussian": {},
    "bc_gmm": {},
    "bc_rnn_gmm": {"hidden_dim": 16},
    "bc_transformer_gmm": {"embed_dim": 16, "num_layers": 1, "num_heads": 2},
}
SHAPES = Shapes({"front_image": (30, 30), "wrist_image": (30, 30)}, {"hand": 3}, 4)


def config(policy: str, **changes: Any) -> PolicyConfig:
    return PolicyConfig(
        **{
            "policy": policy,
            "encoder_options": TINY,
            "policy_options": SMALL[policy],
            "hidden": 16,
            "crop": 24,
            **changes,
        }
    )


def batch(settings: PolicyConfig, rows: int = 3) -> dict[str, Any]:
    steps = settings.n_obs_steps + (settings.horizon - 1 if settings.policy == "bc_rnn_gmm" else 0)
    return {
        "obs": observations(rows, steps),
        "actions": torch.rand(rows, settings.horizon, 4) * 2 - 1,
        "action_mask": torch.ones(rows, settings.horizon, dtype=torch.bool),
    }


def observations(rows: int, steps: int) -> dict[str, torch.Tensor]:
    images = {
        key: torch.randint(0, 256, (rows, steps, 30, 30, 3), dtype=torch.uint8)
        for key in SHAPES.images
    }
    return images | {"hand": torch.rand(rows, steps, 3)}


@pytest.mark.parametrize("name", SMALL)
def test_means_and_scales_are_not_rounded_under_autocast(name: str) -> None:
    policy: Any = build_policy(config(name), SHAPES)
    sample = batch(policy.config)
    with autocast("bf16", torch.device("cpu")):
        found = policy.distribution(sample["obs"])
    normal = getattr(found, "component_distribution", found).base_dist
    assert normal.loc.dtype == normal.scale.dtype == torch.float32


@pytest.mark.parametrize("horizon", [None, 3])
@pytest.mark.parametrize("policy", SMALL)
def test_the_loss_reaches_every_weight_and_padding_does_not_count(
    policy: str, horizon: int | None
) -> None:
    settings = config(policy, horizon=horizon)
    policy = build_policy(settings, SHAPES)
    policy.eval()  # no dropout; the distributions become narrow
    samples = batch(settings)
    policy.loss(samples)[0].backward()
    without = {name for name, parameter in policy.named_parameters() if parameter.grad is None}
    assert all("scale" in name for name in without)
    if settings.horizon > 1:
        samples["action_mask"][:, -1] = False
        before = policy.loss(samples)[0].detach()
        samples["actions"][:, -1] += 1
        torch.testing.assert_close(policy.loss(samples)[0].detach(), before)
    policy.train()
    policy.loss(samples)[0].backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_the_likelihood_is_torchs_own() -> None:
    actions, mask = torch.rand(2, 5, 4), torch.ones(2, 5, 4)
    normal = torch.distributions.Normal(torch.rand(2, 5, 3, 4), torch.rand(2, 5, 3, 4) + 0.1)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=torch.rand(2, 5, 3)),
        torch.distributions.Independent(normal, 1),
    )
    torch.testing.assert_close(log_likelihood(mixture, actions, mask), mixture.log_prob(actions))
    single = torch.distributions.Independent(
        torch.distributions.Normal(torch.rand(2, 5, 4), torch.rand(2, 5, 4) + 0.1), 1
    )
    torch.testing.assert_close(log_likelihood(single, actions, mask), single.log_prob(actions))


@pytest.mark.parametrize("policy", SMALL)
def test_default_settings_are_those_of_robomimic(policy: str) -> None:
    settings = PolicyConfig(policy=policy)
    assert (settings.n_obs_steps, settings.horizon, settings.n_action_steps) == {
        "bc_rnn_gmm": (1, 10, 1),
        "bc_transformer_gmm": (10, 1, 1),
    }.get(policy, (1, 1, 1))
    assert (settings.hidden, settings.action_normalization) == (1024, "none")
    assert settings.layers == (0 if policy == "bc_rnn_gmm" else 2)
    assert PolicyConfig(**asdict(settings)) == settings


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        ("bc_gmm", {"policy_options": {"num_mode": 3}}, "did you mean 'num_modes'"),
        ("bc_gmm", {"policy_options": {"num_modes": "3"}}, "num_modes must be like 5, got '3'"),
        ("bc_gmm", {"policy_options": {"std_activation": "relu"}}, "std_activation must be one of"),
        ("bc_gmm", {"n_obs_steps": 2}, "sees one observation"),
        ("bc_gaussian", {"layers": 0}, "layers must be at least 1"),
        ("bc_gmm", {"views": "joint"}, "views='separate'"),
        ("bc_rnn_gmm", {"n_action_steps": 2}, "one action at a time"),
        ("bc_rnn_gmm", {"policy_options": {"rnn_type": "lstm"}}, "LSTM or GRU"),
        ("bc_transformer_gmm", {"policy_options": {"embed_dim": 15}}, "cannot be built"),
        ("bc_gmm", {"encoder_options": {"dept": 3}}, "did you mean 'depth'"),
    ],
)
def test_mistakes_in_the_settings(policy: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_policy(config(policy, **changes), SHAPES)


@pytest.mark.parametrize("policy", SMALL)
def test_an_exported_policy_acts_the_same(policy: str, tmp_path: Path) -> None:
    from fibopolicy.robomimic.checkpoint import read_checkpoint
    from fibopolicy.robomimic.export import export
    from fibopolicy.robomimic.imported import ImportedPolicy

    run = saved(config(policy), tmp_path / "run")
    out = export(run, tmp_path / "x.pth")
    with pytest.raises(UserError, match="exists already"):
        export(run, out)
    policy, exported = load_policy(run).policy, ImportedPolicy(read_checkpoint(out))
    seen = [observations(2, policy.config.n_obs_steps) for _ in range(3)]
    state = other = None
    for step in range(12):
        actions, state = policy.act(seen[step % 3], state)
        theirs, other = exported.act(seen[step % 3], other)
        torch.testing.assert_close(theirs, actions, atol=1e-5, rtol=0)
    robomimics_rollout_agrees(out, policy, observations(1, policy.config.n_obs_steps))


def robomimics_rollout_agrees(path: Path, policy: Any, obs: dict[str, torch.Tensor]) -> None:
    """Robomimic's own wrapper around the file, given one observation: the same action,
    or the same modes to draw from.
    """
    stacked = policy.name == "bc_transformer_gmm"
    action = rollout_policy(path)(observed(obs, 0, SHAPES.images, stacked))
    if policy.name == "bc_gaussian":
        np.testing.assert_allclose(action, policy.act(obs)[0][0, 0].numpy(), atol=1e-5)
        return
    modes = (
        policy.distribution(obs)
        .component_distribution.base_dist.loc.reshape(-1, 4)
        .detach()
        .numpy()
    )
    assert np.abs(modes - action).max(axis=-1).min() < 1e-3  # drawn with a deviation of 1e-4


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        ("bc_gmm", {"horizon": 3}, "train with horizon 1"),
        ("bc_gmm", {"action_normalization": "minmax"}, "action_normalization none"),
    ],
)
def test_what_robomimic_cannot_do_is_not_exported(
    policy: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    from fibopolicy.robomimic.export import export

    with pytest.raises(UserError, match=message):
        export(saved(config(policy, **changes), tmp_path / "run"), tmp_path / "x.pth")
    run = saved(PolicyConfig(encoder_options=TINY, crop=24, hidden=8), tmp_path / "bc")
    with pytest.raises(UserError, match="no counterpart of policy bc; it has one of bc_gaussian"):
        export(run, tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()


def saved(settings: PolicyConfig, run: Path) -> Path:
    """A run directory with fresh weights."""
    torch.manual_seed(0)
    policy = build_policy(settings, SHAPES)
    spread = {
        "min": np.full(3, -1.0),
        "max": np.ones(3),
        "mean": np.full(3, 0.3),
        "std": np.full(3, 0.02),
    }
    policy.fit_normalizers(
        {"hand": spread, "actions": {key: value[0].repeat(4) for key, value in spread.items()}}
    )
    run.mkdir()
    weights = {name: tensor.clone().contiguous() for name, tensor in policy.state_dict().items()}
    save_file(weights, run / "ema.safetensors", metadata={"step": "1"})
    train = {
        "dataset": "x.hdf5",
        "seed": 0,
        "filter_key": None,
        "optimizer": {"steps": 1, "batch_size": 4, "lr": 1e-3},
    }
    document = {
        "policy": asdict(settings),
        "shapes": asdict(SHAPES),
        "train": train,
        "env_args": {"env_name": "Lift", "type": 1},
    }
    (run / "config.json").write_text(json.dumps(document))
    return run


@pytest.mark.parametrize("policy", ["bc_gmm", "bc_rnn_gmm"])
def test_a_run_trains_and_loads(policy: str, tiny_config: TrainConfig, tmp_path: Path) -> None:
    settings = replace(
        tiny_config,
        out=tmp_path / "run",
        policy=config(policy, crop=None, horizon=4 if policy == "bc_rnn_gmm" else 1),
        optimizer=OptimizerConfig(steps=3, batch_size=4, warmup_steps=1),
    )
    done = train(settings)
    loaded = load_policy(tmp_path / "run")
    assert loaded.step == 3
    for mine, theirs in zip(done.policy.parameters(), loaded.policy.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
