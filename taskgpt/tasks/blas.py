"""Matrix products inside compiled kernels: SciPy's BLAS, called without the GIL, on tiles as they lie in memory.

The address comes from `scipy.linalg.cython_blas`, the interface SciPy publishes for this purpose. It is bound to a symbol rather than
written into the code as a number, so that compiled kernels can be cached on disk.
"""

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import get_cython_function_address, intrinsic

_SYMBOL = "taskgpt_sgemm"
llvmlite.binding.add_symbol(_SYMBOL, get_cython_function_address("scipy.linalg.cython_blas", "sgemm"))


@intrinsic
def gemm(typing_context, c, a, b, transpose_a, transpose_b, alpha, beta):
    """In a compiled twin: `c = alpha * op(a) @ op(b) + beta * c` for float32 tiles, op(x) = x.T where the flag is 1, x where it is 0.

    Shapes: c (M, N), op(a) (M, K), op(b) (K, N); not checked. With beta = 0, c is not read: NaN in it does not spread.
    """
    if not all(isinstance(t, types.Array) and t.ndim == 2 and t.dtype == types.float32 for t in (c, a, b)):
        raise TypingError(f"gemm takes float32 tiles of two dimensions, got {c}, {a}, {b}")
    if not c.mutable:
        raise TypingError("Cannot modify readonly array c")  # numba's words, where an In tile is written
    signature = types.void(c, a, b, types.intp, types.intp, types.float32, types.float32)

    def codegen(context, builder, signature, args):
        tiles = [context.make_array(t)(context, builder, value) for t, value in zip(signature.args[:3], args[:3], strict=True)]
        flag_a, flag_b, alpha, beta = args[3:]
        int32, char, pointer = ir.IntType(32), ir.IntType(8), ir.IntType(8).as_pointer()

        def extent(tile, axis):
            return builder.trunc(builder.extract_value(tile.shape, axis), int32)

        def distance_of_rows(tile):
            elements = builder.udiv(builder.extract_value(tile.strides, 0), ir.Constant(ir.IntType(64), 4))
            # A tile of one row may carry any stride; BLAS wants at least the length of a row.
            elements, columns = builder.trunc(elements, int32), extent(tile, 1)
            return builder.select(builder.icmp_signed("<", elements, columns), columns, elements)

        def letter(flag):
            is_set = builder.icmp_signed("!=", flag, ir.Constant(flag.type, 0))
            return builder.select(is_set, ir.Constant(char, ord("T")), ir.Constant(char, ord("N")))

        def address(value):
            slot = cgutils.alloca_once_value(builder, value)
            return builder.bitcast(slot, pointer)

        c_tile, a_tile, b_tile = tiles
        depth = builder.select(builder.icmp_signed("!=", flag_a, ir.Constant(flag_a.type, 0)), extent(a_tile, 0), extent(a_tile, 1))
        # BLAS counts by columns: our row-major c is its c.T = op(b).T @ op(a).T, the same memory with the operands exchanged.
        arguments = [
            address(letter(flag_b)), address(letter(flag_a)),
            address(extent(c_tile, 1)), address(extent(c_tile, 0)), address(depth),
            address(alpha), builder.bitcast(b_tile.data, pointer), address(distance_of_rows(b_tile)),
            builder.bitcast(a_tile.data, pointer), address(distance_of_rows(a_tile)),
            address(beta), builder.bitcast(c_tile.data, pointer), address(distance_of_rows(c_tile)),
        ]  # fmt: skip
        function_type = ir.FunctionType(ir.VoidType(), [pointer] * len(arguments))
        builder.call(cgutils.get_or_insert_function(builder.module, function_type, _SYMBOL), arguments)
        return context.get_dummy_value()

    return signature, codegen
