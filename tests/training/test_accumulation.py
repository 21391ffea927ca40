"""A batch computed in parts is the batch: the same loss, and the same gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fibopolicy.errors import UserError
from fibopolicy.policies import PolicyConfig, Shapes, build_policy
from fibopolicy.policies.base import POLICIES, Policy
from fibopolicy.policies.rng import SampleRng
from fibopolicy.training import ComputeConfig, TrainConfig
from fibopolicy.training.data import rows
from fibopolicy.training.distributed import World
from fibopolicy.training.trainer import Trainer, train

SHAPES = Shapes({"front_image": (24, 24)}, {"hand": 3}, 4)
#: Small networks, where a policy has options for them.
OPTIONS: dict[str, dict[str, Any]] = {
    "bc_rnn_gmm": {"hidden_dim": 8},
    "bc_transformer_gmm": {"embed_dim": 8, "num_layers": 1, "num_heads": 2},
}
ENCODER = {"patch_size": 12, "width": 24, "depth": 1, "num_heads": 2, "keypoints": 4}


def batch_of(policy: Policy, count: int) -> dict[str, Any]:
    """Random windows; the later ones end in ever more padding."""
    config = policy.config
    seen = config.n_obs_steps + (config.horizon - 1 if policy.sequence else 0)
    return {
        "obs": {
            "front_image": torch.randint(0, 255, (count, seen, 24, 24, 3), dtype=torch.uint8),
            "hand": torch.randn(count, seen, 3),
        },
        "actions": torch.rand(count, config.horizon, 4) * 2 - 1,
        "action_mask": torch.arange(config.horizon)[None]
        <= config.horizon - 1 - torch.arange(count)[:, None] % config.horizon,
    }


@pytest.mark.parametrize("policy", POLICIES.names())
def test_losses_of_parts_average_by_their_denominators(policy: str) -> None:
    if policy.startswith("bc_"):
        pytest.importorskip("robomimic")
    torch.manual_seed(0)
    policy = build_policy(
        PolicyConfig(
            policy=policy,
            policy_options=OPTIONS.get(policy, {}),
            encoder_options=ENCODER,
            hidden=16,
        ),
        SHAPES,
    ).eval()
    batch = batch_of(policy, 6)

    def loss(which: slice) -> torch.Tensor:
        part = rows(batch, which)
        rng = SampleRng(torch.Generator().manual_seed(0), batch_size=6, start=which.start)
        return policy.loss(part, rng)[0].detach().double() * policy.loss_denominator(part)

    parts = [loss(slice(0, 1)), loss(slice(1, 4)), loss(slice(4, 6))]
    torch.testing.assert_close(sum(parts), loss(slice(0, 6)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulated_gradients_are_those_of_the_whole_batch(
    tiny_config: TrainConfig, parts: int
) -> None:
    found = []
    for accumulate in (1, parts):
        optimizer = replace(tiny_config.optimizer, grad_clip_norm=1e9)
        compute = ComputeConfig(accumulate=accumulate, precision="fp32")
        config = replace(tiny_config, optimizer=optimizer, compute=compute)
        trainer = Trainer(config, World())
        metrics = trainer.train_step(5)
        gradients = [p.grad for p in trainer.policy.parameters()]
        found.append((metrics["loss"], metrics["gradient_norm"], gradients))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    for ours, theirs in zip(found[0][2], found[1][2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("accumulate", [0, 3])
def test_parts_that_do_not_divide_the_batch_are_rejected(
    tiny_config: TrainConfig, tmp_path: Path, accumulate: int
) -> None:
    with pytest.raises(
        UserError, match=r"accumulate must be|batch_size 8 cannot be split .* a multiple of 3"
    ):
        train(
            replace(tiny_config, out=tmp_path / "run", compute=ComputeConfig(accumulate=accumulate))
        )
    assert not (tmp_path / "run").exists()


def test_the_number_of_parts_may_change_on_resume(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, out=tmp_path / "run")
    train(config)
    train(replace(config, compute=ComputeConfig(accumulate=2)), resume=True)
