"""A program: what all of its tasks share, from its first task to its end."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from types import CodeType
from typing import Protocol

from taskgpt.schedulers.dynamic.futures import Body, Part, Task
from taskgpt.schedulers.dynamic.recording import Recording
from taskgpt.tasks import Call, Kernel
from taskgpt.tasks.events import this_thread
from taskgpt.tasks.known_calls import KnownCalls
from taskgpt.tasks.spawn import ProgramError, Spawn

_LOOK_S = 0.1  # how often who waits looks whether Ctrl-C was pressed, or whether the program was cancelled


class Engine(Protocol):
    """What a scheduler gives a program: it runs tasks when what they wait for is done. Places number open tasks; ROOT's is the program.

    All but the waiting is called by one thread at a time.
    """

    tasks: list[Task | None]  # by place: the task there, perhaps done

    def add(self, task: Task, waits: Sequence[int], parent: int, priority: int, is_shell: bool = False) -> int:
        """Return the place of a new task that waits for those at these places; -1 if there is no room.

        A shell has no body: it is done when all that have it as parent are, and `complete` was called.
        """

    def is_done(self, place: int) -> bool: ...

    def was_skipped(self, place: int) -> bool:
        """Return True if a task that is done was cancelled with all others."""

    def open_tasks(self) -> int: ...

    def claim(self, place: int) -> int:
        """Return a number for `run_claimed` if the task is ready and nobody has begun it, else -1."""

    def run_claimed(self, place: int, claimed: int) -> None: ...

    def begin_wait(self, place: int) -> bool:
        """Return True if a task is done; otherwise `end_wait` follows."""

    def await_task(self, place: int, milliseconds: int) -> bool: ...

    def end_wait(self, place: int) -> None: ...

    def await_children(self, place: int, milliseconds: int) -> bool: ...

    def await_few(self, few: int, milliseconds: int) -> bool:
        """Wait until no more than so many tasks are open."""

    def hold(self, place: int) -> None:
        """Let a task that runs wait for one `fulfil` more."""

    def fulfil(self, place: int) -> None: ...

    def complete(self, place: int) -> None:
        """Say that a shell has all of its parts."""

    def cancel(self, place: int) -> bool: ...

    def cancel_all(self) -> None: ...

    def is_cancelled(self) -> bool: ...

    def failures(self) -> list[tuple[Task, BaseException]]:
        """Return the tasks that failed in compiled code since the last call, and what they raised."""

    def blocking(self) -> contextlib.AbstractContextManager[None]:
        """Let another thread be this worker within the `with` block."""

    is_closed: bool  # its arrays are no longer the workers'

    def waiting(self) -> list[tuple[Task, bool, bool]]:
        """Return (task, could it begin, has it begun) for all open tasks."""


ROOT = 0  # the place of the program
_MOST_INSIDE = 64  # tasks that run in one thread inside of each other: Python allows 1000 calls so
MOST_OPEN = 4096  # tasks; beyond, who spawns waits until half of them are done, or runs what it spawns


def _takes_all(kernel: Kernel) -> None:
    """Refuse no kernel: what a graph cannot, a program can."""


class _Inside(threading.local):
    """`depth`: how many tasks this thread runs inside of others that wait for them."""

    depth = 0


class Program:
    """Without an engine, tasks run where they are spawned. The first failure ends it: no other task begins, and it is raised.

    `calls`: what it knows of them. `checks`: whether declarations are enforced. `spawner_of(task)` returns what a task spawns with, when
    its body begins.
    """

    def __init__(
        self,
        engine: Engine | None,
        patience_s: float,
        checks: bool,
        recording: Recording | None,
        spawner_of: Callable[[Task], Spawn],
    ):
        self.spawner_of = spawner_of
        self.lock = threading.RLock()
        self._engine = engine
        self._patience_s = patience_s
        self.checks = checks
        self.recording = recording
        self._numbers = itertools.count()
        self._failure: BaseException | None = None
        self._is_settled = False
        self._inside = _Inside()
        self._events: dict[Event, None] = {}
        self.calls = KnownCalls(_takes_all, lambda: None, may_refine=False)

    # What is spawned ----------------------------------------------------------------------------------------------------------------

    def new_task(self, call: Call, parent: Task | None, label: str, where: tuple[CodeType, int]) -> Task:
        return Task(self, next(self._numbers), call, parent, label, where)

    def add(self, task: Task, waits: set[Task], priority: int) -> None:
        """Have the engine run a task after others."""
        if not task.is_weak:
            self._add(task, task, waits, self._place_of(task.parent), priority)
            return
        task.body = Body(task)
        self._add(task, task, set(), self._place_of(task.parent), priority, is_shell=True)
        self._add(Part(task), task, task.domain.awaited(), task.place, priority)
        self._add(task.body, task, waits, task.place, priority)
        self._engine.complete(task.place)

    def _add(self, added: Task, task: Task, waits: set[Task], parent: int, priority: int, is_shell: bool = False) -> None:
        engine = self._engine
        before = [each.place for each in waits if each.place >= 0 and engine.tasks[each.place] is each]
        added.place = engine.add(added, before, parent, priority, is_shell)
        if added.place < 0:
            raise ProgramError(
                f"no room for task {task}: too many tasks are open, or it waits for too many; wait for some before, with spawn.taskwait()"
            )

    @staticmethod
    def _place_of(task: Task | None) -> int:
        return ROOT if task is None else task.place

    @property
    def is_crowded(self) -> bool:
        return self._engine is not None and self._engine.open_tasks() > MOST_OPEN

    def wait_while_crowded(self) -> None:
        """Wait until fewer tasks are open, if there are many."""
        if self.is_crowded:
            self._wait(lambda milliseconds: self._engine.await_few(MOST_OPEN // 2, milliseconds), "room for its tasks")

    def run_here(self, task: Task, before: Task | None) -> None:
        """Run a task at once, in this thread."""
        for each in (before, task):
            if each is not None and not self._is_over:
                with self.paused(None, each):
                    each.run()
                if each.unfulfilled:
                    self._wait(lambda milliseconds, task=each: self._are_fulfilled(task, milliseconds / 1e3), "its events")

    def _are_fulfilled(self, task: Task, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while task.unfulfilled and time.monotonic() < until:
            time.sleep(1e-3)
        return not task.unfulfilled

    # What ran when ------------------------------------------------------------------------------------------------------------------

    def begin(self, task: Task) -> None:
        """Note that a body begins, if there is a recording."""
        if self.recording is not None and task.stretch >= 0:
            self.recording.begin(task)

    def end(self, task: Task) -> None:
        """Note that it ends."""
        if self.recording is not None and task.stretch >= 0:
            self.recording.end(task)

    @contextlib.contextmanager
    def paused(self, ran: Task | None = None, *awaited: Task) -> Iterator[list[Task]]:
        """Note that this thread's task does nothing within the `with` block, and goes on after it.

        `ran`: a task that runs in this thread meanwhile. `awaited`: tasks that are done then, with all that they have spawned; to the list
        that this gives, more can be added.
        """
        task, found = this_thread.at, list(awaited)
        if self.recording is None or task is None or not self.recording.is_running(task):
            yield found
            return
        self.recording.end(task)
        try:
            yield found
        finally:
            with self.lock:
                self.recording.go_on(task, ran, found)

    def spawned_by(self, task: Task) -> list[Task]:
        """Return what a task has spawned and not waited for since, if that is recorded."""
        return [] if self.recording is None else self.recording.spawned(task)

    # Whether it is done -------------------------------------------------------------------------------------------------------------

    def is_open(self, task: Task) -> bool:
        """Return True if a task is not done."""
        return not self.has_ended and task.place >= 0 and self._engine.tasks[task.place] is task and not self._engine.is_done(task.place)

    def was_skipped(self, task: Task) -> bool:
        if task.place < 0 or self._engine.tasks[task.place] is not task:
            return False
        return self._engine.was_skipped(task.place) or (self.has_ended and not self._engine.is_done(task.place))

    def run_child(self, task: Task) -> None:
        """Run a task in the thread that spawned it, if it is ready and nobody has begun it; not inside of too many others."""
        if self._inside.depth == _MOST_INSIDE:
            return
        with self.lock:
            claimed = self._engine.claim(task.place) if self.is_open(task) and not task.is_weak else -1
        if claimed >= 0:
            self._inside.depth += 1
            try:
                with self.paused(task):
                    self._engine.run_claimed(task.place, claimed)
            finally:
                self._inside.depth -= 1

    def wait(self, task: Task) -> None:
        """Wait for a task."""
        if self._engine is None or self.has_ended or (self.recording is None and not self.is_open(task)):
            return  # recorded, it is an edge though nothing has to be waited for
        with self.paused(None, task):
            if this_thread.at is not None and task.parent is this_thread.at:
                self.run_child(task)
            place = task.place
            with self.lock:
                if not self.is_open(task) or self._engine.begin_wait(place):
                    return
            try:
                self._wait(lambda milliseconds: self._engine.await_task(place, milliseconds), f"task {task}")
            finally:
                with self.lock:
                    self._engine.end_wait(place)

    def wait_children(self, task: Task | None) -> None:
        """Wait for all that a task, or the program, has spawned."""
        if self._engine is not None:
            place = self._place_of(task)
            self._wait(lambda milliseconds: self._engine.await_children(place, milliseconds), "the tasks that it spawned")

    def wait_for(self, is_over: Callable[[float], bool], what: str) -> None:
        """Wait until a function, called with a number of seconds to wait, returns True."""
        self._wait(lambda milliseconds: is_over(milliseconds / 1e3), what)

    def _wait(self, is_over: Callable[[int], bool], what: str) -> None:
        """Wait with the core left to another; `is_over` waits so many milliseconds.

        Raises CancelledError in a task of a program that ends.
        """
        task = this_thread.at
        looks = task is None or self._engine is None  # whether all wait for each other
        if is_over(0):
            return
        with self.blocking():
            if task is not None:
                task.waits_for = what
            try:
                quiet_since = time.monotonic()
                while not is_over(int(_LOOK_S * 1e3)):
                    self.verify_may_wait()
                    if not looks:
                        continue
                    if self._is_over:
                        self._end_waiting(None)  # who would fulfil events may be among those that do not begin
                    elif not self._is_stuck():
                        quiet_since = time.monotonic()
                    elif time.monotonic() - quiet_since > self._patience_s:
                        self._end_waiting(ProgramError(self._who_waits(what)))
                        quiet_since = time.monotonic()
            finally:
                if task is not None:
                    task.waits_for = None

    @contextlib.contextmanager
    def blocking(self) -> Iterator[None]:
        """Let another thread be this worker within the `with` block."""
        with self.paused(), self._engine.blocking() if self._engine is not None else contextlib.nullcontext():
            yield

    def verify_may_wait(self) -> None:
        """Raise CancelledError in a task of a program that has ended early."""
        if this_thread.at is not None and self._is_over:
            raise CancelledError("the program has ended: a task failed, or it was interrupted")

    # Events -------------------------------------------------------------------------------------------------------------------------

    def event_of(self, task: Task) -> "Event":
        """Return an event that a task, which runs, waits for before it is done. Raises CancelledError in a program that ends."""
        event = Event(self, task)
        with self.lock:
            self.verify_may_wait()
            task.unfulfilled += 1
            self._events[event] = None
            if task.place >= 0:
                self._engine.hold(task.place)
        return event

    def fulfil(self, task: Task, event: "Event") -> None:
        """Note that an event has happened."""
        task.unfulfilled -= 1
        del self._events[event]
        if task.place >= 0 and not self.has_ended:
            self._engine.fulfil(task.place)

    # Its end ------------------------------------------------------------------------------------------------------------------------

    @property
    def has_ended(self) -> bool:
        """True after its `with` block."""
        return self._is_settled or (self._engine is not None and self._engine.is_closed)

    def verify_has_not_ended(self) -> None:
        if self.has_ended:
            raise RuntimeError("this program has ended: spawn and wait inside its `with` block, and begin another one for more")

    @property
    def _is_over(self) -> bool:
        return self._failure is not None or (self._engine is not None and self._engine.is_cancelled())

    def cancel(self, task: Task) -> bool:
        """Have a task not begin; return True if it has not."""
        with self.lock:
            begins = task.body or task
            return self.is_open(begins) and self._engine.cancel(begins.place)

    def fail(self, error: BaseException) -> None:
        """Have no other task begin; the first such error is raised where the program waits next."""
        with self.lock:
            if self._failure is None and not isinstance(error, CancelledError):
                self._failure = error
            if self._engine is not None:
                self._engine.cancel_all()

    def verify_goes_on(self) -> None:
        """Raise what a task has raised."""
        self.collect_failures()
        if self._failure is not None:
            raise self._failure
        if self._is_over:
            raise CancelledError("the program has ended")

    def collect_failures(self) -> None:
        """Give tasks that failed in compiled code what they have raised."""
        if self._engine is not None and self._engine.is_cancelled():
            with self.lock:
                if self.has_ended:
                    return
                for task, error in self._engine.failures():
                    task.fail(error)

    def settle(self, is_early: bool) -> None:
        """Wait for all tasks that have begun, whatever is pressed meanwhile."""
        interrupt: KeyboardInterrupt | None = None
        while not self.has_ended:
            try:
                if is_early:
                    self._end_waiting(None)
                # A Ctrl-C may have kept a place from being given back.
                is_over = self._engine is None or self._engine.await_few(0, 10) or not self._runs_anything()
                self.collect_failures()
                with self.lock:
                    self._is_settled = is_over
            except KeyboardInterrupt as pressed:
                interrupt = pressed
        if interrupt is not None:
            raise interrupt

    def _end_waiting(self, error: ProgramError | None) -> None:
        """Have nobody wait any more, for events neither."""
        with self.lock:
            if error is not None:
                self.fail(error)
            if self._engine is not None:
                self._engine.cancel_all()
            for event in list(self._events):
                event.give_up()

    # What waits for what ------------------------------------------------------------------------------------------------------------

    def _runs_anything(self) -> bool:
        with self.lock:
            return any(has_begun and not task.has_ended for task, _, has_begun in self._engine.waiting())

    def _is_stuck(self) -> bool:
        """Return True if no task runs that does not wait, and none could begin."""
        if self._engine is None:
            return True
        with self.lock:
            open_tasks = self._engine.waiting()
        return all((task.waits_for is not None or task.has_ended) if has_begun else not could for task, could, has_begun in open_tasks)

    def _who_waits(self, what: str) -> str:
        """Return who waits for what, in words; `what` is what this thread waits for."""
        with self.lock:
            open_tasks = self._engine.waiting() if self._engine is not None else []
        lines = [f"the program waits for {what}"]
        for task, _, has_begun in open_tasks:
            if has_begun and task.waits_for is not None:
                lines.append(f"task {task} waits for {task.waits_for}")
            elif task.unfulfilled:
                lines.append(f"task {task} has ended, and {task.unfulfilled} of its events have not been fulfilled")
        waiting = sum(not has_begun for _, _, has_begun in open_tasks)
        shown = "; ".join(lines[:_MOST_SHOWN]) + (f"; and {len(lines) - _MOST_SHOWN} more" if len(lines) > _MOST_SHOWN else "")
        return f"nothing has gone on for {self._patience_s:g} s: {shown}; {waiting} tasks have not begun"


_MOST_SHOWN = 5  # tasks, in a message


class Event:
    """Something that a task waits for before it is done."""

    def __init__(self, program: Program, task: Task):
        self._program, self._task = program, task
        self._has_happened = threading.Event()
        self._is_given_up = False

    def fulfil(self) -> None:
        with self._program.lock:
            if self._is_given_up:
                return
            if self._has_happened.is_set():
                raise RuntimeError(f"an event of task {self._task} was fulfilled before")
            self._has_happened.set()
            self._program.fulfil(self._task, self)

    def fail(self, error: BaseException) -> None:
        with self._program.lock:
            if not self._is_given_up:
                self._task.fail(error)
                self.fulfil()

    def give_up(self) -> None:
        """Fulfil it, as the program ends; who does so later has come in vain."""
        self.fulfil()
        self._is_given_up = True

    def wait(self) -> None:
        self._program.wait_for(self._has_happened.wait, "an event")
