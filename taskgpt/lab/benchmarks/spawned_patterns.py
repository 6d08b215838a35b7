"""Task Bench's patterns as programs: tasks start as they are spawned, from Python or from compiled code, and wait for what tiles say.

A row writes its elements of an array of a few rows, which are used again; who waits for tasks of the row before reads theirs. So a task
waits for some that are ROWS earlier, too, which are long done.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from taskgpt.lab.benchmarks.patterns import LINE, busy, depends, spin, width_at
from taskgpt.schedulers import Scheduler
from taskgpt.tasks import Arena, In, InOut, Out, TensorSpec, dims, kernel, wrap
from taskgpt.tasks.spawn import Spawn

I64 = np.int64
ROWS = 16  # of the array
MOST_READS = 3  # a task reads so many runs of neighbours
R, W, L, T, K, A, B, C = dims("R W L T K A B C")
WAYS = ("program", "nested")


@kernel(compiled=True)
def after_one(out: Out[1], iterations: In[1, I64], a: In[A, 1]):
    """Spin like `busy`; that a tile is read says which tasks come before, here and in the next two."""
    out[0] = spin(iterations[0])


@kernel(compiled=True)
def after_two(out: Out[1], iterations: In[1, I64], a: In[A, 1], b: In[B, 1]):
    out[0] = spin(iterations[0])


@kernel(compiled=True)
def after_three(out: Out[1], iterations: In[1, I64], a: In[A, 1], b: In[B, 1], c: In[C, 1]):
    out[0] = spin(iterations[0])


@kernel(compiled=True)
def spawn_all(out: InOut[R, W, L], iterations: In[1, I64], table: In[T, K, I64], spawn: Spawn):
    """Spawn all tasks. Of the table, a row each: its row and column, how many runs of the row before it reads, and their ends."""
    rows = table.array
    for n in range(rows.shape[0]):
        row, reads = rows[n, 0], rows[n, 2]
        before, own = (row - 1) % ROWS, out[row, rows[n, 1], :1]
        if reads == 0:
            spawn(busy, own, iterations)
            continue
        a = out[before, rows[n, 3] : rows[n, 4], :1]
        if reads == 1:
            spawn(after_one, own, iterations, a)
            continue
        b = out[before, rows[n, 5] : rows[n, 6], :1]
        if reads == 2:
            spawn(after_two, own, iterations, a, b)
        else:
            spawn(after_three, own, iterations, a, b, out[before, rows[n, 7] : rows[n, 8], :1])


def opened_pattern(scheduler: Scheduler, way: str, pattern: str, width: int, steps: int) -> tuple[int, Callable[[int], None]]:
    """Return how many tasks there are, and what runs them, each so many iterations; this raises NotImplementedError where none can."""
    table = wrap(np.array([*_tasks(pattern, width, steps)], I64), (), "table")
    specs = {"out": TensorSpec((ROWS, width, LINE), (1, 1, None)), "iterations": TensorSpec((1,), dtype=np.dtype(I64))}
    a = Arena(specs, scheduler.needs_shared_memory)

    def run(iterations: int) -> None:
        a.iterations.array[0] = iterations
        with scheduler.program() as spawn:
            if way == "nested":
                spawn(spawn_all, a.out[:], a.iterations[:], table[:])
            else:
                spawn_all.body(a.out[:], a.iterations[:], table[:], spawn)

    return len(table.array), run


def _tasks(pattern: str, width: int, steps: int) -> Iterator[list[int]]:
    for t in range(steps):
        for i in range(width_at(pattern, width, t)):
            runs = _runs(depends(pattern, width, t, i))
            yield [t % ROWS, i, len(runs) // 2, *runs, *[0] * (2 * MOST_READS - len(runs))]


def _runs(columns: list[int]) -> list[int]:
    """Return where each run of neighbours begins and ends."""
    starts = [column for column in columns if column - 1 not in columns]
    stops = [column + 1 for column in columns if column + 1 not in columns]
    return list(itertools.chain(*zip(starts, stops, strict=True)))
