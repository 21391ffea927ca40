from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from fibopolicy.datasets import DemoWriter
from fibopolicy.errors import UserError
from fibopolicy.policies import PolicyConfig, Shapes, build_policy
from fibopolicy.policies.actions import (
    ActionNormalizer,
    axis_angle_from_6d,
    axis_angle_to_6d,
)
from fibopolicy.policies.run_directory import load_policy
from fibopolicy.training import OptimizerConfig, TrainConfig
from fibopolicy.training.trainer import train

# two arms: position, rotation, gripper
ABSOLUTE = Shapes({}, {"hand": 3}, 14, absolute=True, rotations=(3, 10))


def poses(rows: int = 40) -> torch.Tensor:
    torch.manual_seed(0)
    arm = [
        torch.rand(rows, 3) * 3 - 1,
        torch.nn.functional.normalize(torch.randn(rows, 3), dim=-1),
        torch.ones(rows, 1),
    ]
    return torch.cat([*arm, *arm], dim=-1)


def statistics(actions: torch.Tensor) -> dict[str, np.ndarray]:
    x = actions.double().numpy()
    return {"min": x.min(0), "max": x.max(0), "mean": x.mean(0), "std": x.std(0)}


@pytest.mark.parametrize("kind", ["minmax", "gaussian", "none"])
def test_absolute_actions_come_back_and_their_rotations_are_not_normalised(kind: str) -> None:
    actions = poses()
    normalizer = ActionNormalizer(PolicyConfig(action_normalization=kind), ABSOLUTE)
    normalizer.fit(statistics(actions))
    converted = normalizer(actions)
    assert converted.shape == (40, normalizer.dim) == (40, 20)
    torch.testing.assert_close(normalizer.invert(converted), actions, atol=1e-5, rtol=0)
    for start in (3, 13):
        columns = converted[:, start : start + 6].view(40, 2, 3)
        torch.testing.assert_close(columns.norm(dim=-1), torch.ones(40, 2))
    if kind == "minmax":
        torch.testing.assert_close(converted[:, :3].amax(0), torch.ones(3))
        torch.testing.assert_close(converted[:, 10:13].amin(0), -torch.ones(3))


def test_axis_angles_may_be_kept() -> None:
    actions = poses()
    normalizer = ActionNormalizer(PolicyConfig(rotation="axis_angle"), ABSOLUTE)
    normalizer.fit(statistics(actions))
    assert normalizer.dim == 14
    torch.testing.assert_close(normalizer.invert(normalizer(actions)), actions)
    with pytest.raises(UserError, match="unknown rotation '6D': did you mean '6d'"):
        PolicyConfig(rotation="6D")


def test_displacements_stay_in_range_and_poses_do_not() -> None:
    far = torch.full((1, 14), 5.0)
    bounded = ActionNormalizer(PolicyConfig(), Shapes({}, {}, 14))
    assert float(bounded.invert(far).max()) == 1
    free = ActionNormalizer(PolicyConfig(rotation="axis_angle"), ABSOLUTE)
    assert float(free.invert(far).max()) == 5


@pytest.mark.parametrize(
    "policy",
    ["bc", "diffusion", "flow", "bc_gaussian", "bc_gmm", "bc_rnn_gmm", "bc_transformer_gmm"],
)
def test_every_policy_trains_and_acts_on_absolute_actions(policy: str) -> None:
    pytest.importorskip(
        "diffusers"
        if policy == "diffusion"
        else "robomimic"
        if policy.startswith("bc_")
        else "torch"
    )
    sizes: dict[str, Any] = {
        "bc_rnn_gmm": {"hidden_dim": 8},
        "bc_transformer_gmm": {"embed_dim": 8, "num_layers": 1},
    }
    config = PolicyConfig(
        policy=policy,
        hidden=16,
        horizon=3,
        n_action_steps=1,
        n_obs_steps=1,
        policy_options=sizes.get(policy, {}),
        action_normalization="minmax",
    )
    policy = build_policy(config, ABSOLUTE)
    actions = poses(12)
    numbers = statistics(torch.rand(5, 3))
    policy.fit_normalizers({"actions": statistics(actions), "hand": numbers})
    steps = 3 if policy.sequence else 1
    batch = {
        "obs": {"hand": torch.rand(4, steps, 3)},
        "actions": actions.view(4, 3, 14),
        "action_mask": torch.ones(4, 3, dtype=torch.bool),
    }
    policy.loss(batch)[0].backward()
    acted, _ = policy.eval().act({"hand": torch.rand(4, 1, 3)})
    assert acted.shape == (4, 1, 14)
    assert acted[..., 3:6].norm(dim=-1).max() <= np.pi + 1e-4


@pytest.mark.parametrize("policy", ["bc_gaussian", "bc_gmm"])
def test_a_policy_that_cannot_reach_the_actions_is_rejected(
    policy: str,
) -> None:
    pytest.importorskip("robomimic", reason="robomimic is not installed")
    policy = build_policy(PolicyConfig(policy=policy, hidden=16), ABSOLUTE)
    numbers = statistics(torch.rand(5, 3))
    small, large = poses(12).clamp(-1, 1), poses(12)
    small[:, 3:6] = 3.0  # a rotation, which has another range
    policy.fit_normalizers({"actions": statistics(small), "hand": numbers})
    with pytest.raises(
        UserError,
        match=r"in \[-1, 1\], but those of the data reach .*--action-normalization minmax",
    ):
        policy.fit_normalizers({"actions": statistics(large), "hand": numbers})
    policy.actions.kind = "gaussian"
    with pytest.raises(UserError, match=r"one standard deviation; .*--action-normalization minmax"):
        policy.fit_normalizers({"actions": statistics(small), "hand": numbers})


def test_a_run_on_a_file_of_absolute_actions_keeps_their_layout(tmp_path: Path) -> None:
    controller = {"type": "OSC_POSE", "control_delta": False}
    task = {
        "env_name": "Lift",
        "type": 1,
        "env_kwargs": {"robots": ["Panda"], "controller_configs": controller},
    }
    actions = poses(6)[:, :7].numpy()
    with DemoWriter(tmp_path / "absolute.hdf5", task) as writer:
        hand = {"robot0_eef_pos": np.random.default_rng(0).random((6, 3))}
        writer.add(hand, actions=actions, states=np.zeros((6, 2)), rewards=None, dones=None)
    policy = PolicyConfig(hidden=16, horizon=2, n_action_steps=1)
    optimizer = OptimizerConfig(steps=2, batch_size=4)
    train(
        TrainConfig(
            tmp_path / "absolute.hdf5",
            tmp_path / "run",
            cameras=(),
            policy=policy,
            optimizer=optimizer,
        )
    )
    loaded = load_policy(tmp_path / "run").policy
    assert loaded.shapes == Shapes({}, {"robot0_eef_pos": 3}, 7, absolute=True, rotations=(3,))
    acted, _ = loaded.act({"robot0_eef_pos": torch.zeros(1, 1, 3)})
    assert acted.shape == (1, 1, 7)


# Rotations.


def vectors(angles: list[float], directions: int = 200) -> torch.Tensor:
    axes = np.random.default_rng(0).normal(size=(directions, 3))
    axes = np.concatenate([axes, np.eye(3), -np.eye(3)])
    axes /= np.linalg.norm(axes, axis=-1, keepdims=True)
    return torch.as_tensor(np.concatenate([axes * angle for angle in angles]))


def test_6d_is_the_first_two_columns_of_the_matrix() -> None:
    given = vectors([0.0, 1e-9, 1e-3, 1.0, 3.0, np.pi, 4.0, 2 * np.pi])
    matrices = Rotation.from_rotvec(given.numpy()).as_matrix()
    expected = torch.as_tensor(np.concatenate([matrices[..., 0], matrices[..., 1]], axis=-1))
    torch.testing.assert_close(axis_angle_to_6d(given), expected, atol=1e-12, rtol=0)


def test_axis_angle_vectors_come_back() -> None:
    for dtype, tolerance in ((torch.float64, 1e-7), (torch.float32, 2e-3)):
        given = vectors([0.0, 1e-6, 0.01, 1.0, 2.0, 3.0, 3.14]).to(dtype)
        torch.testing.assert_close(
            axis_angle_from_6d(axis_angle_to_6d(given)), given, atol=tolerance, rtol=0
        )


def test_angles_beyond_pi_come_back_as_the_same_rotation() -> None:
    for angle in (np.pi, 3.2, 5.0, 6.28):
        given = vectors([angle])
        back = axis_angle_from_6d(axis_angle_to_6d(given))
        assert float(back.norm(dim=-1).max()) <= np.pi + 1e-9
        between = Rotation.from_rotvec(given.numpy()) * Rotation.from_rotvec(back.numpy()).inv()
        assert between.magnitude().max() < 1e-7


def test_any_two_vectors_give_the_rotation_of_gram_schmidt() -> None:
    columns = torch.as_tensor(np.random.default_rng(1).normal(size=(50, 6)))
    a, b = columns[:, :3].numpy(), columns[:, 3:].numpy()
    first = a / np.linalg.norm(a, axis=-1, keepdims=True)
    second = b - (first * b).sum(-1, keepdims=True) * first
    second /= np.linalg.norm(second, axis=-1, keepdims=True)
    matrices = np.stack([first, second, np.cross(first, second)], axis=-1)
    expected = Rotation.from_matrix(matrices).as_rotvec()
    torch.testing.assert_close(
        axis_angle_from_6d(columns), torch.as_tensor(expected), atol=1e-7, rtol=0
    )


def test_nearby_rotations_are_near_in_6d_where_their_vectors_are_far_apart() -> None:
    just_below, just_above = torch.tensor([[0.0, 0.0, 3.14]]), torch.tensor([[0.0, 0.0, -3.14]])
    assert float((just_below - just_above).norm()) > 6
    assert float((axis_angle_to_6d(just_below) - axis_angle_to_6d(just_above)).norm()) < 0.01
