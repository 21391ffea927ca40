"""Policies of other dtypes: `.half()`, `.bfloat16()`, `.double()`."""

from __future__ import annotations

import pytest
import torch

from fibopolicy.policies import PolicyConfig, Shapes, build_policy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("policy", ["bc", "diffusion", "flow"])
@pytest.mark.parametrize("vectors", [{"hand": 3}, {}])
def test_a_policy_computes_in_its_dtype(
    policy: str, vectors: dict[str, int], dtype: torch.dtype
) -> None:
    if policy == "diffusion":
        pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = PolicyConfig(
        policy=policy, encoder="vit_tiny", encoder_options={"depth": 1}, hidden=16, n_obs_steps=1
    )
    policy = build_policy(config, Shapes({"a_image": (24, 24), "b_image": (24, 24)}, vectors, 4))
    obs = {
        camera: torch.randint(0, 256, (2, 1, 24, 24, 3), dtype=torch.uint8)
        for camera in ("a_image", "b_image")
    }
    obs |= {key: torch.randn(2, 1, dim) for key, dim in vectors.items()}
    batch = {
        "obs": obs,
        "actions": torch.rand(2, config.horizon, 4),
        "action_mask": torch.ones(2, config.horizon, dtype=torch.bool),
    }
    expected = policy.eval().act(obs)[0]
    policy.to(dtype)
    policy.loss(batch)[0].backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)
    actions = policy.act(obs)[0]
    # Ten steps of denoising by random weights amplify what rounding did.
    assert (torch.as_tensor(actions.numpy()).float() - expected).square().mean().sqrt() < 0.15
