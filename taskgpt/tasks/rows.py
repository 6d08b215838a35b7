"""Rows of tiles in compiled twins."""

from numba import types
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic


@intrinsic
def dense(typing_context, row):
    """In a compiled twin: the same 1-D array with its elements known to lie side by side, so that loops over it vectorise.

    A row of a tile always does; its type cannot say so, because rows of a tile need not touch each other.
    """
    result = types.Array(row.dtype, row.ndim, "C", readonly=not row.mutable)

    def codegen(context, builder, signature, args):
        return impl_ret_borrowed(context, builder, result, args[0])

    return result(row), codegen
