"""The engine of a program on native workers: an open run, its arrays, and the threads that take over where a task blocks."""

import contextlib
import ctypes
import functools
import struct
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError

import numpy as np

from taskgpt.schedulers.dynamic.futures import Part, Task
from taskgpt.schedulers.native import nested, open_run
from taskgpt.schedulers.native import table as r
from taskgpt.schedulers.native.crew import Crew
from taskgpt.schedulers.native.ring import RING_HEAD
from taskgpt.tasks import Kernel, TaskError, TwinError, compile_kernels
from taskgpt.tasks.cache import compile_function, undisturbed
from taskgpt.tasks.native_entry import (
    PYTHON_ENTRY,
    Words,
    has_native_entry,
    native_entry,
    prepare_spawned,
    take_exception,
    told_words,
    word_functions,
)
from taskgpt.tasks.scratch import scratch_layout

PLACES = 1 << 17  # for open tasks: far more than a program has, as what it spawns waits, but for tasks that spawn tasks which wait
_EDGES = 1 << 20
_SHARE = 1 << 12  # of them for what each worker spawns in compiled code, as long as half are Python's
_EDGES_A_PLACE = 8
_BUFFER_WORDS = 1 << 16
_LOOK_MS = 100  # how often who waits for what compiled code has spawned looks whether the program was cancelled
_DRAINING_S = 1e-4  # between looks whether the queues are empty, at the end
_LEAVE = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)  # takes the GIL
_HEADER = struct.Struct(f"{open_run.FIRST_WAIT}q")


@functools.cache
def _frame_functions() -> tuple[object, list[int]]:
    """Return what keeps them alive, and the addresses, of the functions that compiled bodies call."""
    for function, signature in nested.FUNCTIONS_OF_FRAMES.items():
        compile_function(function, signature)
    return undisturbed(lambda: word_functions(list(nested.FUNCTIONS_OF_FRAMES)))


class OpenRun:
    """Runs a program's tasks; the Engine of schedulers/dynamic.

    `table`, `run`: the words that the workers share, and those of the run. `make_scratch(bytes)` gives every worker so much. `keeps_times`:
    whether it is recorded what ran when. `places`, `edges`: room for open tasks, and for what they wait for.
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
        self._words = Words()
        self._buffer = array("q", bytes(8 * _BUFFER_WORDS))
        self._view = memoryview(self._buffer)
        self._scratch_bytes = 0
        self._entries: dict[Kernel, int] = {}
        self._by_key: dict[int, Task] = {}  # what runs in Python, and has not begun
        self._python_entry: object = PYTHON_ENTRY(self._run_python)
        self._python_address = ctypes.cast(self._python_entry, ctypes.c_void_p).value
        self._leave_worker: object = None
        self._clocks = threading.local()
        self.is_closed = False
        self._keeps_times = keeps_times
        self._nesting: np.ndarray | None = None  # what compiled bodies call, of each worker
        workers = int(table[r.WORKERS])
        share = min(_SHARE, places // (2 * workers))
        places -= workers * share  # those of Python's pool
        self.tasks: list[Task | None] = [None] * places
        self._open, self._pools = np.zeros(r.OPEN_WORDS, np.int64), np.zeros((1 + workers, r.POOL_WORDS), np.int64)
        every, all_edges = places + workers * share, edges + workers * share * _EDGES_A_PLACE
        place_arrays = (r.HEADS, r.STATES, r.ALIVE, r.PARENTS, r.HOLDS, r.ERRORS, r.SERIALS, r.NEXT_PLACE, r.EDGE_FIRST, r.RESULTS_AT)
        self._arrays = {at: np.zeros(every, np.int64) for at in (*place_arrays, r.RESULTS, r.TICKETS, r.NEXT_FUTURE, r.LINES)}
        self._arrays |= {at: np.zeros(all_edges, np.int64) for at in (r.EDGE_NEXT, r.EDGE_TO, r.EDGE_OWN)}
        self._arrays[r.OWN_WORDS] = np.zeros(every * open_run.MOST_WORDS, np.int64)
        for at, each in self._arrays.items():
            self._open[at] = each.ctypes.data
        self._open[[r.PLACES, r.SHARE, r.BUFFER, r.POOLS_AT]] = places, share, self._buffer.buffer_info()[0], self._pools.ctypes.data
        self._open[r.FAILED_PLACES] = r.NOTHING
        self._pools[:, [r.FREE, r.FREE_EDGE, r.FREED, r.FEW]] = r.NOTHING
        for number, pool in enumerate(self._pools):
            pool[r.USED], pool[r.USED_EDGES] = max(0, number - 1) * share, max(0, number - 1) * share * _EDGES_A_PLACE
            pool[[r.USED, r.USED_EDGES]] += (places, edges) if number else (0, 0)
            pool[r.LAST] = pool[r.USED] + (share if number else places)
            pool[r.LAST_EDGE] = pool[r.USED_EDGES] + (share * _EDGES_A_PLACE if number else edges)
        self._pools[0, [r.USED, r.SPAWNED, r.ENDED]] = 1  # ROOT
        self._arrays[r.ALIVE][open_run.ROOT] = 1
        self._states, self._news, self._of_python = map(memoryview, (self._arrays[r.STATES], self._open, self._pools[0]))
        of_run = {at: np.zeros(every, np.int64) for at in (r.CALL_ENTRY, r.CALL_WORDS, r.PENDING, r.OWN_PRIORITIES)}
        if keeps_times:
            of_run[r.READY_AT] = np.zeros(every, np.int64)
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
        result_at = self._result_at(task, entry)
        serial = self._serial(task, entry)
        _HEADER.pack_into(self._buffer, 0, entry, far, len(words), len(waits), parent, priority, is_shell, serial, result_at)
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

    def _result_at(self, task: Task, entry: int) -> int:
        """Return where compiled code leaves a task's result, 0 for nowhere."""
        if entry in (0, self._python_address) or task.call.kernel.result is None:
            return 0
        task.result_word = array("q", [0])
        return task.result_word.buffer_info()[0]

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
            # Of what Python spawns, a recording knows when it ran, and a check what it did.
            runs_alone = has_native_entry(call) and not (kernel.spawns and (self._keeps_times or task.program.checks))
            entry = self._entries[kernel] = self._native_entry(kernel) if runs_alone else self._python_address
        if entry == self._python_address or type(task) is not Task:
            self._by_key[id(task)] = task
            self._words.words.append(id(task))
            return self._python_address
        if kernel.scratch and (needed := scratch_layout(call.scratch_shapes)[1]) > self._scratch_bytes:
            self._make_scratch(needed)
            self._scratch_bytes = needed
        self._words.add(call)
        return entry

    def _native_entry(self, kernel: Kernel) -> int:
        """Return what the workers call for a kernel that runs without Python, and so does what it spawns."""
        entry = native_entry(kernel)
        try:
            prepare_spawned(kernel)
        except TwinError as error:
            raise TaskError(f"{kernel.name} spawns in compiled code: {error}") from error
        if kernel.spawns and self._nesting is None:
            self._open_nests()
        return entry

    def _open_nests(self) -> None:
        """Give the workers what compiled bodies call, and queues for what these spawn."""
        self._leave_worker = _LEAVE(self._wait_for_nested)
        called = [*_frame_functions()[1], ctypes.cast(self._leave_worker, ctypes.c_void_p).value, self._address]
        workers = int(self._table[r.WORKERS])
        self._nesting = np.array([[*called, me] for me in range(workers)], np.int64)
        for me, words in enumerate(self._nesting):
            ctypes.c_int64.from_address(int(self._table[r.WORKERS_AT]) + 8 * (me * r.WORKER_WORDS + r.NESTING)).value = words.ctypes.data
        slots = 1 << (len(self._states) - len(self.tasks) - 1).bit_length()
        self._rings = np.zeros((workers, RING_HEAD + slots), np.int64)
        self._rings[:, 0] = slots - 1
        self._nests = np.zeros((workers, r.QUEUE_WORDS), np.int64)
        self._nests[:, r.DEQUE] = [ring.ctypes.data for ring in self._rings]
        self._table[r.NESTS_AT] = self._nests.ctypes.data

    def _wait_for_nested(self, place: int, are_children: int, _: int) -> int:
        """Wait for a task, or what it has spawned, with the worker left to another; return 1 if too many tasks wait."""
        wait = self.await_children if are_children else self.await_task
        try:
            with self._crew.blocking():
                while not wait(place, _LOOK_MS) and not self.is_cancelled():
                    pass
        except RuntimeError:
            return 1
        return 0

    def _run_python(self, words: int, _scratch: int, _error: object) -> int:
        self._by_key.pop(ctypes.c_int64.from_address(words).value).run()
        return 0

    def is_done(self, place: int) -> bool:
        return bool(self._states[place] & open_run.ALL_DONE)

    def was_skipped(self, place: int) -> bool:
        return bool(self._states[place] & open_run.SKIPPED)

    def open_tasks(self) -> int:
        return self._of_python[r.SPAWNED] - self._of_python[r.ENDED]

    @property
    def is_quiet(self) -> bool:
        """True if no task is open, and none is in a queue: what compiled code has spawned, too, and what was run by who waited for it."""
        return int(self._pools[:, r.SPAWNED].sum()) == int(self._pools[:, r.ENDED].sum())

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
            found.append(self._failure(place, take_exception(int(self._arrays[r.ERRORS][place]))))
            open_run.end_wait(self._address, place)
        return found

    def _failure(self, place: int, error: BaseException) -> tuple[Task, BaseException]:
        """Return the task of Python's that has spawned the one at this place, directly or not, and the error in words that tell how."""
        told: list[str] = []
        kernels = {native_entry(kernel): kernel for kernel in self._known_kernels()} if place >= len(self.tasks) else {}
        while place >= len(self.tasks):
            kernel, parent = kernels[self._of_run[r.CALL_ENTRY][place]], int(self._arrays[r.PARENTS][place])
            words = self._arrays[r.OWN_WORDS][place * open_run.MOST_WORDS :]
            told.append(f"{kernel.name}({told_words(kernel, words)}), spawned in line {self._arrays[r.LINES][place]} of")
            place = parent
        task = self.tasks[place]
        if told and isinstance(error, Exception) and not isinstance(error, CancelledError):
            failure = TaskError(f"task {' '.join(told)} task {task}: {type(error).__name__}: {error}")
            failure.__cause__ = error
            error = failure
        return task, error

    def _known_kernels(self) -> list[Kernel]:
        """Return those that ran in compiled code, and all that they name."""
        found = dict.fromkeys(kernel for kernel, entry in self._entries.items() if entry != self._python_address)
        left = list(found)
        while left:
            more = [each for each in left.pop().spawned if each not in found]
            found |= dict.fromkeys(more)
            left += more
        return list(found)

    def waiting(self) -> list[tuple[Task, bool, bool]]:
        found = []
        pending = self._of_run[r.PENDING]
        for place in range(1, self._of_python[r.USED]):
            task, state = self.tasks[place], self._states[place]
            if task is not None and not state & open_run.ALL_DONE and not (task.is_weak and task.body is not None):
                found.append((task, pending[place] == 0, bool(state & open_run.TAKEN)))
        return found

    def settle(self) -> None:
        """Have no other task begin, and wait for those that run."""
        if not self.is_quiet:
            self.cancel_all()
            while any(has_begun and not task.has_ended for task, _, has_begun in self.waiting()):
                time.sleep(1e-2)

    def close(self) -> None:
        """Let go of what only an open run needs; futures ask for more, for as long as there are any."""
        self.is_closed = True
        self._python_entry = self._leave_worker = None  # they hold this
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
        until = time.monotonic() + milliseconds / 1e3
        is_so = open_run.await_few(self._address, few, self._clock(), milliseconds)
        while is_so and few == 0 and not self.is_quiet and time.monotonic() < until:
            time.sleep(_DRAINING_S)
        return is_so and (few > 0 or self.is_quiet)

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
