"""Observations are like those of training, or are rejected in one line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fibopolicy.errors import UserError
from fibopolicy.policies import Policy, PolicyConfig, Shapes, build_policy

SHAPES = Shapes({"front_image": (24, 24), "wrist_image": (24, 36)}, {"hand": 3}, action_dim=4)
TINY = PolicyConfig(
    encoder="vit_tiny",
    encoder_options={"width": 24, "depth": 1, "num_heads": 2, "keypoints": 2},
    hidden=16,
)
ROBOMIMIC = {"bc_gaussian": 1, "bc_gmm": 1, "bc_rnn_gmm": 1, "bc_transformer_gmm": 10}
POLICIES = {"bc": 1, "diffusion": 2, "flow": 2, **ROBOMIMIC}


def policy_of(policy: str) -> Policy:
    options: dict[str, Any] = (
        {"embed_dim": 16, "num_layers": 1, "num_heads": 2} if policy == "bc_transformer_gmm" else {}
    )
    options |= {"hidden_dim": 16} if policy == "bc_rnn_gmm" else {}
    config = PolicyConfig(
        policy=policy,
        policy_options=options,
        encoder=TINY.encoder,
        encoder_options=TINY.encoder_options,
        hidden=16,
    )
    torch.manual_seed(0)
    return build_policy(config, SHAPES).eval()


@pytest.fixture(scope="module")
def policies() -> dict[str, Policy]:
    return {policy: policy_of(policy) for policy in POLICIES}


def observations(steps: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    frames = {
        key: torch.randint(256, (batch, steps, *size, 3), dtype=torch.uint8, generator=generator)
        for key, size in SHAPES.images.items()
    }
    return {**frames, "hand": torch.rand(batch, steps, 3, generator=generator)}


FAULTS: dict[str, tuple[Any, str]] = {
    "larger frames": (
        lambda o: {
            **o,
            "front_image": torch.zeros(*o["hand"].shape[:2], 480, 640, 3, dtype=torch.uint8),
        },
        "480, 640",
    ),
    "floats in [0, 1]": (
        lambda o: {**o, "front_image": o["front_image"] / 255},
        r"holds torch\.float32, the policy reads uint8",
    ),
    "channels first": (
        lambda o: {**o, "front_image": o["front_image"].movedim(-1, 2)},
        "channels last",
    ),
    "height for width": (
        lambda o: {**o, "wrist_image": o["wrist_image"].transpose(2, 3)},
        r"trained on \(B, T_o, 24, 36, 3\)",
    ),
    "no steps": (lambda o: {key: value[:, 0] for key, value in o.items()}, "has shape"),
    "a missing camera": (
        lambda o: {k: v for k, v in o.items() if k != "wrist_image"},
        "'wrist_image' is missing",
    ),
    "a missing vector": (
        lambda o: {k: v for k, v in o.items() if k != "hand"},
        "'hand' is missing",
    ),
    "an array": (lambda o: {**o, "hand": o["hand"].numpy()}, "of type ndarray"),
    "another robot's vector": (
        lambda o: {**o, "hand": o["hand"].repeat(1, 1, 2)},
        r"\(2, \d+, 6\).*another robot",
    ),
    "an integer vector": (lambda o: {**o, "hand": o["hand"].long()}, "floating-point"),
    "other batches": (lambda o: {**o, "hand": o["hand"][:1]}, "1 episodes"),
    "no episodes": (lambda o: {k: v[:0] for k, v in o.items()}, "0 episodes"),
    "nothing": (lambda o: None, "of type NoneType, the policy reads a mapping"),
    "too many steps": (lambda o: {k: v.repeat_interleave(3, 1) for k, v in o.items()}, "steps"),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("fault", FAULTS)
def test_observations_unlike_those_of_training_are_rejected(
    policies: dict[str, Policy], policy: str, fault: str
) -> None:
    change, message = FAULTS[fault]
    policy, obs = policies[policy], change(observations(POLICIES[policy]))
    with pytest.raises(UserError, match=message) as caught:
        policy.act(obs)
    assert "\n" not in str(caught.value)
    batch = {"obs": obs, "actions": torch.zeros(2, policy.config.horizon, 4)}
    with pytest.raises(UserError, match=message):
        policy.loss(
            {**batch, "action_mask": torch.ones(2, policy.config.horizon, dtype=torch.bool)}
        )


@pytest.mark.parametrize("policy", POLICIES)
def test_keys_that_the_policy_does_not_read_change_nothing(
    policies: dict[str, Policy], policy: str
) -> None:
    obs = observations(POLICIES[policy])
    expected, _ = policies[policy].act(obs)
    extra = {"depth": torch.zeros(1), **obs, "instruction": "lift the cube"}
    assert torch.equal(policies[policy].act(extra)[0], expected)  # type: ignore[arg-type]


@settings(max_examples=100, derandomize=True)
@given(data=st.data())
def test_any_observation_is_acted_on_correctly_or_rejected(
    policies: dict[str, Policy], data: st.DataObject
) -> None:
    policy = data.draw(st.sampled_from(["bc", "diffusion"]))
    obs = observations(POLICIES[policy])
    key = data.draw(st.sampled_from(sorted(obs)))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float32, torch.float64, torch.int64]))
    size = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 24, 36]), min_size=1, max_size=6))
    kept = data.draw(st.booleans())
    changed = obs[key].to(dtype) if kept else torch.zeros(size, dtype=dtype)
    try:
        actions, _ = policies[policy].act({**obs, key: changed})
    except UserError:
        return
    like = (SHAPES.images[key] + (3,)) if key in SHAPES.images else (SHAPES.vectors[key],)
    assert changed.shape[2:] == like
    assert (
        (changed.dtype == torch.uint8) if key in SHAPES.images else changed.dtype.is_floating_point
    )
    if kept:
        expected, _ = policies[policy].act(obs)
        torch.testing.assert_close(actions, expected)


def test_cameras_may_have_dots_in_their_names() -> None:
    shapes = replace(
        SHAPES, images={"observation.images.front": (24, 24)}, vectors={"observation.state": 3}
    )
    for policy in ("bc", *ROBOMIMIC):
        config = policy_of(policy).config
        policy = build_policy(config, shapes).eval()
        steps = config.n_obs_steps
        obs = {
            "observation.images.front": torch.zeros(1, steps, 24, 24, 3, dtype=torch.uint8),
            "observation.state": torch.zeros(1, steps, 3),
        }
        actions, _ = policy.act(obs)
        assert actions.shape[0] == 1
