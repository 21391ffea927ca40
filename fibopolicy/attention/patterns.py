"""Which token pairs each attention head keeps.

A pattern is a value: frozen, hashable, comparable. Patch tokens stand in raster order, so an offset of +-1 wraps from
the end of one image row to the start of the next; when the patches of several cameras stand in one sequence, offsets
cross the camera border in the same way. Both are part of the method as published, which knows a flat sequence only.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fibopolicy.errors import UserError


def wythoff(i: int) -> tuple[int, int]:
    """Row `i >= 1` of the Wythoff array: (1, 2), (4, 7), (6, 10), ...  in exact integer arithmetic.

    With m = floor(i*phi): a = floor(m*phi) and b = floor(m*phi^2) = a + m.
    """
    m = _floor_phi(i)
    a = _floor_phi(m)
    return a, a + m


def _floor_phi(n: int) -> int:
    """floor(n * (1 + sqrt 5) / 2), exact for any size of n."""
    return (n + math.isqrt(5 * n * n)) // 2


def get_fibonacci(a: int, b: int, w: int) -> tuple[int, ...]:
    """The Fibonacci-like sequence a, b, a+b, a+2b, ... up to and including `w` (Algorithm 1).

    The first term is kept even when it exceeds `w`, so that no head is left empty.

    >>> get_fibonacci(4, 7, 20)
    (4, 7, 11, 18)
    >>> get_fibonacci(30, 49, 20)
    (30,)
    """
    terms = [a]
    while b <= w:
        terms.append(b)
        a, b = b, a + b
    return tuple(terms)


@dataclass(frozen=True)
class FibottentionPattern:
    """The diagonals that every head of one layer keeps: patches (j, k) see each other iff |j - k| is an offset.

    Args:
        num_tokens: N, the patch tokens, without the CLS token.
        num_heads: h.
        w_min, w_max: the window w_i of head i grows linearly from w_min to w_max; `None` means max(N // 3, w_min).
        modified: heads after the first also get the two Wythoff columns to their left.
        layer: from 0; permutes which head slot holds which offset set, fixed over training.
        cls_token: one token stands before the patches; it sees and is seen by all.
        main_diagonal: also keep offset 0 for the first head (before permutation), only with `modified`.

    Source: Fibottention (Rahimian et al.), with the corrections of the released code where the text is ambiguous.
    """

    num_tokens: int
    num_heads: int
    w_min: int = 5
    w_max: int | None = None
    modified: bool = False
    layer: int = 0
    cls_token: bool = True
    main_diagonal: bool = False

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or self.num_heads < 1:
            raise UserError(f"a pattern needs num_tokens >= 1 and num_heads >= 1, got {self.num_tokens} and {self.num_heads}")
        if self.w_min < 1:
            raise UserError(f"w_min must be at least 1, got {self.w_min}")
        if self.w_max is not None and self.w_max < self.w_min:
            raise UserError(f"w_max must be at least w_min = {self.w_min}, got {self.w_max}; use None for max(N // 3, w_min)")
        if self.layer < 0:
            raise UserError(f"layer counts from 0, got {self.layer}")
        if self.main_diagonal and not self.modified:
            raise UserError("main_diagonal is an option of the modified variant; pass modified=True as well")

    @property
    def sequence_length(self) -> int:
        """T: all tokens of the sequence, N (+ 1 with a CLS token)."""
        return self.num_tokens + int(self.cls_token)

    @functools.cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Per head slot, after the layer's permutation: the kept |j - k|, ascending, each below N."""
        sets = [self._head_offsets(i) for i in range(1, self.num_heads + 1)]
        random.Random(self.layer).shuffle(sets)  # a generator of its own: the global one stays untouched
        return tuple(sets)

    def _head_offsets(self, i: int) -> tuple[int, ...]:
        w_max = max(self.num_tokens // 3, self.w_min) if self.w_max is None else self.w_max
        w = self.w_min + ((i - 1) * (w_max - self.w_min) // (self.num_heads - 1) if self.num_heads > 1 else 0)
        kept = set(get_fibonacci(*wythoff(i), w))
        if self.modified and i > 1:
            kept |= {i - 1, _floor_phi(i)}
        if self.main_diagonal and i == 1:
            kept.add(0)
        return tuple(sorted(o for o in kept if o < self.num_tokens))

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """Boolean (h, T, T), true where a pair is kept. Quadratic in T: for tests, pictures and masked dense attention."""
        return _mask(self).to(device) if device is not None else _mask(self)

    @functools.cached_property
    def density(self) -> float:
        """Kept patch pairs over N^2, averaged over the heads; the CLS token is not counted."""
        n = self.num_tokens
        kept = sum(2 * (n - o) if o else n for head in self.offsets for o in head)
        return kept / (n * n * self.num_heads)


@functools.lru_cache(maxsize=64)
def _mask(pattern: FibottentionPattern) -> Tensor:
    position = torch.arange(pattern.num_tokens)
    distance = (position[:, None] - position[None, :]).abs()  # (N, N)
    mask = torch.ones(pattern.num_heads, pattern.sequence_length, pattern.sequence_length, dtype=torch.bool)
    first = int(pattern.cls_token)
    for head, offsets in enumerate(pattern.offsets):
        mask[head, first:, first:] = _is_in(distance, offsets)
    return mask


def _is_in(distance: Tensor, offsets: Iterable[int]) -> Tensor:
    return torch.isin(distance, torch.tensor(list(offsets), dtype=distance.dtype))


def generate_fibomask(
    layer: int,
    num_tokens: int,
    num_heads: int,
    w_min: int = 5,
    w_max: int | None = None,
    is_modified: bool = False,
) -> Tensor:
    """The mask of all heads of one layer, with a CLS token: boolean (h, N + 1, N + 1) (Algorithm 2).

    >>> generate_fibomask(0, 196, 12).shape
    torch.Size([12, 197, 197])
    """
    return FibottentionPattern(num_tokens, num_heads, w_min=w_min, w_max=w_max, modified=is_modified, layer=layer).mask().clone()
