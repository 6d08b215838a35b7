"""Conjugate gradients: a loop that goes on until the residual is small. A step is a graph, recorded once and run as often as it takes."""

import numpy as np

from taskgpt.tasks import In, InOut, Out, Reduction, dims, kernel, wrap

N, M = dims("N M")
f64 = np.float64


@kernel(compiled=True)
def zero(total: Out[(), f64]):
    total[()] = 0


@kernel(compiled=True, flops=lambda N, M: 2 * N * M)
def multiply(out: Out[N, f64], a: In[N, M, f64], x: In[M, f64]):
    for n in range(out.shape[0]):
        total = 0.0
        for m in range(x.shape[0]):
            total += a[n, m] * x[m]
        out[n] = total


@kernel(compiled=True, flops=lambda N: 2 * N)
def dot(total: Reduction["+", (), f64], x: In[N, f64], y: In[N, f64]):
    for n in range(x.shape[0]):
        total[()] += x[n] * y[n]


@kernel(compiled=True, flops=lambda N: 4 * N)
def advance(x: InOut[N, f64], r: InOut[N, f64], p: In[N, f64], ap: In[N, f64], rr: In[(), f64], pap: In[(), f64]):
    alpha = rr[()] / pap[()]
    for n in range(x.shape[0]):
        x[n] += alpha * p[n]
        r[n] -= alpha * ap[n]


@kernel(compiled=True, flops=lambda N: 2 * N)
def turn(p: InOut[N, f64], r: In[N, f64], new: In[(), f64], old: In[(), f64]):
    beta = new[()] / old[()]
    for n in range(p.shape[0]):
        p[n] = r[n] + beta * p[n]


@kernel(compiled=True)
def keep(old: Out[(), f64], new: In[(), f64]):
    old[()] = new[()]


class Problem:
    """A system of `size` equations in blocks of `block`. `run` is given what takes one step, and calls it as often as needed."""

    def __init__(self, size: int = 90, block: int = 16):
        half = np.random.default_rng(0).standard_normal((size, size))
        self.a = wrap(half @ half.T / size + np.eye(size), (block, None), "a")
        self.right = np.arange(size) / size
        self.x, self.r, self.p, self.ap = (wrap(np.empty(size), block, name) for name in ("x", "r", "p", "ap"))
        self.rr, self.new, self.pap = (wrap(np.empty(()), name=name) for name in ("rr", "new", "pap"))

    def begin(self) -> None:
        self.x.array[...] = 0
        self.r.array[...] = self.p.array[...] = self.right
        self.rr.array[...] = self.right @ self.right

    def program(self, spawn) -> None:
        """Spawn one step."""
        blocks = range(self.x.grid[0])
        spawn(zero, self.pap[()])
        for i in blocks:
            spawn(multiply, self.ap.cell(i), self.a.cell(i, 0), self.p[:])
            spawn(dot, self.pap[()], self.p.cell(i), self.ap.cell(i))
        spawn(zero, self.new[()])
        for i in blocks:
            spawn(advance, self.x.cell(i), self.r.cell(i), self.p.cell(i), self.ap.cell(i), self.rr[()], self.pap[()])
            spawn(dot, self.new[()], self.r.cell(i), self.r.cell(i))
        for i in blocks:
            spawn(turn, self.p.cell(i), self.r.cell(i), self.new[()], self.rr[()])
        spawn(keep, self.rr[()], self.new[()])

    def run(self, run_step) -> None:
        """Take steps until the residual is small."""
        while self.rr.array > 1e-24:
            run_step()

    def result(self) -> np.ndarray:
        return self.x.array

    def wanted(self) -> np.ndarray:
        return np.linalg.solve(self.a.array, self.right)
