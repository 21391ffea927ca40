from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import dense_mask, offset_sets

from fibopolicy.attention import (
    AttentionPattern,
    FibottentionPattern,
    LocalPattern,
    OffsetPattern,
    fibottention,
    generate_fibomask,
    get_fibonacci,
    wythoff,
)
from fibopolicy.attention.patterns import neighbours
from fibopolicy.errors import UserError

WYTHOFF = [
    (1, 2),
    (4, 7),
    (6, 10),
    (9, 15),
    (12, 20),
    (14, 23),
    (17, 28),
    (19, 31),
    (22, 36),
    (25, 41),
    (27, 44),
    (30, 49),
]
H12_N196 = [{1, 2, 3, 5}, *({a, b} for a, b in WYTHOFF[1:])]
H6_N196 = [
    {1, 2, 3, 5}, {4, 7, 11}, {6, 10, 16, 26}, {9, 15, 24, 39}, {12, 20, 32, 52}, {14, 23, 37, 60},
]  # fmt: skip


def test_wythoff_rows_are_the_published_ones() -> None:
    assert [wythoff(i) for i in range(1, 13)] == WYTHOFF


def test_wythoff_is_exact_for_integers_beyond_float_precision() -> None:
    i = 10**30
    a, b = wythoff(i)
    m = b - a
    # m = floor(i phi) and a = floor(m phi), tested without roots: n = floor(x phi) iff
    # n^2 - n x - x^2 < 0 <= that of n + 1.
    for n, x in ((m, i), (a, m)):
        assert n * n - n * x - x * x < 0 < (n + 1) ** 2 - (n + 1) * x - x * x


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 500))
def test_fibonacci_sequences_grow_by_sums_and_stop_at_the_window(a: int, more: int, w: int) -> None:
    terms = get_fibonacci(a, a + more, w)
    assert terms[0] == a
    assert all(term <= w for term in terms[1:])
    assert all(z == x + y for x, y, z in zip(terms, terms[1:], terms[2:], strict=False))
    last = (0, *terms, a + more)
    assert len(terms) == 1 or last[-2] + last[-3] > w


@pytest.mark.parametrize(("heads", "sets"), [(12, H12_N196), (6, H6_N196)])
def test_offsets_of_196_tokens_are_the_golden_ones(heads: int, sets: list[set[int]]) -> None:
    assert [set(o) for o in FibottentionPattern(196, heads, permuted=False).offsets] == sets


@pytest.mark.parametrize(
    ("heads", "layer", "slots"),
    [
        (12, 0, [2, 10, 9, 6, 11, 3, 4, 8, 5, 1, 12, 7]),
        (12, 1, [8, 12, 1, 9, 6, 7, 4, 11, 5, 2, 10, 3]),
        (6, 0, [5, 3, 2, 1, 6, 4]),
        (6, 1, [3, 4, 6, 1, 5, 2]),
    ],
)
def test_layers_permute_the_sets_over_the_slots(heads: int, layer: int, slots: list[int]) -> None:
    sets = FibottentionPattern(196, heads, permuted=False).offsets
    assert FibottentionPattern(196, heads, layer=layer).offsets == tuple(
        sets[slot - 1] for slot in slots
    )


@pytest.mark.parametrize(
    ("heads", "num_tokens", "percent"),
    [
        (12, 196, 1.994),
        (6, 196, 3.540),
        (3, 196, 4.450),
        (6, 588, 1.753),
        (12, 784, 1.151),
        (12, 3136, 0.460),
    ],
)
def test_density_is_the_published_one(heads: int, num_tokens: int, percent: float) -> None:
    assert FibottentionPattern(num_tokens, heads).density * 100 == pytest.approx(percent, abs=5e-4)


def test_modified_density_is_the_golden_one() -> None:
    assert FibottentionPattern(196, 6, modified=True).density * 100 == pytest.approx(
        5.202, abs=5e-4
    )


def test_released_robot_preset_has_the_authors_density() -> None:
    assert FibottentionPattern(
        81, 12, w_min=81, w_max=81, modified=True
    ).density * 100 == pytest.approx(10.8, abs=0.05)


@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 9),
    st.booleans(),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_mask_and_neighbours_equal_the_definition(
    num_tokens: int, heads: int, w_min: int, modified: bool, layer: int, prefix: int
) -> None:
    pattern = FibottentionPattern(
        num_tokens, heads, w_min=w_min, modified=modified, layer=layer, cls_token=prefix
    )
    sets = offset_sets(num_tokens, heads, w_min, None, modified, layer)
    mask = dense_mask(sets, num_tokens, prefix)
    assert torch.equal(pattern.mask(), mask)
    near = neighbours(pattern)
    for head in range(heads):
        begin = near.start[head, 0]
        rows = torch.repeat_interleave(
            torch.arange(num_tokens + prefix), torch.from_numpy(near.start[head]).diff()
        )
        keys, transposed = (
            torch.from_numpy(x[begin : near.start[head, -1]]).long()
            for x in (near.key, near.transpose)
        )
        assert torch.equal(torch.stack([rows, keys]), mask[head].nonzero().T)
        assert torch.equal(rows[transposed], keys)
        assert torch.equal(keys[transposed], rows)


def test_generate_fibomask_keeps_the_cls_row_and_column_and_leaves_the_global_generator_alone() -> (
    None
):
    random.seed(3)
    before = random.getstate()
    mask = generate_fibomask(2, 30, 4, is_modified=True)
    assert random.getstate() == before
    assert mask.shape == (4, 31, 31)
    assert mask[:, 0].all()
    assert mask[:, :, 0].all()
    assert not mask[:, 1:, 1:].diagonal(dim1=1, dim2=2).any()


def test_writing_into_a_mask_changes_no_later_one() -> None:
    pattern = FibottentionPattern(10, 2)
    pattern.mask().fill_(True)
    assert not pattern.mask().all()


def test_main_diagonal_joins_the_first_set_only() -> None:
    pattern = FibottentionPattern(30, 3, modified=True, main_diagonal=True, permuted=False)
    assert [0 in offsets for offsets in pattern.offsets] == [True, False, False]


def test_patterns_are_values() -> None:
    pattern = FibottentionPattern(20, 3, w_min=4, layer=1)
    assert pattern == FibottentionPattern(20, 3, w_min=4, layer=1)
    assert (
        len(
            {
                pattern,
                FibottentionPattern(20, 3, w_min=4, layer=1),
                FibottentionPattern(20, 3, layer=1),
            }
        )
        == 2
    )
    assert AttentionPattern.from_spec(pattern.spec) == pattern


@pytest.mark.parametrize(
    "options",
    [
        {"num_tokens": 0}, {"num_heads": 0}, {"w_min": 0}, {"w_max": 2}, {"layer": -1}, {"cls_token": -1},  # noqa: E501
        {"main_diagonal": True},
    ],
)  # fmt: skip
def test_impossible_patterns_are_rejected(options: dict[str, int]) -> None:
    with pytest.raises(UserError):
        FibottentionPattern(**{"num_tokens": 10, "num_heads": 2, **options})  # type: ignore[arg-type]


def custom_pattern(offset: int) -> type[OffsetPattern]:
    """A class of the user's, named like one of ours; every call defines it again."""

    @dataclass(frozen=True, kw_only=True)
    class LocalPattern(OffsetPattern):
        further: tuple[tuple[int, ...], ...] = ((7,), (7, 9))

        @property
        def offsets(self) -> tuple[tuple[int, ...], ...]:
            return tuple((offset, *more) for more in self.further)

    return LocalPattern


@pytest.mark.parametrize("backend", ["numba", "csr", "sdpa", "reference"])
def test_patterns_of_classes_of_one_name_keep_their_own_pairs(backend: str) -> None:
    q = torch.randn(1, 2, 25, 16)
    first, again = custom_pattern(1), custom_pattern(2)
    ours = LocalPattern(24, 2, target=0.2)
    for pattern in (first(24, 2), again(24, 2), ours):
        logits = (q @ q.mT / 4).masked_fill(~pattern.mask(), -torch.inf)
        expected = logits.softmax(-1) @ q
        torch.testing.assert_close(fibottention(q, q, q, pattern, backend=backend), expected)


@pytest.mark.parametrize("pairs", [([1, 2], [0, 1]), ([0, 0, 1, 2], [2, 1, 0, 0])])
def test_pairs_without_their_mirrors_or_out_of_order_are_rejected(
    pairs: tuple[list[int], list[int]],
) -> None:
    class Custom(AttentionPattern):
        def patch_pairs(self, head: int) -> tuple[np.ndarray, np.ndarray]:
            row, key = (np.array(x, dtype=np.int32) for x in pairs)
            return row, key

    q = torch.randn(1, 1, 4, 16)
    with pytest.raises(UserError, match=r"Custom.patch_pairs\(0\) must keep the pair \(k, j\)"):
        fibottention(q, q, q, Custom(3, 1), backend="numba")


def test_numbers_may_be_numpys() -> None:
    pattern = FibottentionPattern(20, 2, w_min=np.int64(4), cls_token=np.int32(2))  # type: ignore[arg-type]
    assert pattern == FibottentionPattern(20, 2, w_min=4, cls_token=2)
    assert pattern.spec == FibottentionPattern(20, 2, w_min=4, cls_token=2).spec
    with pytest.raises(UserError, match=r"cls_token of a pattern must be an integer, got 1\.5"):
        FibottentionPattern(20, 2, cls_token=1.5)  # type: ignore[arg-type]
