"""Which way to multiply: what a graph file says, and what a kernel's constant `products` is."""

import numpy as np

from taskgpt.errors import UserError
from taskgpt.products.instruction_sets import of_this_machine

MOST_CALLERS = 128  # of OpenBLAS at a time: it has no more buffers, and beyond them its results are wrong, or the process ends
MANY_CALLERS = 32  # from here on, the lock that OpenBLAS takes at every call is worth a note
BLAS, OWN_FP32, OWN_BF16 = range(3)
PRODUCTS, PRECISIONS = ("own", "blas"), ("fp32", "bf16")  # in words; the first of each is the default


def way_for(products: str, precision: str) -> int:
    """Return the way for what a graph file says. Raises ValueError if this machine cannot go it: BLAS has no bfloat16.

    "own" in float32 is BLAS on a machine that has none of the vector instructions that our products are written for.
    """
    has_own = products == "own" and of_this_machine() is not None
    if precision == "bf16":
        if has_own:
            return OWN_BF16
        why = "BLAS has none" if products == "blas" else "this machine has no AVX2, AVX-512 or NEON"
        raise ValueError(f'precision = "bf16" needs products of our own: {why}; set precision = "fp32"')
    return OWN_FP32 if has_own else BLAS


def described(way: int) -> str:
    """Return a way in words: `own fp32, avx512, 8x48`."""
    if way == BLAS:
        return "blas fp32, SciPy's OpenBLAS"
    return f"own {'bf16' if way == OWN_BF16 else 'fp32'}, {of_this_machine()}"


def register_tile(way: int) -> tuple[int, int] | None:
    """Return rows and columns of an output that are computed at a time; None for BLAS, which does not say."""
    instructions = of_this_machine()
    return None if way == BLAS or instructions is None else (instructions.rows, instructions.columns)


def verify_callers(way: int, workers: int) -> list[str]:
    """Return notes on so many workers that multiply at a time. Raises UserError where BLAS would break."""
    if way != BLAS or workers < MANY_CALLERS:
        return []
    if workers > MOST_CALLERS:
        do = f'choose --workers {MOST_CALLERS} or less, or products = "own"'
        raise UserError(f"{workers} workers: OpenBLAS, which multiplies here, breaks beyond {MOST_CALLERS} callers; {do}")
    return [f"OpenBLAS takes one lock at every product, for which {workers} workers wait"]


def operand(way: int, x: np.ndarray) -> np.ndarray:
    """Return an operand as a product takes it, for NumPy bodies: as it is, or rounded to bfloat16, to the nearest, then to the even one."""
    if way != OWN_BF16:
        return x
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    nearest = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    kept = np.where(np.isnan(x), bits | np.uint32(0x400000), nearest) & np.uint32(0xFFFF0000)
    return kept.view(np.float32)
