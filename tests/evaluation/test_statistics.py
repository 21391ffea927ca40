from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.proportion import proportion_confint

from fibopolicy.errors import UserError
from fibopolicy.evaluation.statistics import wilson


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_agrees_with_statsmodels(counts: tuple[int, int]) -> None:
    rate = wilson(*counts)
    low, high = proportion_confint(*counts, alpha=0.05, method="wilson")
    assert rate.low == pytest.approx(low, abs=1e-9)
    assert rate.high == pytest.approx(high, abs=1e-9)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


def test_impossible_counts_are_refused() -> None:
    for counts in ((1, 0), (3, 2), (-1, 5)):
        with pytest.raises(UserError):
            wilson(*counts)
