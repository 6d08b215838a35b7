"""BLAS and LAPACK in compiled kernels, for all types and flags, on whole tiles and on tiles in the middle of larger ones."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg

from taskgpt.config import load_scheduler
from taskgpt.schedulers import open_scheduler
from taskgpt.tasks import AccessError, Graph, In, InOut, Out, Scratch, TaskError, TwinError, check, dims, kernel, wrap
from taskgpt.tasks.blas import gemm, herk, syrk, trsm
from taskgpt.tasks.lapack import geqrf, getrf, potrf

M, N, K, P, Q, MORE = dims("M N K P Q MORE")
TYPES = [np.dtype(each) for each in (np.float32, np.float64, np.complex64, np.complex128)]
by_type = pytest.mark.parametrize("dtype", TYPES, ids=str)


def kernels(dtype: np.dtype) -> SimpleNamespace:
    """Return a kernel for each routine, its flags as constants. Its body is NumPy's and SciPy's word for it."""

    @kernel
    def product(c: InOut[M, N, dtype], a: In[P, Q, dtype], b: In[K, MORE, dtype], ta: int, tb: int, alpha: float, beta: float):
        c[...] = alpha * (turned(a, ta) @ turned(b, tb)) + (beta * c if beta else 0)

    @product.compiled
    def _(c, a, b, ta, tb, alpha, beta):
        gemm(c, a, b, ta, tb, alpha, beta)

    def square(is_conjugated):
        def body(c, a, lower, transpose, alpha, beta):
            other = a.conj() if is_conjugated else a
            full = alpha * (other.T @ a if transpose else a @ other.T) + beta * c
            c[...] = np.tril(full) + np.triu(c, 1) if lower else np.triu(full) + np.tril(c, -1)

        body.__annotations__ = {
            "c": InOut[N, N, dtype],
            "a": In[P, Q, dtype],
            "lower": int,
            "transpose": int,
            "alpha": float,
            "beta": float,
        }
        return kernel(body)

    plain, conjugated = square(False), square(True)

    @plain.compiled
    def _(c, a, lower, transpose, alpha, beta):
        syrk(c, a, lower, transpose, alpha, beta)

    @conjugated.compiled
    def _(c, a, lower, transpose, alpha, beta):
        herk(c, a, lower, transpose, alpha, beta)

    @kernel
    def solve(b: InOut[M, N, dtype], a: In[K, K, dtype], left: int, lower: int, transpose: int, unit: int, alpha: float):
        a, trans = np.tril(a) if lower else np.triu(a), "NTC"[transpose]
        if left:
            b[...] = scipy.linalg.solve_triangular(a, alpha * b, trans=trans, lower=lower, unit_diagonal=unit)
        else:
            turn = {"N": "T", "T": "N", "C": "N"}[trans]
            of = a.conj() if trans == "C" else a
            b[...] = scipy.linalg.solve_triangular(of, alpha * b.T, trans=turn, lower=lower, unit_diagonal=unit).T

    @solve.compiled
    def _(b, a, left, lower, transpose, unit, alpha):
        trsm(b, a, left, lower, transpose, unit, alpha)

    @kernel
    def cholesky(a: InOut[N, N, dtype], lower: int):
        full = np.tril(a) + np.tril(a, -1).T.conj() if lower else np.triu(a) + np.triu(a, 1).T.conj()
        factor = np.linalg.cholesky(full)
        a[...] = np.tril(factor) + np.triu(a, 1) if lower else np.triu(factor.T.conj()) + np.tril(a, -1)

    @cholesky.compiled
    def _(a, lower):
        potrf(a, lower)

    @kernel
    def lu(a: InOut[M, N, dtype], pivots: Out[K, np.int32], work: Scratch[N, M, dtype]):
        a[...], pivots[:] = scipy.linalg.lu_factor(a)

    @lu.compiled
    def _(a, pivots, work):
        getrf(a, pivots, work)

    @kernel
    def qr(a: InOut[M, N, dtype], tau: Out[K, dtype], work: Scratch[N, M, dtype], more: Scratch[64, dtype]):
        (raw, tau[:]), _ = scipy.linalg.qr(a, mode="raw")
        a[...] = raw

    @qr.compiled
    def _(a, tau, work, more):
        geqrf(a, tau, work, more)

    return SimpleNamespace(product=product, syrk=plain, herk=conjugated, solve=solve, cholesky=cholesky, lu=lu, qr=qr)


def turned(a: np.ndarray, flag: int) -> np.ndarray:
    return (a, a.T, a.T.conj())[flag]


KERNELS = {dtype: kernels(dtype) for dtype in TYPES}


def numbers(dtype: np.dtype, *shape: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    values = draw.standard_normal(shape) + (1j * draw.standard_normal(shape) if dtype.kind == "c" else 0)
    return values.astype(dtype)


def agree(kernel, written: int, *arguments) -> None:
    """Compare twin and body on the tiles as they are, and in the middle of larger arrays, around which nothing may be written."""
    for margin in 0, 3:
        around = [framed(each, margin) if isinstance(each, np.ndarray) and each.ndim == 2 else each for each in arguments]
        inner = [middle(each, margin) if isinstance(each, np.ndarray) and each.ndim == 2 else each for each in around]
        before = around[0].copy()
        wanted = [each.copy() if isinstance(each, np.ndarray) else each for each in arguments]
        scratch = [np.empty(shape, dtype) for shape, dtype in kernel.scratch_shapes(wanted)]
        kernel.body(*wanted, *scratch)
        kernel(*inner)
        for got, expected in list(zip(inner, wanted, strict=True))[:written]:
            tolerance = 2e-4 if got.dtype in (np.float32, np.complex64) else 1e-11
            np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)
        middle(before, margin)[...] = middle(around[0], margin)
        np.testing.assert_array_equal(before, around[0])


def framed(array: np.ndarray, margin: int) -> np.ndarray:
    return np.pad(array, margin, constant_values=99)


def middle(array: np.ndarray, margin: int) -> np.ndarray:
    return array[margin : array.shape[0] - margin, margin : array.shape[1] - margin]


@by_type
@pytest.mark.parametrize("ta", [0, 1, 2])
@pytest.mark.parametrize("tb", [0, 1, 2])
def test_gemm(dtype, ta, tb):
    """c = alpha * op(a) @ op(b) + beta * c, also of one row, one column, and with nothing of c read."""
    for m, n, k in (1, 1, 1), (1, 5, 3), (5, 1, 3), (4, 7, 1), (16, 24, 32):
        a, b = numbers(dtype, *((k, m) if ta else (m, k))), numbers(dtype, *((n, k) if tb else (k, n)), seed=1)
        for alpha, beta in (1.0, 1.0), (-2.0, 0.5), (0.0, 2.0):
            agree(KERNELS[dtype].product, 1, numbers(dtype, m, n, seed=2), a, b, ta, tb, alpha, beta)
        agree(KERNELS[dtype].product, 1, np.full((m, n), np.nan, dtype), a, b, ta, tb, 1.5, 0.0)


@by_type
@pytest.mark.parametrize("which", ["syrk", "herk"])
@pytest.mark.parametrize("lower", [0, 1])
@pytest.mark.parametrize("transpose", [0, 1])
def test_syrk_and_herk(dtype, which, lower, transpose):
    """One triangle of a product with oneself; the other one stays."""
    for n, k in (1, 1), (5, 3), (12, 20):
        c = numbers(dtype, n, n)
        c[np.diag_indices(n)] = c.diagonal().real  # herk's are real
        agree(getattr(KERNELS[dtype], which), 1, c, numbers(dtype, *((k, n) if transpose else (n, k)), seed=1), lower, transpose, -0.5, 2.0)


@by_type
@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("lower", [0, 1])
@pytest.mark.parametrize("transpose", [0, 1, 2])
@pytest.mark.parametrize("unit", [0, 1])
def test_trsm(dtype, left, lower, transpose, unit):
    """Both sides, both triangles, every transpose, with and without the diagonal."""
    for m, n in (1, 1), (1, 4), (6, 5):
        size = m if left else n
        a = numbers(dtype, size, size) / 4 + 2 * np.eye(size, dtype=dtype)
        agree(KERNELS[dtype].solve, 1, numbers(dtype, m, n, seed=1), a, left, lower, transpose, unit, 1.5)


@by_type
@pytest.mark.parametrize("lower", [0, 1])
def test_potrf(dtype, lower):
    """Either triangle; the other one stays."""
    for n in 1, 5, 40:
        a = numbers(dtype, n, n)
        agree(KERNELS[dtype].cholesky, 1, a @ a.T.conj() + n * np.eye(n, dtype=dtype), lower)


@by_type
@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (7, 4), (4, 7)])
def test_getrf(dtype, shape):
    """Factors and pivots are those of SciPy."""
    pivots = np.zeros(min(shape), np.int32)
    agree(KERNELS[dtype].lu, 2, numbers(dtype, *shape), pivots)


@by_type
@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (7, 4), (4, 7)])
def test_geqrf(dtype, shape):
    """R and the reflectors: their product, times R, is the tile."""
    m, a = shape[0], numbers(dtype, *shape)
    factored, tau = a.copy(), np.zeros(min(shape), dtype)
    KERNELS[dtype].qr(factored, tau)
    q = np.eye(m, dtype=dtype)
    for at in range(min(shape)):
        v = np.r_[np.zeros(at), 1, factored[at + 1 :, at]].astype(dtype)
        q = q @ (np.eye(m) - tau[at] * np.outer(v, v.conj()))
    tolerance = 1e-5 if dtype.itemsize in (4, 8) and dtype in (np.float32, np.complex64) else 1e-13
    np.testing.assert_allclose(q @ np.triu(factored), a, rtol=0, atol=10 * tolerance)
    agree(KERNELS[dtype].qr, 2, a, np.zeros(min(shape), dtype))


@pytest.mark.parametrize("dtype", [TYPES[0], TYPES[3]], ids=str)
@pytest.mark.parametrize("scheduler", ["sequential", "native", "threads"])
def test_what_cannot_be_factored_names_its_task(dtype, scheduler):
    """LinAlgError is the cause of the task's error, under every scheduler."""
    zeros, pivots = wrap(np.zeros((3, 3), dtype), name="a"), wrap(np.zeros(3, np.int32), name="p")
    chosen = load_scheduler(scheduler)
    for spawned, tiles, what in (
        (KERNELS[dtype].cholesky, (zeros[:], 1), "potrf: the tile is not positive definite"),
        (KERNELS[dtype].lu, (zeros[:], pivots[:]), "getrf: the tile is singular"),
    ):
        graph = Graph()
        graph.spawn(spawned, *tiles)
        with open_scheduler(chosen.scheduler, chosen.settings) as opened, pytest.raises(TaskError, match=f"LinAlgError: {what}") as raised:
            opened.run(graph)
        assert str(raised.value).startswith(f"task 0, {spawned.name} ") and isinstance(raised.value.__cause__, np.linalg.LinAlgError)


def test_tiles_that_a_routine_cannot_take():
    """Are refused when the kernel is compiled: other types, of two types, another number of axes; and one that is read."""

    @kernel
    def half(c: Out[M, N, np.int32], a: In[M, K, np.int32], b: In[K, N, np.int32]):
        pass

    @kernel
    def mixed(c: Out[M, N, np.float64], a: In[M, K], b: In[K, N]):
        pass

    for wrong in half, mixed:

        @wrong.compiled
        def _(c, a, b):
            gemm(c, a, b, 0, 0, 1.0, 0.0)

        with pytest.raises(
            TwinError, match="gemm takes as c a tile of 2 dimensions of float32, float64, complex64, complex128, all of one type; got"
        ):
            wrong.compile()

    @kernel
    def cheat(a: In[N, N]):
        pass

    @cheat.compiled
    def _(a):
        potrf(a, 1)

    with pytest.raises(AccessError, match="cheat wrote 'a', declared In"):
        cheat.compile()

    @kernel(compiled=True)
    def long(a: InOut[M, N], pivots: Out[K, np.int64], work: Scratch[N, M]):
        getrf(a, pivots, work)

    with pytest.raises(TwinError, match="getrf takes as pivots a tile of 1 dimensions of int32"):
        long.compile()


@by_type
def test_checked(dtype):
    """Under check a routine stays in its tiles."""
    a = numbers(dtype, 8, 8)
    matrix = wrap(a @ a.T.conj() + 8 * np.eye(8, dtype=dtype), (4, 4), "a")
    wanted = np.linalg.cholesky(matrix.array)
    graph = Graph()
    graph.spawn(KERNELS[dtype].cholesky, matrix.cell(0, 0), 1)
    graph.spawn(KERNELS[dtype].solve, matrix.cell(1, 0), matrix.cell(0, 0), 0, 1, 2, 0, 1.0)
    graph.spawn(KERNELS[dtype].herk, matrix.cell(1, 1), matrix.cell(1, 0), 1, 0, -1.0, 1.0)
    graph.spawn(KERNELS[dtype].cholesky, matrix.cell(1, 1), 1)
    for task in check(graph).tasks:
        task.run()
    np.testing.assert_allclose(np.tril(matrix.array), wanted, rtol=1e-4)
