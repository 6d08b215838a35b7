"""LAPACK inside compiled kernels, on row-major tiles of float32, float64, complex64 or complex128: Cholesky, LU and QR factors of one tile.

What cannot be factored raises LinAlgError, and so the task fails by its name.
"""

import numpy as np
from numba import njit

from taskgpt.tasks.fortran import distance, routine, triangle_letter, verifier

_potrf = routine("cython_lapack", "potrf", "c i Wi I")
_getrf = routine("cython_lapack", "getrf", "ii Wi P I")
_geqrf = routine("cython_lapack", "geqrf", "ii Wi W Wi I")
_verify_potrf = verifier("potrf", a="2w")
_verify_getrf = verifier("getrf", a="2w", pivots="1wp", work="2w")
_verify_geqrf = verifier("geqrf", a="2w", tau="1w", work="2w", more="1w")


@njit
def potrf(a, lower):
    """In a compiled twin: the lower triangle of a becomes L of `a = L @ L.T.conj()`; with lower 0 the upper one U of `a = U.T.conj() @ U`.

    The other triangle is neither read nor written. Raises LinAlgError if a is not positive definite.
    """
    _verify_potrf(a)
    info = _potrf(triangle_letter(lower), a.shape[0], a, distance(a))
    if info:
        raise np.linalg.LinAlgError("potrf: the tile is not positive definite")


@njit
def getrf(a, pivots, work):
    """In a compiled twin: a becomes L, with ones on its diagonal that are not stored, and U of `P @ a = L @ U`.

    pivots[n] is the row that row n was exchanged with, n ascending, as SciPy's lu_factor says. Shapes: a (M, N), pivots min(M, N), int32,
    work (N, M): `Scratch[N, M]`. Raises LinAlgError if U has a zero on its diagonal.
    """
    _verify_getrf(a, pivots, work)
    work[:] = a.T  # pivots are of rows, and those of a tile as a routine sees it would be of columns
    info = _getrf(a.shape[0], a.shape[1], work, distance(work), pivots)
    a[:] = work.T
    for n in range(pivots.shape[0]):
        pivots[n] -= 1
    if info:
        raise np.linalg.LinAlgError("getrf: the tile is singular")


@njit
def geqrf(a, tau, work, more):
    """In a compiled twin: the upper triangle of a becomes R of `a = Q @ R`; below it and in tau stand the reflectors whose product is Q.

    Q is the product of `I - tau[n] * v @ v.T.conj()`, n ascending, v being column n of a below the diagonal, after zeros and a one.
    Shapes: a (M, N), tau min(M, N), work (N, M): `Scratch[N, M]`, more at least N, faster with 32 * N: `Scratch[4096]`, say.
    """
    _verify_geqrf(a, tau, work, more)
    work[:] = a.T
    info = _geqrf(a.shape[0], a.shape[1], work, distance(work), tau, more, more.shape[0])
    a[:] = work.T
    if info:
        raise np.linalg.LinAlgError("geqrf: the working memory is smaller than the columns of the tile")
