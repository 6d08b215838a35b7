"""Domains: which tasks an access must wait for, among those that one task, or the program, has spawned.

As in a recorded graph (tasks/waits.py), a task waits for the last writer of every cell that it touches and, if it writes, for the
readers since. Here tasks come and go: who is done is forgotten, so that a domain is as large as its cells.

A task that touches a cell weakly does not wait for who wrote it before: its domain takes that over, for the tasks that it spawns. It waits
for the bodies of earlier weak tasks alone, which spawn all of theirs. So who comes after a weak task whose body has ended waits for what
that one has spawned, cell by cell, and not for all of it.
"""

from collections.abc import Callable, Iterable, Sequence

from taskgpt.schedulers.dynamic.futures import Task
from taskgpt.tasks.dependencies import Cell

_MOST_READERS = 64  # of a cell, before those that are done are looked for

Ends = tuple[Sequence[Task], Sequence[Task]]  # writers of a cell, and its readers since


class _Cell:
    """`before`: what each of a group of concurrent writers waits for; None if the writer is none of such a group."""

    __slots__ = ("before", "is_weak", "most", "readers", "writers")

    def __init__(self, ends: Ends):
        self.writers, readers = ends
        self.before: tuple[Task, ...] | None = None
        self.readers = list(readers)
        self.is_weak = any(task.is_weak for each in ends for task in each)
        self.most = _MOST_READERS


class Domain:
    """What a task has spawned, by the cells that it accesses. `inherited`: what it waits for weakly, by cell."""

    __slots__ = ("_cells", "inherited")

    def __init__(self, inherited: dict[Cell, Ends]):
        self.inherited = inherited
        self._cells: dict[Cell, _Cell] = {}

    def access(self, cells: Iterable[Cell], kind: str, task: Task, waits: set[Task], is_open: Callable[[Task], bool]) -> None:
        """Note that a task accesses cells; add to `waits` what it waits for: perhaps itself, if it accessed one of the cells before."""
        is_read = kind in ("in", "weakin")
        for which in cells:
            cell = self._cells.get(which)
            if cell is None:
                cell = self._cells[which] = _Cell(self.inherited.get(which, ((), ())))
            if kind == "concurrent":
                self._join(cell, which, task, waits, is_open)
                continue
            writers, readers = _at_end((cell.writers, cell.readers), which) if cell.is_weak else (cell.writers, cell.readers)
            if task.is_weak and kind.startswith("weak"):
                task.domain.inherited[which] = writers, () if is_read else tuple(readers)
                waits.update(each.body for ends in (writers, readers) for each in ends if each.body is not None)
            else:
                waits.update(writers)
                if not is_read:
                    waits.update(readers)
            if is_read:
                cell.readers.append(task)
                if len(cell.readers) > cell.most:
                    cell.readers = [each for each in cell.readers if is_open(each)]
                    cell.most = max(_MOST_READERS, 2 * len(cell.readers))
                cell.is_weak = cell.is_weak or task.is_weak
            else:
                cell.writers, cell.readers, cell.is_weak, cell.before = (task,), [], task.is_weak, None

    def _join(self, cell: _Cell, which: Cell, task: Task, waits: set[Task], is_open: Callable[[Task], bool]) -> None:
        """Note that a task writes a cell beside others that do so concurrently."""
        if cell.before is None or cell.readers:
            writers, readers = _at_end((cell.writers, cell.readers), which)
            cell.before, cell.writers, cell.readers, cell.is_weak = (*writers, *readers), (), [], False
        if len(cell.writers) > cell.most:
            cell.writers = tuple(each for each in cell.writers if is_open(each))
            cell.most = max(_MOST_READERS, 2 * len(cell.writers))
        cell.writers = (*cell.writers, task)
        waits.update(cell.before)

    def writers_of(self, cells: Iterable[Cell]) -> set[Task]:
        """Return who writes these cells, or who did before and is done."""
        found: set[Task] = set()
        for which in cells:
            cell = self._cells.get(which)
            found.update(_at_end((cell.writers, ()) if cell else self.inherited.get(which, ((), ())), which)[0])
        return found

    def awaited(self) -> set[Task]:
        """Return all that the task waits for weakly."""
        return {task for ends in self.inherited.values() for each in ends for task in each}

    def ends(self, which: Cell) -> Ends:
        """Return who accessed a cell last: of all that was spawned here, or else of what it was to wait for."""
        cell = self._cells.get(which)
        return (cell.writers, cell.readers) if cell else self.inherited.get(which, ((), ()))


def _at_end(ends: Ends, which: Cell) -> Ends:
    """Return the same with what weak tasks have spawned in their place, as far as these have ended, with their events.

    Weak tasks may be many in a row, or reached on many ways: each is looked at once.
    """
    writers: list[Task] = []
    readers: list[Task] = []
    left = [(task, False) for task in ends[0]] + [(task, True) for task in ends[1]]
    seen = set(left)
    while left:
        task, is_reader = left.pop()
        domain = task.domain if task.is_weak and task.has_ended and not task.unfulfilled else None
        if domain is None:
            (readers if is_reader else writers).append(task)
            continue
        inner_writers, inner_readers = domain.ends(which)
        inner = {*((each, is_reader) for each in inner_writers), *((each, True) for each in inner_readers)} - seen
        seen |= inner
        left.extend(inner)
    return writers, readers
