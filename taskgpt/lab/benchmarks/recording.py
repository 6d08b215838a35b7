"""What recording a graph costs: microseconds and bytes a task, at several sizes, each time in a process of its own. Nothing runs.

A stencil of three points on two rows that take turns, a tiled Cholesky factorisation, the training step of a graph file, or `loop`: one
step of the stencil on as many columns, recorded by one spawn_each. The time is that of the whole program, until the graph's edges are
known; `loops` is what it takes with a spawn that does nothing: loops and tiles.
"""

import argparse
import gc
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from statistics import median
from typing import Any

import psutil

from taskgpt.config import MOST_TASKS
from taskgpt.errors import UserError, shorten
from taskgpt.gpt2.program import training_step
from taskgpt.lab.named import make
from taskgpt.lab.report import Report, in_range
from taskgpt.progress import Progress
from taskgpt.tasks import Arena, Graph, In, InOut, Out, TensorSpec, dims, kernel

R, C, K = dims("R C K")
Program = Callable[[Callable, Callable], None]  # given a spawn, as programs are, and a spawn_each


@kernel
def relax(out: Out[C], left: In[C], middle: In[C], right: In[C]):
    """Stand for a step of a stencil."""


@kernel
def factorise(a: InOut[R, R]):
    """Stand for LAPACK's potrf."""


@kernel
def solve(b: InOut[R, C], a: In[C, C]):
    """Stand for trsm."""


@kernel
def square(c: InOut[R, R], a: In[R, K]):
    """Stand for syrk."""


@kernel
def subtract(c: InOut[R, C], a: In[R, K], b: In[C, K]):
    """Stand for gemm."""


def stencil(tasks: int) -> Program:
    """Return about so many tasks, as many steps as columns; at most 1000 columns."""
    columns = min(1000, max(1, math.isqrt(tasks)))
    spec = TensorSpec((columns + 2, 8), (1, None))
    arena = Arena({"here": spec, "there": spec})

    def program(spawn: Callable, _spawn_each: Callable) -> None:
        out, inp = arena.here, arena.there
        for _ in range(tasks // columns):
            for i in range(1, columns + 1):
                spawn(relax, out[i], inp[i - 1], inp[i], inp[i + 1])
            out, inp = inp, out

    return program


def cholesky(tasks: int) -> Program:
    """Return about so many tasks: n tiles a side are n * (n + 1) * (n + 2) / 6."""
    n = max(1, round((6 * tasks) ** (1 / 3)) - 1)
    a = Arena({"a": TensorSpec((4 * n, 4 * n), (4, 4))}).a
    tiles = [slice(4 * i, 4 * i + 4) for i in range(n)]

    def program(spawn: Callable, _spawn_each: Callable) -> None:
        for k, column in enumerate(tiles):
            below = tiles[k + 1 :]
            spawn(factorise, a[column, column])
            for row in below:
                spawn(solve, a[row, column], a[column, column])
            for i, row in enumerate(below):
                spawn(square, a[row, row], a[row, column])
                for other in below[:i]:
                    spawn(subtract, a[row, other], a[row, column], a[other, column])

    return program


def loop(tasks: int) -> Program:
    """Return so many tasks that do not wait for each other."""
    spec = TensorSpec((tasks + 2, 8), (1, None))
    arena = Arena({"here": spec, "there": spec})

    def program(_spawn: Callable, spawn_each: Callable) -> None:
        out, inp = arena.here, arena.there
        spawn_each(relax, range(1, tasks + 1), lambda i: (out[i], inp[i - 1], inp[i], inp[i + 1]))

    return program


def training(graph_word: str) -> Program:
    """Return a training step's tasks."""
    gpt = make(graph_word)
    return lambda spawn, _spawn_each: training_step(spawn, gpt)


PROGRAMS = {"stencil": stencil, "cholesky": cholesky, "loop": loop}


def measured(name: str, tasks: int | None) -> dict[str, Any]:
    """Record a program in this process, which should be new; return what that took. `tasks` is None for a graph file's."""
    program = training(name) if tasks is None else PROGRAMS[name](tasks)
    warm = Graph()
    loop(10)(warm.spawn, warm.spawn_each)
    len(warm.edges)  # compiles
    begin = time.perf_counter()
    program(lambda *_args, **_options: None, lambda *_args, **_options: None)
    loops = time.perf_counter() - begin
    gc.collect()
    graph, process = Graph(), psutil.Process()
    before = process.memory_info().rss
    begin = time.perf_counter()
    program(graph.spawn, graph.spawn_each)
    spawned = time.perf_counter()
    count = len(graph.edges)
    end = time.perf_counter()
    after = process.memory_info().rss
    return {
        "tasks": len(graph.tasks),
        "edges": count,
        "loops_s": loops,
        "spawn_s": spawned - begin,
        "edges_s": end - spawned,
        "bytes": after - before,
        "process_gib": after / 2**30,
    }


COLUMNS = {
    "program": ("program", ""),
    "tasks": ("tasks", ",d"),
    "us a task": ("record_us", ".2f"),
    "loops": ("loops_us", ".2f"),
    "edges": ("edges_us", ".2f"),
    "edges a task": ("edges_a_task", ".1f"),
    "bytes a task": ("bytes_a_task", ",.0f"),
    "seconds": ("record_s", ".2f"),
    "process GiB": ("process_gib", ".2f"),
}
DETAILS = ("edges", "edges a task")


def record(flags: argparse.Namespace) -> None:
    """Record the programs at all sizes, in turns; print the table."""
    in_range("--rounds", flags.rounds)
    sizes = list(dict.fromkeys(size(word) for word in flags.tasks))
    cases: list[tuple[str, int | None]] = []
    for name in dict.fromkeys(flags.programs):
        cases += [(name, tasks) for tasks in sizes] if name in PROGRAMS else [(name, None)]
        if name not in PROGRAMS:
            make(name)  # says what is wrong with it
    report = Report(flags)
    found: list[list[dict[str, Any]]] = [[] for _ in cases]
    with Progress("recording", flags.rounds * len(cases)) as progress:
        for done, at in enumerate([*range(len(cases))] * flags.rounds):
            name, tasks = cases[at]
            progress.show(done, f"round {done // len(cases) + 1}/{flags.rounds}: {name} {tasks or ''}")
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
                    found[at].append(child.submit(measured, name, tasks).result())
            except BrokenProcessPool:
                raise UserError(
                    f"{name} {tasks or ''}: the process that recorded it died, perhaps for want of memory; take fewer tasks"
                ) from None
    report.table("rows", COLUMNS, [row(name, each) for (name, _), each in zip(cases, found, strict=True)], DETAILS)
    report.save()


def size(word: str) -> int:
    """Return a number of tasks from the command line. Raises UserError."""
    try:
        tasks = int(word)
    except ValueError:
        raise UserError(f"--tasks: wanted whole numbers, got '{shorten(word)}'; for example --tasks 10000,100000") from None
    in_range("--tasks", tasks, 1, MOST_TASKS)
    return tasks


def row(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a row of the table: medians over the rounds."""
    tasks = found[0]["tasks"]

    def us(*keys: str) -> float:
        return 1e6 * median(sum(each[key] for key in keys) for each in found) / tasks

    return {
        "program": name,
        "tasks": tasks,
        "record_us": us("spawn_s", "edges_s"),
        "loops_us": us("loops_s"),
        "edges_us": us("edges_s"),
        "edges_a_task": found[0]["edges"] / tasks,
        "bytes_a_task": median(each["bytes"] for each in found) / tasks,
        "record_s": us("spawn_s", "edges_s") * tasks / 1e6,
        "process_gib": median(each["process_gib"] for each in found),
        "rounds": found,
    }
