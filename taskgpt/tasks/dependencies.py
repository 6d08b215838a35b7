"""Dependencies: what an access of a cell must wait for, and which of these waits others imply.

A task waits for the last writer of every cell that it touches (RAW, WAW) and, if it writes, for the readers since (WAR).
"""

import threading
from collections.abc import Iterable, Sequence


class CellHistory:
    """The tasks that the next access of a cell must wait for."""

    __slots__ = ("group", "lock", "readers", "serial", "writers")
    _count = 0

    def __init__(self):
        self.writers: set[int] = set()  # the last writer, or all tasks of a commutative group
        self.readers: set[int] = set()  # since then
        self.group: set[int] | None = None  # what every member of the open commutative group waits for
        self.lock = threading.Lock()
        self.serial = CellHistory._count = CellHistory._count + 1

    def copy(self) -> "CellHistory":
        """Return the same state, to go on from; a commutative group ends here."""
        twin = CellHistory()
        twin.writers, twin.readers = set(self.writers), set(self.readers)
        return twin

    def access(self, kind: str, number: int) -> set[int]:
        """Note the access of a task; return the tasks it waits for."""
        if kind == "commutative":
            if self.group is None:
                self.group = self.writers | self.readers
                self.writers, self.readers = set(), set()
            self.writers.add(number)
            return self.group
        self.group = None
        if kind == "in":
            self.readers.add(number)
            return set(self.writers)
        waits = self.writers | self.readers
        self.writers, self.readers = {number}, set()
        return waits


def without_implied(waits: Iterable[int], ancestors: list[int]) -> tuple[int, ...]:
    """Return the next task's predecessors, less those that others of them already wait for: the transitive reduction, task by task.

    `ancestors` has one integer per earlier task, a bit for each task that it waits for; the next task's is appended.
    """
    kept, implied = [], 0
    for p in sorted(waits, reverse=True):
        if not implied >> p & 1:
            kept.append(p)
            implied |= ancestors[p] | 1 << p
    ancestors.append(implied)
    return tuple(reversed(kept))


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
