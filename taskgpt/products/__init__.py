"""Matrix products of our own, for the compiled twins of kernels; on machines that they are not written for, BLAS.

instruction_sets.py  what vector instructions this machine has, and the register tile that fills them
micro_kernels.py     the innermost loops, as LLVM IR
machine_code.py      these as functions that compiled code calls
vectors.py           what these and other kernels on registers are written with
packing.py           operands as the innermost loops want them
blocks.py            the loops around them, `product`
packed.py            the same for kernels that pack operands themselves
ways.py              which way to multiply: what a graph file says, and what a kernel's constant `products` is

Three ways: SciPy's BLAS in float32; our own in float32; our own in bfloat16 with sums in float32. Each gives the same bits under every
scheduler, and others than the other two.
"""

from taskgpt.products.blocks import WORK, product
from taskgpt.products.ways import BLAS, OWN_BF16, OWN_FP32, described, operand, register_tile, verify_callers, way_for

__all__ = ["BLAS", "OWN_BF16", "OWN_FP32", "WORK", "described", "operand", "product", "register_tile", "verify_callers", "way_for"]
