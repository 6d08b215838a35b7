"""Several types: the bytes of a picture are counted into bins of 64-bit integers, and become shares in float16."""

import numpy as np

from taskgpt.tasks import In, Out, Reduction, dims, kernel, wrap

R, C, BINS = dims("R C BINS")


@kernel(compiled=True)
def clear(bins: Out[BINS, np.int64]):
    bins[:] = 0


@kernel(compiled=True, flops=lambda R, C: R * C)
def count(bins: Reduction["+", BINS, np.int64], picture: In[R, C, np.uint8]):
    """Add each pixel to its bin."""
    for r in range(picture.shape[0]):
        for c in range(picture.shape[1]):
            bins[picture[r, c]] += 1


@kernel
def share(shares: Out[BINS, np.float16], bins: In[BINS, np.int64]):
    """numba has no float16 on processors: this one is NumPy alone."""
    shares[:] = bins / bins.sum()


class Problem:
    """A picture of `size` rows in tiles of `tile` rows."""

    def __init__(self, size: int = 120, tile: int = 32):
        pixels = np.random.default_rng(0).normal(128, 30, (size, size)).clip(0, 255).astype(np.uint8)
        self.picture = wrap(pixels, (tile, tile), "picture")
        self.bins, self.shares = wrap(np.empty(256, np.int64), name="bins"), wrap(np.empty(256, np.float16), name="shares")

    def begin(self) -> None:
        self.bins.array[...] = -1

    def program(self, spawn) -> None:
        spawn(clear, self.bins[:])
        for i in range(self.picture.grid[0]):
            for j in range(self.picture.grid[1]):
                spawn(count, self.bins[:], self.picture.cell(i, j))
        spawn(share, self.shares[:], self.bins[:])

    def result(self) -> np.ndarray:
        return self.shares.array

    def wanted(self) -> np.ndarray:
        return (np.bincount(self.picture.array.ravel(), minlength=256) / self.picture.array.size).astype(np.float16)
