"""A program as it ran: a graph of stretches without a pause, and when each ran, for traces.

A task that waits in its body is several stretches: what it did before, and what it did after, which waits for that and for what was
awaited. So no worker does two things at once, and the graph is one that all that looks at graphs knows. Who waits for a task waits for the
last stretches of all that this has spawned, too. Phases are the labels of tasks, of those without one the label of who spawned them.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from taskgpt.schedulers.dynamic.futures import Body, Task
from taskgpt.tasks import Call, Graph
from taskgpt.tasks.task import Task as Stretch


class _Stretch(NamedTuple):
    """`before`: stretches that it waits for; `awaited`: tasks that it waits for with all that they have spawned."""

    call: Call
    label: str
    before: tuple[int, ...]
    awaited: tuple[Task, ...]


class Recording:
    """`rows`: (stretch, start_ns, stop_ns, worker) of what ran in Python; compiled tasks are kept by the workers.

    Stretches are numbered as they come; `graph` numbers them anew, so that all come after what they wait for, and `numbers` says how.
    `worker()` returns which worker this thread is.
    """

    def __init__(self, worker: Callable[[], int]):
        self._stretches: list[_Stretch] = []
        self._children: dict[Task, dict[Task, None]] = {}  # of each task those that it has not waited for
        self.rows: list[tuple[int, int, int, int]] = []
        self.numbers: list[int] = []
        self._graph = Graph("program")
        self._worker = worker

    def add(self, task: Task, waits: Iterable[Task]) -> None:
        """Note a task that was spawned. By one thread at a time, as `go_on`."""
        if task.parent is not None:
            self._children.setdefault(task.parent, {})[task] = None
        task.stretch = self._add(task, (), tuple(waits))

    def _add(self, task: Task, before: tuple[int, ...], awaited: tuple[Task, ...]) -> int:
        labelled: Task | None = task
        while labelled is not None and not labelled.label:
            labelled = labelled.parent
        self._stretches.append(_Stretch(task.call, labelled.label if labelled is not None else "", before, awaited))
        return len(self._stretches) - 1

    def graph(self) -> Graph:
        """Return what ran so far; the same graph until there is another stretch."""
        count = len(self._stretches)
        if count == len(self._graph.tasks):
            return self._graph
        before = [self._before(number) for number in range(count)]
        after: list[list[int]] = [[] for _ in range(count)]
        missing = list(map(len, before))
        for number, each in enumerate(before):
            for other in each:
                after[other].append(number)
        ready = [number for number in range(count) if not missing[number]]
        self.numbers, graph = [-1] * count, Graph("program")
        while ready:
            number = heapq.heappop(ready)
            stretch = self._stretches[number]
            self.numbers[number] = place = len(graph.tasks)
            graph.append(Stretch(place, (stretch.call,), (stretch.label, -1)), sorted(self.numbers[each] for each in before[number]))
            for other in after[number]:
                missing[other] -= 1
                if not missing[other]:
                    heapq.heappush(ready, other)
        self._graph = graph
        return graph

    def _before(self, number: int) -> set[int]:
        """Return the stretches that one waits for."""
        stretch = self._stretches[number]
        found = set(stretch.before)
        left, seen = list(stretch.awaited), set(stretch.awaited)
        while left:
            task = left.pop()
            if isinstance(task, Body):  # the body alone, of a weak task
                found.add(task.task.stretch)
                continue
            found.add(task.stretch)
            more = [child for child in self._children.get(task, ()) if child not in seen]
            seen.update(more)
            left += more
        return {each for each in found if 0 <= each < len(self._stretches) and each != number}

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

    def spawned(self, task: Task) -> list[Task]:
        """Return what a task has spawned and not waited for since."""
        return list(self._children.get(task, ()))

    def go_on(self, task: Task, ran: Task | None, awaited: Sequence[Task]) -> None:
        """Note that a task goes on after `end`, with another stretch: after another ran in its place, or tasks that it awaited."""
        own = self._children.get(task, {})
        for each in awaited:
            own.pop(each, None)
        before = (task.stretch,) if ran is None or ran.stretch < 0 else (task.stretch, ran.stretch)
        task.stretch = self._add(task, before, tuple(awaited))
        self.begin(task)
