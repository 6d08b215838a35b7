"""Cells, by which dependencies are told apart, and how long paths through a graph take. What tasks wait for is found in waits.py."""

import itertools
import threading
from collections.abc import Iterable, Sequence


class Cell:
    """A cell of a grid, as far as programs and locks are concerned: what excludes commutative tasks from each other."""

    __slots__ = ("_lock",)

    def __init__(self):
        self._lock: tuple[int, threading.Lock] | None = None

    def numbered_lock(self) -> tuple[int, threading.Lock]:
        """Return the cell's lock and its serial number, made at the first call."""
        if self._lock is None:
            self._lock = next(_serials), threading.Lock()
        return self._lock


_serials = itertools.count(1)


def longest_path(predecessors: Sequence[Sequence[int]], took: Sequence[float]) -> list[int]:
    """Return the tasks of the path that takes longest, in order, if task n takes took[n]. Predecessors have smaller numbers."""
    until, before = list(took), [-1] * len(took)  # how long the longest path to the end of each task takes, and the task before it there
    for task, earlier in enumerate(predecessors):
        if len(earlier):
            before[task] = max(earlier, key=until.__getitem__)
            until[task] += until[before[task]]
    path = [max(range(len(until)), key=until.__getitem__)] if until else []
    while path and before[path[-1]] >= 0:
        path.append(before[path[-1]])
    return path[::-1]


def time_to_end(successors: Sequence[Sequence[int]], took: Sequence[float], order: Iterable[int] | None = None) -> list[float]:
    """Return for each task how long the longest path from its beginning to the end of the graph takes.

    `order`: all tasks, none before one that it waits for; default: their numbers.
    """
    behind = list(took)
    for task in reversed(range(len(took)) if order is None else list(order)):
        behind[task] += max((behind[s] for s in successors[task]), default=0)
    return behind
