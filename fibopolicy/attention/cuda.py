"""The CUDA backend: launches the Triton kernels with little work on the host. On a CPU
they run in Triton's interpreter, for tests: TRITON_INTERPRET=1.

All that depends only on the pattern, shapes and strides is computed once and cached: a
`_Launch` for each kernel, and the pattern's offsets on the device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fibopolicy.attention.operator import KERNELS, Kernels, with_contiguous_rows
from fibopolicy.attention.patterns import AttentionPattern, OffsetPattern, constant_to_compiler

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
#: The first cards that multiply bfloat16 on tensor cores.
_MIN_CAPABILITY = (8, 0)
#: A program for prefix rows reads at most this many tokens; longer sequences are split.
_TOKENS_PER_SPLIT = 1024
#: Prefix rows per program with tensor cores, which multiply 16 rows at a time.
_DOT_ROWS = 16

_INSTALLED = importlib.util.find_spec("triton") is not None


class Tiling(NamedTuple):
    """How a kernel divides its work.

    Attributes:
        dot: multiply with tensor cores, for 16-bit inputs.
        groups: groups of 16 rows per program.
        warps: warps per program.
        stages: 1: load through the L1 cache, when needed; more: load into shared memory
            `stages - 1` steps ahead, past the L1 cache.
    """

    dot: bool
    groups: int
    warps: int
    stages: int


_WIDE = (256, Tiling(False, 1, 8, 1))
#: By kernel: tilings for 16-bit and for 32-bit inputs, each up to a head dimension.
#: `scripts/benchmarks/attention_registers.py` shows their registers; up to d = 128 none
#: spills them.
TILINGS: dict[str, dict[int, tuple[tuple[int, Tiling], ...]]] = {
    "forward": {
        16: ((64, Tiling(True, 4, 4, 2)), (128, Tiling(True, 2, 4, 2)), _WIDE),
        32: ((64, Tiling(False, 2, 4, 1)), _WIDE),
    },
    "backward_queries": {
        16: ((64, Tiling(True, 4, 4, 2)), (128, Tiling(True, 2, 4, 2)), _WIDE),
        32: ((64, Tiling(False, 2, 4, 1)), _WIDE),
    },
    "backward_keys": {
        16: ((64, Tiling(True, 4, 4, 2)), (128, Tiling(True, 2, 8, 2)), _WIDE),
        32: ((64, Tiling(False, 2, 4, 1)), _WIDE),
    },
}
#: Replaces the choice from `TILINGS` by kernel, for benchmarks and tests; call
#: `forget_launches` after a change.
OVERRIDES: dict[str, Tiling] = {}


def available() -> bool:
    """Whether Triton is installed."""
    return _INSTALLED


def unsupported(
    pattern: AttentionPattern, d: int, dtype: torch.dtype, device: torch.device, zero_logit: bool
) -> str | None:
    """Why the kernels cannot take such a pattern, head dimension d, dtype and device;
    None if they can. The end of a sentence about the backend.
    """
    if not available():
        return "needs triton: pip install triton"
    if dtype not in _DTYPES or not isinstance(pattern, OffsetPattern):
        return (
            "supports float32, float16 or bfloat16 and patterns made of diagonals, got"
            f" {dtype} and {type(pattern).__name__}"
        )
    if d > _MAX_HEAD_DIM:
        return f"supports head dimensions up to {_MAX_HEAD_DIM}, got {d}"
    if zero_logit and _keeps_every_key(pattern.spec):
        return "does not support masking 'zero_logit' where a patch keeps every key"
    if device.type == "cuda":
        found: tuple[int, int] = capability(device.index)
        if found < _MIN_CAPABILITY:
            return "needs a GPU of compute capability 8.0 or higher, got {}.{}".format(*found)
    elif os.environ.get("TRITON_INTERPRET") != "1":
        return f"runs on CUDA, got tensors on {device}"
    return None


@constant_to_compiler
@functools.cache
def capability(index: int) -> tuple[int, int]:
    """The compute capability of a GPU."""
    return torch.cuda.get_device_capability(index)


@constant_to_compiler
@functools.lru_cache(maxsize=256)
def _keeps_every_key(spec: str) -> bool:
    """Whether a row drops no key. Under zero_logit, the kernels start a row with all
    keys at logit 0 and take the kept ones back, which would leave only rounding errors.
    """
    pattern = _offset_pattern(spec)
    nearest = set(range(pattern.num_tokens // 2 + 1))  # all that the middle row needs
    return any(nearest <= set(offsets) for offsets in pattern.offsets)


def _offset_pattern(spec: str) -> OffsetPattern:
    pattern = AttentionPattern.from_spec(spec)
    assert isinstance(pattern, OffsetPattern)
    return pattern


def _on_its_device(run: Callable[..., None]) -> Callable[..., None]:
    """`run` with the first argument's device as the current one, where Triton launches."""

    @functools.wraps(run)
    def on_its_device(first: Tensor, *arguments: Any) -> None:
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                run(first, *arguments)
        else:
            run(first, *arguments)

    return on_its_device


@_on_its_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    pattern: AttentionPattern,
    zero_logit: bool,
    scale: float,
) -> None:
    """See `Kernels.forward`."""
    q, k, v = _with_equal_strides(q, k, v)
    kernels, table, partial_shape, _ = _launches(
        "forward", pattern.spec, zero_logit, q.dtype, q.device, q.shape,
        (q.stride(), out.stride()), _aligned(q, k, v, out),
    )  # fmt: skip
    sums = v.sum(dim=2, dtype=torch.float32).contiguous() if zero_logit else lse
    partial = lse.new_empty(partial_shape) if partial_shape else lse
    kernels[0](q, k, v, out, lse, sums, partial, table, scale)
    if partial_shape:
        kernels[1](partial, out, lse)


@_on_its_device
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: Tensor,
    pattern: AttentionPattern,
    zero_logit: bool,
    scale: float,
) -> None:
    """See `Kernels.backward`."""
    q, k, v = _with_equal_strides(q, k, v)
    grad = with_contiguous_rows(grad)
    dq, dk, dv = grads.unbind(0)
    (queries, keys), table, partial_shape, sums_shape = _launches(
        "backward", pattern.spec, zero_logit, q.dtype, q.device, q.shape,
        (q.stride(), out.stride(), grad.stride(), dq.stride()),
        _aligned(q, k, v, out, grad, grads),
    )  # fmt: skip
    delta = torch.empty_like(lse)
    sums = lse.new_empty(sums_shape) if zero_logit else lse
    partial = lse.new_empty(partial_shape) if partial_shape else None  # (3, B, h, prefix, ., d)
    dq_part, dk_part, dv_part = (lse, lse, lse) if partial is None else partial.unbind(0)
    queries(q, k, v, out, grad, dq, lse, delta, sums, dq_part, table, scale)
    keys(q, k, v, grad, dk, dv, lse, delta, sums, dk_part, dv_part, table, scale)
    if partial is not None:
        grads[:, :, :, : pattern.num_prefix] = partial.sum(dim=-2)


KERNELS["triton"] = Kernels(forward, backward)


def _with_equal_strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as the kernels read them: each row contiguous, equal strides."""
    strides = q.stride()
    if strides[-1] != 1 or strides != k.stride() or strides != v.stride():
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    return q.resolve_neg(), k.resolve_neg(), v.resolve_neg()


def _aligned(*tensors: Tensor) -> bool:
    """Whether all data start at multiples of 16 bytes, as kernels with wide loads assume."""
    address = 0
    for x in tensors:
        address |= x.data_ptr()
    return address % 16 == 0


@functools.lru_cache(maxsize=64)
def _table(spec: str, device: torch.device) -> Tensor:
    """Number of offsets, then the offsets, padded, of each head: int32 `(h, 1 + most)`."""
    offsets = _offset_pattern(spec).offsets
    most = max(len(kept) for kept in offsets)
    rows = [[len(kept), *kept, *[0] * (most - len(kept))] for kept in offsets]
    return torch.tensor(rows, dtype=torch.int32, device=device)


class _Launch:
    """A kernel with its grid and all arguments but tensors and scale.

    The first call goes through Triton's own launch code, which compiles the kernel.
    Later ones skip that code, which takes longer than a small problem on the card.
    """

    def __init__(
        self, kernel: Any, programs: int, arguments: tuple[Any, ...], tiling: Tiling, aligned: bool
    ) -> None:
        self._arguments, self._grid = arguments, (programs, 1, 1)
        options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
        self._launch: Callable[..., Any] = functools.partial(kernel[self._grid], **options)
        # A compiled kernel assumes the alignment of its first arguments.
        self._reuse = aligned and _reuses_compiled_kernels()

    def __call__(self, *tensors: Any) -> None:
        compiled = self._launch(*tensors, *self._arguments)
        if self._reuse:
            self._launch, self._reuse = compiled[self._grid], False


@functools.cache
def _reuses_compiled_kernels() -> bool:
    """Whether this Triton's compiled kernels take the arguments of their source. Triton
    3.6 to 3.9 do; the interpreter compiles nothing.
    """
    version = importlib.metadata.version("triton").split(".")
    return tuple(map(int, version[:2])) >= (3, 6) and os.environ.get("TRITON_INTERPRET") != "1"


def forget_launches() -> None:
    """Make later calls choose their tilings anew."""
    _launches.cache_clear()


def choose_tiling(kernel: str, dtype: torch.dtype, d: int) -> Tiling:
    """The tiling of a kernel for a dtype and a head dimension d."""
    if kernel in OVERRIDES:
        return OVERRIDES[kernel]
    tilings = TILINGS[kernel][8 * dtype.itemsize]
    return next(tiling for most, tiling in tilings if d <= most)


def constants(tiling: Tiling, prefix: int, d: int, zero_logit: bool) -> dict[str, Any]:
    """The compile-time arguments of the three kernels, in their order."""
    block = _power_of_two(d)
    return {
        "PREFIX": prefix,
        "HEAD_DIM": d,
        "D": block,
        "G": tiling.groups,
        "M": _DOT_ROWS if tiling.dot else 1,
        "KEYS": min(128, 8192 // block) if tiling.dot else min(64, 4096 // block),
        "ZERO_LOGIT": zero_logit,
        "DOT": tiling.dot,
    }


def _power_of_two(d: int) -> int:
    """Width of a tile: Triton needs a power of two."""
    return max(16, 1 << (d - 1).bit_length())


def _blocks(name: str, dtype: torch.dtype, d: int, num_tokens: int) -> int:
    """Programs of a kernel for the patches of one head."""
    return -(-num_tokens // (16 * choose_tiling(name, dtype, d).groups))


def _splits(length: int) -> int:
    """Programs that share the tokens of a prefix row."""
    return -(-length // _TOKENS_PER_SPLIT)


def _launch(
    name: str,
    spec: str,
    zero_logit: bool,
    dtype: torch.dtype,
    device: torch.device,
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    aligned: bool,
    *numbers: int,
) -> _Launch:
    """The launch of a kernel for tensors of a `shape` `(B, h, T, d)` with these
    strides; `numbers` are arguments that only this kernel has.
    """
    from fibopolicy.attention import triton_kernels

    batch, heads, length, d = shape
    pattern, tiling = _offset_pattern(spec), choose_tiling(name, dtype, d)
    values = constants(tiling, pattern.num_prefix, d, zero_logit)
    prefix_programs = -(-pattern.num_prefix // values["M"]) * _splits(length)
    programs = prefix_programs + _blocks(name, dtype, d, pattern.num_tokens)
    arguments = (
        *(number for stride in strides for number in stride[:3]),
        heads, length, _table(spec, device).shape[1], programs, prefix_programs, _splits(length),
        *numbers, *values.values(),
    )  # fmt: skip
    kernel = getattr(triton_kernels, name)
    return _Launch(kernel, programs * batch * heads, arguments, tiling, aligned)


class _Launches(NamedTuple):
    """The launches of a pass and what their arguments depend on.

    Attributes:
        kernels: `forward` and, if prefix rows are split, `merge`; or `backward_queries`
            and `backward_keys`.
        table: the `_table`.
        partial: the shape of the partial results of prefix rows; empty if these are not
            split.
        sums: the shape of the backward pass's sums under zero_logit.
    """

    kernels: tuple[_Launch, ...]
    table: Tensor
    partial: tuple[int, ...]
    sums: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _launches(
    which: str,
    spec: str,
    zero_logit: bool,
    dtype: torch.dtype,
    device: torch.device,
    shape: torch.Size,
    strides: tuple[tuple[int, ...], ...],
    aligned: bool,
) -> _Launches:
    """The launches of the pass `which`, "forward" or "backward". `strides` are those of
    q, k and v, of out, and in the backward pass of grad and of each gradient.
    """
    from fibopolicy.attention import triton_kernels

    inputs = (spec, zero_logit, dtype, device, shape)
    batch, heads, length, d = shape
    pattern, splits = _offset_pattern(spec), _splits(length)
    prefix, table = pattern.num_prefix, _table(spec, device)
    split = prefix > 0 and splits > 1
    if which == "backward":
        x, _, g, dx = strides
        blocks = _blocks("backward_queries", dtype, d, pattern.num_tokens)
        queries = _launch("backward_queries", *inputs, strides, aligned)
        keys = _launch("backward_keys", *inputs, (x, g, dx), aligned, blocks)
        partial = (3, batch, heads, prefix, splits, d) if split else ()
        return _Launches((queries, keys), table, partial, (batch, heads, blocks, d))
    run = _launch("forward", *inputs, strides, aligned)
    if not split:
        return _Launches((run,), table, (), ())
    programs = batch * heads * prefix
    sizes = (prefix, d, _power_of_two(d), 1 << (splits - 1).bit_length())
    arguments = (*strides[1][:3], heads, length, splits, *sizes)
    merge = _Launch(triton_kernels.merge, programs, arguments, Tiling(False, 1, 1, 1), aligned)
    return _Launches((run, merge), table, (programs * splits * (d + 1),), ())
