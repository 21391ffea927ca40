"""Short vectors for numba: explicit SIMD, so that one row of a head lives in registers.

Numba's own loops cannot keep a row of `d` numbers in registers across keys. LLVM can: a
value of type `<d x float>` is split into the registers that the processor has (AVX-512,
AVX2, NEON, SSE). This file gives numba that one type, and the few operations attention
needs. Addresses are plain int64 byte addresses, so any strided tensor can be read
without a copy.

Numba caches compiled code by the file of the compiled function, so a change here does
not invalidate the cache of `cpu_kernels.py`: raise `VERSION`, which the kernels hold as
a constant.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import math
import operator
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, overload, register_model

VERSION = 9

_INT64 = ir.IntType(64)
_INT32 = ir.IntType(32)
_REAL = {"f32": ir.FloatType(), "f64": ir.DoubleType()}
_STORAGE = {
    "f32": ir.FloatType(),
    "f64": ir.DoubleType(),
    "f16": ir.HalfType(),
    "bf16": ir.IntType(16),
}
_NUMBA_REAL = {"f32": types.float32, "f64": types.float64}
# Sums may be reordered and fused, but NaN and infinity keep their meaning.
_FLAGS = ("reassoc", "contract")


class Vector(types.Type):  # type: ignore[misc]
    """`width` numbers of kind "f32" or "f64", held in registers."""

    def __init__(self, real: str, width: int) -> None:
        self.real, self.width = real, width
        super().__init__(name=f"Vector({real}, {width})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, dmm: Any, fe_type: Vector) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(_REAL[fe_type.real], fe_type.width))


def _compute_kind(storage: str) -> str:
    return "f64" if storage == "f64" else "f32"


def _suffix(kind: ir.Type) -> str:
    """How LLVM spells a type inside the name of an overloaded intrinsic."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{_suffix(kind.element)}"
    return {"float": "f32", "double": "f64", "half": "f16"}.get(str(kind), str(kind))


def _declare(builder: Any, name: str, result: ir.Type, arguments: list[ir.Type]) -> Any:
    from numba.core import cgutils

    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _splat(builder: Any, scalar: Any, width: int) -> Any:
    vector = ir.VectorType(scalar.type, width)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_INT32, 0))
    return builder.shuffle_vector(
        one,
        ir.Constant(vector, ir.Undefined),
        ir.Constant(ir.VectorType(_INT32, width), [0] * width),
    )


def _constant(vector: ir.VectorType, value: float | int) -> Any:
    return ir.Constant(vector, [value] * vector.count)


@intrinsic(prefer_literal=True)
def load(typing_context: Any, storage: Any, width: Any, address: Any) -> Any:
    """`width` numbers at a byte address, stored as "f32", "f64", "f16" or "bf16",
    widened to the precision of the computation.
    """
    kind, count = storage.literal_value, width.literal_value
    result = Vector(_compute_kind(kind), count)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = ir.VectorType(_STORAGE[kind], count)
        pointer = builder.inttoptr(args[2], stored.as_pointer())
        value = builder.load(pointer, align=_STORAGE[kind].get_abi_size(context.target_data))
        if kind == "f16":
            return builder.fpext(value, ir.VectorType(ir.FloatType(), count))
        if kind == "bf16":
            words = ir.VectorType(_INT32, count)
            high = builder.shl(builder.zext(value, words), _constant(words, 16))
            return builder.bitcast(high, ir.VectorType(ir.FloatType(), count))
        return value

    return result(storage, width, types.int64), codegen


@intrinsic(prefer_literal=True)
def store(typing_context: Any, storage: Any, vector: Any, address: Any) -> Any:
    """Write a vector at a byte address, rounded to the nearest number of the storage kind."""
    kind = storage.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _rounded(builder, args[1], kind)
        pointer = builder.inttoptr(args[2], value.type.as_pointer())
        builder.store(value, pointer, align=_STORAGE[kind].get_abi_size(context.target_data))
        return context.get_dummy_value()

    return types.void(storage, vector, types.int64), codegen


def _rounded(builder: Any, value: Any, kind: str) -> Any:
    if kind == "f16":
        return builder.fptrunc(value, ir.VectorType(ir.HalfType(), value.type.count))
    return _to_bfloat16(builder, value, value.type.count) if kind == "bf16" else value


def _to_bfloat16(builder: Any, value: Any, width: int) -> Any:
    words = ir.VectorType(_INT32, width)
    bits = builder.bitcast(value, words)
    odd = builder.and_(builder.lshr(bits, _constant(words, 16)), _constant(words, 1))
    # to nearest, ties to even
    rounded = builder.add(bits, builder.add(odd, _constant(words, 0x7FFF)))
    # Rounding must not carry a NaN's payload into infinity.
    rounded = builder.select(
        builder.fcmp_unordered("uno", value, value), _constant(words, 0x7FC00000), rounded
    )
    return builder.trunc(
        builder.lshr(rounded, _constant(words, 16)), ir.VectorType(ir.IntType(16), width)
    )


@intrinsic(prefer_literal=True)
def splat(typing_context: Any, width: Any, scalar: Any) -> Any:
    """A vector of `width` copies of a number."""
    count = width.literal_value
    real = "f64" if scalar == types.float64 else "f32"

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, args[1], count)

    return Vector(real, count)(width, _NUMBA_REAL[real]), codegen


def _binary(name: str) -> Any:
    @intrinsic
    def operation(typing_context: Any, left: Any, right: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return getattr(builder, name)(*args, flags=_FLAGS)

        return left(left, left), codegen

    return operation


def _overload(function: Any, operation: Any) -> None:
    @overload(function, strict=False)
    def choose(left: Any, right: Any) -> Any:
        if isinstance(left, Vector) and left == right:
            return lambda left, right: operation(left, right)
        return None


_overload(operator.add, _binary("fadd"))
_overload(operator.sub, _binary("fsub"))
_overload(operator.mul, _binary("fmul"))
_overload(operator.truediv, _binary("fdiv"))


@intrinsic
def difference(typing_context: Any, left: Any, right: Any) -> Any:
    """left - right of rounded numbers: not fused with a product before it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fsub(*args)

    return left(left, left), codegen


@intrinsic
def add_scaled(typing_context: Any, total: Any, scalar: Any, vector: Any) -> Any:
    """total + scalar * vector."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        product = builder.fmul(_splat(builder, args[1], vector.width), args[2], flags=_FLAGS)
        return builder.fadd(args[0], product, flags=_FLAGS)

    return vector(vector, _NUMBA_REAL[vector.real], vector), codegen


@intrinsic
def total(typing_context: Any, vector: Any) -> Any:
    """The sum of a vector's numbers."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        function = _declare(
            builder, f"llvm.vector.reduce.fadd.{_suffix(kind)}", kind.element, [kind.element, kind]
        )
        return builder.call(function, [ir.Constant(kind.element, -0.0), args[0]], fastmath=_FLAGS)

    return _NUMBA_REAL[vector.real](vector), codegen


@intrinsic
def totals(typing_context: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The sums of four vectors' numbers, as a vector of four.

    In float32 the four sums share one tree of shuffles, which is a third of the work of
    four separate sums.
    """
    result = Vector(a.real, 4)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def shuffle(x: Any, y: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(
                x, y, ir.Constant(ir.VectorType(_INT32, len(lanes)), lanes)
            )

        def halves(x: Any) -> Any:
            half = x.type.count // 2
            low, high = shuffle(x, x, list(range(half))), shuffle(x, x, list(range(half, 2 * half)))
            return builder.fadd(low, high, flags=_FLAGS)

        def interleave(x: Any, y: Any) -> Any:
            """Sums of neighbours, as x y x y in every 128 bits, half as many of x and
            of y.
            """
            count = x.type.count
            quads = range(0, count, 4)
            low = [lane for q in quads for lane in (q, count + q, q + 1, count + q + 1)]
            high = [lane for q in quads for lane in (q + 2, count + q + 2, q + 3, count + q + 3)]
            return builder.fadd(shuffle(x, y, low), shuffle(x, y, high), flags=_FLAGS)

        vectors = list(args)
        while vectors[0].type.count > 16:
            vectors = [halves(x) for x in vectors]
        ac, bd = interleave(vectors[0], vectors[2]), interleave(vectors[1], vectors[3])
        sums = interleave(ac, bd)
        while sums.type.count > 4:
            sums = halves(sums)
        return sums

    return result(a, b, c, d), codegen


def _greater(builder: Any, left: Any, right: Any) -> Any:
    """`right` where it is greater, else `left`: one instruction, unlike the maximum
    that IEEE defines for NaN.
    """
    return builder.select(builder.fcmp_ordered(">", right, left), right, left)


@intrinsic
def highest(typing_context: Any, vector: Any) -> Any:
    """The largest of a vector's numbers; any of them if some are NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = args[0]
        while value.type.count > 1:
            half = value.type.count // 2
            low, high = (
                builder.shuffle_vector(
                    value,
                    value,
                    ir.Constant(ir.VectorType(_INT32, half), list(range(first, first + half))),
                )
                for first in (0, half)
            )
            value = _greater(builder, low, high)
        return builder.extract_element(value, ir.Constant(_INT32, 0))

    return _NUMBA_REAL[vector.real](vector), codegen


@intrinsic
def first(typing_context: Any, vector: Any) -> Any:
    """A vector's first number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.extract_element(args[0], ir.Constant(_INT32, 0))

    return _NUMBA_REAL[vector.real](vector), codegen


@intrinsic
def maximum(typing_context: Any, left: Any, right: Any) -> Any:
    """Elementwise: `right` where it is greater, else `left`."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _greater(builder, *args)

    return left(left, left), codegen


@intrinsic
def exponential(typing_context: Any, vector: Any) -> Any:
    """exp(x) for x <= 0 up to rounding (and a little above); exactly 0 where it would
    be subnormal, NaN where x is NaN.

    Cody-Waite reduction x = n ln 2 + r, then exp(r) by its Taylor polynomial on |r| <=
    ln 2 / 2, then 2^n by the exponent bits.
    """
    single = vector.real == "f32"
    # The last kept term bounds the relative error: (ln2/2)^8/8! = 5e-9 in float32,
    # (ln2/2)^14/14! = 4e-18 in float64.
    degree, lowest, magic, shift = (
        (7, -86.0, 1.5 * 2**23, 23) if single else (13, -700.0, 1.5 * 2**52, 52)
    )
    ln2_high = 0.693359375 if single else 0.6931471803691238
    ln2_low = math.log(2) - ln2_high if single else 1.9082149292705877e-10

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = args[0]
        kind = x.type
        words = ir.VectorType(_INT32 if single else _INT64, kind.count)

        def fma(a: Any, b: Any, c: Any) -> Any:
            return builder.call(
                _declare(builder, f"llvm.fmuladd.{_suffix(kind)}", kind, [kind] * 3), [a, b, c]
            )

        flushed = builder.fcmp_ordered("<", x, _constant(kind, lowest))
        x = builder.select(flushed, _constant(kind, lowest), x)
        # Adding 1.5 * 2^mantissa rounds to an integer and leaves it in the low bits: no
        # conversion, no poison for NaN.
        shifted = fma(x, _constant(kind, 1 / math.log(2)), _constant(kind, magic))
        n = builder.fsub(shifted, _constant(kind, magic))
        r = fma(n, _constant(kind, -ln2_high), x)
        r = fma(n, _constant(kind, -ln2_low), r)
        value = _constant(kind, 1 / math.factorial(degree))
        for power in range(degree - 1, -1, -1):
            value = fma(value, r, _constant(kind, 1 / math.factorial(power)))
        # value is within [0.7, 1.42] and n >= -125 (-1010 in float64): adding n to its
        # exponent bits stays in the normal range.
        exponent = builder.shl(builder.bitcast(shifted, words), _constant(words, shift))
        scaled = builder.bitcast(builder.add(builder.bitcast(value, words), exponent), kind)
        scaled = builder.select(builder.fcmp_unordered("uno", x, x), x, scaled)
        return builder.select(flushed, _constant(kind, 0.0), scaled)

    return vector(vector), codegen


@intrinsic
def logarithm(typing_context: Any, vector: Any) -> Any:
    """log(x) for finite x >= 1 up to rounding, NaN where x is NaN, infinite where x is.

    x = 2^n m with m within [sqrt(1/2), sqrt(2)], then log(m) = 2 artanh((m - 1) / (m +
    1)) by its Taylor polynomial.
    """
    single = vector.real == "f32"
    # With s = (m - 1) / (m + 1), s^2 < 0.0295: the first dropped term of artanh(s) / s
    # is below 0.0295^5 / 11 = 2e-9 in float32, 0.0295^11 / 23 = 6e-19 in float64.
    terms, shift = (5, 23) if single else (11, 52)
    ln2_high = 0.693359375 if single else 0.6931471803691238
    ln2_low = math.log(2) - ln2_high if single else 1.9082149292705877e-10
    half_root = 0x3F3504F3 if single else 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        x = args[0]
        kind = x.type
        words = ir.VectorType(_INT32 if single else _INT64, kind.count)

        def fma(a: Any, b: Any, c: Any) -> Any:
            return builder.call(
                _declare(builder, f"llvm.fmuladd.{_suffix(kind)}", kind, [kind] * 3), [a, b, c]
            )

        bits = builder.bitcast(x, words)
        above = builder.sub(bits, _constant(words, half_root))
        mantissa = builder.and_(above, _constant(words, (1 << shift) - 1))
        m = builder.bitcast(builder.add(mantissa, _constant(words, half_root)), kind)
        n = builder.sitofp(builder.ashr(above, _constant(words, shift)), kind)
        s = builder.fdiv(
            builder.fsub(m, _constant(kind, 1.0)), builder.fadd(m, _constant(kind, 1.0))
        )
        square = builder.fmul(s, s)
        value = _constant(kind, 2 / (2 * terms - 1))
        for term in range(terms - 2, -1, -1):
            value = fma(value, square, _constant(kind, 2 / (2 * term + 1)))
        value = fma(
            n, _constant(kind, ln2_high), fma(n, _constant(kind, ln2_low), builder.fmul(value, s))
        )
        finite = builder.fcmp_ordered("<", x, _constant(kind, math.inf))
        return builder.select(finite, value, x)

    return vector(vector), codegen


def _lanes_below(builder: Any, count: Any, width: int) -> Any:
    """The mask of the first `count` of `width` lanes."""
    lanes = ir.VectorType(_INT64, width)
    return builder.icmp_signed(
        "<", ir.Constant(lanes, list(range(width))), _splat(builder, count, width)
    )


@intrinsic
def store_first(typing_context: Any, vector: Any, address: Any, count: Any) -> Any:
    """Write only the first `count` lanes; memory after them stays unchanged."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        mask = _lanes_below(builder, args[2], kind.count)
        name = f"llvm.masked.store.{_suffix(kind)}.p0"
        function = _declare(
            builder, name, ir.VoidType(), [kind, kind.as_pointer(), _INT32, mask.type]
        )
        pointer = builder.inttoptr(args[1], kind.as_pointer())
        builder.call(
            function,
            [
                args[0],
                pointer,
                ir.Constant(_INT32, kind.element.get_abi_size(context.target_data)),
                mask,
            ],
        )
        return context.get_dummy_value()

    return types.void(vector, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def read(typing_context: Any, kind: Any, address: Any) -> Any:
    """One number at a byte address: "f32", "f64", "i32" or "i64" (integers arrive as int64)."""
    name = kind.literal_value
    result = _NUMBA_REAL.get(name, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        stored = {"i32": _INT32, "i64": _INT64}.get(name) or _REAL[name]
        value = builder.load(builder.inttoptr(args[1], stored.as_pointer()))
        return builder.sext(value, _INT64) if name == "i32" else value

    return result(kind, types.int64), codegen


@intrinsic(prefer_literal=True)
def write(typing_context: Any, kind: Any, address: Any, value: Any) -> Any:
    """Write one number, "f32" or "f64", at a byte address."""
    real = _NUMBA_REAL[kind.literal_value]

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[2], builder.inttoptr(args[1], args[2].type.as_pointer()))
        return context.get_dummy_value()

    return types.void(kind, types.int64, real), codegen


@intrinsic(prefer_literal=True)
def stream(typing_context: Any, storage: Any, vector: Any, address: Any) -> Any:
    """A non-temporal `store`, past the caches: for data that is not read soon. The
    address must be a multiple of 64.
    """
    kind = storage.literal_value

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _rounded(builder, args[1], kind)
        size = _STORAGE[kind].get_abi_size(context.target_data)
        count = min(64 // size, vector.width)
        for i in range(0, vector.width, count):
            lanes = ir.Constant(ir.VectorType(_INT32, count), list(range(i, i + count)))
            part = builder.shuffle_vector(value, value, lanes)
            pointer = builder.inttoptr(
                builder.add(args[2], ir.Constant(_INT64, i * size)), part.type.as_pointer()
            )
            written = builder.store(part, pointer, align=count * size)
            written.set_metadata(
                "nontemporal", builder.module.add_metadata([ir.Constant(_INT32, 1)])
            )
        return context.get_dummy_value()

    return types.void(storage, vector, types.int64), codegen


@intrinsic
def fence(typing_context: Any) -> Any:
    """Complete all writes, including those of `stream`, before anything that follows."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(typing_context: Any, address: Any) -> Any:
    """Load the cache line of a byte address, which may be any number."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        function = _declare(
            builder, "llvm.prefetch.p0", ir.VoidType(), [byte, _INT32, _INT32, _INT32]
        )
        builder.call(
            function,
            [builder.inttoptr(args[0], byte), *(ir.Constant(_INT32, x) for x in (0, 3, 1))],
        )
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def take_ticket(typing_context: Any, address: Any) -> Any:
    """Add 1 to the int64 at an address, atomically, and return its earlier value.
    Threads share work this way.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _INT64.as_pointer())
        return builder.atomic_rmw("add", pointer, ir.Constant(_INT64, 1), "monotonic")

    return types.int64(types.int64), codegen
