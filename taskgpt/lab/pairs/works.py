"""What the programs of pairs do: work that can be repeated, on memory of its own, with a result that has a hash.

Beside training steps of graphs: cholesky and heat of `bench programs`, from the same start in every repetition; a chain, which one core
runs as fast as many; STREAM, which memory bounds; and matrix products, which the cores bound.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from taskgpt.lab.benchmarks.task_programs import Cholesky, Heat
from taskgpt.lab.named import Prepared
from taskgpt.lab.report import compile_with_progress
from taskgpt.products import BLAS
from taskgpt.tasks import Graph, In, InOut, Out, Tensor, dims, kernel, wrap
from taskgpt.tasks.blas import gemm

R, C, K, N = dims("R C K N")
F64 = np.float64
STREAM_SCALE = math.sqrt(2) - 1  # each round multiplies by 2 s + s**2, which is 1: numbers stay what they are however often it runs
LARGE = {"at_least": 1, "at_most": 1 << 30}


@dataclass
class Work:
    """Graphs that are run in turns, and have their result in these tensors; `begin` sets the memory as it is at the start.

    `products`: the way it multiplies. `is_exact`: its bits do not depend on the order of tasks.
    """

    graphs: Sequence[Graph]
    begin: Callable[[], None]
    results: Sequence[Tensor]
    products: int = BLAS
    is_exact: bool = True

    def sha256(self) -> str:
        """Return the hash of the result."""
        digest = hashlib.sha256()
        for tensor in self.results:
            digest.update(tensor.array)
        return digest.hexdigest()


@kernel
def load(out: Out[R, C, F64], inp: In[R, C, F64]):
    """Copy a tile of the start."""
    out[...] = inp


@load.compiled
def _(out, inp):
    for r in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[r, c] = inp[r, c]


@kernel(compiled=True)
def advance(x: InOut[N, F64], times: int):
    """Apply the logistic map to each element, so many times."""
    for _ in range(times):
        for n in range(x.shape[0]):
            x[n] = 3.75 * x[n] * (1.0 - x[n])


@kernel(compiled=True)
def copy(c: Out[N, F64], a: In[N, F64]):
    for n in range(c.shape[0]):
        c[n] = a[n]


@kernel(compiled=True)
def scale(b: Out[N, F64], c: In[N, F64], s: float):
    for n in range(b.shape[0]):
        b[n] = s * c[n]


@kernel(compiled=True)
def add(c: Out[N, F64], a: In[N, F64], b: In[N, F64]):
    for n in range(c.shape[0]):
        c[n] = a[n] + b[n]


@kernel(compiled=True)
def triad(a: Out[N, F64], b: In[N, F64], c: In[N, F64], s: float):
    for n in range(a.shape[0]):
        a[n] = b[n] + s * c[n]


@kernel
def multiply(out: Out[R, C, F64], a: In[R, K, F64], b: In[K, C, F64]):
    """out = a @ b."""
    np.matmul(a, b, out=out)


@multiply.compiled
def _(out, a, b):
    gemm(out, a, b, 0, 0, 1.0, 0.0)


@dataclass(frozen=True)
class Chain:
    """A chain of tasks, each on the same n elements: there is never more than one to run."""

    n: int = field(default=4096, metadata=LARGE)
    tasks: int = field(default=500, metadata=LARGE)
    sweeps: int = field(default=20, metadata=LARGE)

    @property
    def nbytes(self) -> int:
        return 8 * self.n

    def work(self) -> Work:
        x = wrap(np.empty(self.n), (), "x")

        def begin() -> None:
            x.array[...] = np.linspace(0.1, 0.9, self.n)

        graph = Graph("chain")
        for _ in range(self.tasks):
            graph.spawn(advance, x[:], self.sweeps)
        return Work([graph], begin, [x])


@dataclass(frozen=True)
class Stream:
    """STREAM's copy, scale, add and triad on three arrays of n elements, in pieces."""

    n: int = field(default=1 << 23, metadata=LARGE)
    piece: int = field(default=1 << 16, metadata=LARGE)

    @property
    def tasks(self) -> int:
        return 4 * math.ceil(self.n / self.piece)

    @property
    def nbytes(self) -> int:
        return 3 * 8 * self.n

    def work(self) -> Work:
        a, b, c = (wrap(np.empty(self.n), self.piece, name) for name in "abc")

        def begin() -> None:
            a.array[...], b.array[...], c.array[...] = np.linspace(1, 2, self.n), 2, 0

        graph = Graph("stream")
        for at in range(a.grid[0]):
            graph.spawn(copy, c.cell(at), a.cell(at))
            graph.spawn(scale, b.cell(at), c.cell(at), STREAM_SCALE)
            graph.spawn(add, c.cell(at), a.cell(at), b.cell(at))
            graph.spawn(triad, a.cell(at), b.cell(at), c.cell(at), STREAM_SCALE)
        return Work([graph], begin, [a])


@dataclass(frozen=True)
class Products:
    """The product of two n x n matrices, a task for each tile of it: none waits for another, and each stays within caches."""

    n: int = field(default=1024, metadata={"at_least": 1, "at_most": 1 << 16})
    tile: int = field(default=128, metadata={"at_least": 1, "at_most": 1 << 16})

    @property
    def tasks(self) -> int:
        return math.ceil(self.n / self.tile) ** 2

    @property
    def nbytes(self) -> int:
        return 3 * 8 * self.n**2

    def work(self) -> Work:
        cuts = {"out": (self.tile, self.tile), "a": (self.tile, None), "b": (None, self.tile)}
        out, a, b = (wrap(np.empty((self.n, self.n)), cut, name) for name, cut in cuts.items())

        def begin() -> None:
            draw = np.random.default_rng(0)
            a.array[...], b.array[...], out.array[...] = draw.random(a.shape), draw.random(b.shape), 0

        graph = Graph("products")
        for i, j in itertools.product(range(out.grid[0]), range(out.grid[1])):
            graph.spawn(multiply, out.cell(i, j), a.cell(i, 0), b.cell(0, j))
        return Work([graph], begin, [out])


PROGRAMS: dict[str, type] = {"cholesky": Cholesky, "heat": Heat, "chain": Chain, "stream": Stream, "products": Products}


def work_of(program: Cholesky | Heat | Chain | Stream | Products) -> Work:
    """Return the work of a program, compiled, with its memory."""
    work = from_the_same_start(program) if isinstance(program, Cholesky | Heat) else program.work()
    compile_with_progress(work.graphs[0].kernels)
    return work


def from_the_same_start(program: Cholesky | Heat) -> Work:
    """Return a program whose tasks first load the tensor's start: its result is that of one time, however often it runs."""
    loop = program.opened(False)
    loop.begin()
    tensor = loop.tensor
    start = wrap(tensor.array.copy(), tuple(map(list, tensor.bounds)), "start")
    graph = Graph(program.name)
    for place in np.ndindex(tensor.grid):
        graph.spawn(load, tensor.cell(*place), start.cell(*place))
    loop.program(graph.spawn)
    return Work([graph], loop.begin, [tensor])


def training(prepared: Prepared) -> Work:
    """Return training steps of a graph, from fresh parameters."""
    m = prepared.m

    def begin() -> None:
        m.initialize(seed=42)
        for tensor in (*m.m.tensors.values(), *m.v.tensors.values()):
            tensor.array[...] = 0

    return Work(prepared.graphs, begin, list(m.p.tensors.values()), m.products, not m.options.commutative)
