"""Futures: a task that was spawned, and what comes of it."""

from collections.abc import Callable
from concurrent.futures import CancelledError
from types import CodeType
from typing import Any, Protocol

from taskgpt.tasks import Call, TaskError
from taskgpt.tasks.events import this_thread
from taskgpt.tasks.native_entry import value_of
from taskgpt.tasks.spawn import Event


class Owner(Protocol):
    """What a task asks the program of."""

    checks: bool

    def is_open(self, task: "Task") -> bool: ...

    def was_skipped(self, task: "Task") -> bool: ...

    def wait(self, task: "Task") -> None: ...

    def cancel(self, task: "Task") -> bool: ...

    def fail(self, error: BaseException) -> None: ...

    def spawner_of(self, task: "Task") -> Any: ...

    def event_of(self, task: "Task") -> Event: ...

    def begin(self, task: "Task") -> None: ...

    def end(self, task: "Task") -> None: ...

    def collect_failures(self) -> None: ...

    def verify_goes_on(self) -> None: ...


class Task:
    """A spawned task; the Future of tasks/spawn.py.

    `place`: its number among the engine's open tasks; -1 if it never was one, as it ran where it was spawned. `parent`: who spawned it.
    `domain`: what its weak accesses wait for, and what it has spawned. `unfulfilled`: how many events it waits for.
    """

    __slots__ = (
        "_error", "_is_cancelled", "_value", "_where", "begun_ns", "body", "call", "domain", "group", "has_ended", "is_final", "is_weak",
        "label", "number", "parent", "place", "program", "result_word", "stretch", "unfulfilled", "waits_for", "words",
    )  # fmt: skip

    def __init__(self, program: Owner, number: int, call: Call, parent: "Task | None", label: str, where: tuple[CodeType, int]):
        self.program, self.number, self.call, self.parent, self.label, self._where = program, number, call, parent, label, where
        self.place = -1
        self.domain: Any = None  # a Domain
        self.body: Task | None = None  # of a weak task: the place of its body alone
        self.group: Any = parent.group if parent is not None else None
        self.is_weak = False
        self.has_ended = False  # its body has
        self.is_final = parent is not None and parent.is_final
        self.unfulfilled = 0
        self.stretch = -1  # of the recording, if there is one: what it does now, or did last
        self.begun_ns = 0  # when that began
        self.waits_for: object = None  # what it waits for in its body, in words by str()
        self.words: Any = None  # keeps arguments alive that its place has no room for
        self.result_word: Any = None  # where compiled code leaves the result, if it does
        self._value: Any = None
        self._error: BaseException | None = None
        self._is_cancelled = False

    # What comes of it ---------------------------------------------------------------------------------------------------------------

    def done(self) -> bool:
        return not self.program.is_open(self)

    def result(self) -> Any:
        self._wait()
        self.program.collect_failures()
        if isinstance(self._error, CancelledError):
            self.program.verify_goes_on()  # says what it was cancelled for
        if self._error is not None:
            raise self._error
        if self._is_cancelled:
            raise CancelledError(f"task {self} was cancelled")
        if self.program.was_skipped(self):
            self.program.verify_goes_on()  # says why
        return self._value if self.result_word is None else value_of(self.result_word[0], self.call.kernel.result)

    def exception(self) -> BaseException | None:
        try:
            self.result()
        except CancelledError as cancelled:
            return cancelled
        except TaskError as error:
            return error
        return None

    def cancel(self) -> bool:
        if not self._is_cancelled:
            self._is_cancelled = self.program.cancel(self)
            self.has_ended = self.has_ended or self._is_cancelled
        return self._is_cancelled

    def _wait(self) -> None:
        self.program.wait(self)

    # Its body -----------------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run the body; keep what it returns or raises."""
        outer, this_thread.at = this_thread.at, self
        self.program.begin(self)
        try:
            self._value = self._run()
        except BaseException as error:
            self.fail(error)
        finally:
            self.program.end(self)
            this_thread.at = outer
            self.has_ended = True

    def _run(self) -> Any:
        if self.call.kernel.spawns:
            return self.call.kernel.run(*self.call.args, self.program.spawner_of(self))
        return self.call.run()

    def event(self) -> Event:
        """Return what the task waits for, besides its body, before it is done."""
        return self.program.event_of(self)

    def fail(self, error: BaseException) -> None:
        """Keep what the body raised, in words that name the task; the program ends."""
        if isinstance(error, Exception) and not isinstance(error, TaskError | CancelledError):
            failure = TaskError(f"task {self}: {_told(error)}")
            failure.__cause__ = error
            error = failure
        self._error = error
        self.program.fail(error)

    def __str__(self) -> str:
        code, line = self._where
        label = f" '{self.label}'" if self.label else ""
        return f"{self.number}{label}, {self.call}, spawned in {code.co_filename}, line {line}"


def _told(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # of its own __str__
        return type(error).__name__


class Readiness(Task):
    """What is done before a task that could start: its `onready`, and the events that this asks for."""

    __slots__ = ("_onready",)

    def __init__(self, task: Task, onready: Callable[[Any], None]):
        super().__init__(task.program, task.number, task.call, task.parent, task.label, task._where)
        self._onready = onready

    def _run(self) -> None:
        self._onready(self.program.spawner_of(self))


class Part(Task):
    """A part of a weak task, whose own place is there until all of its parts, and what it spawned, are done.

    One has nothing to do, and waits for what the task waits for weakly: who comes after the task relies on that.
    """

    __slots__ = ()

    def __init__(self, task: Task):
        super().__init__(task.program, task.number, task.call, task.parent, task.label, task._where)


class Body(Part):
    """The part that runs the body."""

    __slots__ = ("task",)

    def __init__(self, task: Task):
        super().__init__(task)
        self.task = task

    def run(self) -> None:
        self.task.run()
        self.has_ended = True
