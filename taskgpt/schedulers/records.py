"""When each task ran, and where: what every scheduler hands out as records, and how those that run tasks in Python keep them."""

import threading
import time
from collections.abc import Callable, Hashable, Iterable

import numpy as np

from taskgpt.schedulers.prepare import OncePerGraph
from taskgpt.tasks import Graph, Task

# run: its number since the scheduler was opened; task: its number in the graph as run; times: of CLOCK_MONOTONIC, as time.monotonic_ns().
RECORD_TYPE = np.dtype([(name, np.int64) for name in ("run", "task", "ready_ns", "start_ns", "stop_ns", "worker")])

Times = tuple[int, int, int, int]  # run, task, start_ns, stop_ns


class ThreadTimes:
    """The times of the tasks that one thread ran: as many as there is room for, and how many found none."""

    __slots__ = ("capacity", "lost", "rows")

    def __init__(self, capacity: int):
        self.capacity, self.lost = capacity, 0
        self.rows: list[Times] = []

    def run(self, run: int, task: Task) -> None:
        start = time.monotonic_ns()
        task.run_calls()
        if len(self.rows) < self.capacity:
            self.rows.append((run, task.number, start, time.monotonic_ns()))
        else:
            self.lost += 1


class Recorder:
    """Runs tasks of this process, and keeps when and where if `capacity`, the times that each worker can keep, is not 0.

    A task is ready when its last predecessor is done, or when its run begins.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._count = 0
        self._runs: list[tuple[int, Graph, int]] = []  # number, graph, begin_ns; only of those recorded
        self._times: dict[Hashable, ThreadTimes] = {}  # a thread's place is its worker's number
        self._predecessors = OncePerGraph(_predecessors)

    def count(self, graph: Graph) -> int:
        """Return the number of the run of a graph that begins now."""
        number = self.number()
        if self.capacity:
            self.note(number, graph, time.monotonic_ns())
        return number

    def number(self) -> int:
        """Return the number of a run that begins now."""
        self._count += 1
        return self._count - 1

    def note(self, number: int, graph: Graph, begin_ns: int) -> None:
        """Note what the graph of a run was, and when it began."""
        self._runs.append((number, graph, begin_ns))

    def begin(self, graph: Graph) -> Callable[[Task], None]:
        """Count a run of a graph; return what runs its tasks."""
        number = self.count(graph)
        return (lambda task: self._of_this_thread().run(number, task)) if self.capacity else Task.run_calls

    def _of_this_thread(self) -> ThreadTimes:
        thread = threading.get_ident()
        return self._times.get(thread) or self._times.setdefault(thread, ThreadTimes(self.capacity))

    def forget_threads(self) -> None:
        """Number the workers anew: their threads were replaced."""
        kept, self._times = list(self._times.values()), {}
        self._times |= {("gone", at): times for at, times in enumerate(kept) if times.rows or times.lost}

    def add(self, worker: Hashable, rows: Iterable[Times], lost: int) -> None:
        """Take over what a worker of another process kept."""
        times = self._times.setdefault(worker, ThreadTimes(self.capacity))
        times.rows += rows
        times.lost += lost

    def take(self) -> tuple[np.ndarray, int]:
        """Return (records by start time, how many found no room) since the last call."""
        rows = [(run, task, 0, start, stop, at) for at, times in enumerate(self._times.values()) for run, task, start, stop in times.rows]
        records = np.array(rows, RECORD_TYPE)
        records = records[np.argsort(records["start_ns"], kind="stable")]
        for number, graph, begin_ns in self._runs:
            mine = np.flatnonzero(records["run"] == number)
            done_ns = np.full(len(graph.tasks), begin_ns)
            done_ns[records["task"][mine]] = records["stop_ns"][mine]
            tasks, first, predecessors = self._predecessors(graph)
            ready_ns = np.full(len(graph.tasks), begin_ns)
            if len(tasks):
                ready_ns[tasks] = np.maximum.reduceat(done_ns[predecessors], first)
            records["ready_ns"][mine] = ready_ns[records["task"][mine]]
        lost = sum(times.lost for times in self._times.values())
        self._runs.clear()
        for times in self._times.values():
            times.rows, times.lost = [], 0
        return records, lost


def _predecessors(graph: Graph) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tasks that have predecessors, where those of each begin, and the predecessors."""
    tasks = [task for task in graph.tasks if task.predecessors]
    counts = [len(task.predecessors) for task in tasks]
    first = np.cumsum([0, *counts])[:-1]
    return np.array([t.number for t in tasks], int), first, np.array([p for task in tasks for p in task.predecessors], int)
