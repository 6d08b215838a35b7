"""The tasks of a graph as a list: those that were spawned are made of the graph's columns when somebody looks."""

from collections.abc import Iterator, Sequence
from typing import Any, overload

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
    """Those of the columns, in program order, or of a graph that has none, those that were appended."""

    def __init__(self, columns: Columns, edges: Edges):
        self._columns, self._edges = columns, edges
        self._made: list[Any] = []  # None for one that nobody has looked at
        self._unmade = 0  # all tasks before this one are made
        self._replaced = 0
        self._appended: list[Task] = []

    def __len__(self) -> int:
        return len(self._columns) or len(self._appended)

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
            task = made[at] = RecordedTask(self._columns, self._edges, at)
        return task

    def __iter__(self) -> Iterator[Task]:
        if self._appended:
            return iter(self._appended)
        made = self._grow()
        if self._unmade < len(made):
            for number in range(self._unmade, len(made)):
                if made[number] is None:
                    made[number] = RecordedTask(self._columns, self._edges, number)
            self._unmade = len(made)
        return iter(made)

    def append(self, task: Task) -> None:
        self._appended.append(task)

    @property
    def version(self) -> tuple[int, int]:
        """What changes whenever the tasks do."""
        return len(self), self._columns.replaced

    def _grow(self) -> list[Any]:
        if self._replaced != self._columns.replaced:  # and their numbers may be others
            self._made, self._unmade, self._replaced = [], 0, self._columns.replaced
        made, count = self._made, len(self._columns)
        if len(made) < count:
            made.extend([None] * (count - len(made)))
        return made
