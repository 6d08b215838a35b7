"""Tiled Cholesky factorization, in float64 or any other type that LAPACK has."""

import numpy as np

from taskgpt.tasks import In, InOut, dims, kernel, wrap
from taskgpt.tasks.blas import gemm, herk, trsm
from taskgpt.tasks.lapack import potrf

M, N, K = dims("M N K")
f64 = np.float64


@kernel(flops=lambda N: N**3 // 3)
def factor(a: InOut[N, N, f64]):
    """a = its Cholesky factor, lower."""
    a[...] = np.tril(np.linalg.cholesky(a)) + np.triu(a, 1)


@factor.compiled
def _(a):
    potrf(a, 1)


@kernel(flops=lambda M, N: M * N * N)
def solve(a: InOut[M, N, f64], diagonal: In[N, N, f64]):
    """a = a @ inv(diagonal).T; of the diagonal tile the lower triangle."""
    a[...] = np.linalg.solve(np.tril(diagonal), a.T).T


@solve.compiled
def _(a, diagonal):
    trsm(a, diagonal, 0, 1, 1, 0, 1.0)


@kernel(flops=lambda N, K: N * N * K)
def square(c: InOut[N, N, f64], a: In[N, K, f64]):
    """c -= a @ a.T, its lower triangle."""
    c -= np.tril(a @ a.T)


@square.compiled
def _(c, a):
    herk(c, a, 1, 0, -1.0, 1.0)


@kernel(flops=lambda M, N, K: 2 * M * N * K)
def subtract(c: InOut[M, N, f64], a: In[M, K, f64], b: In[N, K, f64]):
    """c -= a @ b.T."""
    c -= a @ b.T


@subtract.compiled
def _(c, a, b):
    gemm(c, a, b, 0, 1, -1.0, 1.0)


class Problem:
    """A matrix of `size` rows in tiles of `tile` rows; the last may be smaller."""

    def __init__(self, size: int = 200, tile: int = 48):
        half = np.random.default_rng(0).standard_normal((size, size))
        self.matrix = half @ half.T + size * np.eye(size)
        self.a = wrap(np.empty_like(self.matrix), (tile, tile), "a")

    def begin(self) -> None:
        self.a.array[...] = self.matrix

    def program(self, spawn) -> None:
        a = self.a.cell
        tiles = self.a.grid[0]
        for k in range(tiles):
            spawn(factor, a(k, k))
            for i in range(k + 1, tiles):
                spawn(solve, a(i, k), a(k, k))
            for i in range(k + 1, tiles):
                spawn(square, a(i, i), a(i, k))
                for j in range(k + 1, i):
                    spawn(subtract, a(i, j), a(i, k), a(j, k))

    def result(self) -> np.ndarray:
        return np.tril(self.a.array)

    def wanted(self) -> np.ndarray:
        return np.linalg.cholesky(self.matrix)
