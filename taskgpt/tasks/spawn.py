"""What tasks spawn tasks with, in a program whose tasks start as they are spawned (`scheduler.program()`).

    @kernel
    def sort(a: InOut[N], spawn: Spawn):
        half = a.shape[0] // 2
        spawn(sort, a[:half]), spawn(sort, a[half:])
        spawn.taskwait()
        ...

Who calls a kernel never passes its `spawn`, which stands last. Such a kernel is given tiles in place of arrays, `a.array` is the array: it
hands parts of them to the tasks that it spawns. Words are those of OmpSs-2, where it has one.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

from taskgpt.tasks.tensor import Tile

PRIORITY_LIMIT = 1 << 14  # of a task's priority, either way


class Future(Protocol):
    """A task that was spawned, and what comes of it."""

    def result(self) -> Any:
        """Return what the kernel returned, when it has: None where it declares no result.

        Raises TaskError for what the task raised, CancelledError if it was cancelled, and what ended the program if it did not begin
        because of that. A task may wait so for one that it spawned.
        """

    def exception(self) -> BaseException | None:
        """Return what `result` would raise, when the task is done."""

    def done(self) -> bool:
        """Return True if the task and all that it spawned have ended, in whatever way."""

    def cancel(self) -> bool:
        """Have the task not begin; return False if it has. Who waits for it goes on as if it had run."""


class Event(Protocol):
    """Something that a task must wait for, besides its body and the tasks that it spawned, before it is done."""

    def fulfil(self) -> None:
        """Say that it has happened, once, from any thread. Raises RuntimeError the second time; none where the program has ended early."""

    def fail(self, error: BaseException) -> None:
        """Say, in place of that, that it never will: the task fails, with this error."""

    def wait(self) -> None:
        """Wait until it has happened, inside the task; in a program another task has the core meanwhile."""


class Group(Protocol):
    """The tasks that were spawned inside of `with spawn.group() as group:`, and those that they spawned."""

    def cancel(self) -> int:
        """Have those not begin that have not; return how many. Who waits for them goes on as if they had run."""

    def wait(self) -> None:
        """Wait for all of them."""


class Spawn(Protocol):
    """Spawns tasks: in a program, or from inside of a task, as a kernel's last parameter."""

    def __call__(
        self,
        kernel: Any,
        *args: Any,
        priority: int = 0,
        label: str = "",
        final: bool = False,
        onready: Callable[["Spawn"], None] | None = None,
    ) -> Future:
        """Spawn a task. It starts when the tasks are done that were spawned here before it and access the same cells.

        `priority`: of ready tasks the highest goes first; up to PRIORITY_LIMIT, either way. `label` names it in messages and traces.
        `final`: what it spawns runs at once, in its place. `onready(spawn)` is called when the task could start: it starts after that, and
        after the events that `spawn.event()` made there. Raises what `TaskGraph.spawn` raises for arguments that do not fit, and what a
        task of the program has raised. Where very many tasks are open, waits, or runs the task at once.
        """

    def taskwait(self) -> None:
        """Wait for all tasks spawned here, and all that they spawned. Raises what a task of the program has raised."""

    def wait_on(self, *tiles: Tile) -> None:
        """Wait for the tasks spawned here that write these tiles: then their arrays can be read."""

    def group(self) -> AbstractContextManager[Group]:
        """Gather the tasks spawned within a `with` block, to wait for them or to cancel them."""

    def event(self) -> Event:
        """Return what this task, whose body runs, must wait for before it is done. Raises RuntimeError outside of a task."""

    def blocking(self) -> AbstractContextManager[None]:
        """Let another task have the core within the `with` block: around whatever waits for something else than tasks."""

    def sleep(self, seconds: float) -> None:
        """Sleep; another task has the core meanwhile."""

    def lock(self) -> "Lock":
        """Return a lock for tasks of this program: who waits for it leaves the core to another task."""


class Lock(Protocol):
    """A lock that tasks hold in a `with` block."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...


class ProgramError(RuntimeError):
    """A program that cannot go on: what waits for what is in the message."""
