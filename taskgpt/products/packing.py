"""Operands of a matrix product as the micro-kernels want them, made in the working memory of a worker.

Columns: of each step of K `width` elements side by side, a multiple of the lanes; what lies beyond the operand's edge is 0, and is not
stored in the product. Rows: the steps of each row side by side. `apart` is the distance of what is written, in elements: of steps, or of
rows. An element is a float32 or a pair of bfloat16; see micro_kernels.py.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from taskgpt.products.machine_code import MachineCode
from taskgpt.products.micro_kernels import FLOAT32, NUMBERS
from taskgpt.tasks.symbols import by_symbol

# Of what is called by a symbol: numbers, and tiles.
INT, WRITTEN, READ = types.int64, types.Array(types.float32, 2, "A"), types.Array(types.float32, 2, "A", readonly=True)
STEPS = 384  # elements of K that are packed at a time
ROW_STEPS = STEPS + 16  # distance of packed rows: such that they do not fall on one another in the first cache
_ZERO = np.float32(0)


def packers(code: MachineCode, precision: str):
    """Return (pack_columns, pack_rows) of float32 operands, which make elements of `precision`; see symbols.py on how to call them.

    pack_columns((there, apart, x, is_transposed, k, kn, n, nn, width)): op(x)[k : k + kn, n : n + nn] to columns at the address `there`;
    op(x) is x, or x.T if it is transposed. pack_rows((there, apart, x, m, mm, k, kn)): x[m : m + mm, k : k + kn] to rows.
    """
    lanes, numbers = code.instructions.lanes, NUMBERS[precision]
    transpose = code.external(f"transpose_{precision}", 5)
    copy_1, copy_2, copy_3 = (code.external(f"copy_{precision}_{vectors}", 5) for vectors in (1, 2, 3))
    copy_row = code.external(f"copy_row_{precision}", 3)

    if precision == FLOAT32:

        @numba.njit(nogil=True, error_model="numpy")
        def element(first, _second):
            return _bits(first)

    else:

        @numba.njit(nogil=True, error_model="numpy")
        def element(first, second):
            return _bfloat16(first) | (_bfloat16(second) << types.uint32(16))

    @numba.njit(nogil=True, error_model="numpy")
    def pack_edge(there, apart, x, is_transposed, k, kn, n, nn, steps, lane):
        """Pack one element after another: `steps` and `lane` are ranges of them."""
        to = _elements_at(there)
        for step in range(*steps):
            for j in range(*lane):
                at, second = k + step * numbers, step * numbers + 1 < kn
                if j >= nn:
                    to[step * apart + j] = 0
                elif is_transposed:
                    to[step * apart + j] = element(x[n + j, at], x[n + j, at + 1] if numbers == 2 and second else _ZERO)
                else:
                    to[step * apart + j] = element(x[at, n + j], x[at + 1, n + j] if numbers == 2 and second else _ZERO)

    @numba.njit(nogil=True, error_model="numpy")
    def pack_columns(there, apart, x, is_transposed, k, kn, n, nn, width):
        distance, steps = x.strides[0], -(-kn // numbers)
        if is_transposed:
            times = kn // (lanes * numbers)
            for j in range(0, width, lanes):
                whole = times if j + lanes <= nn else 0
                transpose(x.ctypes.data + (n + j) * distance + 4 * k, distance, there + 4 * j, 4 * apart, whole)
                pack_edge(there, apart, x, is_transposed, k, kn, n, nn, (whole * lanes, steps), (j, j + lanes))
        else:
            whole, source = kn // numbers if nn == width else 0, x.ctypes.data + k * distance + 4 * n
            if width == lanes:
                copy_1(source, distance, there, 4 * apart, whole)
            elif width == 2 * lanes:
                copy_2(source, distance, there, 4 * apart, whole)
            else:
                copy_3(source, distance, there, 4 * apart, whole)
            pack_edge(there, apart, x, is_transposed, k, kn, n, nn, (whole, steps), (0, width))

    @numba.njit(nogil=True, error_model="numpy")
    def pack_rows(there, apart, x, m, mm, k, kn):
        for i in range(mm):
            here, to = x.ctypes.data + (m + i) * x.strides[0] + 4 * k, there + 4 * i * apart
            times = kn // (lanes * numbers)
            copy_row(here, to, times)
            for step in range(times * lanes, -(-kn // numbers)):
                at, second = k + step * numbers, step * numbers + 1 < kn
                _elements_at(to)[step] = element(x[m + i, at], x[m + i, at + 1] if numbers == 2 and second else _ZERO)

    columns = {"k": INT, "kn": INT, "n": INT, "nn": INT, "width": INT}
    return (
        by_symbol(f"columns_{precision}", there=INT, apart=INT, x=READ, is_transposed=INT, **columns)(lambda: pack_columns),
        by_symbol(f"rows_{precision}", there=INT, apart=INT, x=READ, m=INT, mm=INT, k=INT, kn=INT)(lambda: pack_rows),
    )


@intrinsic
def _elements_at(typing_context, address):
    """Return the memory at an address as elements."""
    pointer = types.CPointer(types.uint32)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(types.int64), codegen


@intrinsic
def _bits(typing_context, x):
    """Return a float32 as 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@numba.njit(nogil=True, error_model="numpy")
def _bfloat16(x):
    """Return the 16 bits of the bfloat16 nearest to a float32, of two equally near ones the even one."""
    bits = _bits(x)
    if np.isnan(x):  # stays NaN, whatever the half that goes held
        return types.uint32((bits | types.uint32(0x400000)) >> types.uint32(16))
    return types.uint32((bits + types.uint32(0x7FFF) + ((bits >> types.uint32(16)) & types.uint32(1))) >> types.uint32(16))
