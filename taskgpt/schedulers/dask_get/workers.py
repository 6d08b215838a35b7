"""A `get` for any Dask graph: `x.compute(scheduler=taskgpt.get)`. Python threads that need no coordinator between tasks.

dask.threaded wakes the calling thread between any two tasks. Here a worker that has finished a task releases what waited for it and takes
the next one itself, in one step under one lock, and the calling thread is a worker too. The others are started when more tasks are ready
than there are workers, and end with the call.

Which of the ready tasks goes first is in ranking.py.
"""

import multiprocessing.pool
from collections.abc import Hashable, Mapping, MutableMapping, Sequence
from concurrent.futures import CancelledError, Executor, ProcessPoolExecutor
from contextlib import nullcontext, suppress
from contextvars import copy_context
from heapq import heappop, heappush
from threading import Lock, RLock, Thread, get_ident, local
from time import sleep
from typing import Any

import dask.config
from dask.callbacks import Callback, local_callbacks, unpack_callbacks
from dask.core import flatten

from taskgpt.schedulers.cores import usable_cores
from taskgpt.schedulers.dask_get.ranking import POLICIES, Ranking
from taskgpt.tasks import dask_graph

_thread = local()  # .run: whose task this thread is running

# Dask leaves the frames of its own files out of the traceback of a failing task, unless its user said otherwise. These files, too.
if _shortened := dask.config.get("admin.traceback.shorten", None):
    _ours = r"taskgpt[\\\/](schedulers[\\\/]dask_get[\\\/]workers|tasks[\\\/]dask_graph)\.py"
    dask.config.update_defaults({"admin": {"traceback": {"shorten": [*_shortened, _ours]}}})


def get(
    dsk: Any,
    keys: Any,
    *,
    policy: str = "depth_first",
    num_workers: int | None = None,
    pool: Executor | multiprocessing.pool.ThreadPool | None = None,
    cache: MutableMapping | None = None,
    callbacks: Sequence[tuple] | None = None,
    rerun_exceptions_locally: bool | None = None,
    finish_running: bool | None = None,
    **_others: Any,
) -> Any:
    """Return the results of `keys`, a key or nested lists of keys (which give nested tuples), of any Dask graph.

    To be given to Dask: `x.compute(scheduler=taskgpt.get)`, `dask.config.set(scheduler=taskgpt.get)`. Runs each task that the keys need
    once, and keeps a result until its last use. Tasks may themselves compute with it, to any depth, and threads may call it together.

    `policy` is one of POLICIES, in ranking.py: what runs first. Priorities from `dask.annotate(priority=...)`, higher first, win over
    it. The default, depth_first, needs no more memory than Dask's own order, and a fraction of its time.

    `num_workers` defaults to Dask's setting of that name, then to the cores that this process may use; the calling thread is one of them.
    With `pool`, or a pool of threads in Dask's setting of that name, the workers are its threads, and the calling thread only if it is one
    of them. `cache` holds results that are there already, and takes new ones. `callbacks` and `rerun_exceptions_locally` are those of
    dask.local; but each worker calls the callbacks of the task that it runs, one at a time. Keywords of other schedulers are ignored.

    The first exception ends the run and those inside it: no further task starts, those that run are waited for, then it is raised. Ctrl-C
    ends them as well, and is raised at once, as by dask.threaded: what runs in other threads goes on to its end. Where that would go on
    writing to memory that the caller wants to use, `finish_running=True`, or Dask's setting `taskgpt.finish-running`, waits for it, too,
    until a second Ctrl-C.

    Raises KeyError for a key that the graph has not, ValueError for one that is missing for a task, for an unknown policy and for less than
    one worker, RuntimeError for a cycle, TypeError for a `pool` that is none of threads.
    """
    if policy not in POLICIES:
        raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {policy!r}")
    if pool is None and not _has_threads(pool := dask.config.get("pool", None)):
        pool = None  # a setting for another scheduler
    if pool is not None and not _has_threads(pool):
        raise TypeError(f"pool must be a ThreadPoolExecutor or a multiprocessing.pool.ThreadPool, got {type(pool).__name__}")
    workers = _size(pool) if pool else num_workers or dask.config.get("num_workers", None) or usable_cores()
    if workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {workers}")
    if cache is None:
        cache = dask.config.get("cache", None)
    results = {} if cache is None else cache
    if finish_running is None:
        finish_running = dask.config.get("taskgpt.finish-running", False)
    nodes = dask_graph.nodes(dsk)
    # Without callbacks there is nothing to hide from the runs inside this one, and other threads may be about to set some.
    with local_callbacks(callbacks) if callbacks is not None or Callback.active else nullcontext(()) as callbacks:
        started, state, failed = [], {}, True
        try:
            for callback in callbacks:
                if callback[0]:
                    callback[0](nodes)
                started.append(callback)
            if callbacks:
                nodes = dask_graph.nodes(nodes)  # dask.cache puts values into the graph
            results.update(dask_graph.constants(nodes))
            ranking = Ranking(nodes, results, list(flatten([keys])))
            ranking.rank_by(policy, dask_graph.find_priorities(dsk, nodes))
            run = _Computation(ranking, results, workers, pool, finish_running)
            if callbacks:
                run.watch = _Watch(callbacks, ranking, results, state)
            if ranking.order:
                run.execute()
            if run.error is not None:
                if rerun_exceptions_locally is None:
                    rerun_exceptions_locally = dask.config.get("rerun_exceptions_locally", False)
                try:
                    if rerun_exceptions_locally and run.failed is not None and isinstance(run.error, Exception):
                        dask_graph.evaluate(ranking.nodes[run.failed], results)  # in this thread, where a debugger is at hand
                    raise run.error
                finally:
                    run.error = None  # whose traceback knows the run
            failed = False
        finally:
            for callback in started:
                if callback[4]:
                    callback[4](nodes, state, failed)
    return _gather(keys, results)


def _gather(keys: Any, results: Mapping) -> Any:
    return tuple(_gather(key, results) for key in keys) if isinstance(keys, list) else results[keys]


def _has_threads(pool: Any) -> bool:
    return isinstance(pool, multiprocessing.pool.ThreadPool | Executor) and not isinstance(pool, ProcessPoolExecutor)


def _size(pool: Any) -> int:
    return pool._processes if isinstance(pool, multiprocessing.pool.ThreadPool) else getattr(pool, "_max_workers", None) or usable_cores()


# Runs -----------------------------------------------------------------------------------------------------------------------------------


class _Computation:
    """One call of get: what its workers share.

    Attributes: error, the first exception, or None; failed, the task that raised it, or None; watch, which sees every task, or None.
    """

    def __init__(self, ranking: Ranking, results: MutableMapping[Hashable, Any], workers: int, pool: Any, finishes_running: bool):
        self.ranking, self.results, self.pool = ranking, results, pool
        self.error: BaseException | None = None
        self.failed: int | None = None
        self.watch: _Watch | None = None
        self._finishes_running = finishes_running
        self._caller = get_ident()
        self._is_abandoned = False  # the caller has left, and tasks still run
        self._context = copy_context()
        self._outer: _Computation | None = getattr(_thread, "run", None)
        self._inner: set[_Computation] = set()
        self._works_here = pool is None or (self._outer is not None and self._outer.pool is pool)
        self._helpers = workers - self._works_here  # that may still be started
        self._threads: list[Thread] = []
        self._lock = RLock()  # whoever has it can release it, however he was interrupted
        self._waiting, self._uses = ranking.waiting[:], ranking.uses[:]
        self._left = len(ranking.order)
        self._ready: list[int] = []  # a heap
        self._ticks = 0
        self._idle: list[Any] = []  # a lock for each worker that sleeps on it
        self._working: set[int] = set()  # threads
        self._is_over = self._is_stopped = False
        self._ended = Lock()
        self._ended.acquire()
        for task in ranking.order if ranking.step >= 0 else reversed(ranking.order):
            if not ranking.inputs[task]:
                self._push(task)

    def execute(self) -> None:
        """Run all tasks; return when no worker is left, or at Ctrl-C. Leaves the first exception in `error`."""
        try:
            if self._outer is not None:
                self._outer._add_inner(self)
            if self._works_here:
                self._context.copy().run(self._work)
            else:
                self._helpers -= 1
                self._start_helper()
            self._wait()
        except BaseException as error:  # Ctrl-C, wherever it came
            if self._works_here:
                self._leave(self._outer)  # which it may have kept `_work` from
            if self._is_stopped:
                raise
            self._interrupt(error)
            self._wait()
        finally:
            if self._outer is not None:
                self._outer._inner.discard(self)

    def _interrupt(self, error: BaseException, task: int | None = None) -> None:
        """Stop for what was raised in the caller's thread."""
        self._is_abandoned = isinstance(error, KeyboardInterrupt) and not self._finishes_running
        self.stop(error, task)

    def stop(self, error: BaseException, task: int | None = None) -> None:
        """Let no further task start, here and in the runs inside this one."""
        with suppress(RuntimeError):
            self._lock.release()  # if an interrupt came just after it was taken
        with self._lock:
            if not self._is_stopped:
                self.error, self.failed = error, task
            self._is_stopped = True
            self._end()
            inner = list(self._inner)
        for run in inner:
            run.stop(CancelledError("the run around this one was stopped"))

    def _add_inner(self, run: "_Computation") -> None:
        with self._lock:
            if self._is_stopped:
                raise CancelledError("the run around this one was stopped")
            self._inner.add(run)

    def _end(self) -> None:
        self._is_over = True
        while self._idle:
            self._idle.pop().release()

    def _wait(self) -> None:
        """Return when nobody works any more, or at once after Ctrl-C."""
        if self._is_abandoned:
            return
        for thread in self._threads:
            with suppress(RuntimeError):  # an interrupt came while it was being started: it ends at once
                thread.join()
        if self.pool is not None:
            with self._lock:
                has_ended = self._is_over and not self._working
            if not has_ended:
                self._ended.acquire()
            self.ranking = self.results = self.watch = None  # a busy pool may call _work much later, and keeps the run until then

    def _start_helper(self) -> None:
        work = self._context.copy().run
        if self.pool is None:
            thread = Thread(target=work, args=(self._work,), name=f"taskgpt-get-{len(self._threads) + 1}")
            self._threads.append(thread)
            thread.start()
        elif isinstance(self.pool, Executor):
            self.pool.submit(work, self._work)
        else:
            self.pool.apply_async(work, (self._work,))

    def _work(self) -> None:
        """Be a worker until the run is over."""
        outer = getattr(_thread, "run", None)
        task = None
        try:
            with self._lock:
                if self._is_over:
                    return
                self._working.add(get_ident())
            _thread.run = self
            keys, nodes, results, watch, evaluate = self.ranking.keys, self.ranking.nodes, self.results, self.watch, dask_graph.evaluate
            while (task := self._next(task)) is not None:
                if watch is not None:
                    watch.before(task)
                results[keys[task]] = evaluate(nodes[task], results)
                if watch is not None and not self._is_abandoned:
                    watch.after(task)
        except BaseException as error:
            (self._interrupt if get_ident() == self._caller else self.stop)(error, task)
        finally:
            self._leave(outer)

    def _leave(self, outer: "_Computation | None") -> None:
        """Let this thread work for the run around this one again, if there is one."""
        _thread.run = outer
        with self._lock:
            self._working.discard(get_ident())
            if self._is_over and not self._working and self._ended.locked():
                self._ended.release()

    def _next(self, done: int | None) -> int | None:
        """Release what waited for a task that is done; return the next one, or None if the run is over. Sleep while none is ready."""
        ranking, ready = self.ranking, self._ready
        while True:
            task = gate = None
            starts_helper = False
            freed = []
            # Who sleeps on a lock is given it while he still waits for the GIL, and then all others wait for him: so ask, and give way.
            while not self._lock.acquire(False):
                sleep(0)
            try:
                if done is not None:
                    waiting, uses = self._waiting, self._uses
                    for user in ranking.users[done]:
                        waiting[user] -= 1
                        if not waiting[user]:
                            self._push(user)
                    for each in ranking.inputs[done]:
                        uses[each] -= 1
                        if not uses[each]:
                            freed.append(self.results.pop(ranking.keys[each]))
                    done = None
                    self._left -= 1
                    if not self._left:
                        self._end()
                if self._is_over:
                    return None
                if ready:
                    task = ranking.order[heappop(ready) % len(ranking.order)]
                    if ready and self._idle:
                        gate = self._idle.pop()
                    elif ready and self._helpers:
                        self._helpers -= 1
                        starts_helper = True
                else:
                    gate = Lock()
                    gate.acquire()
                    self._idle.append(gate)
            finally:
                self._lock.release()
            if task is None:
                freed.clear()  # not after the sleep
                gate.acquire()
                continue
            if gate is not None:
                gate.release()
            elif starts_helper:
                self._start_helper()
            return task

    def _push(self, task: int) -> None:
        ranking, rank = self.ranking, self.ranking.ranks[task]
        if ranking.step:
            self._ticks += ranking.step
            rank += (ranking.levels[task] * (2 * len(ranking.keys) + 1) + self._ticks) * len(ranking.order)
        heappush(self._ready, rank)


class _Watch:
    """Calls Dask's callbacks before and after each task, one worker at a time, and keeps the state that dask.local shows them."""

    def __init__(self, callbacks: Sequence[tuple], ranking: Ranking, results: Mapping[Hashable, Any], state: dict[str, Any]):
        self._graph, self._state, self._keys, self._wanted = ranking.graph, state, ranking.keys, ranking.wanted
        _, start_states, self._before, self._after, _ = unpack_callbacks(callbacks)
        self._lock = Lock()
        keys = ranking.keys
        dependencies = {keys[task]: set(ranking.nodes[task].dependencies) for task in ranking.order}
        dependents: dict[Hashable, set] = {key: set() for key in [*dependencies, *results]}
        for key, before in dependencies.items():
            for each in before:
                dependents[each].add(key)
        state.update(
            dependencies=dependencies | {key: set() for key in results},
            dependents=dependents,
            waiting={keys[task]: {keys[each] for each in ranking.inputs[task]} for task in ranking.order if ranking.inputs[task]},
            waiting_data={key: set(after) for key, after in dependents.items()},
            cache=results,
            ready={keys[task] for task in ranking.order if not ranking.inputs[task]},
            running=set(),
            finished=set(),
            released=set(),
        )
        for call in start_states:
            call(self._graph, state)

    def before(self, task: int) -> None:
        key, state = self._keys[task], self._state
        with self._lock:
            state["ready"].discard(key)
            state["running"].add(key)
            for call in self._before:
                call(key, self._graph, state)

    def after(self, task: int) -> None:
        key, state = self._keys[task], self._state
        with self._lock:
            for user in state["dependents"][key]:
                state["waiting"][user].discard(key)
                if not state["waiting"][user]:
                    del state["waiting"][user]
                    state["ready"].add(user)
            for each in state["dependencies"][key]:
                state["waiting_data"][each].discard(key)
                if not state["waiting_data"][each] and each not in self._wanted:
                    del state["waiting_data"][each]
                    state["released"].add(each)
            state["running"].discard(key)
            state["finished"].add(key)
            for call in self._after:
                call(key, state["cache"][key], self._graph, state, get_ident())
