"""Tiled programs for ranks that own tiles: worker processes import them."""

import os
import signal

import numpy as np

from taskgpt.tasks import In, InOut, Out, Reduction, TensorSpec, dims, kernel

R, C, A, B = dims("R C A B")
F64 = np.float64


@kernel
def number(out: Out[R, C, F64], start: int):
    out[...] = start + np.arange(out.size).reshape(out.shape) / 7


@kernel
def smooth(out: Out[R, C, F64], inp: In[A, B, F64], top: int, left: int):
    """A mean of the neighbours; `inp` has borders, of which `top` and `left` say whether they are there."""
    padded = np.pad(inp, ((1 - top, out.shape[0] + 1 - inp.shape[0] + top), (1 - left, out.shape[1] + 1 - inp.shape[1] + left)))
    out[...] = (padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:]) / 4


@kernel
def sum_up(total: Reduction["+", (), F64], inp: In[R, C, F64]):
    total[...] += inp.sum()


@kernel
def scale(out: InOut[R, C, F64], total: In[(), F64]):
    out /= total


@kernel
def die(out: InOut[R, C, F64]):
    os.kill(os.getpid(), signal.SIGKILL)


@kernel
def stop(out: InOut[R, C, F64]):
    os.kill(os.getpid(), signal.SIGSTOP)


@kernel
def refuse(out: InOut[R, C, F64]):
    raise ValueError("not today")


def heat_specs() -> dict[str, TensorSpec]:
    grid = TensorSpec((48, 40), (16, 16), np.dtype(F64))
    return {"x": grid, "y": grid, "total": TensorSpec((), (), np.dtype(F64))}


def heat(spawn, arena) -> None:
    """Halos from neighbours, sums of all tiles on one rank, and their total back to all."""
    x, y = arena.x, arena.y
    cells = [(i, j) for i in range(x.grid[0]) for j in range(x.grid[1])]
    for n, cell in enumerate(cells):
        spawn(number, x.cell(*cell), 100 * n)
    for _ in range(3):
        for i, j in cells:
            spawn(smooth, y.cell(i, j), x.cell(i, j).grown(1), int(i > 0), int(j > 0))
        for cell in cells:
            spawn(sum_up, arena.total[()], y.cell(*cell))
        for cell in cells:
            spawn(scale, y.cell(*cell), arena.total[()])
        x, y = y, x


def lost(spawn, arena) -> None:
    """The process of one tile is killed, and the others wait for it."""
    broken(spawn, arena, die)


def silent(spawn, arena) -> None:
    """The process of one tile is stopped, and the others wait for it."""
    broken(spawn, arena, stop)


def refused(spawn, arena) -> None:
    """The task of one tile fails, and the others wait for it."""
    broken(spawn, arena, refuse)


def broken(spawn, arena, bad) -> None:
    x, y = arena.x, arena.y
    spawn(number, x.cell(0, 1), 3)
    spawn(bad, x.cell(0, 1))
    for i in range(3):
        for j in range(3):
            spawn(smooth, y.cell(i, j), x.cell(0, 1), 0, 0) if (i, j) == (0, 0) else spawn(sum_up, arena.total[()], x.cell(0, 1))


def two_homes(spawn, arena) -> None:
    """A task that writes tiles of two ranks."""
    spawn(number, arena.x[0:32, 0:32], 1)


def nowhere(tensor: str, cell: tuple[int, ...], ranks: int) -> int:
    return ranks
