"""LU factorization of a matrix most of whose tiles are not there: BSC's SparseLU. One comes to be when something is subtracted from it."""

import numpy as np

from taskgpt.tasks import In, InOut, dims, kernel, wrap
from taskgpt.tasks.blas import gemm, trsm

N = dims("N")[0]


@kernel(compiled=True, flops=lambda N: 2 * N**3 // 3)
def lu0(diagonal: InOut[N, N]):
    """Factor a tile without exchanging rows."""
    for k in range(diagonal.shape[0]):
        for i in range(k + 1, diagonal.shape[0]):
            diagonal[i, k] /= diagonal[k, k]
            for j in range(k + 1, diagonal.shape[0]):
                diagonal[i, j] -= diagonal[i, k] * diagonal[k, j]


@kernel(flops=lambda N: N**3)
def fwd(tile: InOut[N, N], diagonal: In[N, N]):
    """tile = inv(L) @ tile."""
    tile[...] = np.linalg.solve(np.tril(diagonal, -1) + np.eye(len(tile), dtype=tile.dtype), tile)


@fwd.compiled
def _(tile, diagonal):
    trsm(tile, diagonal, 1, 1, 0, 1, 1.0)


@kernel(flops=lambda N: N**3)
def bdiv(tile: InOut[N, N], diagonal: In[N, N]):
    """tile = tile @ inv(U)."""
    tile[...] = np.linalg.solve(np.triu(diagonal).T, tile.T).T


@bdiv.compiled
def _(tile, diagonal):
    trsm(tile, diagonal, 0, 0, 0, 0, 1.0)


@kernel(flops=lambda N: 2 * N**3)
def bmod(tile: InOut[N, N], row: In[N, N], column: In[N, N]):
    """tile -= row @ column."""
    tile -= row @ column


@bmod.compiled
def _(tile, row, column):
    gemm(tile, row, column, 0, 0, -1.0, 1.0)


class Problem:
    """`tiles` by `tiles` tiles of `size` rows; those off a few diagonals are not there at first."""

    def __init__(self, tiles: int = 7, size: int = 12):
        self.a = wrap(np.empty((tiles, tiles, size, size), np.float32), (1, 1, None, None), "a")
        draw = np.random.default_rng(0)
        self.there = np.array([[abs(i - j) in (0, 1, 4) for j in range(tiles)] for i in range(tiles)])
        self.matrix = np.where(self.there[:, :, None, None], draw.random(self.a.shape, np.float32), np.float32(0))
        for k in range(tiles):
            self.matrix[k, k] += 10 * size * np.eye(size, dtype=np.float32)

    def begin(self) -> None:
        self.a.array[...] = self.matrix

    def program(self, spawn) -> None:
        a, there, tiles = self.a, self.there.copy(), len(self.there)
        for k in range(tiles):
            spawn(lu0, a[k, k])
            below = [i for i in range(k + 1, tiles) if there[i, k]]
            right = [j for j in range(k + 1, tiles) if there[k, j]]
            for j in right:
                spawn(fwd, a[k, j], a[k, k])
            for i in below:
                spawn(bdiv, a[i, k], a[k, k])
            for i in below:
                for j in right:
                    there[i, j] = True
                    spawn(bmod, a[i, j], a[i, k], a[k, j])

    def result(self) -> np.ndarray:
        """Return L @ U."""
        whole = _whole(self.a.array)
        return (np.tril(whole, -1) + np.eye(len(whole), dtype=whole.dtype)) @ np.triu(whole)

    def wanted(self) -> np.ndarray:
        return _whole(self.matrix)


def _whole(tiles: np.ndarray) -> np.ndarray:
    count, _, size, _ = tiles.shape
    return tiles.transpose(0, 2, 1, 3).reshape(count * size, count * size)
