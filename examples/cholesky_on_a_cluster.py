"""Cholesky factorization of a matrix that no process has whole: each tile has a home, and tasks run at the home of what they write.

python -m examples.cholesky_on_a_cluster                          # two worker processes on this machine
python -m examples.cholesky_on_a_cluster 8192 --tile 512          # a matrix of 512 MiB
python -m examples.cholesky_on_a_cluster --scheduler tcp://host:8786    # the workers of a Dask cluster that is there

The matrix is exp(-|i - j| / 100), which tasks fill tile by tile; its factor has a formula, by which other tasks check it where it is.
"""

import argparse
import math
import sys
from collections.abc import Sequence

import numpy as np

from examples.cholesky import factor, solve, square, subtract
from taskgpt.config import load_scheduler
from taskgpt.errors import UserError, run_program
from taskgpt.programs.arguments import Parser, add_scheduler
from taskgpt.tasks import Arena, In, Out, TensorSpec, dims, kernel

M, N = dims("M N")
f64 = np.float64
LENGTH = 100.0  # over which neighbours have to do with each other


@kernel(flops=lambda M, N: 10 * M * N, compiled=True)
def fill(a: Out[M, N, f64], row: int, column: int):
    """a = exp(-|i - j| / LENGTH), from the element (row, column) on."""
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            a[i, j] = math.exp(-abs(row + i - column - j) / LENGTH)


@kernel(flops=lambda M, N: 10 * M * N, compiled=True)
def check(error: Out[(), f64], a: In[M, N, f64], row: int, column: int):
    """error = how far the lower triangle of a is from the factor: columns are exp(-(i - j) / LENGTH), all but the first times a number."""
    largest = 0.0
    scale = math.sqrt(1.0 - math.exp(-2.0 / LENGTH))
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            if row + i >= column + j:
                wanted = math.exp(-(row + i - column - j) / LENGTH) * (scale if column + j else 1.0)
                largest = max(largest, abs(a[i, j] - wanted))
    error[()] = largest


def specs(size: int, tile: int) -> dict[str, TensorSpec]:
    """Return a matrix whose tiles are its last two axes, so that each lies in one piece of memory, and an error for each tile."""
    tiles = size // tile
    return {
        "a": TensorSpec((tiles, tiles, tile, tile), (1, 1, None, None), np.dtype(f64)),
        "error": TensorSpec((tiles, tiles), (1, 1), np.dtype(f64)),
    }


def program(spawn, arena) -> None:
    """Fill the lower triangle, factor it, and check it."""
    a, (tiles, _, tile, _) = arena.a, arena.a.shape
    lower = [(i, j) for i in range(tiles) for j in range(i + 1)]
    for i, j in lower:
        spawn(fill, a[i, j], i * tile, j * tile)
    for k in range(tiles):
        spawn(factor, a[k, k])
        for i in range(k + 1, tiles):
            spawn(solve, a[i, k], a[k, k])
        for i in range(k + 1, tiles):
            spawn(square, a[i, i], a[i, k])
            for j in range(k + 1, i):
                spawn(subtract, a[i, j], a[i, k], a[j, k])
    for i, j in lower:
        spawn(check, arena.error[i, j], a[i, j], i * tile, j * tile)


class Problem:
    """The same program in one process, as the other examples are run."""

    def __init__(self, size: int = 192, tile: int = 48):
        self.size, self.arena = size, Arena(specs(size, tile))

    def begin(self) -> None:
        """The program fills its tiles itself."""

    def program(self, spawn) -> None:
        program(spawn, self.arena)

    def result(self) -> np.ndarray:
        return np.tril(self.arena.a.array.transpose(0, 2, 1, 3).reshape(self.size, self.size))

    def wanted(self) -> np.ndarray:
        i = np.arange(self.size)
        return np.linalg.cholesky(np.exp(-abs(i[:, None] - i) / LENGTH))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    p = Parser("python -m examples.cholesky_on_a_cluster", __doc__)
    p.add_argument("size", nargs="?", type=int, default=1024, help="rows of the matrix (default 1024)")
    p.add_argument("--tile", type=int, default=128, metavar="N", help="rows of a tile, which divide them (default 128)")
    add_scheduler(p, "cluster-local")
    return run_program(p.prog, lambda: run(p.parse_args(argv)))


def run(flags: argparse.Namespace) -> int:
    """Factor the matrix on a cluster; say what each rank did, and how far the result is from the formula."""
    if not 0 < flags.tile <= flags.size or flags.size % flags.tile:
        raise UserError(f"--tile {flags.tile}: wanted a divisor of the matrix's {flags.size} rows")
    chosen = load_scheduler(flags.scheduler, may_be_cluster=True)
    if chosen.scheduler != "cluster":
        raise UserError(f"--scheduler {flags.scheduler}: wanted a cluster: cluster-local, or tcp://HOST:PORT")
    from taskgpt.cluster.checks import wait_for_workers  # here, as Dask takes a second, and one process needs none
    from taskgpt.cluster.opening import opened
    from taskgpt.cluster.owned import run_owned

    with opened(chosen.settings, print) as client:
        wait_for_workers(client, chosen.settings)
        done = run_owned(client, program, specs(flags.size, flags.tile), gather=["error"], ranks=chosen.settings.ranks)
    tiles = flags.size // flags.tile
    lower_mib = tiles * (tiles + 1) // 2 * flags.tile**2 * 8 / 2**20
    print(f"{tiles * (tiles + 1) // 2} tiles of {flags.tile} x {flags.tile}, {lower_mib:.1f} MiB")
    print(done.listing())
    print(f"largest error {done.tensors['error'].max():.1e}")
    return 0


if __name__ == "__main__":
    from examples import cholesky_on_a_cluster  # workers import it by this name

    sys.exit(cholesky_on_a_cluster.main())
