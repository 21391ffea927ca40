from __future__ import annotations

import pytest
import torch

from fibopolicy.attention import (
    BASELINES,
    AttentionPattern,
    FibottentionPattern,
    fibottention,
    like,
)
from fibopolicy.attention.patterns import neighbours
from fibopolicy.errors import UserError

SPARSE = [name for name in BASELINES if name != "dense"]


@pytest.mark.parametrize("baseline", SPARSE)
@pytest.mark.parametrize(("heads", "num_tokens"), [(6, 196), (12, 196), (12, 784)])
@pytest.mark.parametrize("cls_token", [True, False])
def test_a_baseline_is_as_dense_as_its_pattern(
    baseline: str, heads: int, num_tokens: int, cls_token: bool
) -> None:
    pattern = FibottentionPattern(num_tokens, heads, cls_token=cls_token)
    assert like(pattern, baseline).density == pytest.approx(pattern.density, rel=0.025)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("cls_token", [True, False])
def test_a_baseline_is_symmetric_says_its_true_density_and_is_a_value(
    baseline: str, cls_token: bool
) -> None:
    pattern = like(FibottentionPattern(40, 3, layer=2, cls_token=cls_token), baseline)
    patches = pattern.mask()[:, int(cls_token) :, int(cls_token) :]
    assert torch.equal(patches, patches.mT)
    assert patches.double().mean().item() == pytest.approx(pattern.density)
    assert AttentionPattern.from_spec(pattern.spec) == pattern
    assert torch.equal(AttentionPattern.from_spec(pattern.spec).mask(), pattern.mask())
    near = neighbours(pattern)
    assert (near.start[:, -1] - near.start[:, 0] == pattern.mask().sum((1, 2)).numpy()).all()


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("backend", ["sdpa", "csr", "numba", "auto"])
def test_every_backend_computes_every_baseline(baseline: str, backend: str) -> None:
    torch.manual_seed(0)
    pattern = like(FibottentionPattern(30, 2), baseline)
    q, k, v = torch.randn(3, 2, 2, 31, 8, dtype=torch.float64)
    expected = fibottention(q, k, v, pattern, backend="reference")
    torch.testing.assert_close(fibottention(q, k, v, pattern, backend=backend), expected)


def test_baselines_are_what_they_are_called() -> None:
    pattern = FibottentionPattern(196, 6)
    assert like(pattern, "dense").mask().all()
    local = like(pattern, "local").offsets  # type: ignore[attr-defined]
    assert all(offsets == tuple(range(len(offsets))) for offsets in local)
    dilated = like(pattern, "dilated").offsets  # type: ignore[attr-defined]
    assert all(offsets == tuple(range(0, 4 * len(offsets), 4)) for offsets in dilated)
    assert len(set(like(pattern, "shared").offsets)) == 1  # type: ignore[attr-defined]
    masks = like(pattern, "random").mask()
    assert len({mask.numpy().tobytes() for mask in masks}) == 6
    assert not torch.equal(masks, like(FibottentionPattern(196, 6, layer=1), "random").mask())
    assert like(pattern, "unpermuted") == like(FibottentionPattern(196, 6), "unpermuted")


def test_bigbird_has_a_window_random_pairs_and_a_global_token() -> None:
    mask = like(FibottentionPattern(196, 6, cls_token=False), "bigbird").mask()
    assert mask[:, 0].all()
    assert mask.diagonal(dim1=1, dim2=2).all()
    assert mask[:, 1:, 1:].diagonal(3, 1, 2).any()
    assert len({head.numpy().tobytes() for head in mask}) == 6


def test_an_unknown_baseline_is_rejected_with_the_nearest_name() -> None:
    with pytest.raises(UserError, match="did you mean 'bigbird'"):
        like(FibottentionPattern(10, 2), "bigbrid")
