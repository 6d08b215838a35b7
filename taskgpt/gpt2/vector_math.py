"""exp, sums and maxima for loops that must vectorise, and whose bits must not depend on how they do.

numba from PyPI carries no vector math library: a loop around `math.exp` calls libm once per element. This one is straight-line code, which
LLVM turns into vector instructions. Every multiply-add is one fma, so the bits do not depend on the vector width.
"""

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
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


LANES = 16  # partial sums and maxima run in this many lanes: a fixed order, so the same bits on every machine, and one that vectorises


@numba.njit(nogil=True, error_model="numpy")
def row_sum(row):
    """Return the sum of a dense float32 row."""
    a = b = c = d = e = f = g = h = np.float32(0)
    whole = row.shape[0] // 8 * 8
    for i in range(0, whole, 8):
        a += row[i]
        b += row[i + 1]
        c += row[i + 2]
        d += row[i + 3]
        e += row[i + 4]
        f += row[i + 5]
        g += row[i + 6]
        h += row[i + 7]
    for i in range(whole, row.shape[0]):
        a += row[i]
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@numba.njit(nogil=True, error_model="numpy")
def row_max(row, valid, lanes):
    """Return the largest of row[:valid], -inf if there is none; `lanes` is scratch of LANES float32. NaN may be passed over."""
    lanes[:] = np.float32(-np.inf)
    whole = valid // LANES * LANES
    for i in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] = row[i + lane] if row[i + lane] > lanes[lane] else lanes[lane]
    for i in range(whole, valid):
        lanes[i - whole] = row[i] if row[i] > lanes[i - whole] else lanes[i - whole]
    largest = lanes[0]
    for lane in range(1, LANES):
        largest = lanes[lane] if lanes[lane] > largest else largest
    return largest


@numba.njit(nogil=True, error_model="numpy")
def row_sum_exp(row, valid, largest, lanes):
    """Return the sum of exp(row[:valid] - largest); a NaN in the row gives NaN."""
    lanes[:] = np.float32(0)
    whole = valid // LANES * LANES
    for i in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += exp32(row[i + lane] - largest)
    for i in range(whole, valid):
        lanes[i - whole] += exp32(row[i] - largest)
    return row_sum(lanes)
