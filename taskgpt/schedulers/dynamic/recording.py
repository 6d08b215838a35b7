"""A program as it ran: a graph of stretches without a pause, and when each ran, for traces.

A task that waits in its body is several stretches: what it did before, and what it did after, which waits for that and for what was
awaited. So no worker does two things at once, and the graph is one that all that looks at graphs knows. Its edges are those that were known
when a task was spawned, or went on. Its phases are the labels of tasks, of those without one the label of who spawned them.
"""

import time
from collections.abc import Callable, Iterable

from taskgpt.schedulers.dynamic.futures import Task
from taskgpt.tasks import Call, Graph
from taskgpt.tasks.task import Task as Stretch


class Recording:
    """`rows`: (stretch, start_ns, stop_ns, worker) of what ran in Python; compiled tasks are kept by the workers.

    `worker()` returns which worker this thread is.
    """

    def __init__(self, worker: Callable[[], int]):
        self._stretches: list[tuple[Call, str, list[int]]] = []  # with what each waits for
        self.rows: list[tuple[int, int, int, int]] = []
        self._worker = worker

    def add(self, task: Task, waits: Iterable[Task]) -> None:
        """Note a task that was spawned. By one thread at a time, as `pause` and `go_on`."""
        task.stretch = self._add(task, [each.stretch for each in waits if each.stretch >= 0])

    def _add(self, task: Task, before: Iterable[int]) -> int:
        labelled: Task | None = task
        while labelled is not None and not labelled.label:
            labelled = labelled.parent
        self._stretches.append((task.call, labelled.label if labelled is not None else "", sorted(set(before))))
        return len(self._stretches) - 1

    def graph(self) -> Graph:
        """Return what ran so far."""
        graph = Graph("program")
        for number, (call, label, before) in enumerate(self._stretches):
            graph.append(Stretch(number, (call,), (label, -1)), before)
        return graph

    def begin(self, task: Task) -> None:
        """Note that a stretch begins, in this thread."""
        task.begun_ns = time.monotonic_ns()

    def end(self, task: Task) -> None:
        """Note that it has ended."""
        self.rows.append((task.stretch, task.begun_ns, time.monotonic_ns(), self._worker()))
        task.begun_ns = 0

    def is_running(self, task: Task) -> bool:
        """Return True if a stretch of the task has begun, and not ended."""
        return task.begun_ns > 0

    def go_on(self, task: Task, awaited: Task | None) -> None:
        """Note that a task goes on after `end`, with another stretch."""
        before = [task.stretch, *([awaited.stretch] if awaited is not None and awaited.stretch >= 0 else [])]
        task.stretch = self._add(task, before)
        self.begin(task)
