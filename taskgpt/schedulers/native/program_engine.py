"""The engine of a program on native workers: an open run, its arrays, and the threads that take over where a task blocks."""

import contextlib
import ctypes
import struct
import threading
import time
from array import array
from collections.abc import Callable, Sequence

import numpy as np

from taskgpt.schedulers.dynamic.futures import Part, Task
from taskgpt.schedulers.native import open_run
from taskgpt.schedulers.native import table as r
from taskgpt.schedulers.native.crew import Crew
from taskgpt.tasks import Kernel, TaskError, TwinError, compile_kernels
from taskgpt.tasks.native_entry import PYTHON_ENTRY, Words, has_native_entry, native_entry, take_exception
from taskgpt.tasks.scratch import scratch_layout

PLACES = 1 << 17  # for open tasks: far more than a program has, as what it spawns waits, but for tasks that spawn tasks which wait
_EDGES = 1 << 20
_BUFFER_WORDS = 1 << 16
_HEADER = struct.Struct(f"{open_run.FIRST_WAIT}q")


class OpenRun:
    """Runs a program's tasks; the Engine of schedulers/dynamic.

    `table`, `run`: the words that the workers share, and those of the run. `make_scratch(bytes)` gives every worker so much. `places`,
    `edges`: room for open tasks, and for what they wait for.
    """

    def __init__(
        self,
        table: np.ndarray,
        run: np.ndarray,
        crew: Crew,
        make_scratch: Callable[[int], None],
        keeps_times: bool,
        places: int = PLACES,
        edges: int = _EDGES,
    ):
        self._table, self._address, self._me = table, table.ctypes.data, int(table[r.WORKERS])
        self._crew, self._make_scratch = crew, make_scratch
        self.tasks: list[Task | None] = [None] * places
        self._words = Words()
        self._buffer = array("q", bytes(8 * _BUFFER_WORDS))
        self._view = memoryview(self._buffer)
        self._scratch_bytes = 0
        self._entries: dict[Kernel, int] = {}
        self._by_key: dict[int, Task] = {}  # what runs in Python, and has not begun
        self._python_entry: object = PYTHON_ENTRY(self._run_python)
        self._python_address = ctypes.cast(self._python_entry, ctypes.c_void_p).value
        self._clocks = threading.local()
        self.is_closed = False
        place_arrays = (r.HEADS, r.STATES, r.ALIVE, r.PARENTS, r.HOLDS, r.ERRORS, r.SERIALS, r.NEXT_PLACE, r.EDGE_FIRST)
        self._open = np.zeros(r.OPEN_WORDS, np.int64)
        self._arrays = {at: np.zeros(places, np.int64) for at in place_arrays}
        self._arrays |= {at: np.zeros(edges, np.int64) for at in (r.EDGE_NEXT, r.EDGE_TO, r.EDGE_OWN)}
        self._arrays[r.OWN_WORDS] = np.zeros(places * open_run.MOST_WORDS, np.int64)
        for at, each in self._arrays.items():
            self._open[at] = each.ctypes.data
        self._open[[r.PLACES, r.EDGES, r.BUFFER]] = places, edges, self._buffer.buffer_info()[0]
        self._open[[r.FREE, r.FREE_EDGE, r.FREED, r.FAILED_PLACES, r.FEW]] = r.NOTHING
        self._open[r.USED] = self._open[r.SPAWNED] = self._open[r.ENDED] = 1  # ROOT
        self._arrays[r.ALIVE][open_run.ROOT] = 1
        self._states, self._news = memoryview(self._arrays[r.STATES]), memoryview(self._open)
        of_run = {at: np.zeros(places, np.int64) for at in (r.CALL_ENTRY, r.CALL_WORDS, r.PENDING, r.OWN_PRIORITIES)}
        if keeps_times:
            of_run[r.READY_AT] = np.zeros(places, np.int64)
        self._of_run = of_run
        run[:] = 0
        for at, each in of_run.items():
            run[at] = each.ctypes.data
        run[r.OPEN] = self._open.ctypes.data

    # Tasks --------------------------------------------------------------------------------------------------------------------------

    def add(self, task: Task, waits: Sequence[int], parent: int, priority: int, is_shell: bool = False) -> int:
        words, far = self._words.words, 0
        del words[:]
        entry = 0 if is_shell or type(task) is Part else self._entry(task)
        if len(words) > open_run.MOST_WORDS:
            task.words = array("q", words)
            far = task.words.buffer_info()[0]
            del words[:]
        if open_run.FIRST_WAIT + len(waits) + len(words) > _BUFFER_WORDS:
            return -1
        _HEADER.pack_into(self._buffer, 0, entry, far, len(words), len(waits), parent, priority, is_shell, self._serial(task, entry))
        behind = open_run.FIRST_WAIT + len(waits)
        if waits:
            self._view[open_run.FIRST_WAIT : behind] = array("q", waits)
        self._view[behind : behind + len(words)] = words
        if priority:
            self._table[r.PRIORITIES] = 1
        place = open_run.add_task(self._address, self._crew.this.me if self._crew.this.me >= 0 else self._me)
        if place >= 0:
            self._forget(self.tasks[place])
            self.tasks[place] = task
        return place

    def _serial(self, task: Task, entry: int) -> int:
        """Return a task's number in the workers' records: those of tasks that run in Python are kept there."""
        return -1 if entry in (0, self._python_address) else task.stretch

    def _forget(self, task: Task | None) -> None:
        """Let go of what a task holds that was at a place before."""
        if task is not None:
            task.domain = None  # else each holds the one before
            self._by_key.pop(id(task), None)

    def _entry(self, task: Task) -> int:
        """Return what the workers call for a task, with the words of its arguments in `_words`."""
        call, kernel = task.call, task.call.kernel
        entry = self._entries.get(kernel)
        if entry is None:
            try:
                compile_kernels([kernel])
            except TwinError as error:
                raise TaskError(f"task {task}: {error}") from error
            runs_alone = kernel.result is None and not kernel.spawns and has_native_entry(call)
            entry = self._entries[kernel] = native_entry(kernel) if runs_alone else self._python_address
        if entry == self._python_address or type(task) is not Task:
            self._by_key[id(task)] = task
            self._words.words.append(id(task))
            return self._python_address
        if kernel.scratch and (needed := scratch_layout(call.scratch_shapes)[1]) > self._scratch_bytes:
            self._make_scratch(needed)
            self._scratch_bytes = needed
        self._words.add(call)
        return entry

    def _run_python(self, words: int, _scratch: int, _error: object) -> int:
        self._by_key.pop(ctypes.c_int64.from_address(words).value).run()
        return 0

    def is_done(self, place: int) -> bool:
        return bool(self._states[place] & open_run.ALL_DONE)

    def was_skipped(self, place: int) -> bool:
        return bool(self._states[place] & open_run.SKIPPED)

    def open_tasks(self) -> int:
        return self._news[r.SPAWNED] - self._news[r.ENDED]

    def claim(self, place: int) -> int:
        return open_run.claim_task(self._address, place) if self._crew.this.me >= 0 else r.NOTHING

    def run_claimed(self, place: int, claimed: int) -> None:
        open_run.run_claimed(self._address, self._crew.this.me, place, claimed)

    def cancel(self, place: int) -> bool:
        return open_run.cancel(self._address, place)

    def cancel_all(self) -> None:
        open_run.cancel_all(self._address)

    def is_cancelled(self) -> bool:
        return self._news[r.CANCELLED_ALL] != 0

    def failures(self) -> list[tuple[Task, BaseException]]:
        found = []
        while (place := open_run.take_failed(self._address)) != r.NOTHING:
            found.append((self.tasks[place], take_exception(int(self._arrays[r.ERRORS][place]))))
            open_run.end_wait(self._address, place)
        return found

    def waiting(self) -> list[tuple[Task, bool, bool]]:
        found = []
        pending = self._of_run[r.PENDING]
        for place in range(1, int(self._open[r.USED])):
            task, state = self.tasks[place], self._states[place]
            if task is not None and not state & open_run.ALL_DONE and not (task.is_weak and task.body is not None):
                found.append((task, pending[place] == 0, bool(state & open_run.TAKEN)))
        return found

    def settle(self) -> None:
        """Have no other task begin, and wait for those that run."""
        if self.open_tasks():
            self.cancel_all()
            while any(has_begun and not task.has_ended for task, _, has_begun in self.waiting()):
                time.sleep(1e-2)

    def close(self) -> None:
        """Let go of what only an open run needs; futures ask for more, for as long as there are any."""
        self.is_closed = True
        self._python_entry = None  # it holds this
        self._arrays = {at: each for at, each in self._arrays.items() if at == r.STATES}
        self._of_run.clear()
        self._by_key.clear()

    # Waiting ------------------------------------------------------------------------------------------------------------------------

    def begin_wait(self, place: int) -> bool:
        return open_run.begin_wait(self._address, place)

    def end_wait(self, place: int) -> None:
        open_run.end_wait(self._address, place)

    def await_task(self, place: int, milliseconds: int) -> bool:
        return open_run.await_task(self._address, place, self._clock(), milliseconds)

    def await_children(self, place: int, milliseconds: int) -> bool:
        return open_run.await_children(self._address, place, self._clock(), milliseconds)

    def await_few(self, few: int, milliseconds: int) -> bool:
        return open_run.await_few(self._address, few, self._clock(), milliseconds)

    def _clock(self) -> int:
        """Return the address of two words of this thread's own."""
        if not hasattr(self._clocks, "words"):
            self._clocks.words = np.zeros(2, np.int64)
        return self._clocks.words.ctypes.data

    def hold(self, place: int) -> None:
        open_run.hold(self._address, place)

    def fulfil(self, place: int) -> None:
        open_run.fulfil(self._address, self._me, place, open_run.ONE_EVENT)

    def complete(self, place: int) -> None:
        open_run.fulfil(self._address, self._me, place, 1)

    def blocking(self) -> contextlib.AbstractContextManager[None]:
        return self._crew.blocking()
