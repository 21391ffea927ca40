from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from simulated import outcomes

from fibopolicy.errors import UserError
from fibopolicy.statistics.differences import Difference
from fibopolicy.statistics.sequential import LookPlan


@pytest.mark.parametrize(
    ("looks", "published"),
    [
        (2, (2.9626, 1.9686)),
        (3, (3.7103, 2.5114, 1.9930)),
        (5, (4.8769, 3.3570, 2.6803, 2.2898, 2.0310)),
    ],
)
def test_the_boundaries_are_the_published_ones(looks: int, published: tuple[float, ...]) -> None:
    plan = LookPlan(tuple((k + 1) / looks for k in range(looks)))
    bounds = norm.isf(np.array([plan.nominal(k) for k in range(looks)]) / 2)
    assert bounds == pytest.approx(published, abs=2e-4)


@pytest.mark.parametrize("alpha", [0.3, 0.05, 0.004, 1e-6])
@pytest.mark.parametrize("look", [0, 1, 2])
def test_a_p_value_at_the_boundary_of_a_level_is_that_level(look: int, alpha: float) -> None:
    plan = LookPlan((0.4, 0.6, 1))
    assert plan.p([1.0] * look + [plan.nominal(look, alpha)]) == pytest.approx(alpha, rel=2e-3)


def test_a_decision_stands_whatever_later_looks_find() -> None:
    plan = LookPlan((0.4, 0.6, 1))
    assert plan.p([1e-5, 0.9, 0.9]) == plan.p([1e-5]) < 0.05


def test_one_look_changes_nothing() -> None:
    assert LookPlan((1,)).p([0.0312]) == pytest.approx(0.0312, rel=1e-3)
    assert LookPlan((1,)).nominal(0) == pytest.approx(0.05)


@pytest.mark.parametrize("spread", [0.0, 0.5])
def test_looks_at_growing_seeds_keep_false_positives_and_coverage(spread: float) -> None:
    seeds, plan, n = (2, 3, 5), LookPlan((0.4, 0.6, 1)), 50
    rng, repetitions = np.random.default_rng(0), 300
    confidence = [1 - plan.nominal(look) for look in range(3)]
    ever_rejected = naively_rejected = ever_missed = 0
    for _ in range(repetitions):
        difficulty = rng.normal(size=n)
        a, b = (outcomes(rng, seeds[-1], difficulty, 1.5, spread) for _ in range(2))
        found = [
            Difference(a[:s], b[:s], confidence=c) for s, c in zip(seeds, confidence, strict=True)
        ]
        ever_rejected += plan.p([one.p for one in found]) <= 0.05
        naively_rejected += min(one.p for one in found) <= 0.05
        ever_missed += any(not one.low <= 0 <= one.high for one in found)
    assert ever_rejected <= 0.05 * repetitions
    assert ever_missed <= 0.05 * repetitions
    assert naively_rejected > ever_rejected


@pytest.mark.parametrize("fractions", [(), (0.5,), (0.5, 0.5, 1), (0, 1), (0.5, 1.5)])
def test_fractions_that_do_not_rise_to_one_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="must rise from above 0 to 1"):
        LookPlan(fractions)
