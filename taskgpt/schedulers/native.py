"""Our own scheduler, after nOS-V: compiled workers that need neither Python nor the GIL between tasks.

A graph is lowered once to flat arrays (_plan.py). Each worker is a thread inside one compiled loop (_worker.py), from the beginning of the
`with` block to its end: it takes a ready task as the policy says (_ready.py), runs it and releases its successors itself. The thread that
calls `run` only submits and sleeps. `run_each` submits the next run while one is under way: its tasks start as soon as those of the run
before that used the same cells are done, without a barrier (OmpSs-2's taskiter).
"""

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Self

import numba
import numpy as np

from taskgpt.errors import UserError
from taskgpt.schedulers import _ready as r
from taskgpt.schedulers import _worker
from taskgpt.schedulers._plan import Plan, edges_to_next
from taskgpt.schedulers._pointers import OPAQUE_WORDS
from taskgpt.schedulers._prepare import OncePerGraph, one_blas_thread, worker_count
from taskgpt.tasks import Graph, TaskError
from taskgpt.tasks.kernel import compile_function
from taskgpt.tasks.native_entry import take_exception
from taskgpt.tasks.tensor import ALIGNMENT_BYTES, aligned

_POLL_MS = 100  # how often the submitting thread looks whether Ctrl-C was pressed
_MEASURED_RUNS = (2, 3, 4, 8)  # longest_path_first takes its times anew before these runs of a graph: the first one runs cold


@dataclass(frozen=True)
class Settings:
    """The keys of scheduler_configs/native.toml."""

    workers: int = field(metadata={"at_least": 0})
    policy: str = field(metadata={"choices": r.POLICIES})
    immediate_successor: bool
    work_stealing: bool
    binding: str = field(metadata={"choices": ("none", "cores")})
    idle: str = field(metadata={"choices": ("busy", "hybrid", "idle")})
    spins: int = field(metadata={"at_least": 1})
    record: int = field(metadata={"at_least": 0})


RECORD_TYPE = np.dtype([(name, np.int64) for name in ("run", "task", "ready_ns", "start_ns", "stop_ns")])


class _Run:
    """A submitted run: its plan, its slot (0 or 1), and what it holds in memory."""

    def __init__(self, number: int, graph: Graph, plan: Plan, slot: int):
        self.number, self.graph, self.plan, self.slot = number, graph, plan, slot
        self.arrays: dict[int, np.ndarray | None] = {}
        self.edges: tuple[np.ndarray, ...] = ()  # to the next run
        self.offset_ns = 0  # when it must start, counted from the start of the first run under way


class Scheduler:
    """Runs graphs on compiled workers."""

    needs_shared_memory = False

    def __init__(self, settings: Settings):
        self.settings = settings
        self.workers = worker_count(settings.workers)
        self._plans = OncePerGraph(Plan)
        self._edges: weakref.WeakKeyDictionary[Plan, weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()
        self._runs: list[_Run | None] = [None, None]  # by slot; None: over
        self._count = 0

    # Life ---------------------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if numba.config.DISABLE_JIT:
            raise UserError("scheduler native is compiled code, which NUMBA_DISABLE_JIT=1 switches off; take --scheduler sequential")
        for function, signature in _worker.SIGNATURES.items():
            compile_function(function, signature)
        self._blas = one_blas_thread()
        self._make_table()
        self._threads = [
            threading.Thread(target=self._be_worker, args=(me,), name=f"taskgpt-native-{me}", daemon=True) for me in range(self.workers)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        _worker.close(self._address)
        for thread in self._threads:
            thread.join()
        self._blas.restore_original_limits()

    def describe(self) -> str:
        s = self.settings
        queues = "a queue each" if self._has_queues else "one queue"
        immediate = ", immediate successor" if s.immediate_successor else ""
        return f"native: {self.workers} workers, {s.policy}, {queues}{immediate}, {s.idle} when idle"

    @property
    def _has_queues(self) -> bool:
        return self.settings.work_stealing and self.workers > 1

    def _make_table(self) -> None:
        """Lay out what the workers share, one block of memory."""
        queues = self.workers if self._has_queues else 1
        sizes = [r.TABLE_WORDS, 2 * r.RUN_WORDS, queues * r.QUEUE_WORDS, (self.workers + 1) * r.WORKER_WORDS, 3 * OPAQUE_WORDS]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        self._memory = np.zeros(starts[-1] + 16, np.int64)
        words = self._memory[-self._memory.ctypes.data // 8 % 16 :]  # begins a pair of cache lines
        self._address = words.ctypes.data
        table, runs, queue_words, workers, opaque = (words[a:b] for a, b in itertools.pairwise(starts))
        self._table, self._run_words = table, runs.reshape(2, -1)
        self._queue_words, self._worker_words = queue_words.reshape(queues, -1), workers.reshape(self.workers + 1, -1)
        mutex, work, done = (opaque[at * OPAQUE_WORDS :].ctypes.data for at in range(3))
        _worker.initialize(mutex, work, done)
        s = self.settings
        table[r.WORKERS], table[r.QUEUES], table[r.POLICY] = self.workers, queues, r.POLICIES.index(s.policy)
        table[r.IMMEDIATE] = s.immediate_successor
        table[r.SPINS] = {"busy": -1, "hybrid": s.spins, "idle": 0}[s.idle]
        table[r.QUEUES_AT], table[r.RUNS_AT], table[r.WORKERS_AT] = queue_words.ctypes.data, runs.ctypes.data, workers.ctypes.data
        table[r.MUTEX], table[r.WORK], table[r.DONE] = mutex, work, done
        self._heap_entries, self._scratch_bytes = 0, -1
        self._records = np.zeros((self.workers, s.record), RECORD_TYPE)
        if s.record:
            self._worker_words[:-1, r.RECORD] = [each.ctypes.data for each in self._records]
            self._worker_words[:-1, r.RECORD_CAPACITY] = s.record

    def _be_worker(self, me: int) -> None:
        if self.settings.binding == "cores" and hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[me % len(cores)]})  # this thread, not the process
        _worker.work(self._address, me)

    # Runs ---------------------------------------------------------------------------------------------------------------------------

    def run(self, graph: Graph) -> None:
        try:
            self._finish(self._submit(graph, None, may_overlap=False))
        except BaseException:
            self._abandon()
            raise

    def run_each(self, graphs: Iterable[Graph]) -> Iterator[Graph]:
        under_way: deque[_Run] = deque()
        try:
            for graph in graphs:
                under_way.append(self._submit(graph, under_way[-1] if under_way else None, may_overlap=True))
                if len(under_way) == 2:
                    yield self._finish(under_way.popleft())
            while under_way:
                yield self._finish(under_way.popleft())
        except BaseException:
            self._abandon()
            raise

    def _submit(self, graph: Graph, before: _Run | None, may_overlap: bool) -> _Run:
        """Start a run; after `before` and beside it, if that may still be under way. The slot's last run is over."""
        if before is None:
            self._abandon()  # what a second Ctrl-C left while the first one was answered
        plan = self._plans(graph)
        run = _Run(self._count, graph, plan, self._count % 2)
        self._count += 1
        self._make_room(plan)
        if before:
            self._link(before, run)
        self._write(run, before, may_overlap)
        self._runs[run.slot] = run
        self._table[r.PRIORITIES] = any(each.plan.priorities is not None for each in self._runs if each)
        _worker.submit(self._address, run.slot, before is not None)
        return run

    def _finish(self, run: _Run) -> Graph:
        """Wait until a run is over. Raises TaskError for the first task that failed."""
        self._wait(run)
        self._runs[run.slot] = None
        return run.graph

    def _wait(self, run: _Run) -> None:
        while not _worker.wait(self._address, run.slot, _POLL_MS):
            pass  # back in Python, where Ctrl-C is heard
        if self._table[r.FAILED]:
            raise self._failure()

    def _failure(self) -> BaseException:
        error = take_exception(int(self._table[r.FAILED]))
        call, slot = divmod(int(self._table[r.FAILED_CALL]), 2)
        run = self._runs[slot]
        number = int(np.searchsorted(run.plan.call_first, call, side="right")) - 1
        task = run.graph.tasks[number]
        return TaskError.of(task, task.calls[call - run.plan.call_first[number]], error) if isinstance(error, Exception) else error

    def _abandon(self) -> None:
        """Let the workers finish the tasks they are at, and forget the rest of all runs."""
        if self._runs == [None, None]:
            return
        _worker.stop(self._address)  # now all sleep
        self._queue_words[:, r.SIZE] = 0
        for run in self._runs:
            if run and run.plan.locks is not None:
                run.plan.locks[:] = 0
        self._runs = [None, None]
        self._table[[r.FAILED, r.STOPPING]] = 0

    def _make_room(self, plan: Plan) -> None:
        """Let every queue hold all tasks of two runs, and every worker have the scratch that the kernels ask for."""
        if 2 * plan.tasks <= self._heap_entries and plan.scratch_bytes <= self._scratch_bytes:
            return
        for run in filter(None, self._runs):
            self._wait(run)
        self._heap_entries = max(self._heap_entries, 2 * plan.tasks)
        self._scratch_bytes = max(self._scratch_bytes, plan.scratch_bytes)
        self._heaps = np.zeros((len(self._queue_words), 2, self._heap_entries), np.int64)
        self._scratch = np.zeros((self.workers, aligned(self._scratch_bytes) + ALIGNMENT_BYTES), np.uint8)
        for queue, (keys, entries) in zip(self._queue_words, self._heaps, strict=True):
            queue[[r.KEYS, r.ENTRIES]] = keys.ctypes.data, entries.ctypes.data
        for worker, scratch in zip(self._worker_words, self._scratch, strict=False):
            worker[r.SCRATCH] = aligned(scratch.ctypes.data)

    def _link(self, before: _Run, run: _Run) -> None:
        """Tell the run before which of its tasks this one's wait for."""
        known = self._edges.setdefault(before.plan, weakref.WeakKeyDictionary())
        if run.plan not in known:
            known[run.plan] = edges_to_next(before.graph, run.graph)
        before.edges = first, successor = known[run.plan]
        self._run_words[before.slot, [r.NEXT_FIRST, r.NEXT]] = first.ctypes.data, successor.ctypes.data

    def _write(self, run: _Run, before: _Run | None, may_overlap: bool) -> None:
        """Write what the workers are to know of a run."""
        plan, tasks, s = run.plan, run.plan.tasks, self.settings
        follows_home = s.policy == "same_core_first"
        run.arrays = {
            r.PENDING: np.empty(tasks, np.int64),
            r.MARKS: np.empty(tasks, np.int64) if may_overlap else None,
            r.READY_AT: np.empty(tasks, np.int64) if s.record else None,
            r.RAN_ON: np.full(tasks, r.NOTHING, np.int64) if follows_home else None,
            r.CALL_FIRST: plan.call_first,
            r.CALL_ENTRY: plan.call_entry,
            r.CALL_WORDS: plan.call_words,
            r.SUCCESSOR_FIRST: plan.successor_first,
            r.SUCCESSOR: plan.successor,
            r.INDEGREE: plan.indegree,
            r.OWN_PRIORITIES: plan.priorities,
            r.FAVOURITES: plan.favourites if follows_home else None,
            r.LOCK_FIRST: plan.lock_first,
            r.LOCK_OF: plan.lock_of,
            r.LOCKS: plan.locks,
            r.RANKS: None,
            r.DURATIONS: None,
        }
        if s.policy == "longest_path_first":
            self._measure(run, before)
        words = self._run_words[run.slot]
        for at, array in run.arrays.items():
            words[at] = 0 if array is None else array.ctypes.data
        words[r.TASKS], words[r.NUMBER], words[r.REMAINING] = tasks, run.number, plan.sinks

    def _measure(self, run: _Run, before: _Run | None) -> None:
        """For longest_path_first: rank tasks by when they must start for the run to end in time, and time them in the first runs."""
        plan = run.plan
        if plan.runs in _MEASURED_RUNS:
            plan.seconds = np.where(plan.durations > 0, plan.durations * 1e-9, plan.seconds)
        if plan.runs in (0, *_MEASURED_RUNS):
            plan.rank()
        if plan.runs < _MEASURED_RUNS[-1]:
            run.arrays[r.DURATIONS] = plan.durations
        plan.runs += 1
        run.arrays[r.RANKS] = plan.latest_starts_ns
        run.offset_ns = before.offset_ns + before.plan.length_ns if before else 0
        self._run_words[run.slot, r.OFFSET] = run.offset_ns

    # What was recorded --------------------------------------------------------------------------------------------------------------

    def take_records(self) -> tuple[np.ndarray, int]:
        """Return (records, how many found no room) since the last call: RECORD_TYPE with the worker, by start time. Between runs only."""
        counts = self._worker_words[:-1, r.RECORD_COUNT]
        kept = np.minimum(counts, self.settings.record)
        parts = [rows[:count] for rows, count in zip(self._records, kept, strict=True)]
        records = np.empty(kept.sum(), [*RECORD_TYPE.descr, ("worker", np.int64)])
        for name in RECORD_TYPE.names:
            records[name] = np.concatenate([part[name] for part in parts])
        records["worker"] = np.repeat(np.arange(self.workers), kept)
        lost = int((counts - kept).sum())
        counts[:] = 0
        return records[np.argsort(records["start_ns"], kind="stable")], lost
