"""A dot product: tasks add to one number at the same time, and the sum has the same bits however they run."""

import numpy as np

from taskgpt.tasks import In, Out, Reduction, dims, kernel, wrap

N = dims("N")[0]


@kernel(compiled=True)
def zero(total: Out[()]):
    total[()] = 0


@kernel(compiled=True, flops=lambda N: 2 * N)
def dot(total: Reduction["+", ()], x: In[N], y: In[N]):
    for n in range(x.shape[0]):
        total[()] += x[n] * y[n]


class Problem:
    """Vectors of `length` elements in pieces of `piece`."""

    def __init__(self, length: int = 10_000, piece: int = 100):
        draw = np.random.default_rng(0)
        self.x, self.y = (wrap(draw.standard_normal(length, np.float32), piece, name) for name in "xy")
        self.total = wrap(np.empty((), np.float32), name="total")

    def begin(self) -> None:
        self.total.array[...] = np.nan

    def program(self, spawn) -> None:
        spawn(zero, self.total[()])
        for at in range(self.x.grid[0]):
            spawn(dot, self.total[()], self.x.cell(at), self.y.cell(at))

    def result(self) -> np.ndarray:
        return self.total.array

    def wanted(self) -> np.ndarray:
        return self.x.array.astype(np.float64) @ self.y.array
