"""Gauss-Seidel relaxation, in place: a block needs its upper and left neighbours of this sweep, and the others of the last one.

OmpSs-2 programs pad blocks for that. Here a block is read with its border, and sweeps follow each other as waves, without a barrier.
"""

import numpy as np

from taskgpt.tasks import InOut, dims, kernel, wrap

P, Q = dims("P Q")


@kernel(compiled=True, flops=lambda P, Q: 4 * (P - 2) * (Q - 2))
def relax(u: InOut[P, Q, np.float64]):
    """Set each element inside of the border to the mean of its neighbours, row by row."""
    for r in range(1, u.shape[0] - 1):
        for c in range(1, u.shape[1] - 1):
            u[r, c] = (u[r - 1, c] + u[r + 1, c] + u[r, c - 1] + u[r, c + 1]) * 0.25


class Problem:
    """A plate of `size` rows inside its edge, which keeps its temperature; blocks of `block` rows."""

    def __init__(self, size: int = 60, block: int = 16, sweeps: int = 6):
        inside = range(1, size + 1, block)
        cuts = [*inside, size + 1]  # the edge has cells of its own, so that no border is cut off
        self.u = wrap(np.empty((size + 2, size + 2)), (cuts, cuts), "u")
        self.blocks, self.sweeps = len(inside), sweeps

    def begin(self) -> None:
        self.u.array[...] = 0
        self.u.array[0] = 100

    def program(self, spawn) -> None:
        for _ in range(self.sweeps):
            for i in range(1, self.blocks + 1):
                for j in range(1, self.blocks + 1):
                    spawn(relax, self.u.cell(i, j).grown(1))

    def result(self) -> np.ndarray:
        return self.u.array

    def wanted(self) -> np.ndarray:
        u = np.zeros_like(self.u.array)
        u[0] = 100
        for _ in range(self.sweeps):
            relax.body(u)
        return u
