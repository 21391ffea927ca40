from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fibopolicy.encoders import build_encoder
from fibopolicy.errors import UserError
from fibopolicy.policies import Policy, PolicyConfig, Shapes, build_policy
from fibopolicy.training import OptimizerConfig, TrainConfig
from fibopolicy.training.encoders import freeze
from fibopolicy.training.optim import build_optimizer, learning_rate, set_learning_rate
from fibopolicy.utils.imports import make_torchvision_importable


@pytest.fixture
def policy(tiny_config: TrainConfig) -> Policy:
    return build_policy(tiny_config.policy, Shapes({"front_image": (24, 24)}, {"hand": 3}, 4))


def test_learning_rate_warms_up_and_ends_at_zero() -> None:
    config = OptimizerConfig(steps=100, warmup_steps=10, lr=1.0)
    rates = [learning_rate(step, config) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[100] == pytest.approx(0.0)


def test_weight_decay_excludes_biases_norms_and_positions(policy: Policy) -> None:
    decayed, spared = build_optimizer(policy, OptimizerConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): n for n, p in policy.named_parameters()}
    assert all(p.ndim > 1 for p in decayed["params"])
    assert {
        name.rsplit(".", 1)[-1]
        for name in names.values()
        if "positions" in name or name.endswith("cls")
    } == {
        name.rsplit(".", 1)[-1]
        for name in (names[id(p)] for p in spared["params"])
        if not name.endswith(("bias", "weight"))
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def test_weight_decay_excludes_the_learned_tokens_of_timm() -> None:
    make_torchvision_importable()
    pytest.importorskip("timm")
    encoder = build_encoder("timm:vit_tiny_patch16_224", image_size=(32, 32))
    _, spared = build_optimizer(encoder, OptimizerConfig()).param_groups
    assert {id(encoder.model.pos_embed), id(encoder.model.cls_token)} <= {
        id(p) for p in spared["params"]
    }


@pytest.mark.parametrize(
    ("policy", "options", "learned"),
    [
        ("flow", {"denoiser": "transformer"}, "denoiser.memory_positions"),
        (
            "bc_transformer_gmm",
            {"embed_dim": 8, "num_layers": 1},
            "network.params.embed_timestep",
        ),
        (
            "bc_transformer_gmm",
            {"embed_dim": 8, "num_layers": 1, "nn_parameter_for_timesteps": False},
            "network.nets.embed_timestep.weight",
        ),
    ],
)
def test_weight_decay_excludes_the_learned_positions_of_transformers(
    policy: str, options: dict[str, Any], learned: str
) -> None:
    if policy.endswith("gmm"):
        pytest.importorskip("robomimic")
    config = PolicyConfig(policy, options, hidden=32, layers=1)
    built = build_policy(config, Shapes({}, {"hand": 3}, 4))
    _, spared = build_optimizer(built, OptimizerConfig()).param_groups
    assert id(built.get_parameter(learned)) in {id(p) for p in spared["params"]}


def test_the_encoder_has_its_own_learning_rate(policy: Policy) -> None:
    optimizer = build_optimizer(policy, OptimizerConfig(encoder_lr_scale=0.1))
    set_learning_rate(optimizer, 2.0)
    inside = {id(p) for name, p in policy.named_parameters() if ".encoders." in name}
    assert len(optimizer.param_groups) == 4
    for group in optimizer.param_groups:
        assert {id(p) in inside for p in group["params"]} == {group["lr"] == pytest.approx(0.2)}
        assert group["lr"] == pytest.approx(0.2 if id(group["params"][0]) in inside else 2.0)


def test_a_frozen_encoder_is_not_in_the_optimizer(policy: Policy) -> None:
    freeze(policy)
    trained = {
        id(p)
        for group in build_optimizer(policy, OptimizerConfig()).param_groups
        for p in group["params"]
    }
    assert trained == {id(p) for name, p in policy.named_parameters() if ".encoders." not in name}


def test_shared_encoders_are_counted_once(tiny_config: TrainConfig) -> None:
    config: PolicyConfig = replace(tiny_config.policy, views="shared")
    policy = build_policy(config, Shapes({"a_image": (24, 24), "b_image": (24, 24)}, {}, 4))
    found = [
        p
        for group in build_optimizer(policy, OptimizerConfig(encoder_lr_scale=0.5)).param_groups
        for p in group["params"]
    ]
    assert len(found) == len({id(p) for p in found}) == len(list(policy.parameters()))


@pytest.mark.parametrize(
    "change",
    [{"encoder_lr_scale": 0.0}, {"lr": -1.0}, {"grad_clip_norm": 0.0}, {"betas": (0.9, 1.0)}],
)
def test_values_out_of_range_are_rejected(change: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(change))):
        OptimizerConfig(**change)


def test_an_optimizer_can_be_built_without_decayed_parameters() -> None:
    assert len(build_optimizer(nn.LayerNorm(3), OptimizerConfig()).param_groups) == 1
    assert isinstance(build_optimizer(nn.Linear(2, 2), OptimizerConfig()), torch.optim.AdamW)
