"""Events: what a task waits for after its body, before it is done, without a thread or a core that waits. A message, a file, a device.

    @kernel
    def fetch(tile: Out[R, C]):
        arrived = event()
        start_to_fill(tile, then=arrived.fulfil)  # any thread fulfils it

In OmpSs-2 a task counts its events likewise, and its libraries for MPI are made of that. A task whose body makes none is done at its end.
"""

import threading
from collections.abc import Callable
from typing import Any

from taskgpt.tasks.spawn import Event


class _Thread(threading.local):
    """`at`: the task, on a native worker the call, that this thread is running, or None. `awaited`: what it waits for, if for events."""

    at: Any = None
    awaited: "Awaited | None" = None


this_thread = _Thread()


def event() -> Event:
    """Return an event that the task waits for whose body runs in this thread. Raises RuntimeError outside of a task.

    If it fails, the task does, with what it failed with.
    """
    task = this_thread.at
    if task is None:
        raise RuntimeError("an event is waited for by a task, and no task runs in this thread; call event() in a kernel's body")
    if hasattr(task, "event"):
        return task.event()  # of a program, which keeps count itself
    if this_thread.awaited is None:
        this_thread.awaited = Awaited()
    return this_thread.awaited.event()


def take_awaited() -> "Awaited | None":
    """Return what the body waits for that this thread has just run, None if for nothing."""
    awaited, this_thread.awaited = this_thread.awaited, None
    return awaited


def settle() -> None:
    """Wait for the events of the body that this thread has just run. Raises what one of them failed with."""
    awaited = take_awaited()
    if awaited is not None:
        awaited.wait()


class Awaited:
    """What a task waits for: its body, and the events that were made there."""

    def __init__(self):
        self._lock = threading.Lock()
        self._left = 1  # the body
        self._error: BaseException | None = None
        self._then: Callable[[BaseException | None], None] | None = None

    def event(self) -> Event:
        with self._lock:
            self._left += 1
        return _Event(self)

    def end_body(self, then: Callable[[BaseException | None], None]) -> bool:
        """Return True if all has happened, well; else who fulfils the last event calls `then`, with what failed, or None."""
        with self._lock:
            self._then = then
            self._left -= 1
            if self._left:
                return False
        if self._error is not None:
            raise self._error
        return True

    def wait(self) -> None:
        """End the body, and wait for all events. Raises what one of them failed with."""
        done = threading.Event()
        if not self.end_body(lambda error: done.set()):
            done.wait()
            if self._error is not None:
                raise self._error

    def happen(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = self._error or error
            self._left -= 1
            is_last = not self._left
        if is_last and self._then is not None:
            self._then(self._error)


class _Event:
    """An event of a task of a graph."""

    def __init__(self, awaited: Awaited):
        self._awaited = awaited
        self._lock = threading.Lock()
        self._has_happened = threading.Event()

    def fulfil(self) -> None:
        self._happen(None)

    def fail(self, error: BaseException) -> None:
        self._happen(error)

    def wait(self) -> None:
        self._has_happened.wait()

    def _happen(self, error: BaseException | None) -> None:
        with self._lock:
            if self._has_happened.is_set():
                raise RuntimeError("this event was fulfilled before")
            self._has_happened.set()
        self._awaited.happen(error)
