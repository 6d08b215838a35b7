"""Gauss-Seidel relaxation, in place: a block needs its upper and left neighbours of this sweep, and the others of the last one.

OmpSs-2 programs pad blocks for that. Here strips of the neighbours are read, so that the blocks of a diagonal run side by side, and sweeps
follow each other as waves, without a barrier.
"""

import itertools

import numpy as np

from taskgpt.tasks import In, InOut, dims, kernel, wrap

P, Q = dims("P Q")


@kernel(compiled=True, flops=lambda P, Q: 4 * P * Q)
def relax(
    u: InOut[P, Q, np.float64],
    up: In[Q, np.float64],
    down: In[Q, np.float64],
    left: In[P, 1, np.float64],
    right: In[P, 1, np.float64],
):
    """Set each element to the mean of its neighbours, row by row."""
    for r in range(u.shape[0]):
        for c in range(u.shape[1]):
            above = up[c] if r == 0 else u[r - 1, c]
            below = down[c] if r == u.shape[0] - 1 else u[r + 1, c]
            before = left[r, 0] if c == 0 else u[r, c - 1]
            after = right[r, 0] if c == u.shape[1] - 1 else u[r, c + 1]
            u[r, c] = (above + below + before + after) * 0.25


class Problem:
    """A plate of `size` rows inside its edge, which keeps its temperature; blocks of `block` rows."""

    def __init__(self, size: int = 60, block: int = 16, sweeps: int = 6):
        cuts = [*range(1, size + 1, block), size + 1]  # the edge has cells of its own
        self.u = wrap(np.empty((size + 2, size + 2)), (cuts, cuts), "u")
        self.spans, self.sweeps = [slice(*span) for span in itertools.pairwise(cuts)], sweeps

    def begin(self) -> None:
        self.u.array[...] = 0
        self.u.array[0] = 100

    def program(self, spawn) -> None:
        u = self.u
        for _ in range(self.sweeps):
            for r in self.spans:
                for c in self.spans:
                    left, right = u[r, c.start - 1 : c.start], u[r, c.stop : c.stop + 1]
                    spawn(relax, u[r, c], u[r.start - 1, c], u[r.stop, c], left, right)

    def result(self) -> np.ndarray:
        return self.u.array

    def wanted(self) -> np.ndarray:
        u = np.zeros_like(self.u.array)
        u[0] = 100
        for _ in range(self.sweeps):
            relax.body(u[1:-1, 1:-1], u[0, 1:-1], u[-1, 1:-1], u[1:-1, :1], u[1:-1, -1:])
        return u
