"""The token pairs that each attention head keeps.

Patterns are frozen dataclasses, hashable and comparable. Patch tokens are in raster
order, so an offset of +-1 wraps from the end of one image row to the start of the next.
When one sequence holds the patches of several cameras, offsets cross from one camera to
the next in the same way. The published method does the same: it treats the tokens as a
flat sequence.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fibopolicy.errors import UserError

F = TypeVar("F", bound=Callable[..., object])


def wythoff(i: int) -> tuple[int, int]:
    """Row `i >= 1` of the Wythoff array: (1, 2), (4, 7), (6, 10), ...  in exact integer
    arithmetic.

    With m = floor(i*phi): a = floor(m*phi) and b = floor(m*phi^2) = a + m.
    """
    m = _floor_phi(i)
    a = _floor_phi(m)
    return a, a + m


def _floor_phi(n: int) -> int:
    """floor(n * (1 + sqrt 5) / 2), exact for any size of n."""
    return (n + math.isqrt(5 * n * n)) // 2


def get_fibonacci(a: int, b: int, w: int) -> tuple[int, ...]:
    """The Fibonacci-like sequence a, b, a+b, a+2b, ... up to and including `w`
    (Algorithm 1).

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


@dataclass(frozen=True, kw_only=True)
class AttentionPattern(ABC):
    """The pairs of patches that each head keeps.

    Kept pairs are symmetric: (j, k) is kept iff (k, j) is. Prefix tokens (CLS,
    registers) precede the patches. They attend to all tokens and are attended to by
    all.

    Args:
        num_tokens: N, the number of patch tokens.
        num_heads: h.
        layer: index of the layer, from 0.
        cls_token: whether a CLS token precedes the patches; an integer gives the number
            of prefix tokens (CLS and registers).
    """

    num_tokens: int = field(kw_only=False)
    num_heads: int = field(kw_only=False)
    layer: int = 0
    cls_token: bool | int = True
    #: The pattern as a string, for torch operators; `from_spec` parses it.
    spec: str = field(init=False, repr=False, compare=False)

    _kind: ClassVar[str]
    _kinds: ClassVar[dict[str, type[AttentionPattern]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        kind = f"{cls.__module__}.{cls.__qualname__}"
        while kind in AttentionPattern._kinds:  # defined again, for example in a notebook
            kind += "'"
        cls._kind = kind
        AttentionPattern._kinds[kind] = cls

    def __post_init__(self) -> None:
        for name, value in (
            ("num_tokens", self.num_tokens),
            ("num_heads", self.num_heads),
            ("layer", self.layer),
            ("cls_token", self.cls_token),
        ):
            try:
                object.__setattr__(self, name, operator.index(value))  # accepts numpy's integers
            except TypeError:
                raise UserError(f"{name} of a pattern must be an integer, got {value!r}") from None
        if self.num_tokens < 1 or self.num_heads < 1:
            raise UserError(
                f"a pattern needs num_tokens >= 1 and num_heads >= 1, got {self.num_tokens} and"
                f" {self.num_heads}"
            )
        if self.layer < 0:
            raise UserError(f"layer must be at least 0, got {self.layer}")
        if self.cls_token < 0:
            raise UserError(
                f"cls_token must be True, False or a number of tokens, got {self.cls_token}"
            )
        values = {
            item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.init
        }
        # Stored, not computed on demand, so that torch.compile sees a plain string. The
        # dataclass is frozen, hence __setattr__.
        spec = json.dumps({"kind": self._kind, **values}, default=operator.index)
        object.__setattr__(self, "spec", spec)

    @staticmethod
    def from_spec(spec: str) -> AttentionPattern:
        """The pattern with this `spec`. Equal strings give the same object while it is
        cached.
        """
        return _from_spec(spec)

    @property
    def num_prefix(self) -> int:
        """The number of tokens before the patches."""
        return int(self.cls_token)

    @property
    def sequence_length(self) -> int:
        """T: the number of tokens, prefix tokens included."""
        return self.num_tokens + self.num_prefix

    @property
    def keeps_all(self) -> bool:
        """Whether every pair is kept in every head: plain dense attention."""
        return False

    @abstractmethod
    def patch_pairs(self, head: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """The kept patch pairs (j, k) of a head slot as two arrays, ascending by j,
        then k, with each pair's mirror (k, j). Takes time linear in their number.
        """

    def mask(self, device: torch.device | str | None = None) -> Tensor:
        """Boolean (h, T, T), true where a pair is kept. Its memory is quadratic in T:
        for tests, plots and masked dense attention.
        """
        # a copy, so that callers cannot change the cached mask
        mask = torch.from_numpy(_mask(self).copy())
        return mask if device is None else mask.to(device)

    @functools.cached_property
    def density(self) -> float:
        """Kept patch pairs over N^2, averaged over the heads; prefix tokens are not counted."""
        kept = sum(len(self.patch_pairs(head)[0]) for head in range(self.num_heads))
        return kept / (self.num_tokens**2 * self.num_heads)

    @functools.cached_property
    def kept_share(self) -> float:
        """Kept pairs over T^2, prefix tokens included, averaged over the heads."""
        length = self.sequence_length
        with_prefix = length**2 - self.num_tokens**2
        return (with_prefix + self.density * self.num_tokens**2) / length**2


@functools.lru_cache(maxsize=256)
def _from_spec(spec: str) -> AttentionPattern:
    values = {name: _tuples(value) for name, value in json.loads(spec).items()}
    return AttentionPattern._kinds[values.pop("kind")](**values)


def _tuples(value: Any) -> Any:
    """A value of a pattern, hashable again after JSON made lists of its tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@functools.lru_cache(maxsize=64)
def _mask(pattern: AttentionPattern) -> NDArray[np.bool_]:
    # Numpy, because a tensor created under torch.export is fake, and the cache would
    # keep it.
    length, first = pattern.sequence_length, pattern.num_prefix
    mask = np.ones((pattern.num_heads, length, length), dtype=np.bool_)
    mask[:, first:, first:] = False
    for head in range(pattern.num_heads):
        row, key = pattern.patch_pairs(head)
        mask[head, row + first, key + first] = True
    return mask


def shared_mask(pattern: AttentionPattern, device: torch.device) -> Tensor:
    """`pattern.mask(device)`, cached per device. Do not modify it."""
    if device.type == "cpu" or torch.compiler.is_compiling():
        mask: Tensor = _cpu_mask(pattern.spec)
        return mask.to(device)
    return _device_mask(pattern, device)


def constant_to_compiler(function: F) -> F:
    """What `torch.compiler.assume_constant_result` does, without its import of
    torch._dynamo, which would double the time that a command takes to start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_to_compiler
def _cpu_mask(spec: str) -> Tensor:
    return torch.from_numpy(_mask(AttentionPattern.from_spec(spec)))


@functools.lru_cache(maxsize=64)
def _device_mask(pattern: AttentionPattern, device: torch.device) -> Tensor:
    return torch.from_numpy(_mask(pattern)).to(device)


class OffsetPattern(AttentionPattern):
    """A pattern made of diagonals: patches j and k attend to each other iff |j - k| is
    an offset of the head.
    """

    @property
    @abstractmethod
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Per head slot: the kept |j - k|, ascending, each below N."""

    def patch_pairs(self, head: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        return _diagonals(self.num_tokens, self.offsets[head])

    @functools.cached_property
    def density(self) -> float:
        """Kept patch pairs over N^2, averaged over the heads; prefix tokens are not counted."""
        n = self.num_tokens
        return sum(diagonal_pairs(n, o) for head in self.offsets for o in head) / (
            n * n * self.num_heads
        )


def diagonal_pairs(num_tokens: int, offset: int) -> int:
    """Number of ordered patch pairs at distance `offset`: both diagonals, or the main one for 0."""
    return 2 * (num_tokens - offset) if offset else num_tokens


def _diagonals(
    num_tokens: int, offsets: tuple[int, ...]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    signed = np.array(
        sorted({sign * offset for offset in offsets for sign in (-1, 1)}), dtype=np.int32
    )
    key = np.arange(num_tokens, dtype=np.int32)[:, None] + signed  # (N, signed offsets)
    row, column = np.nonzero((key >= 0) & (key < num_tokens))
    return row.astype(np.int32), key[row, column]


@dataclass(frozen=True, kw_only=True)
class FibottentionPattern(OffsetPattern):
    """The diagonals that every head of one layer keeps.

    Args:
        num_tokens: N, the number of patch tokens.
        num_heads: h.
        w_min, w_max: the window w_i of head i grows linearly from w_min to w_max;
            `None` means max(N // 3, w_min).
        modified: heads after the first also get the two Wythoff columns to their left.
        layer: index of the layer, from 0; seeds the permutation of the offset sets over
            the head slots, which is fixed during training.
        cls_token: whether a CLS token precedes the patches; an integer gives the number
            of prefix tokens (CLS and registers).
        main_diagonal: also keep offset 0 for the first head (before permutation), only
            with `modified`.
        permuted: False gives head i set i in every layer: the baseline without
            permutation.

    Source: Fibottention (Rahimian et al.), following the released code where the text
    is ambiguous.
    """

    w_min: int = 5
    w_max: int | None = None
    modified: bool = False
    main_diagonal: bool = False
    permuted: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.w_min < 1:
            raise UserError(f"w_min must be at least 1, got {self.w_min}")
        if self.w_max is not None and self.w_max < self.w_min:
            raise UserError(
                f"w_max must be at least w_min = {self.w_min}, got {self.w_max}; use None for max(N"
                " // 3, w_min)"
            )
        if self.main_diagonal and not self.modified:
            raise UserError(
                "main_diagonal is an option of the modified variant; pass modified=True as well"
            )

    @functools.cached_property
    def offsets(self) -> tuple[tuple[int, ...], ...]:
        """Per head slot, after the layer's permutation: the kept |j - k|, ascending,
        each below N.
        """
        sets = [self._head_offsets(i) for i in range(1, self.num_heads + 1)]
        if self.permuted:
            # a local generator, so that the global one stays unchanged
            random.Random(self.layer).shuffle(sets)
        return tuple(sets)

    def _head_offsets(self, i: int) -> tuple[int, ...]:
        w_max = max(self.num_tokens // 3, self.w_min) if self.w_max is None else self.w_max
        w = self.w_min + (
            (i - 1) * (w_max - self.w_min) // (self.num_heads - 1) if self.num_heads > 1 else 0
        )
        kept = set(get_fibonacci(*wythoff(i), w))
        if self.modified and i > 1:
            kept |= {i - 1, _floor_phi(i)}
        if self.main_diagonal and i == 1:
            kept.add(0)
        return tuple(sorted(o for o in kept if o < self.num_tokens))


def generate_fibomask(
    layer: int,
    num_tokens: int,
    num_heads: int,
    w_min: int = 5,
    w_max: int | None = None,
    is_modified: bool = False,
) -> Tensor:
    """The mask of all heads of one layer, with a CLS token: boolean (h, N + 1, N + 1)
    (Algorithm 2).

    >>> generate_fibomask(0, 196, 12).shape
    torch.Size([12, 197, 197])
    """
    return FibottentionPattern(
        num_tokens, num_heads, w_min=w_min, w_max=w_max, modified=is_modified, layer=layer
    ).mask()


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Keys per token in compressed sparse rows (CSR), one head after another.

    Attributes:
        start: int64 `(h, T + 1)`; the keys of token t in head i are `key[start[i, t] :
            start[i, t + 1]]`, ascending.
        key: int32 `(pairs,)`.
        transpose: int32 `(pairs,)`; the pair (t, k) at position e of its head has (k,
            t) at position `transpose[e]` of the same head. Kept pairs are symmetric, so
            the backward pass gathers instead of scattering.
    """

    start: NDArray[np.int64]
    key: NDArray[np.int32]
    transpose: NDArray[np.int32]

    @functools.cached_property
    def addresses(self) -> dict[str, int]:
        """The addresses of the arrays, for compiled code."""
        return {name: getattr(self, name).ctypes.data for name in ("start", "key", "transpose")}

    @functools.cached_property
    def pairs_per_head(self) -> int:
        """The largest number of kept pairs of any head."""
        return int((self.start[:, -1] - self.start[:, 0]).max())


@functools.lru_cache(maxsize=64)
def neighbours(pattern: AttentionPattern) -> Neighbours:
    """The neighbour lists of a pattern, cached by its value.

    Raises:
        UserError: its pairs are not symmetric, or not in order.
    """
    length, prefix = pattern.sequence_length, pattern.num_prefix
    starts, keys, transposes = [], [], []
    base = 0
    for head in range(pattern.num_heads):
        row, patch_key = pattern.patch_pairs(head)
        counts = np.concatenate(
            [np.full(prefix, length), prefix + np.bincount(row, minlength=pattern.num_tokens)]
        )
        start = np.concatenate([[0], np.cumsum(counts)])
        key = np.empty(start[-1], dtype=np.int32)
        key[: prefix * length] = np.tile(np.arange(length, dtype=np.int32), prefix)
        for i in range(prefix):
            key[start[prefix:-1] + i] = i
        # A patch pair comes after all earlier ones, the prefix rows, and the prefix
        # keys of its row and of earlier rows.
        key[np.arange(len(row)) + prefix * length + (row.astype(np.int64) + 1) * prefix] = (
            patch_key + np.int32(prefix)
        )
        starts.append(start + base)
        keys.append(key)
        # Sorting a symmetric set by (key, row) lists the mirrored pairs in the same
        # order as sorting by (row, key) lists the pairs.
        transpose = np.argsort(key, kind="stable")
        rows = np.repeat(np.arange(length), counts)
        if not (np.array_equal(key[transpose], rows) and np.array_equal(rows[transpose], key)):
            raise UserError(
                f"{type(pattern).__name__}.patch_pairs({head}) must keep the pair (k, j) with every"
                " pair (j, k), and list each pair once, ascending by j, then k"
            )
        transposes.append(transpose.astype(np.int32))
        base += len(key)
    return Neighbours(np.stack(starts), np.concatenate(keys), np.concatenate(transposes))
