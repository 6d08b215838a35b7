"""Task Bench (Slaughter et al. 2020) in small: what a task costs under each system, and the shortest tasks that it still runs well.

A graph is `steps` rows of `width` tasks; a pattern says which tasks of the row before a task waits for. Every task computes the same chain
of multiply-adds, `iterations` long, in one compiled function without the GIL. Our schedulers run it as a recorded graph, `NAME+program` and
`NAME+nested` as a program whose tasks Python or compiled code spawns, the Dask systems as a Dask graph whose callable is that function.
"""

import argparse
import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import median

import numpy as np

from taskgpt.config import MOST_TASKS, available, is_address
from taskgpt.errors import UserError, did_you_mean, shorten
from taskgpt.lab import machine
from taskgpt.lab.benchmarks import spawned_patterns
from taskgpt.lab.benchmarks.patterns import LINE, busy, depends, spin, verify_patterns, width_at
from taskgpt.lab.named import named_scheduler, split_changes
from taskgpt.lab.report import Report, in_range, quartiles, seconds_of
from taskgpt.progress import Progress
from taskgpt.tasks import Arena, Call, Graph, Task, TensorSpec, compile_kernels

DASK = ("taskgpt.get", "dask.threaded", "distributed")  # beside our schedulers, the systems that take Dask graphs
SYSTEMS = ("native", "native+program", "native+nested", *DASK)

# Tasks ----------------------------------------------------------------------------------------------------------------------------------


def record(pattern: str, width: int, steps: int, shared: bool = False) -> tuple[Graph, np.ndarray]:
    """Return the graph of a pattern, with exactly its edges, and the array that holds the iterations of its tasks."""
    count = sum(width_at(pattern, width, t) for t in range(steps))
    a = Arena({"out": TensorSpec((count, LINE)), "iterations": TensorSpec((1,), dtype=np.dtype(np.int64))}, shared)
    graph = Graph(f"{pattern}, {width} x {steps}")
    before: list[int] = []  # numbers of the row before
    for t in range(steps):
        row = []
        for i in range(width_at(pattern, width, t)):
            number = len(graph.tasks)
            call = Call(busy, (a.out[number, :1], a.iterations[:]))
            graph.append(Task(number, (call,), ("", -1)), [before[j] for j in depends(pattern, width, t, i)])
            row.append(number)
        before = row
    compile_kernels(graph.kernels)
    return graph, a.iterations.array


# Systems --------------------------------------------------------------------------------------------------------------------------------

Run = Callable[[int], float]  # iterations of each task -> seconds of one run of the graph


@dataclass
class Case:
    """A pattern under a system."""

    pattern: str
    system: str
    workers: int
    tasks: int
    run: Run


def spin_and_return(iterations: int, *_predecessors: None) -> None:
    """What the tasks of Dask graphs call."""
    spin(iterations)


@contextmanager
def opened(system: str, workers: int) -> Iterator[Callable[[str, int, int], Case]]:
    """Open a system; yield what makes a case of (pattern, width, steps)."""
    with ExitStack() as stack:
        recorded, _, way = system.partition("+")
        if system in DASK:
            get = dask_get(stack, system, workers)
        elif way not in ("", *spawned_patterns.WAYS):
            raise UserError(f"--systems: unknown way '{shorten(way)}' of '{recorded}'{did_you_mean(way, spawned_patterns.WAYS)}")
        elif (name := split_changes(recorded)[0]) in available("scheduler_configs") or is_address(name) or os.path.isfile(name):
            # Tasks as recorded: merged ones would cost less than they say.
            scheduler = stack.enter_context(named_scheduler(recorded, workers, coarsen=0, dashboard=-1))
        else:
            raise UserError(f"--systems: unknown system '{name}'{did_you_mean(name, [*DASK, *available('scheduler_configs')])}")

        def scheduler_case(pattern: str, width: int, steps: int) -> Case:
            graph, iterations = record(pattern, width, steps, scheduler.needs_shared_memory)

            def run(count: int) -> float:
                iterations[0] = count
                return seconds_of(lambda: scheduler.run(graph))

            return Case(pattern, system, scheduler.workers, len(graph.tasks), run)

        def dask_case(pattern: str, width: int, steps: int) -> Case:
            graph, _ = record(pattern, width, steps)

            def run(count: int) -> float:
                layers, last = graph.to_dask(lambda _: (spin_and_return, count))
                tasks = layers.to_dict()
                return seconds_of(lambda: get(tasks, last))

            return Case(pattern, system, workers, len(graph.tasks), run)

        def spawned_case(pattern: str, width: int, steps: int) -> Case:
            tasks, run = spawned_patterns.opened_pattern(scheduler, way, pattern, width, steps)
            return Case(pattern, system, scheduler.workers, tasks, lambda count: seconds_of(lambda: run(count)))

        yield dask_case if system in DASK else spawned_case if way else scheduler_case


def dask_get(stack: ExitStack, system: str, workers: int) -> Callable[[dict, list], object]:
    """Return `get(graph, keys)` of a Dask system on so many threads, open until the stack is closed."""
    if system == "distributed":
        from distributed import Client, LocalCluster

        quiet = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": "127.0.0.1:0", "scheduler_kwargs": {"dashboard": False}}
        cluster = LocalCluster(n_workers=1, threads_per_worker=workers, processes=False, memory_limit=0, **quiet)
        return stack.enter_context(Client(stack.enter_context(cluster), set_as_default=False)).get
    if system == "taskgpt.get":
        from taskgpt import get
    else:
        from dask.threaded import get
    return lambda graph, keys: get(graph, keys, num_workers=workers)


# Measurements ---------------------------------------------------------------------------------------------------------------------------

COLUMNS = {
    "pattern": ("pattern", ""),
    "system": ("system", ""),
    "workers": ("workers", "d"),
    "width": ("width", "d"),
    "tasks": ("tasks", "d"),
}
DETAILS = ("width", "tasks")
FIGURES = {"q1": ("q1_us", ".2f"), "q3": ("q3_us", ".2f"), "x first": ("x_first", ".2f")}
SLOWER = {"distributed": 20, "local-cluster": 20, "local-cluster-processes": 20}  # so many times fewer steps
REPEATS = 3  # runs of a graph one after another; their median counts
LONGEST = 2.0  # seconds that the tasks of a run compute: a system that needs longer ones has no METG here
FIRST = 1e-4  # seconds a task where the first search begins


def overhead(flags: argparse.Namespace) -> None:
    """Time graphs of empty tasks: microseconds from submission to the end, by the number of tasks."""
    measure(flags, "us a task", lambda case: lambda: median(case.run(0) for _ in range(REPEATS)) / case.tasks)


def metg(flags: argparse.Namespace) -> None:
    """Search the minimum effective task granularity of each pattern under each system."""
    if not 0 < flags.efficiency < 1:
        raise UserError(f"--efficiency: wanted a part of the peak, between 0 and 1, got {flags.efficiency}; Task Bench takes 0.5")
    measure(flags, f"METG({flags.efficiency:.0%}) us", lambda case: MetgSearch(case, flags.efficiency))


def measure(flags: argparse.Namespace, heading: str, measurement: Callable[[Case], Callable[[], float | None]]) -> None:
    """Take `measurement(case)()`, in seconds, of all patterns and systems in turns, round after round; print the table."""
    for flag in ("width", "steps", "rounds"):
        in_range(f"--{flag}", getattr(flags, flag))
    verify_patterns(flags.patterns)
    report = Report(flags)
    workers = flags.workers or machine.usable_cores()
    width = flags.width or workers
    if width * flags.steps > MOST_TASKS:
        raise UserError(f"--steps {flags.steps} of --width {width}: wanted at most {MOST_TASKS:,} tasks; choose fewer steps")
    with ExitStack() as stack:
        makers = {system: stack.enter_context(opened(system, workers)) for system in dict.fromkeys(flags.systems)}
        cases = []
        for pattern in dict.fromkeys(flags.patterns):
            for system, make_case in makers.items():
                cases.append(make_case(pattern, width, max(1, flags.steps // SLOWER.get(split_changes(system)[0], 1))))
        measurements: list[tuple[Case, Callable[[], float | None], list]] = [(case, measurement(case), []) for case in cases]
        for case in cases:
            case.run(0)  # prepares, compiles
        with Progress("measuring", flags.rounds * len(cases)) as progress:
            for done, (case, take, found) in enumerate(measurements * flags.rounds):
                progress.show(done, f"round {done // len(cases) + 1}/{flags.rounds}: {case.pattern} {case.system}")
                found.append(take())
    rows = [row(case, width, found) for case, _, found in measurements]
    first: dict[str, float] = {}
    for each in rows:
        if each["median_us"] is not None:
            each["x_first"] = each["median_us"] / first.setdefault(each["pattern"], each["median_us"])
    report.table("rows", {**COLUMNS, heading: ("median_us", ".2f"), **FIGURES}, rows, DETAILS)
    report.save()


def row(case: Case, width: int, seconds: list[float | None]) -> dict:
    """Return a row of the table; without figures if a round found none."""
    q1 = middle = q3 = None
    if None not in seconds:
        q1, middle, q3 = (value * 1e6 for value in quartiles(seconds))
    settings = {"pattern": case.pattern, "system": case.system, "workers": case.workers, "width": width, "tasks": case.tasks}
    return {**settings, "median_us": middle, "q1_us": q1, "q3_us": q3, "x_first": None, "seconds": seconds}


class MetgSearch:
    """Searches the granularity at which a system runs at a part of the machine's peak, half say; a search begins near where the last ended.

    Granularity is wall time x workers / tasks. Efficiency is the part of it that the tasks compute, at the best speed that all workers
    reached together in one long task each. One of two workers alone gets to half of the peak, so with two, half asks little of a system.
    """

    def __init__(self, case: Case, efficiency: float, seconds_per_iteration: Callable[[int], float] | None = None):
        self._case, self._efficiency = case, efficiency
        self._seconds_per_iteration = seconds_per_iteration or (lambda workers: min(machine.timed_together([spin] * workers, 0.1)))
        self._start = FIRST

    def __call__(self) -> float | None:
        """Return the granularity in seconds; None if runs of LONGEST are not enough."""
        iteration = self._seconds_per_iteration(self._case.workers)
        longest = LONGEST * self._case.workers / self._case.tasks
        count = max(1, round(self._start / iteration))
        above = below = None  # (efficiency, granularity) on either side of what is wanted
        while above is None or below is None:
            granularity = median(self._case.run(count) for _ in range(REPEATS)) * self._case.workers / self._case.tasks
            point = count * iteration / granularity, granularity
            if point[0] < self._efficiency:
                below, count = point, count * 2 if above is None else count
            else:
                above, count = point, count // 2 if below is None else count
            if count * iteration > longest:
                return None
            if count == 0:
                return granularity
        part = (self._efficiency - below[0]) / (above[0] - below[0])
        found = math.exp(math.log(below[1]) + part * math.log(above[1] / below[1]))
        self._start = min(2 * found, longest)
        return found
