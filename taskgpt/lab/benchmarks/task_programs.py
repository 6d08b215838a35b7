"""Task programs that `bench programs` measures: tiled Cholesky, Gauss-Seidel's heat, Fibonacci and N queens with a cut-off.

A loop (Cholesky, heat) is given a spawn, that of a graph or of a running program; a kernel that spawns does the same in compiled code. A
recursion (fib, queens) is a kernel whose tasks spawn tasks; below the cut-off each is one compiled task. openmp.c has the same tasks, on
the same memory.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numba
import numpy as np

from taskgpt.lab.benchmarks.openmp import OpenMP
from taskgpt.tasks import Arena, In, InOut, Kernel, Spawn, Tensor, TensorSpec, dims, kernel
from taskgpt.tasks.blas import gemm, syrk, trsm
from taskgpt.tasks.lapack import potrf

R, C, K = dims("R C K")
F64 = np.float64
RESIDUAL = 1e-12  # of a factorization, at most; it is some 1e-15


@dataclass
class Loop:
    """A program on a tensor. `begin` sets it, `program` spawns, as `root`, a kernel with its arguments, does; `in_c` runs it in C.

    `wrong` is given what a run returned; it says what is wrong with the result, "" if nothing is.
    """

    tensor: Tensor
    begin: Callable[[], None]
    program: Callable[[Callable], None]
    root: tuple[Any, ...]
    in_c: Callable[[OpenMP], object]
    wrong: Callable[[object], str]


@dataclass
class Recursion:
    """A program of one task that spawns others. `root`: its kernel and arguments. `wanted`: what it must return. Others as of Loop."""

    root: tuple[Any, ...]
    in_c: Callable[[OpenMP], int]
    wanted: int

    def begin(self) -> None:
        """Do nothing: there is no memory to set."""

    def wrong(self, found: object) -> str:
        return "" if found == self.wanted else f"it returned {found}, wanted {self.wanted}"


# Cholesky -------------------------------------------------------------------------------------------------------------------------------


@kernel
def factorise(a: InOut[R, R, F64]):
    """a = its Cholesky factor, in its lower triangle."""
    a[...] = np.tril(np.linalg.cholesky(np.tril(a) + np.tril(a, -1).T)) + np.triu(a, 1)


@factorise.compiled
def _(a):
    potrf(a, 1)


@kernel
def solve(b: InOut[R, C, F64], a: In[C, C, F64]):
    """b = b @ inv(a).T; a is lower triangular."""
    b[...] = np.linalg.solve(np.tril(a), b.T).T


@solve.compiled
def _(b, a):
    trsm(b, a, 0, 1, 1, 0, 1.0)


@kernel
def square(c: InOut[R, R, F64], a: In[R, K, F64]):
    """c -= a @ a.T, its lower triangle."""
    c -= np.tril(a @ a.T)


@square.compiled
def _(c, a):
    syrk(c, a, 1, 0, -1.0, 1.0)


@kernel
def subtract(c: InOut[R, C, F64], a: In[R, K, F64], b: In[C, K, F64]):
    """c -= a @ b.T."""
    c -= a @ b.T


@subtract.compiled
def _(c, a, b):
    gemm(c, a, b, 0, 1, -1.0, 1.0)


@kernel(compiled=True)
def factorise_all(a: InOut[R, R, F64], tile: int, spawn: Spawn):
    """The factorization, from compiled code."""
    n = a.shape[0]
    tiles = (n + tile - 1) // tile
    for k in range(tiles):
        here = slice(k * tile, min((k + 1) * tile, n))
        spawn(factorise, a[here, here])
        for i in range(k + 1, tiles):
            spawn(solve, a[i * tile : min((i + 1) * tile, n), here], a[here, here])
        for i in range(k + 1, tiles):
            row = slice(i * tile, min((i + 1) * tile, n))
            spawn(square, a[row, row], a[row, here])
            for j in range(k + 1, i):
                column = slice(j * tile, min((j + 1) * tile, n))
                spawn(subtract, a[row, column], a[row, here], a[column, here])


@dataclass(frozen=True)
class Cholesky:
    """The Cholesky factorization of a matrix of n rows in tiles, in float64."""

    n: int = field(default=2048, metadata={"at_least": 1, "at_most": 1 << 16})
    tile: int = field(default=128, metadata={"at_least": 1, "at_most": 1 << 16})
    name: ClassVar[str] = "cholesky"
    kernels: ClassVar[tuple[Kernel, ...]] = (factorise_all, factorise, solve, square, subtract)

    @property
    def tasks(self) -> int:
        tiles = math.ceil(self.n / self.tile)
        return tiles * (tiles + 1) * (tiles + 2) // 6

    @property
    def nbytes(self) -> int:
        return 5 * 8 * self.n**2  # the tensor, the matrix, and what verifying takes

    def __str__(self) -> str:
        return f"cholesky {self.n}, tiles {self.tile}"

    def opened(self, shared: bool) -> Loop:
        a = Arena({"a": TensorSpec((self.n, self.n), (self.tile, self.tile), np.dtype(F64))}, shared).a
        matrix = np.random.default_rng(0).random((self.n, self.n))
        matrix = (matrix + matrix.T) / 2 + self.n * np.eye(self.n)  # its diagonal dominates: positive definite
        vector = np.random.default_rng(1).standard_normal(self.n)
        wanted = matrix @ vector

        def begin() -> None:
            a.array[...] = matrix

        def program(spawn: Callable) -> None:
            tiles = a.grid[0]
            cell = [[a.cell(i, j) for j in range(i + 1)] for i in range(tiles)]
            for k in range(tiles):
                spawn(factorise, cell[k][k])
                for i in range(k + 1, tiles):
                    spawn(solve, cell[i][k], cell[k][k])
                for i in range(k + 1, tiles):
                    row = cell[i]
                    spawn(square, row[i], row[k])
                    for j in range(k + 1, i):
                        spawn(subtract, row[j], row[k], cell[j][k])

        def wrong(_: object) -> str:
            factor = np.tril(a.array)
            residual = np.abs(factor @ (factor.T @ vector) - wanted).max() / np.abs(wanted).max()
            return "" if residual <= RESIDUAL else f"the factor's residual is {residual:.1e}, wanted at most {RESIDUAL:.0e}"

        return Loop(a, begin, program, (factorise_all, a[:], self.tile), lambda c: c.cholesky(a.array, self.tile), wrong)


# Heat -----------------------------------------------------------------------------------------------------------------------------------


@kernel(compiled=True)
def relax(u: InOut[R, C, F64], up: In[C, F64], down: In[C, F64], left: In[R, 1, F64], right: In[R, 1, F64]):
    """Set each element to the mean of its neighbours, in place, row by row; around u are four strips of its neighbours."""
    rows, columns = u.shape
    for r in range(rows):
        above = u[r - 1] if r > 0 else up
        below = u[r + 1] if r + 1 < rows else down
        here, before = u[r], left[r, 0]
        for c in range(columns - 1):
            before = (above[c] + below[c] + here[c + 1] + before) * 0.25
            here[c] = before
        last = columns - 1
        here[last] = (above[last] + below[last] + right[r, 0] + before) * 0.25


def before(span: slice) -> slice:
    return slice(span.start - 1, span.start)


def after(span: slice) -> slice:
    return slice(span.stop, span.stop + 1)


@numba.njit(nogil=True)
def sweep(u):
    """Relax all that is inside the edge of u (N + 2, N + 2), row by row: what blocks must give, bit by bit."""
    for r in range(1, u.shape[0] - 1):
        for c in range(1, u.shape[1] - 1):
            u[r, c] = (u[r - 1, c] + u[r + 1, c] + u[r, c + 1] + u[r, c - 1]) * 0.25


@kernel(compiled=True)
def relax_all(u: InOut[R, C, F64], block: int, sweeps: int, spawn: Spawn):
    """The sweeps, from compiled code."""
    for _ in range(sweeps):
        for first in range(1, u.shape[0] - 1, block):
            last = min(first + block, u.shape[0] - 1)
            for begin in range(1, u.shape[1] - 1, block):
                r, c = slice(first, last), slice(begin, min(begin + block, u.shape[1] - 1))
                spawn(relax, u[r, c], u[first - 1, c], u[last, c], u[r, begin - 1 : begin], u[r, c.stop : c.stop + 1])


@dataclass(frozen=True)
class Heat:
    """Sweeps of Gauss-Seidel over a plate of n x n elements, in blocks, in float64; a block waits for its neighbours, no sweep for all."""

    n: int = field(default=4096, metadata={"at_least": 1, "at_most": 1 << 16})
    block: int = field(default=128, metadata={"at_least": 1, "at_most": 1 << 16})
    sweeps: int = field(default=10, metadata={"at_least": 1, "at_most": 10000})
    name: ClassVar[str] = "heat"
    kernels: ClassVar[tuple[Kernel, ...]] = (relax_all, relax)

    @property
    def tasks(self) -> int:
        return math.ceil(self.n / self.block) ** 2 * self.sweeps

    @property
    def nbytes(self) -> int:
        return 3 * 8 * (self.n + 2) ** 2  # the tensor, what it must become, and what comparing takes

    def __str__(self) -> str:
        return f"heat {self.n}, blocks {self.block}, {self.sweeps} sweeps"

    def opened(self, shared: bool) -> Loop:
        cuts = [*range(1, self.n + 1, self.block), self.n + 1]  # the edge has cells of its own
        u = Arena({"u": TensorSpec((self.n + 2, self.n + 2), (cuts, cuts), np.dtype(F64))}, shared).u

        def begin() -> None:
            u.array[...] = 0
            u.array[0] = 100

        begin()
        wanted = u.array.copy()
        for _ in range(self.sweeps):
            sweep(wanted)

        def program(spawn: Callable) -> None:
            spans = [slice(*span) for span in itertools.pairwise(cuts)]
            blocks = [(u[r, c], u[r.start - 1, c], u[r.stop, c], u[r, before(c)], u[r, after(c)]) for r in spans for c in spans]
            for _ in range(self.sweeps):
                for block in blocks:
                    spawn(relax, *block)

        def wrong(_: object) -> str:
            differ = int((u.array != wanted).sum())
            found, right = float(u.array.sum()), float(wanted.sum())
            return f"{differ:,} elements differ; their sum is {found!r}, wanted {right!r}" if differ else ""

        root = relax_all, u[:], self.block, self.sweeps
        return Loop(u, begin, program, root, lambda c: c.heat(u.array, self.block, self.sweeps), wrong)


# Recursions -----------------------------------------------------------------------------------------------------------------------------


@kernel
def fib_alone(n: int) -> int:
    """Return the n-th Fibonacci number, by as many additions of ones as it says."""
    return n if n < 2 else fib_alone.body(n - 1) + fib_alone.body(n - 2)


@fib_alone.compiled
def _(n):
    # Compiled code that calls itself costs twice as much. Two levels of the recursion are loops, as gcc makes them of C's.
    later = np.empty(8192, np.int64)  # n**3 / 48 at most
    later[0] = n
    count = 1
    found = 0
    while count:
        count -= 1
        n = later[count]
        while n >= 2:
            m = n - 1
            while m >= 2:
                later[count] = m - 1
                count += 1
                m -= 2
            found += m
            n -= 2
        found += n
    return found


@kernel(compiled=True)
def fib(n: int, cut_off: int, spawn: Spawn) -> int:
    """Return the n-th Fibonacci number; n is above the cut-off."""
    first = spawn(fib, n - 1, cut_off) if n - 1 > cut_off else spawn(fib_alone, n - 1)
    second = spawn(fib, n - 2, cut_off) if n - 2 > cut_off else spawn(fib_alone, n - 2)
    return first.result() + second.result()


@kernel
def queens_alone(full: int, columns: int, left: int, right: int) -> int:
    """Return in how many ways the rows that are left can have a queen each. Bits: all columns; those taken, straight and aslant."""
    if columns == full:
        return 1
    found = 0
    for bit in bits(full & ~(columns | left | right)):
        found += queens_alone.body(full, columns | bit, (left | bit) << 1, (right | bit) >> 1)
    return found


@queens_alone.compiled
def _(full, columns, left, right):
    if columns == full:
        return 1
    rows = np.empty((64, 4), np.int64)  # of each row: columns left to try; those taken, straight and aslant
    rows[0, 0], rows[0, 1], rows[0, 2], rows[0, 3] = full & ~(columns | left | right), columns, left, right
    at = 0
    found = 0
    while at >= 0:
        free = rows[at, 0]
        if free == 0:
            at -= 1
            continue
        bit = free & -free
        rows[at, 0] = free ^ bit
        taken = rows[at, 1] | bit
        if taken == full:
            found += 1
            continue
        to_left, to_right = (rows[at, 2] | bit) << 1, (rows[at, 3] | bit) >> 1
        at += 1
        rows[at, 0], rows[at, 1], rows[at, 2], rows[at, 3] = full & ~(taken | to_left | to_right), taken, to_left, to_right
    return found


@kernel(compiled=True)
def queens(full: int, columns: int, left: int, right: int, rows: int, spawn: Spawn) -> int:
    """Return the same as `queens_alone`; each place in so many rows, at least one, is a task."""
    free, counts = full & ~(columns | left | right), []
    while free:
        bit = free & -free
        free ^= bit
        place = full, columns | bit, (left | bit) << 1, (right | bit) >> 1
        counts.append(spawn(queens, *place, rows - 1) if rows > 1 else spawn(queens_alone, *place))
    found = 0
    for count in counts:
        found += count.result()
    return found


def bits(word: int) -> list[int]:
    """Return the bits that are set, each as a number, the lowest first."""
    found = []
    while word:
        found.append(word & -word)
        word &= word - 1
    return found


@dataclass(frozen=True)
class Fib:
    """The n-th Fibonacci number, as a tree of tasks; below the cut-off a task is one loop."""

    n: int = field(default=38, metadata={"at_least": 2, "at_most": 60})
    cut_off: int = field(default=24, metadata={"at_least": 1, "at_most": 60})
    name: ClassVar[str] = "fib"
    kernels: ClassVar[tuple[Kernel, ...]] = (fib, fib_alone)
    nbytes: ClassVar[int] = 0

    def __str__(self) -> str:
        return f"fib {self.n}, cut-off {self.cut_off}"

    def __post_init__(self):
        if self.cut_off >= self.n:
            raise ValueError(f"cut_off {self.cut_off}: wanted less than n, which is {self.n}")

    @property
    def tasks(self) -> int:
        counts = [1] * (self.n + 1)
        for k in range(self.cut_off + 1, self.n + 1):
            counts[k] = 1 + counts[k - 1] + counts[k - 2]
        return counts[self.n]

    def opened(self, shared: bool) -> Recursion:
        wanted, following = 0, 1
        for _ in range(self.n):
            wanted, following = following, wanted + following
        return Recursion((fib, self.n, self.cut_off), lambda c: c.fib(self.n, self.cut_off), wanted)


SOLUTIONS = (1, 0, 0, 2, 10, 4, 40, 92, 352, 724, 2680, 14200, 73712, 365596, 2279184, 14772512, 95815104, 666090624)  # of 1 to 18 queens


@dataclass(frozen=True)
class Queens:
    """In how many ways n queens stand on a board; each place in the first rows, up to the cut-off, is a task."""

    n: int = field(default=13, metadata={"at_least": 1, "at_most": len(SOLUTIONS)})
    cut_off: int = field(default=3, metadata={"at_least": 1, "at_most": 5})
    name: ClassVar[str] = "queens"
    kernels: ClassVar[tuple[Kernel, ...]] = (queens, queens_alone)
    nbytes: ClassVar[int] = 0

    def __str__(self) -> str:
        return f"queens {self.n}, cut-off {self.cut_off}"

    def __post_init__(self):
        if self.cut_off > self.n:
            raise ValueError(f"cut_off {self.cut_off}: wanted at most n, which is {self.n}")

    @property
    def tasks(self) -> int:
        full = (1 << self.n) - 1

        def below(columns: int, left: int, right: int, rows: int) -> int:
            if rows == 0:
                return 1
            free = bits(full & ~(columns | left | right))
            return 1 + sum(below(columns | bit, (left | bit) << 1, (right | bit) >> 1, rows - 1) for bit in free)

        return below(0, 0, 0, self.cut_off)

    def opened(self, shared: bool) -> Recursion:
        root = (queens, (1 << self.n) - 1, 0, 0, 0, self.cut_off)
        return Recursion(root, lambda c: c.queens(self.n, self.cut_off), SOLUTIONS[self.n - 1])


PROGRAMS = {program.name: program for program in (Cholesky, Heat, Fib, Queens)}
