"""STREAM: copy, scale, add and triad. Each piece goes through all four, and no barrier stands between them."""

import numpy as np

from taskgpt.tasks import In, Out, dims, kernel, wrap

N = dims("N")[0]
f64 = np.float64


@kernel(compiled=True)
def copy(c: Out[N, f64], a: In[N, f64]):
    for n in range(c.shape[0]):
        c[n] = a[n]


@kernel(compiled=True)
def scale(b: Out[N, f64], c: In[N, f64], s: float):
    for n in range(b.shape[0]):
        b[n] = s * c[n]


@kernel(compiled=True)
def add(c: Out[N, f64], a: In[N, f64], b: In[N, f64]):
    for n in range(c.shape[0]):
        c[n] = a[n] + b[n]


@kernel(compiled=True, flops=lambda N: 2 * N)
def triad(a: Out[N, f64], b: In[N, f64], c: In[N, f64], s: float):
    for n in range(a.shape[0]):
        a[n] = b[n] + s * c[n]


class Problem:
    """Arrays of `length` elements in pieces of `piece`, `rounds` times."""

    def __init__(self, length: int = 5_000, piece: int = 1_000, rounds: int = 3):
        self.a, self.b, self.c = (wrap(np.empty(length), piece, name) for name in "abc")
        self.rounds = rounds

    def begin(self) -> None:
        self.a.array[...], self.b.array[...], self.c.array[...] = np.arange(len(self.a.array)), 2, 0

    def program(self, spawn) -> None:
        for _ in range(self.rounds):
            for at in range(self.a.grid[0]):
                a, b, c = self.a.cell(at), self.b.cell(at), self.c.cell(at)
                spawn(copy, c, a)
                spawn(scale, b, c, 3.0)
                spawn(add, c, a, b)
                spawn(triad, a, b, c, 3.0)

    def result(self) -> np.ndarray:
        return self.a.array

    def wanted(self) -> np.ndarray:
        a = np.arange(len(self.a.array), dtype=f64)
        for _ in range(self.rounds):
            b = 3.0 * a
            a = b + 3.0 * (a + b)
        return a
