"""What a program, or a task of it, spawns tasks with, and waits for them: the Spawn of tasks/spawn.py."""

import contextlib
import operator
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from taskgpt.schedulers.dynamic.domain import Domain
from taskgpt.schedulers.dynamic.futures import Readiness, Task
from taskgpt.schedulers.dynamic.program import Engine, Event, Program
from taskgpt.schedulers.dynamic.recording import Recording
from taskgpt.tasks import AccessError, Call, Graph, Kernel, Tile
from taskgpt.tasks.check import CheckedCall
from taskgpt.tasks.events import this_thread
from taskgpt.tasks.kernel import as_kernel
from taskgpt.tasks.known_calls import CallSignature, Place
from taskgpt.tasks.spawn import PRIORITY_LIMIT

_LOOK_S = 0.1  # how often who waits for something else than tasks looks whether the program was cancelled
_MOST_CHILDREN = 256  # that are kept before those that are done are looked for


class Spawner:
    """Spawns the tasks of one task, or of the program itself, where `task` is None."""

    def __init__(self, program: Program, task: Task | None, is_final: bool):
        self._program, self._task, self._is_final = program, task, is_final
        self._domain = task.domain if task is not None and task.domain is not None else Domain({})
        self._children: list[Task] = []  # of a task: it runs them itself when it waits for them
        self._most_children = _MOST_CHILDREN
        self._group = task.group if task is not None else None

    def __call__(
        self,
        kernel: Kernel,
        *args: Any,
        priority: int = 0,
        label: str = "",
        final: bool = False,
        onready: Callable[[Any], None] | None = None,
    ) -> Task:
        self._verify_is_mine()
        program, caller = self._program, sys._getframe(1)
        priority = _verified_priority(priority)
        with program.lock:
            program.verify_has_not_ended()
            program.verify_goes_on()
            signature, places, args = program.calls.look_up(as_kernel(kernel), args)
            program.calls.verify_written(signature, places)
            call = Call.verified(signature, args)
            if program.checks:
                self._verify_covered(call, signature, places)
                call = call if kernel.spawns else CheckedCall(kernel.bounds_checked, args)
            task = program.new_task(call, self._task, label, (caller.f_code, caller.f_lineno))
            task.is_final = task.is_final or final
            if self._group is not None:
                task.group = self._group
                self._group.add(task)
            is_here = self._is_final or (self._task is not None and program.is_crowded)
            waits: set[Task] = set()
            if not self._is_final or program.recording is not None:
                task.is_weak = kernel.is_weak and not (is_here or task.is_final)  # what that spawns does not wait in its place
                task.domain = Domain({}) if task.is_weak else None
                for place, kind in zip(places, signature.kinds, strict=True):
                    self._domain.access(place.cells, kind, task, waits, program.is_open)
                waits.discard(task)  # two of its tiles are in one cell
            if program.recording is not None:
                program.recording.add(task, waits)
            before = Readiness(task, onready) if onready else None
            if not is_here:
                try:
                    if before is not None:
                        program.add(before, waits, priority)
                        waits = {before}
                    program.add(task, waits, priority)
                except BaseException as error:
                    program.fail(error)  # who is spawned after it would not wait for those before it
                    raise
                self._note(task)
        if is_here:
            for each in () if self._is_final else waits:
                program.wait(each)
            program.run_here(task, before)
        elif self._task is None:
            program.wait_while_crowded()
        return task

    def _verify_covered(self, call: Call, signature: CallSignature, places: Sequence[Place]) -> None:
        """Raise AccessError if a task that this one spawns touches what this one does not declare, and so may run beside others."""
        task, place_of = self._task, self._program.calls.place
        if task is None:
            return
        touched, written = set(), set()
        for name, tile in task.call.tiles():
            cells = place_of(tile).cells
            touched.update(cells)
            if task.call.kernel.accesses[name].is_written:
                written.update(cells)
        for place, name, access in zip(places, signature.names, signature.accesses, strict=True):
            if not (written if access.is_written else touched).issuperset(place.cells):
                does, whose = "writes" if access.is_written else "reads", task.call.kernel.name
                raise AccessError(
                    f"{call.kernel.name} {does} '{name}', {place.tile!r}, and {whose}, which spawns it, does not declare that, so nobody "
                    f"waits for it; declare the tile in {whose} too, weakly if that does not touch it itself"
                )

    def _note(self, task: Task) -> None:
        if self._task is not None:
            self._children.append(task)
            if len(self._children) > self._most_children:
                self._children = [each for each in self._children if self._program.is_open(each)]
                self._most_children = max(_MOST_CHILDREN, 2 * len(self._children))

    @property
    def graph(self) -> Graph | None:
        """What ran so far, as a graph of stretches without a pause, if the scheduler keeps records."""
        return None if self._program.recording is None else self._program.recording.graph()

    def taskwait(self) -> None:
        self._verify_is_mine()
        if not self._is_final:
            with self._program.paused() as awaited:
                for child in reversed(self._children):
                    self._program.run_child(child)
                self._children.clear()
                self._program.wait_children(self._task)
                if self._task is not None:
                    awaited += self._program.spawned_by(self._task)
        self._program.verify_goes_on()

    def wait_on(self, *tiles: Tile) -> None:
        self._verify_is_mine()
        for tile in tiles:
            if not isinstance(tile, Tile):
                raise TypeError(f"wait_on wants tiles, tensor[index], got a {type(tile).__name__}")
        with self._program.paused() as awaited:
            for tile in tiles:
                with self._program.lock:
                    writers = self._domain.writers_of(self._program.calls.place(tile).cells)
                awaited += writers
                for task in writers:
                    self._program.wait(task)
        self._program.verify_goes_on()

    @contextlib.contextmanager
    def group(self) -> Iterator["Group"]:
        outer, self._group = self._group, Group(self._program, self._group)
        try:
            yield self._group
        finally:
            self._group = outer

    def event(self) -> Event:
        self._verify_is_mine()
        if self._task is None:
            raise RuntimeError("an event is waited for by a task, and this is the program; call spawn.event() inside of a task")
        return self._task.event()

    def blocking(self) -> contextlib.AbstractContextManager[None]:
        return self._program.blocking()

    def sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self._program.blocking():
            while (left := until - time.monotonic()) > 0:
                self._program.verify_may_wait()
                time.sleep(min(left, _LOOK_S))

    def lock(self) -> "Lock":
        return Lock(self._program)

    def _verify_is_mine(self) -> None:
        self._program.verify_has_not_ended()
        if this_thread.at is not self._task:
            whose = f"task {self._task}" if self._task is not None else "the program"
            raise RuntimeError(f"this spawn is that of {whose}, and another task cannot use it: declare `spawn: Spawn` in its kernel")


class Group:
    """Tasks that were spawned within a `with` block, and those that they spawned."""

    def __init__(self, program: Program, outer: "Group | None"):
        self._program, self._outer = program, outer
        self._tasks: list[Task] = []
        self._most = _MOST_CHILDREN

    def add(self, task: Task) -> None:
        """Note a task, in the groups around this one, too."""
        self._tasks.append(task)
        if len(self._tasks) > self._most:
            self._tasks = [each for each in self._tasks if self._program.is_open(each)]
            self._most = max(_MOST_CHILDREN, 2 * len(self._tasks))
        if self._outer is not None:
            self._outer.add(task)

    def cancel(self) -> int:
        return sum([task.cancel() for task in self._tasks])

    def wait(self) -> None:
        while left := [task for task in self._tasks if self._program.is_open(task)]:  # they may spawn more meanwhile
            for task in left:
                self._program.wait(task)
        self._program.verify_goes_on()


class Lock:
    """A lock for tasks: who waits for it leaves the core to another."""

    def __init__(self, program: Program):
        self._program, self._lock = program, threading.Lock()

    def __enter__(self) -> "Lock":
        if not self._lock.acquire(blocking=False):
            self._program.wait_for(lambda seconds: self._lock.acquire(timeout=seconds), "a lock")
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()


@contextlib.contextmanager
def run_program(engine: Engine | None, patience_s: float, check: bool, recording: Recording | None) -> Iterator[Spawner]:
    """Give a `with` block what it spawns tasks with. Its end waits for all of them, and raises the first failure.

    Without an engine every task runs where it is spawned. `patience_s`: how long all tasks may wait for each other, or for events, until
    ProgramError says so. `check`: every task runs on copies of its tiles that show what it did, and touches only what its parent declares.
    `recording`: what ran when, if that is wanted.
    """

    def spawner_of(task: Task) -> Spawner:
        return Spawner(program, task, task.is_final or task.place < 0)

    if not isinstance(patience_s, int | float) or not patience_s > 0:
        raise ValueError(f"patience_s is a number of seconds above 0, got {patience_s!r}")
    program = Program(engine, patience_s, check, recording, spawner_of)
    root = Spawner(program, None, engine is None)
    is_early = True
    outer, this_thread.at = this_thread.at, None  # a task of another scheduler's
    try:
        yield root
        root.taskwait()
        is_early = False
    finally:
        try:
            program.settle(is_early)
        finally:
            this_thread.at = outer


def _verified_priority(priority: int) -> int:
    """Return it as a Python integer. Raises TypeError for what is none, ValueError for one that no queue has room for."""
    number = operator.index(priority)
    if abs(number) > PRIORITY_LIMIT:
        raise ValueError(f"priorities go from {-PRIORITY_LIMIT} to {PRIORITY_LIMIT}, got {number}")
    return number
