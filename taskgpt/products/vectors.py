"""What LLVM's builder says of vectors in more words: for micro-kernels here, and for kernels that work on registers themselves."""

from llvmlite import ir
from numba.core import cgutils


def fma(build: ir.IRBuilder, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
    """Return a * b + c, lane by lane, rounded once, of vectors of float32."""
    kind = ir.FunctionType(c.type, [c.type] * 3)
    return build.call(cgutils.get_or_insert_function(build.module, kind, f"llvm.fma.v{c.type.count}f32"), [a, b, c])


def constant(vector: ir.VectorType, value: float) -> ir.Constant:
    """Return a vector of one number."""
    return ir.Constant(vector, [value] * vector.count)


def spread(build: ir.IRBuilder, x: ir.Value, lanes: int) -> ir.Value:
    """Return a vector of x."""
    vector = ir.VectorType(x.type, lanes)
    first = build.insert_element(ir.Constant(vector, ir.Undefined), x, ir.IntType(32)(0))
    return shuffle(build, first, first, [0] * lanes)


def shuffle(build: ir.IRBuilder, a: ir.Value, b: ir.Value, order: list[int]) -> ir.Value:
    """Return lanes of a, and after them of b, in this order."""
    return build.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order))
