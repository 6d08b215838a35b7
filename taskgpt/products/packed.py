"""Products of operands that the caller packs, in compiled code: for kernels that use an operand more than once, or make it themselves.

A packed operand is a tile of elements in working memory: a float32 each, or a pair of bfloat16 that follow each other along K, of which
`elements` says how many there are. Rows, of A: (M, elements along K). Columns, of B or of A transposed: (elements along K, N). Where the
numbers are odd, the last pair ends with 0. Only for ways of our own.
"""

import numba

from taskgpt.products.instruction_sets import VECTORS
from taskgpt.products.machine_code import MachineCode, code_of_this_machine
from taskgpt.products.micro_kernels import BFLOAT16, FLOAT32
from taskgpt.products.packing import INT, READ, WRITTEN, packers
from taskgpt.products.ways import OWN_FP32
from taskgpt.tasks.symbols import by_symbol

GRAIN = 16  # columns are a multiple of it: as many as the widest vectors hold


@numba.njit(nogil=True, error_model="numpy")
def even_part(part, parts, grains, grain):
    """Return (first, width) of a part of so many grains, cut into parts that are as even as they can be; both in elements."""
    first = grains * part // parts * grain
    return first, grains * (part + 1) // parts * grain - first


def tile_multiplier(code: MachineCode, precision: str):
    """Return the micro-kernel as a function that also takes the width of the tile: one, two, or three vectors."""
    lanes = code.instructions.lanes
    multiply_1, multiply_2, multiply_3 = (code.external(f"multiply_{precision}_{vectors}", 10) for vectors in (1, 2, 3))

    @numba.njit(nogil=True, error_model="numpy")
    def multiply_tile(a, a_row, a_step, b, b_step, c, c_row, steps, rows, adds, width):
        if width == 3 * lanes:
            multiply_3(a, a_row, a_step, b, b_step, c, c_row, steps, rows, adds)
        elif width == 2 * lanes:
            multiply_2(a, a_row, a_step, b, b_step, c, c_row, steps, rows, adds)
        else:
            multiply_1(a, a_row, a_step, b, b_step, c, c_row, steps, rows, adds)

    return multiply_tile


def packed_products(code: MachineCode, precision: str):
    """Return (pack_rows, pack_columns, multiply) as below, for one precision."""
    rows_of_tile, lanes = code.instructions.rows, code.instructions.lanes
    columns_packer, rows_packer = packers(code, precision)
    multiply_tile = tile_multiplier(code, precision)

    @numba.njit(nogil=True, error_model="numpy")
    def pack_rows(packed, x):
        rows_packer((packed.ctypes.data, packed.strides[0] // 4, x, 0, x.shape[0], 0, x.shape[1]))

    @numba.njit(nogil=True, error_model="numpy")
    def pack_columns(packed, x, is_transposed):
        columns, (depth, wanted) = packed.shape[1], (x.shape[1], x.shape[0]) if is_transposed else x.shape
        for n in range(0, columns, VECTORS * lanes):
            width = min(VECTORS * lanes, columns - n)
            at, here = packed.ctypes.data + 4 * n, max(0, min(width, wanted - n))
            columns_packer((at, packed.strides[0] // 4, x, is_transposed, 0, depth, n, here, width))

    @numba.njit(nogil=True, error_model="numpy")
    def multiply(c, a, is_transposed, b, adds):
        rows, columns, steps = c.shape[0], c.shape[1], b.shape[0]
        c_row, b_step = c.strides[0] // 4, b.strides[0] // 4
        a_row, a_step = (1, a.strides[0] // 4) if is_transposed else (a.strides[0] // 4, 1)
        vectors = columns // lanes
        panels = -(-vectors // VECTORS)
        for p in range(panels):
            n, width = even_part(p, panels, vectors, lanes)
            for m in range(0, rows, rows_of_tile):
                a_at, b_at, c_at = a.ctypes.data + 4 * m * a_row, b.ctypes.data + 4 * n, c.ctypes.data + 4 * (m * c_row + n)
                multiply_tile(a_at, a_row, a_step, b_at, b_step, c_at, c_row, steps, min(rows_of_tile, rows - m), adds, width)

    return pack_rows, pack_columns, multiply


@numba.njit(nogil=True, error_model="numpy")
def cannot_multiply(*_):
    raise NotImplementedError("this machine has none of the vector instructions that products of our own need")


def _of_both(which: int):
    """Return what `packed_products` returns under this number, for float32 and for bfloat16."""
    code = code_of_this_machine()
    return [packed_products(code, each)[which] if code else cannot_multiply for each in (FLOAT32, BFLOAT16)]


@by_symbol("pack_rows", way=INT, packed=WRITTEN, x=READ)
def _pack_rows():
    of_float32, of_bfloat16 = _of_both(0)

    @numba.njit(nogil=True, error_model="numpy")
    def pack(way, packed, x):
        if way == OWN_FP32:
            of_float32(packed, x)
        else:
            of_bfloat16(packed, x)

    return pack


@by_symbol("pack_columns", way=INT, packed=WRITTEN, x=READ, is_transposed=INT)
def _pack_columns():
    of_float32, of_bfloat16 = _of_both(1)

    @numba.njit(nogil=True, error_model="numpy")
    def pack(way, packed, x, is_transposed):
        if way == OWN_FP32:
            of_float32(packed, x, is_transposed)
        else:
            of_bfloat16(packed, x, is_transposed)

    return pack


@by_symbol("multiply_packed", way=INT, c=WRITTEN, a=READ, is_transposed=INT, b=READ, adds=INT)
def _multiply():
    of_float32, of_bfloat16 = _of_both(2)

    @numba.njit(nogil=True, error_model="numpy")
    def multiply(way, c, a, is_transposed, b, adds):
        if way == OWN_FP32:
            of_float32(c, a, is_transposed, b, adds)
        else:
            of_bfloat16(c, a, is_transposed, b, adds)

    return multiply


@numba.njit(nogil=True, error_model="numpy")
def elements(way, numbers):
    """Return how many elements hold so many numbers along K."""
    return numbers if way == OWN_FP32 else -(-numbers // 2)


@numba.njit(nogil=True, error_model="numpy")
def pack_rows(way, packed, x):
    """packed (M, elements) = x (M, K), as rows."""
    _pack_rows((way, packed, x))


@numba.njit(nogil=True, error_model="numpy")
def pack_columns(way, packed, x, is_transposed):
    """packed (elements, N or more) = op(x) (K, N), as columns, and 0 beyond them; op(x) = x.T if is_transposed, else x.

    How many columns `packed` has must be a multiple of GRAIN.
    """
    _pack_columns((way, packed, x, is_transposed))


@numba.njit(nogil=True, error_model="numpy")
def multiply(way, c, a, is_transposed, b, adds):
    """c (M, N) = op(a) @ b, or c += op(a) @ b if `adds`, in float32, for a packed as rows, or as columns if it is transposed.

    Shapes: a (M, elements), or (elements, M) if is_transposed; b (elements, N) of columns; N a multiple of GRAIN; not checked.
    """
    _multiply((way, c, a, is_transposed, b, adds))
