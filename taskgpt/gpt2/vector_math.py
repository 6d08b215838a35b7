"""exp, sums and maxima for loops that must vectorise, and whose bits must not depend on how they do.

numba from PyPI carries no vector math library: a loop around `math.exp` calls libm once per element. This one is straight-line code, which
LLVM turns into vector instructions. Every multiply-add is one fma and sums have a fixed order, so that the bits do not depend on the vector
width. tanh is not here: GELU's (1 + tanh(u)) / 2 is 1 / (1 + exp(-2u)).
"""

import math
from collections.abc import Callable

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from taskgpt.products.vectors import fma

_FLOAT, _INT, _SIZE = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_LOWEST, _HIGHEST = -87.33654022216797, 88.3762588501  # below: the result would be subnormal; above: 2**n would leave the exponent's range
_LN2_HIGH = 0.693359375  # 10 bits of ln 2: its product with n is exact
_LN2_LOW = math.log(2) - _LN2_HIGH
# exp(r) = 1 + r + r * r * P(r) on |r| <= ln(2) / 2; coefficients as in Cephes' expf (Moshier 1989).
_COEFFICIENTS = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)


@intrinsic
def exp32(typing_context, x):
    """In a compiled twin: exp of a float32, relative error under 2e-7.

    NaN gives NaN and -inf gives 0, as does everything below -87.33 (no subnormal results); above 88.37, and for inf, the result is inf.
    """
    if x != types.float32:
        raise TypeError(f"exp32 takes float32, got {x}")

    def codegen(context, builder, signature, args):
        def constant(value: float):
            return ir.Constant(_FLOAT, float(np.float32(value)))

        def fma(a, b, c):
            return builder.fma(a, b, c)

        x = args[0]
        floor = builder.module.declare_intrinsic("llvm.floor", [_FLOAT])
        is_low = builder.fcmp_ordered("<", x, constant(_LOWEST))
        is_high = builder.fcmp_ordered(">", x, constant(_HIGHEST))
        # Ordered comparisons are false for NaN, which therefore runs through all that follows; its integer part is replaced by 0,
        # because converting NaN to an integer is undefined.
        is_number = builder.fcmp_ordered("ord", x, x)
        bounded = builder.select(is_low, constant(_LOWEST), builder.select(is_high, constant(_HIGHEST), x))
        n = builder.call(floor, [fma(bounded, constant(1 / math.log(2)), constant(0.5))])
        n = builder.select(is_number, n, constant(0))
        r = fma(n, constant(-_LN2_LOW), fma(n, constant(-_LN2_HIGH), bounded))
        polynomial = constant(_COEFFICIENTS[0])
        for coefficient in _COEFFICIENTS[1:]:
            polynomial = fma(polynomial, r, constant(coefficient))
        fraction = builder.fadd(fma(polynomial, builder.fmul(r, r), r), constant(1))
        exponent = builder.shl(builder.add(builder.fptosi(n, _INT), ir.Constant(_INT, 127)), ir.Constant(_INT, 23))
        result = builder.fmul(fraction, builder.bitcast(exponent, _FLOAT))
        return builder.select(is_low, constant(0), builder.select(is_high, constant(math.inf), result))

    return types.float32(types.float32), codegen


# 2**r = 1 + r * Q(r) on |r| <= 1/2, relative error under 3e-9: minimax by Remez' algorithm, from the highest power down.
_COEFFICIENTS_OF_2 = (1.5594677561e-4, 1.3406643905e-3, 9.6176929748e-3, 5.5503105510e-2, 2.4022652783e-1, 6.9314721497e-1)
_INTEGERS = 1.5 * 2**23 + 127  # added to a float32, leaves the nearest integer in the lowest bits, as an exponent has it


def power_of_2(builder: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Return 2**x of a vector of float32 that are at most 127, as LLVM IR; relative error under 2e-7.

    Half the instructions of exp32. NaN gives NaN and -inf gives 0, as does everything below -126.5.
    """
    lanes = x.type.count

    def constant(value: float, kind: ir.Type = x.type):
        return ir.Constant(kind, [float(np.float32(value)) if kind is x.type else value] * lanes)

    x = builder.select(builder.fcmp_ordered("<", x, constant(-127)), constant(-127), x)  # whose exponent is that of 0
    shifted = builder.fadd(x, constant(_INTEGERS))
    r = builder.fsub(x, builder.fsub(shifted, constant(_INTEGERS)))
    fraction = constant(_COEFFICIENTS_OF_2[0])
    for coefficient in (*_COEFFICIENTS_OF_2[1:], 1):
        fraction = fma(builder, fraction, r, constant(coefficient))
    words = ir.VectorType(_INT, lanes)
    power = builder.shl(builder.bitcast(shifted, words), constant(23, words))
    return builder.fmul(fraction, builder.bitcast(power, x.type))  # a product, and no sum of exponents, in which NaN could get lost


_WIDTHS = (64, 8, 1)  # a row is read 64 elements at a time, its rest 8 at a time, the rest of that one by one


def _reduction(meaning: str, start: float, combine: Callable, take: Callable | None = None):
    """Return an intrinsic that combines the elements of a dense float32 row: lane by lane while reading, then the lanes in halves.

    `take(builder, so far, element)` takes an element in, if not as `combine` does with two results.
    """
    take = take or combine

    def typed(typing_context, row):
        if not (isinstance(row, types.Array) and (row.dtype, row.ndim, row.layout) == (types.float32, 1, "C")):
            raise TypeError(f"wanted a dense float32 row, got {row}")

        def codegen(context, builder, signature, args):
            row = context.make_array(signature.args[0])(context, builder, args[0])
            length = builder.extract_value(row.shape, 0)
            result, done = ir.Constant(_FLOAT, start), ir.Constant(_SIZE, 0)
            for width in _WIDTHS:
                vector, stop = ir.VectorType(_FLOAT, width), builder.and_(length, ir.Constant(_SIZE, -width))
                sofar = cgutils.alloca_once_value(builder, ir.Constant(vector, [start] * width))
                with cgutils.for_range_slice(builder, done, stop, ir.Constant(_SIZE, width), _SIZE) as (at, _):
                    place = builder.bitcast(builder.gep(row.data, [at]), vector.as_pointer())
                    builder.store(take(builder, builder.load(sofar), builder.load(place, align=4)), sofar)
                lanes, done = builder.load(sofar), stop
                while width > 1:
                    width //= 2
                    halves = [ir.Constant(ir.VectorType(_INT, width), list(range(at, at + width))) for at in (0, width)]
                    lanes = combine(builder, *(builder.shuffle_vector(lanes, lanes, half) for half in halves))
                result = combine(builder, result, builder.extract_element(lanes, ir.Constant(_INT, 0)))
            return result

        return types.float32(row), codegen

    typed.__doc__ = f"In a compiled twin: {meaning}"
    return intrinsic(typed)


def _larger(builder, a, b):
    return builder.select(builder.fcmp_ordered(">", b, a), b, a)


def _sum(builder, a, b):
    return builder.fadd(a, b)


row_sum = _reduction("the sum of a dense float32 row.", 0.0, _sum)
row_squares = _reduction(
    "the sum of the squares of a dense float32 row.", 0.0, _sum, lambda builder, sofar, x: builder.fadd(sofar, builder.fmul(x, x))
)
row_max = _reduction("the largest element of a dense float32 row, -inf if it is empty. NaN may be passed over.", -math.inf, _larger)


@numba.njit(nogil=True, error_model="numpy")
def exp_row(row):
    """Replace a dense row by exp(row - its largest element), in place; return (that element, the sum), of which NaN makes the sum NaN."""
    largest = row_max(row)
    for i in range(row.shape[0]):
        row[i] = exp32(row[i] - largest)
    return largest, row_sum(row)
