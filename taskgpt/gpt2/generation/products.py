"""Products of few rows with a matrix, at the speed of the memory that the matrix streams from.

BLAS's sgemm packs the matrix before it multiplies, which for a few rows costs more than the product. Here one row is multiplied with the
rows of the matrix in the order in which they lie in memory, a stream that the processor fetches ahead of itself. Several rows meet four
rows of the matrix at a time, while the next four are fetched.

Every result is a dot product of its own: 16 lanes, each a chain of fma, added in halves, then what is left over, element by element. So its
bits depend on its two rows alone: not on how many rows stand beside them, nor on where the matrix is cut, nor on the vector width.
"""

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

_FLOAT, _INT, _SIZE, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.IntType(8)
_LANES = 16
_VECTOR = ir.VectorType(_FLOAT, _LANES)
SIDE = 4  # rows of each operand in a block: 16 sums, 4 rows of the matrix and one of the input fill the 32 registers of AVX-512
_INTO_L2 = (0, 2, 1)  # of llvm.prefetch: to read, not into L1, data


def _dots(height: int, width: int):
    """Return an intrinsic: out[r + i, o + j] = inp[r + i] . weight[o + j] for i < height and j < width."""

    def typed(typing_context, out, inp, weight, r, o):
        if not all(isinstance(t, types.Array) and t.ndim == 2 and t.dtype == types.float32 for t in (out, inp, weight)):
            raise TypingError(f"products are of float32 tiles of two dimensions, got {out}, {inp}, {weight}")
        if not out.mutable:
            raise TypingError("Cannot modify readonly array out")  # numba's words, where an In tile is written

        def codegen(context, builder, signature, args):
            arrays = zip(signature.args[:3], args[:3], strict=True)
            out, inp, weight = (context.make_array(kind)(context, builder, value) for kind, value in arrays)
            first, column = args[3:]

            def after(number, count):
                return builder.add(number, ir.Constant(_SIZE, count))

            def row(tile, number):
                data = builder.bitcast(tile.data, _BYTE.as_pointer())
                offset = builder.mul(builder.extract_value(tile.strides, 0), number)
                return builder.bitcast(builder.gep(data, [offset]), _FLOAT.as_pointer())

            def place(row, at, kind):
                return builder.bitcast(builder.gep(row, [at]), kind.as_pointer())

            def add_products(kind, sums, at):
                name = "llvm.fma.f32" if kind is _FLOAT else f"llvm.fma.v{_LANES}f32"
                fma = builder.module.declare_intrinsic(name, (), ir.FunctionType(kind, [kind] * 3))
                a, b = ([builder.load(place(row, at, kind), align=4) for row in rows] for rows in (inputs, weights))
                for (i, j), total in zip(pairs, sums, strict=True):
                    builder.store(builder.call(fma, [a[i], b[j], builder.load(total)]), total)

            pairs = [(i, j) for i in range(height) for j in range(width)]
            inputs, weights = ([row(tile, after(at, n)) for n in range(count)] for tile, at, count in
                               ((inp, first, height), (weight, column, width)))  # fmt: skip
            following = [row(weight, after(column, width + j)) for j in range(width)] if width > 1 else []
            pointer = _BYTE.as_pointer()
            prefetch = builder.module.declare_intrinsic("llvm.prefetch", [pointer], ir.FunctionType(ir.VoidType(), [pointer, *[_INT] * 3]))
            length = builder.extract_value(inp.shape, 1)
            whole = builder.and_(length, ir.Constant(_SIZE, -_LANES))

            lanes = [cgutils.alloca_once_value(builder, ir.Constant(_VECTOR, [0.0] * _LANES)) for _ in pairs]
            with cgutils.for_range_slice(builder, ir.Constant(_SIZE, 0), whole, ir.Constant(_SIZE, _LANES), _SIZE) as (at, _):
                for each in following:
                    builder.call(prefetch, [place(each, at, _BYTE), *(ir.Constant(_INT, n) for n in _INTO_L2)])
                add_products(_VECTOR, lanes, at)
            sums = [cgutils.alloca_once_value(builder, _in_halves(builder, builder.load(each))) for each in lanes]
            with cgutils.for_range_slice(builder, whole, length, ir.Constant(_SIZE, 1), _SIZE) as (at, _):
                add_products(_FLOAT, sums, at)
            for (i, j), total in zip(pairs, sums, strict=True):
                builder.store(builder.load(total), place(row(out, after(first, i)), after(column, j), _FLOAT))
            return context.get_dummy_value()

        return types.void(out, inp, weight, types.intp, types.intp), codegen

    return intrinsic(typed)


def _in_halves(builder, lanes):
    """Add the lanes of a vector."""
    count = _LANES
    while count > 1:
        count //= 2
        halves = [ir.Constant(ir.VectorType(_INT, count), list(range(at, at + count))) for at in (0, count)]
        lanes = builder.fadd(*(builder.shuffle_vector(lanes, lanes, half) for half in halves))
    return builder.extract_element(lanes, ir.Constant(_INT, 0))


_one, _wide, _square = _dots(1, 1), _dots(1, SIDE), _dots(SIDE, SIDE)


@numba.njit(nogil=True, error_model="numpy")
def products(out, inp, weight, count):
    """In a compiled twin: out[r, o] = inp[r] . weight[o] for the first `count` rows; the others stay."""
    outputs = weight.shape[0]
    blocks = outputs - outputs % SIDE if count > 1 else 0
    for o in range(0, blocks, SIDE):
        squares = count - count % SIDE
        for r in range(0, squares, SIDE):
            _square(out, inp, weight, r, o)
        for r in range(squares, count):
            _wide(out, inp, weight, r, o)
    for o in range(blocks, outputs):
        for r in range(count):
            _one(out, inp, weight, r, o)
