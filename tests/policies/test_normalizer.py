from __future__ import annotations

import numpy as np
import pytest
import torch

from fibopolicy.policies.actions import Normalizer

LOW, HIGH = np.array([-0.5, 0.0, 0.2, 1.0]), np.array([0.5, 1.0, 0.4, 1.0])
STATISTICS = {"min": LOW, "max": HIGH, "mean": (LOW + HIGH) / 2, "std": (HIGH - LOW) / 4}


@pytest.mark.parametrize("kind", ["minmax", "gaussian"])
def test_normalizer_inverts_and_leaves_constant_dimensions_finite(kind: str) -> None:
    normalizer = Normalizer(4, kind)
    normalizer.fit(STATISTICS)
    x = torch.tensor([[-0.5, 1.0, 0.3, 1.0]])
    torch.testing.assert_close(normalizer.invert(normalizer(x)), x)
    expected = [-1.0, 1.0, 0.0, 0.0] if kind == "minmax" else [-2.0, 2.0, 0.0, 0.0]
    torch.testing.assert_close(normalizer(x), torch.tensor([expected]), atol=1e-5, rtol=0)
