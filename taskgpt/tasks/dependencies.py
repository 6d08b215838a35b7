"""Dependencies: what an access of a cell must wait for, and how long paths through a graph take.

A task waits for the last writer of every cell that it touches (RAW, WAW) and, if it writes, for the readers since (WAR).
"""

import itertools
import threading
from collections.abc import Iterable, Sequence


class CellHistory:
    """The tasks that the next access of a cell must wait for. A graph has one for every cell, so it is small.

    `writers`: the last writer, or all tasks of a group that do not wait for each other. `readers`: those since then. `group`: what every
    member of the open group waits for; None if there is none. `lock`: what excludes commutative tasks from each other, with its serial
    number.
    """

    __slots__ = ("group", "lock", "readers", "writers")

    def __init__(self):
        self.writers: Sequence[int] = ()
        self.readers: Sequence[_Readers] = ()
        self.group: _Commutative | _Concurrent | None = None
        self.lock: tuple[int, threading.Lock] | None = None

    def write(self, writers: Sequence[int], waits: set[int]) -> None:
        """Note writers that come now; add to `waits` what they wait for."""
        waits.update(self.writers)
        for readers in self.readers:
            waits.update(readers.tasks)
            readers.is_open = False
        self.writers, self.readers, self.group = writers, (), None

    def copy(self) -> "CellHistory":
        """Return the history of a piece of the cell."""
        copy = CellHistory()
        copy.writers, copy.readers, copy.group, copy.lock = self.writers[:], self.readers[:], self.group, self.lock
        return copy

    def numbered_lock(self) -> tuple[int, threading.Lock]:
        """Return the cell's lock and its serial number, made at the first call."""
        if self.lock is None:
            self.lock = next(_serials), threading.Lock()
        return self.lock


_serials = itertools.count(1)


class _Commutative(set[int]):
    """What tasks wait for that may come in any order, one at a time."""


class _Concurrent(set[int]):
    """What tasks wait for that may run at the same time."""


_GROUPS: dict[str, type[_Commutative] | type[_Concurrent]] = {"commutative": _Commutative, "concurrent": _Concurrent}


class _Readers:
    """Tasks that read one tile, with nothing written to its cells in between: they all wait for the same, and the next writer for them."""

    __slots__ = ("is_open", "tasks", "waits")

    def __init__(self, cells: Iterable[CellHistory]):
        self.is_open = True
        self.tasks: list[int] = []
        waits: set[int] = set()
        for cell in cells:
            waits.update(cell.writers)
            if cell.readers:
                cell.readers.append(self)
            else:
                cell.readers = [self]
        self.waits = tuple(waits)


class TileHistory:
    """The cells that a tile touches, and who reads it: a row of cells that many tasks read is gone through once."""

    __slots__ = ("cells", "readers")

    def __init__(self, cells: Sequence[CellHistory]):
        self.cells = cells
        self.readers: _Readers | None = None

    def access(self, kind: str, task: int, waits: set[int]) -> None:
        """Note that a task accesses the tile; add to `waits` what it waits for: perhaps itself, if it accessed one of the cells before."""
        if kind == "in":
            readers = self.readers
            if readers is None or not readers.is_open:
                readers = self.readers = _Readers(self.cells)
            readers.tasks.append(task)
            waits.update(readers.waits)
        elif kind in _GROUPS:
            of_kind = _GROUPS[kind]
            for cell in self.cells:
                if type(cell.group) is not of_kind or cell.readers:
                    group = of_kind()
                    cell.write([], group)
                    cell.group = group
                cell.writers.append(task)
                waits.update(cell.group)
        else:
            alone = (task,)
            for cell in self.cells:
                cell.write(alone, waits)


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
