"""BLAS inside compiled kernels, on tiles of float32, float64, complex64 or complex128: products, and triangular systems.

Tiles are row-major. A transpose flag is 0 for the tile itself, 1 for its transpose, 2 for its conjugate transpose. Sizes are not checked.
"""

from numba import njit

from taskgpt.tasks.fortran import distance, routine, transpose_letter, triangle_letter, verifier

_gemm = routine("cython_blas", "gemm", "cc iii x Ai Ai x Wi")
_syrk = routine("cython_blas", "syrk", "cc ii x Ai x Wi")
_herk = routine("cython_blas", "herk", "cc ii r Ai r Wi", of_real="syrk")
_trsm = routine("cython_blas", "trsm", "cccc ii x Ai Wi")
_verify_gemm = verifier("gemm", c="2w", a="2", b="2")
_verify_syrk = verifier("syrk", c="2w", a="2")
_verify_herk = verifier("herk", c="2w", a="2")
_verify_trsm = verifier("trsm", b="2w", a="2")


@njit
def gemm(c, a, b, transpose_a, transpose_b, alpha, beta):
    """In a compiled twin: `c = alpha * op(a) @ op(b) + beta * c`; op as the flags say.

    Shapes: c (M, N), op(a) (M, K), op(b) (K, N). With beta = 0, c is not read: NaN in it does not spread.
    """
    _verify_gemm(c, a, b)
    depth = a.shape[0] if transpose_a else a.shape[1]
    of_b, of_a = transpose_letter(transpose_b), transpose_letter(transpose_a)
    # Our c is its c.T = op(b).T @ op(a).T: the same memory with the operands exchanged.
    _gemm(of_b, of_a, c.shape[1], c.shape[0], depth, alpha, b, distance(b), a, distance(a), beta, c, distance(c))


@njit
def syrk(c, a, lower, transpose, alpha, beta):
    """In a compiled twin: `c = alpha * a @ a.T + beta * c`, with transpose 1 `a.T @ a`, in the lower triangle of c; with lower 0 the upper.

    Shapes: c (N, N), a (N, K), with transpose 1 (K, N). Of complex tiles nothing is conjugated: herk does that.
    """
    _verify_syrk(c, a)
    depth = a.shape[0] if transpose else a.shape[1]
    letter = transpose_letter(0 if transpose else 1)
    _syrk(triangle_letter(lower), letter, c.shape[0], depth, alpha, a, distance(a), beta, c, distance(c))


@njit
def herk(c, a, lower, transpose, alpha, beta):
    """In a compiled twin: `c = alpha * a @ a.T.conj() + beta * c`, with transpose 1 `a.T.conj() @ a`. As syrk; alpha and beta are real."""
    _verify_herk(c, a)
    depth = a.shape[0] if transpose else a.shape[1]
    letter = transpose_letter(0 if transpose else 2)
    _herk(triangle_letter(lower), letter, c.shape[0], depth, alpha, a, distance(a), beta, c, distance(c))


@njit
def trsm(b, a, left, lower, transpose, unit, alpha):
    """In a compiled twin: b becomes X of `op(a) @ X = alpha * b`, with left 0 of `X @ op(a) = alpha * b`.

    a is triangular: its lower triangle is read, with lower 0 its upper one; with unit 1 its diagonal is not read, and counts as ones.
    Shapes: b (M, N), a (M, M), with left 0 (N, N). A zero on the diagonal gives inf or NaN, no exception.
    """
    _verify_trsm(b, a)
    side, diagonal = 82 if left else 76, 85 if unit else 78  # R or L: the transposed equation has a on the other side; U or N
    letter = transpose_letter(transpose)
    _trsm(side, triangle_letter(lower), letter, diagonal, b.shape[1], b.shape[0], alpha, a, distance(a), b, distance(b))
