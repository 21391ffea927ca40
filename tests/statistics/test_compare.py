from __future__ import annotations

import numpy as np
from simulated import outcomes

from fibopolicy.statistics.compare import best_set


def test_the_set_of_the_best_holds_the_best_method() -> None:
    rng, covered, sizes = np.random.default_rng(1), 0, []
    for _ in range(200):
        init_states = 1.5 * rng.normal(size=50)
        found = [outcomes(rng, 3, init_states, mean, 0.3) for mean in (2.0, 1.8, 1.8, -1.0)]
        best = best_set("abcd", found)
        covered += "a" in best
        sizes.append(len(best))
        assert "d" not in best
    assert covered >= 190
    assert np.mean(sizes) > 2
