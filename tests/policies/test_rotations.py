from __future__ import annotations

import numpy as np
import torch
from scipy.spatial.transform import Rotation

from fibopolicy.policies.rotations import axis_angle_from_6d, axis_angle_to_6d


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
