"""The tasks of a graph as a list: those that were spawned are made of the graph's columns when somebody looks."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from taskgpt.tasks.columns import Columns
from taskgpt.tasks.edges import Edges
from taskgpt.tasks.task import Call, Section, Task


class RecordedTask(Task):
    """A task of a graph's columns. What is changed of it is changed there."""

    __slots__ = ("_columns",)

    def __init__(self, columns: Columns, edges: Edges, number: int):
        self._columns, self.edges, self.number = columns, edges, number
        self._calls = ()

    @property
    def calls(self) -> tuple[Call, ...]:
        if self._calls == ():
            calls = self._columns.calls_of(self.number)
            self._calls = calls[0] if len(calls) == 1 else calls
        return super().calls

    @property
    def section(self) -> Section:
        return self._columns.origin_of(self.number).section

    @section.setter
    def section(self, section: Section) -> None:
        self._columns.change(self.number, section=section)

    @property
    def priority(self) -> int:
        return self._columns.origin_of(self.number).priority

    @priority.setter
    def priority(self, priority: int) -> None:
        self._columns.change(self.number, priority=priority)

    @property
    def locks(self) -> tuple:
        return self._columns.locks(self.number)

    def __reduce__(self):
        return _task_of, (self.number, self.calls, self.section, self.priority, self.locks)


def _task_of(number: int, calls: tuple[Call, ...], section: Section, priority: int, locks: tuple) -> Task:
    task = Task(number, calls, section)
    task.priority, task.locks = priority, locks
    return task


class Tasks(Sequence[Task]):
    """Those of the columns, in program order, or of a graph that has none, those that were appended.

    What is asked for all of them at once is found in the columns, and makes no task.
    """

    def __init__(self, columns: Columns, edges: Edges):
        self.columns, self._edges = columns, edges
        self._made: list[Any] = []  # None for one that nobody has looked at
        self._unmade = 0  # all tasks before this one are made
        self._replaced = 0
        self._appended: list[Task] = []

    def __len__(self) -> int:
        return len(self.columns) or len(self._appended)

    @overload
    def __getitem__(self, number: int) -> Task: ...

    @overload
    def __getitem__(self, number: slice) -> list[Task]: ...

    def __getitem__(self, number: Any) -> Any:
        if self._appended:
            return self._appended[number]
        made = self._grow()
        if isinstance(number, slice):
            return [self[at] for at in range(*number.indices(len(made)))]
        task = made[number]
        if task is None:
            at = number + len(made) if number < 0 else number
            task = made[at] = RecordedTask(self.columns, self._edges, at)
        return task

    def __iter__(self) -> Iterator[Task]:
        if self._appended:
            return iter(self._appended)
        made = self._grow()
        if self._unmade < len(made):
            for number in range(self._unmade, len(made)):
                if made[number] is None:
                    made[number] = RecordedTask(self.columns, self._edges, number)
            self._unmade = len(made)
        return iter(made)

    def append(self, task: Task) -> None:
        self._appended.append(task)

    @property
    def version(self) -> tuple[int, int]:
        """What changes whenever the tasks do."""
        return len(self), self.columns.replaced

    def _grow(self) -> list[Any]:
        if self._replaced != self.columns.replaced:  # and their numbers may be others
            self._made, self._unmade, self._replaced = [], 0, self.columns.replaced
        made, count = self._made, len(self.columns)
        if len(made) < count:
            made.extend([None] * (count - len(made)))
        return made

    def calls_of(self, number: int) -> tuple[Call, ...]:
        """Return the calls of a task."""
        return self._appended[number].calls if self._appended else self.columns.calls_of(number)

    def priorities(self) -> np.ndarray:
        """Return that of each task, int64."""
        if self._appended:
            return np.array([task.priority for task in self._appended], np.int64)
        return np.array([origin.priority for origin in self.columns.table], np.int64)[np.array(self.columns.origins)]

    def locks(self) -> dict[int, tuple]:
        """Return the locks of those tasks that have some, by their numbers, ascending."""
        if self._appended:
            return {task.number: task.locks for task in self._appended if task.locks}
        columns = self.columns
        is_commutative = np.array(["commutative" in origin.signature.kinds for origin in columns.table], bool)
        return {number: columns.locks(number) for number in np.flatnonzero(is_commutative[np.array(columns.origins)]).tolist()}
