"""The heat equation by Jacobi's method: two arrays take turns, and a task reads a block of one with its border, its halo."""

import numpy as np

from taskgpt.tasks import In, Out, dims, kernel, wrap

R, C, P, Q = dims("R C P Q")


@kernel(compiled=True, flops=lambda R, C: 4 * R * C)
def relax(out: Out[R, C], inp: In[P, Q]):
    """out is the mean of four neighbours; inp has a border of one element around it."""
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[r, c] = (inp[r, c + 1] + inp[r + 2, c + 1] + inp[r + 1, c] + inp[r + 1, c + 2]) * np.float32(0.25)


class Problem:
    """A plate of `size` rows inside its edge, which keeps its temperature; an even number of steps."""

    def __init__(self, size: int = 50, block: int = 16, steps: int = 8):
        inside = range(1, size + 1, block)
        cuts = [*inside, size + 1]
        self.here, self.there = (wrap(np.empty((size + 2, size + 2), np.float32), (cuts, cuts), name) for name in ("here", "there"))
        self.blocks, self.steps = len(inside), steps

    def begin(self) -> None:
        for each in self.here.array, self.there.array:
            each[...] = 0
            each[:, 0] = 100

    def program(self, spawn) -> None:
        inp, out = self.here, self.there
        for _ in range(self.steps):
            for i in range(1, self.blocks + 1):
                for j in range(1, self.blocks + 1):
                    spawn(relax, out.cell(i, j), inp.cell(i, j).grown(1))
            inp, out = out, inp

    def result(self) -> np.ndarray:
        return self.here.array

    def wanted(self) -> np.ndarray:
        u = np.zeros_like(self.here.array)
        u[:, 0] = 100
        for _ in range(self.steps):
            u[1:-1, 1:-1] = (u[:-2, 1:-1] + u[2:, 1:-1] + u[1:-1, :-2] + u[1:-1, 2:]) * np.float32(0.25)
        return u
