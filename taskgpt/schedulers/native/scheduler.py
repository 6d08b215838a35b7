"""Our own scheduler, after nOS-V: compiled workers that need neither Python nor the GIL between tasks.

A graph is lowered once to flat arrays (plan.py). Each worker is a thread inside one compiled loop (worker.py), from the beginning of the
`with` block to its end: it takes a ready task as the policy says (policies.py), runs it and releases its successors itself. The thread that
calls `run` only submits and sleeps. `run_each` submits the next run while one is under way: its tasks start as soon as those of the run
before that used the same cells are done, without a barrier (OmpSs-2's taskiter).
"""

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numba
import numpy as np

from taskgpt.errors import UserError
from taskgpt.pointers import OPAQUE_WORDS
from taskgpt.schedulers.cores import cores_to_bind, near_first
from taskgpt.schedulers.dynamic import Recording, run_program
from taskgpt.schedulers.native import open_run, worker
from taskgpt.schedulers.native import table as r
from taskgpt.schedulers.native.crew import Crew, ThisWorker
from taskgpt.schedulers.native.doing import Doing, doing
from taskgpt.schedulers.native.held import HeldTasks
from taskgpt.schedulers.native.plan import Plan, edges_to_next
from taskgpt.schedulers.native.policies import POLICIES
from taskgpt.schedulers.native.program_engine import PLACES, OpenRun
from taskgpt.schedulers.native.release import FINISHED
from taskgpt.schedulers.native.ring import RING_HEAD
from taskgpt.schedulers.prepare import IS_BUSY, OncePerGraph, OneAtATime, worker_count
from taskgpt.schedulers.records import RECORD_TYPE
from taskgpt.sharing.member import Member, Terms
from taskgpt.tasks import Graph, TaskError, one_blas_thread
from taskgpt.tasks.cache import compile_function
from taskgpt.tasks.native_entry import take_exception
from taskgpt.tasks.spawn import Spawn
from taskgpt.tasks.tensor import ALIGNMENT_BYTES, aligned

_POLL_MS = 100  # how often the submitting thread looks whether Ctrl-C was pressed
_MEASURED_RUNS = (2, 3, 4, 8)  # of a graph: before these, policies that need times take them anew; the first run is a cold one


@dataclass(frozen=True)
class Settings(Terms):
    """The keys of scheduler_configs/native.toml."""

    workers: int = field(metadata={"at_least": 0, "at_most": 4096})
    policy: str = field(metadata={"choices": tuple(POLICIES)})
    immediate_successor: bool
    work_stealing: bool
    binding: str = field(metadata={"choices": ("none", "cores")})
    idle: str = field(metadata={"choices": ("busy", "hybrid", "idle")})
    spins: int = field(metadata={"at_least": 1, "at_most": 10**12})
    record: int = field(metadata={"at_least": 0, "at_most": 10**8})


_ROW = np.dtype([(name, np.int64) for name in r.ROW_NAMES])


def _shares(graph: Graph) -> np.ndarray:
    """Return which part of the graph's FLOPs each task is; of its tasks, if they declare none."""
    flops = np.array([task.flops for task in graph.tasks], float)
    return flops / flops.sum() if flops.any() else np.full(len(flops), 1 / max(1, len(flops)))


class _Run:
    """A submitted run: its plan, its slot (0 or 1), the run_each that it belongs to, and what it holds in memory."""

    def __init__(self, number: int, graph: Graph, plan: Plan, slot: int, owner: object | None):
        self.number, self.graph, self.plan, self.slot, self.owner = number, graph, plan, slot, owner
        self.arrays: dict[int, np.ndarray | None] = {}
        self.edges: tuple[np.ndarray, ...] = ()  # to the next run
        self.offset = 0  # of its tasks' values
        self.is_over = False


class Scheduler(OneAtATime):
    """Runs graphs on compiled workers."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        self.workers = worker_count(settings.workers)
        self._policy = POLICIES[settings.policy]
        self._plans = OncePerGraph(lambda graph: Plan(graph, self._held.is_held))
        self._shares = OncePerGraph(_shares)
        self._edges: weakref.WeakKeyDictionary[Plan, weakref.WeakKeyDictionary] = weakref.WeakKeyDictionary()
        self._runs: list[_Run] = []  # under way: at most two, in order
        self._submitter = 0  # the thread that submitted the last run
        self._engine: OpenRun | None = None  # of a program
        self._this = ThisWorker()
        self._has_told = False  # of the failure in the table: it was raised
        self._count = 0
        self._program_records: list[np.ndarray] = []  # of what ran in Python
        self._held = HeldTasks(self._runs, self._this, self._program_records if settings.record else None)

    # Life ---------------------------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if numba.config.DISABLE_JIT:
            raise UserError("scheduler native is compiled code, which NUMBA_DISABLE_JIT=1 switches off; take --scheduler sequential")
        for function, signature in (worker.SIGNATURES | open_run.SIGNATURES).items():
            compile_function(function, signature)
        with ExitStack() as undo:
            undo.enter_context(one_blas_thread)
            self._make_table()
            if self.settings.share:
                member = Member(self.settings, self.workers, binds=self.settings.binding == "cores")
                undo.callback(member.leave)
                self._table[r.SHARE_AT] = member.address
            self._crew = Crew(self._address, self.workers, self._bound_to, self._this)
            undo.callback(self._crew.join)
            undo.callback(self._abandon)
            self._undo = undo.pop_all()

    def __exit__(self, kind: type[BaseException] | None = None, *exception: object) -> None:
        try:
            if kind is None or issubclass(kind, Exception):
                self._finish_all()  # what an iterator that nobody closed has begun
            self._end_program()
        finally:
            super().__exit__(kind, *exception)

    def _stop(self) -> None:
        self._undo.close()

    def describe(self) -> str:
        s = self.settings
        queues = "a queue each" if self._has_queues else "one queue"
        immediate = ", immediate successor" if s.immediate_successor else ""
        share = f", cores shared with others in '{s.share}'" if s.share else ""
        return f"native: {self.workers} workers, {s.policy}, {queues}{immediate}, {s.idle} when idle{share}"

    @property
    def _has_queues(self) -> bool:
        return self.settings.work_stealing and self.workers > 1

    def _make_table(self) -> None:
        """Lay out what the workers share, one block of memory."""
        queues = self.workers + 1 if self._has_queues else 1  # the last of several is the submitting thread's
        groups = -(-self.workers // r.GROUP)
        mutexes = 3 + 2 * self.workers  # and conditions
        parts = [(1, r.TABLE_WORDS), (2, r.RUN_WORDS), (queues, r.QUEUE_WORDS), (groups, r.IDLE_WORDS)]
        parts += [(self.workers + 1, r.WORKER_WORDS), (mutexes, OPAQUE_WORDS)]
        starts = np.concatenate([[0], np.cumsum([count * words for count, words in parts])])
        self._memory = np.zeros(starts[-1] + 16, np.int64)
        words = self._memory[-self._memory.ctypes.data // 8 % 16 :]  # begins a pair of cache lines
        self._address = self._held.address = words.ctypes.data
        shaped = [words[a:b].reshape(-1, part[1]) for (a, b), part in zip(itertools.pairwise(starts), parts, strict=True)]
        (table,), self._run_words, self._queue_words, self._idle_words, self._worker_words, opaque = shaped
        self._table = table
        mutex, go, done, *cells = (each.ctypes.data for each in opaque)
        worker.initialize(mutex, go, done)
        for each, cell_mutex, filled in zip(self._worker_words[:-1], cells[::2], cells[1::2], strict=True):
            worker.initialize_cell(cell_mutex, filled)
            each[[r.CELL, r.CELL_MUTEX, r.CELL_FILLED]] = r.NOTHING, cell_mutex, filled
        s = self.settings
        table[r.WORKERS], table[r.QUEUES] = self.workers, queues
        table[r.BY_AGE], table[r.PREFERS_HOME] = self._policy.by_age, self._policy.prefers_home
        table[r.IMMEDIATE] = s.immediate_successor
        table[r.SPINS] = {"busy": -1, "hybrid": s.spins, "idle": 0}[s.idle]
        for at, part in {
            r.RUNS_AT: self._run_words,
            r.QUEUES_AT: self._queue_words,
            r.IDLE_AT: self._idle_words,
            r.WORKERS_AT: self._worker_words,
        }.items():
            table[at] = part.ctypes.data
        table[[r.MUTEX, r.GO, r.DONE]] = mutex, go, done
        self._bound_to = []
        if s.binding == "cores" and not s.share and hasattr(os, "sched_setaffinity"):  # in a share to what core a worker has
            found = cores_to_bind(self.workers)
            self._bound_to = [found[me % len(found)] for me in range(self.workers)]
        if self._bound_to and self._has_queues:
            near = near_first(self._bound_to)
            self._near = np.hstack([near, np.full((self.workers, 1), self.workers)])  # the submitting thread's queue comes last
            table[r.NEAR_AT] = self._near.ctypes.data
        self._queue_room, self._scratch_bytes = 0, 0
        self._room: list[np.ndarray] = []  # old queues too: a worker may still look into one
        self._make_room(1, 0)
        self._records = np.zeros((self.workers, s.record), _ROW)
        self._lost_told = 0
        if s.record:
            self._worker_words[:-1, r.RECORD] = [each.ctypes.data for each in self._records]
            self._worker_words[:-1, r.RECORD_CAPACITY] = s.record

    @contextmanager
    def program(self, patience_s: float = 60.0, check: bool = False) -> Iterator[Spawn]:
        with self._turn():
            self._verify_can_wait()
            self._finish_all()
            if self._table[r.STOPPING]:
                self._abandon()
            self._end_program()
            if self._queue_room < PLACES:
                self._make_room(PLACES, 0)
            number, recording = self._count, Recording(lambda: self._this.me) if self.settings.record else None
            self._count += 1
            try:
                # What ranks by values, which nobody knows, goes by age.
                self._table[[r.IS_RANKED, r.BY_AGE]] = True, self._policy.by_age or 1
                self._engine = OpenRun(self._table, self._run_words[0], self._crew, self._make_scratch, bool(self.settings.record))
                self._run_words[0, r.NUMBER] = number
                with run_program(self._engine, patience_s, check, recording) as spawn:
                    yield spawn
            finally:
                self._end_program()
                if recording is not None:
                    self._keep_records(number, recording)

    def _keep_records(self, number: int, recording: Recording) -> None:
        """Keep what ran in Python, and give what the workers have kept of a program the numbers of its graph."""
        recording.graph()
        numbers = np.array(recording.numbers, np.int64)
        rows = [(number, numbers[stretch], start, start, stop, me) for stretch, start, stop, me in recording.rows]
        self._program_records.append(np.array(rows, RECORD_TYPE))
        for kept, at in zip(self._records, self._recorded(), strict=True):
            of_program = at[kept["run"][at] == number]
            kept["task"][of_program] = numbers[kept["task"][of_program]]

    def _recorded(self) -> list[np.ndarray]:
        """Return for each worker where its records are that nobody has taken yet."""
        ends = self._worker_words[:-1, [r.RECORD_TAKEN, r.RECORD_COUNT]].tolist()
        return [np.arange(*each) % max(1, self.settings.record) for each in ends]

    def _end_program(self) -> None:
        """Have the workers forget a program. A Ctrl-C may have kept it from its end, and this, too: what comes next makes up for it."""
        engine = self._engine
        if engine is None:
            self._run_words[0, r.OPEN] = 0
            return
        if not engine.is_closed:
            engine.settle()
        worker.stop(self._address)  # nobody looks at the program's memory now, not even who has just run its last task
        worker.drop_all(self._address)
        self._run_words[0, r.OPEN] = 0
        self._table[[r.BY_AGE, r.PRIORITIES, r.NESTS_AT]] = self._policy.by_age, False, 0
        worker.go_on(self._address)
        engine.close()
        self._engine = None

    # Runs ---------------------------------------------------------------------------------------------------------------------------

    def run(self, graph: Graph) -> None:
        with self._turn():
            self._verify_can_wait()
            try:
                self._finish(self._submit(graph, None))
            except BaseException:
                self._abandon()
                raise

    def run_each(self, graphs: Iterable[Graph]) -> Iterator[Graph]:
        under_way: deque[_Run] = deque()
        try:
            for graph in graphs:
                with self._turn():
                    self._verify_can_wait(under_way)
                    under_way.append(self._submit(graph, under_way[-1] if under_way else None, owner=under_way))
                    if len(under_way) == 2:
                        self._finish(under_way[0])
                if len(under_way) == 2:
                    yield under_way.popleft().graph
            while under_way:
                with self._turn():
                    self._verify_can_wait(under_way)
                    self._finish(under_way[0])
                yield under_way.popleft().graph
        except BaseException as error:
            if any(run.owner is under_way for run in self._runs):  # else what is under way is somebody else's
                self._leave(error)
            raise

    def _leave(self, error: BaseException) -> None:
        """Finish what a run_each has begun, which raises what failed in it; abandon it for an interrupt, or if `error` is that failure."""
        if self._is_worker() or self._lock.locked():
            return  # closed by the garbage collector, inside a task or at the start of another run, which will wait instead
        with self._turn():
            try:
                if self._has_told or not isinstance(error, Exception | GeneratorExit):
                    self._abandon()
                else:
                    self._finish_all()
            except BaseException:
                self._abandon()
                raise

    def _is_worker(self) -> bool:
        return self._this.me >= 0

    def _verify_can_wait(self, mine: Collection[_Run] = ()) -> None:
        """Raise RuntimeError for a worker; and for a thread that did not begin what is under way between two graphs of a run_each."""
        if self._is_worker() or (self._runs and not mine and self._submitter != threading.get_ident()):
            raise RuntimeError(IS_BUSY)

    def _finish_all(self) -> None:
        for run in self._runs[:]:
            self._finish(run)

    def _submit(self, graph: Graph, before: _Run | None, owner: object | None = None) -> _Run:
        """Start a run: beside `before`, if that is still under way and knows what to wait for, else after all others."""
        if self._table[r.FAILED] and self._runs:
            raise self._failure()
        if self._table[r.STOPPING]:
            self._abandon()  # what a second Ctrl-C left while the first one was answered
        if self._engine is not None:
            self._end_program()
        if not self._table[r.FAILED]:
            self._has_told = False
        graph.verify_untouched()
        plan = self._plans(graph)
        if plan.functions != [kernel.function for kernel in graph.kernels]:
            plan = self._plans.renew(graph)  # a kernel has got another compiled twin
        edges = self._edges_between(before, graph, plan) if before and not before.is_over else None
        is_ranked = self._policy.is_ranked(self._has_queues) or plan.priorities is not None
        if edges is None or not self._has_room(plan) or is_ranked != self._table[r.IS_RANKED]:
            before = None
            self._finish_all()
            self._forget_all()  # what an interrupt kept from being removed
        if not self._has_room(plan):
            self._make_room(2 * plan.tasks, plan.scratch_bytes)  # of two runs
        self._table[r.IS_RANKED] = is_ranked  # now that all queues are empty, if it is another
        run = _Run(self._count, graph, plan, self._count % 2, owner)
        self._count += 1
        if before:
            before.edges = edges
            self._run_words[before.slot, [r.NEXT_FIRST, r.NEXT]] = [array.ctypes.data for array in edges]
        self._write(run, before)
        self._submitter = threading.get_ident()
        self._runs.append(run)
        graph.runs.add(run)
        self._table[r.PRIORITIES] = any(each.plan.priorities is not None for each in self._runs)
        self._begin(run, before is not None)
        return run

    def _begin(self, run: _Run, is_next: bool) -> None:
        with self._held.lock:
            worker.submit(self._address, run.slot, is_next)

    def _edges_between(self, before: _Run, graph: Graph, plan: Plan) -> tuple[np.ndarray, np.ndarray] | None:
        """Return which tasks of the run before those of the next one wait for; None: all for all."""
        if len(before.graph.tasks) != before.plan.tasks:
            return None  # recorded further since it was submitted
        known = self._edges.setdefault(before.plan, weakref.WeakKeyDictionary())
        if plan not in known:
            known[plan] = edges_to_next(before.graph, graph)
        return known[plan]

    def _finish(self, run: _Run) -> None:
        """Wait until a run is over. Raises TaskError for the first task that failed."""
        while not run.is_over:
            if run not in self._runs:
                raise RuntimeError("this run was abandoned when another one failed or was interrupted")
            if worker.wait(self._address, run.slot, _POLL_MS):  # else back in Python, where Ctrl-C is heard
                if self._run_words[run.slot, r.REMAINING]:
                    raise self._failure()  # FAILED: who is interrupted abandons all runs at once
                run.is_over = True
                run.graph.runs.discard(run)
                self._runs.remove(run)

    def _forget_all(self) -> None:
        for run in self._runs:
            run.graph.runs.discard(run)
        self._runs.clear()

    def _failure(self) -> BaseException:
        self._has_told = True
        error = take_exception(int(self._table[r.FAILED]))
        call, slot = divmod(int(self._table[r.FAILED_CALL]), 2)
        run = next(run for run in self._runs if run.slot == slot)
        number = int(np.searchsorted(run.plan.call_first, call, side="right")) - 1
        task = run.graph.tasks[number]
        return TaskError.of(task, task.calls[call - run.plan.call_first[number]], error) if isinstance(error, Exception) else error

    def _abandon(self) -> None:
        """Let the workers finish the tasks they are at, and forget the rest of all runs."""
        if not (self._runs or self._table[r.STOPPING]):
            return
        worker.stop(self._address)  # now all stand still
        with self._held.lock:
            worker.drop_all(self._address)
            if self._table[r.FAILED] and not self._has_told:
                self._has_told = True
                take_exception(int(self._table[r.FAILED]))  # which nobody will: it would never be freed
            self._forget_all()
        self._table[r.FAILED] = 0
        worker.go_on(self._address)  # last: an interrupt before this is made good by the next run

    def _has_room(self, plan: Plan) -> bool:
        return 2 * plan.tasks <= self._queue_room and plan.scratch_bytes <= self._scratch_bytes

    def _make_room(self, tasks: int, scratch_bytes: int) -> None:
        """Let every queue hold so many tasks, and every worker have so much scratch, as kernels ask for. Nothing is under way."""
        room = max(self._queue_room, tasks)
        slots = 1 << (room - 1).bit_length()
        queues = len(self._queue_words)
        heaps = np.zeros((queues, 2, room), np.int64)
        rings = np.zeros((queues, 2, RING_HEAD + slots), np.int64)
        rings[:, :, 0] = slots - 1
        self._room += [heaps, rings]
        for places, blocks in (([r.KEYS, r.INSTANCES], heaps), ([r.DEQUE, r.INBOX], rings)):
            self._queue_words[:, places] = [[array.ctypes.data for array in pair] for pair in blocks]
        self._make_scratch(scratch_bytes)
        self._queue_room = room  # last: an interrupt before this is made good by the next run

    def _make_scratch(self, scratch_bytes: int) -> None:
        """Let every worker have so much scratch at least, from its next task on."""
        if scratch_bytes > self._scratch_bytes or not self._worker_words[0, r.SCRATCH]:
            scratch = np.zeros((self.workers, aligned(scratch_bytes) + ALIGNMENT_BYTES), np.uint8)
            self._room.append(scratch)  # the old one stays: a worker may be at work in it
            self._worker_words[:-1, r.SCRATCH] = [aligned(each.ctypes.data) for each in scratch]
            self._scratch_bytes = scratch_bytes

    def _write(self, run: _Run, before: _Run | None) -> None:
        """Write what the workers are to know of a run."""
        plan, tasks, s = run.plan, run.plan.tasks, self.settings
        prefers_home = self._policy.prefers_home
        run.arrays = {
            r.PENDING: np.empty(tasks, np.int64),
            r.MARKS: np.empty(tasks, np.int64) if run.owner is not None else None,
            r.READY_AT: np.empty(tasks, np.int64) if s.record else None,
            r.RAN_ON: np.full(tasks, r.NOTHING, np.int64) if prefers_home else None,
            r.CALL_FIRST: plan.call_first,
            r.CALL_ENTRY: plan.call_entry,
            r.CALL_WORDS: plan.call_words,
            r.SUCCESSOR_FIRST: plan.successor_first,
            r.SUCCESSOR: plan.successor,
            r.INDEGREE: plan.indegree,
            r.OWN_PRIORITIES: plan.priorities,
            r.FAVOURITES: plan.favourites if prefers_home else None,
            r.KINDS: plan.kinds if self._policy.complements and s.share else None,
            r.LOCK_FIRST: plan.lock_first,
            r.LOCK_OF: plan.lock_of,
            r.LOCKS: plan.locks,
            r.VALUES: None,
            r.DURATIONS: None,
        }
        if self._policy.is_timed:
            self._take_times(run)
        if self._policy.values:
            self._give_values(run, before)
        words = self._run_words[run.slot]
        for at, array in run.arrays.items():
            words[at] = 0 if array is None else array.ctypes.data
        words[r.TASKS], words[r.NUMBER], words[r.REMAINING] = tasks, run.number, plan.sinks

    def _take_times(self, run: _Run) -> None:
        """Have tasks timed in the first runs, and take over what was measured so far."""
        plan = run.plan
        if plan.runs in _MEASURED_RUNS:
            plan.seconds, plan.values = np.where(plan.durations > 0, plan.durations * 1e-9, plan.seconds), None
        if plan.runs < _MEASURED_RUNS[-1]:
            run.arrays[r.DURATIONS] = plan.durations
        plan.runs += 1

    def _give_values(self, run: _Run, before: _Run | None) -> None:
        """Give tasks the values of the policy, behind those of the run before."""
        if run.plan.values is None:
            run.plan.values = self._policy.values(run.plan)
        run.arrays[r.VALUES] = run.plan.values[0]
        run.offset = before.offset + before.plan.values[1] if before else 0
        self._run_words[run.slot, r.OFFSET] = run.offset

    def ahead(self) -> float:
        run = self._runs[0] if self._runs else None
        if run is None or run.arrays[r.MARKS] is None:
            return 0.0
        return float(self._shares(run.graph)[run.arrays[r.MARKS] & FINISHED != 0].sum())

    def doing(self) -> Doing:
        """Return what the workers do, who go on meanwhile. From any thread."""
        return doing(self._runs[:], self._table, self._worker_words[:-1], self._idle_words)

    # What was recorded --------------------------------------------------------------------------------------------------------------

    def as_run(self, graph: Graph) -> Graph:
        return graph

    def take_records(self) -> tuple[np.ndarray, int]:
        words, places = self._worker_words[:-1], self._recorded()
        counts = [len(at) for at in places]
        records = np.empty(sum(counts), RECORD_TYPE)
        for name in _ROW.names:
            records[name] = np.concatenate([rows[name][at] for rows, at in zip(self._records, places, strict=True)])
        records["worker"] = np.repeat(np.arange(self.workers), counts)
        words[:, r.RECORD_TAKEN] += counts
        before, self._lost_told = self._lost_told, int(words[:, r.RECORD_LOST].sum())
        in_python = self._program_records[:]
        del self._program_records[: len(in_python)]  # more may come meanwhile
        records = np.concatenate([records, *in_python])
        if not self._runs and self._engine is None:  # begin at the first row again; else workers go on counting
            words[:, [r.RECORD_COUNT, r.RECORD_TAKEN]] = 0
        return records[np.argsort(records["start_ns"], kind="stable")], self._lost_told - before
