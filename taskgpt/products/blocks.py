"""Matrix products of tiles, in compiled code: blocks, packed operands, and the micro-kernels that multiply them.

    for each block of K:
        for each block of rows:                 A, if it must be packed, goes into `work`
            for each panel of columns:          B is packed behind it, and stays in the caches while the rows go by
                for each register tile:         the micro-kernel

In float32, A is read where it lies if its steps are side by side and its rows do not fall on one another in the first cache, and B if its
columns are side by side and there are too few rows to make up for a copy. The order of every sum is that of K; see micro_kernels.py.
"""

import numba
import numpy as np
from numba import types

from taskgpt.products.instruction_sets import VECTORS
from taskgpt.products.machine_code import MachineCode, code_of_this_machine
from taskgpt.products.micro_kernels import BFLOAT16, FLOAT32, NUMBERS
from taskgpt.products.packed import cannot_multiply, even_part, tile_multiplier
from taskgpt.products.packing import INT, READ, ROW_STEPS, STEPS, WRITTEN, packers
from taskgpt.products.ways import BLAS, OWN_FP32
from taskgpt.tasks.blas import gemm
from taskgpt.tasks.symbols import by_symbol

ROWS = 512  # of A that are packed at a time
_A_ELEMENTS, _B_ELEMENTS, _EDGE_ELEMENTS = ROWS * ROW_STEPS, STEPS * 64, 16 * 64  # enough for any register tile
WORK = _A_ELEMENTS + _B_ELEMENTS + _EDGE_ELEMENTS  # float32 of working memory that a product needs
_FEW_ROWS = 16  # for which B is not worth packing
_SAME_PLACE_BYTES = 2048  # rows whose distance is a multiple of it fall on one another

_ZERO, _ONE = np.float32(0), np.float32(1)


def multiplier(code: MachineCode, precision: str):
    """Return the function that multiplies float32 tiles as elements of `precision`."""
    rows_of_tile, lanes = code.instructions.rows, code.instructions.lanes
    panel = max(rows_of_tile, lanes)  # rows of A side by side, where its columns are packed
    numbers = NUMBERS[precision]
    multiply_tile = tile_multiplier(code, precision)
    pack_columns, pack_rows = packers(code, precision)

    @numba.njit(nogil=True, error_model="numpy")
    def multiply(c, a, b, transpose_a, transpose_b, adds, work):
        rows, columns, depth = c.shape[0], c.shape[1], a.shape[0] if transpose_a else a.shape[1]
        packed_a, packed_b, edge = work.ctypes.data, work.ctypes.data + 4 * _A_ELEMENTS, work[_A_ELEMENTS + _B_ELEMENTS :]
        a_in_place = numbers == 1 and not transpose_a and a.strides[0] % _SAME_PLACE_BYTES != 0
        b_in_place = numbers == 1 and not transpose_b and rows <= _FEW_ROWS
        vectors = -(-columns // lanes)
        panels = -(-vectors // VECTORS)
        for k in range(0, depth, STEPS * numbers):
            kn = min(STEPS * numbers, depth - k)
            steps, adds_now = -(-kn // numbers), 1 if adds or k > 0 else 0
            for m in range(0, rows, ROWS):
                mn = min(ROWS, rows - m)
                if transpose_a:
                    for i in range(0, mn, panel):
                        pack_columns((packed_a + 4 * i * steps, panel, a, 0, k, kn, m + i, min(panel, mn - i), panel))
                elif not a_in_place:
                    pack_rows((packed_a, ROW_STEPS, a, m, mn, k, kn))
                for p in range(panels):
                    n, width = even_part(p, panels, vectors, lanes)
                    nn = min(width, columns - n)
                    if b_in_place and nn == width:
                        b_at, b_step = b.ctypes.data + k * b.strides[0] + 4 * n, b.strides[0] // 4
                    else:
                        b_at, b_step = packed_b, width
                        pack_columns((b_at, width, b, transpose_b, k, kn, n, nn, width))
                    for i in range(0, mn, rows_of_tile):
                        here = min(rows_of_tile, mn - i)
                        if transpose_a:
                            a_at, a_row, a_step = packed_a + 4 * (i // panel * panel * steps + i % panel), 1, panel
                        elif a_in_place:
                            a_at, a_row, a_step = a.ctypes.data + (m + i) * a.strides[0] + 4 * k, a.strides[0] // 4, 1
                        else:
                            a_at, a_row, a_step = packed_a + 4 * i * ROW_STEPS, ROW_STEPS, 1
                        if nn == width:
                            c_at = c.ctypes.data + (m + i) * c.strides[0] + 4 * n
                            multiply_tile(a_at, a_row, a_step, b_at, b_step, c_at, c.strides[0] // 4, steps, here, adds_now, width)
                        else:
                            at_edge(c, m + i, n, here, nn, a_at, a_row, a_step, b_at, b_step, edge, steps, adds_now, width)

    @numba.njit(nogil=True, error_model="numpy")
    def at_edge(c, m, n, rows, nn, a, a_row, a_step, b, b_step, edge, steps, adds, width):
        """Multiply into the working memory, and store what is of C."""
        if adds:
            for i in range(rows):
                for j in range(nn):
                    edge[i * width + j] = c[m + i, n + j]
        multiply_tile(a, a_row, a_step, b, b_step, edge.ctypes.data, width, steps, rows, adds, width)
        for i in range(rows):
            for j in range(nn):
                c[m + i, n + j] = edge[i * width + j]

    return multiply


@numba.njit(nogil=True, error_model="numpy")
def _has_rows(x):
    """Return True if the elements of each row lie side by side."""
    return x.strides[1] == 4 or x.shape[1] <= 1


@by_symbol("product", way=INT, c=WRITTEN, a=READ, b=READ, transpose_a=INT, transpose_b=INT, adds=INT, work=types.float32[::1])
def _product():
    code = code_of_this_machine()
    multiply_float32, multiply_bfloat16 = (multiplier(code, each) if code else cannot_multiply for each in (FLOAT32, BFLOAT16))

    @numba.njit(nogil=True, error_model="numpy")
    def multiply(way, c, a, b, transpose_a, transpose_b, adds, work):
        rows, depth = (a.shape[1], a.shape[0]) if transpose_a else a.shape
        steps, columns = (b.shape[1], b.shape[0]) if transpose_b else b.shape
        if rows != c.shape[0] or columns != c.shape[1] or depth != steps or work.shape[0] < WORK:
            raise ValueError("product() wants c (M, N), op(a) (M, K), op(b) (K, N), and work of Scratch[WORK]")
        if rows == 0 or columns == 0 or depth == 0:
            if not adds:
                c[...] = _ZERO
            return
        if not (_has_rows(c) and _has_rows(a) and _has_rows(b)):
            raise ValueError("product() wants elements of a row side by side; to transpose an operand, set its flag")
        if way == BLAS:
            gemm(c, a, b, transpose_a, transpose_b, _ONE, _ONE if adds else _ZERO)
        elif way == OWN_FP32:
            multiply_float32(c, a, b, transpose_a, transpose_b, adds, work)
        else:
            multiply_bfloat16(c, a, b, transpose_a, transpose_b, adds, work)

    return multiply


@numba.njit(nogil=True, error_model="numpy")
def product(way, c, a, b, transpose_a, transpose_b, adds, work):
    """In a compiled twin: c = op(a) @ op(b), or c += op(a) @ op(b) if `adds`, for float32 tiles; op(x) = x.T where the flag is 1.

    Shapes: c (M, N), op(a) (M, K), op(b) (K, N), otherwise it raises ValueError; work: Scratch[WORK]. `way` is one of BLAS, OWN_FP32,
    OWN_BF16, of which the last rounds a and b to bfloat16.
    """
    _product((way, c, a, b, transpose_a, transpose_b, adds, work))
