"""dask.distributed on this machine: its scheduler and its dashboard, with worker threads or worker processes.

Distributed takes tasks for pure functions with precious results; ours work in place and return None. So every worker gets a graph once,
and tasks are integers that point into it; keys are new in every run, for a key that Distributed knows it does not run again; and a worker
that is lost ends the run, as what it was writing is half written. A task costs 0.75 ms: it wants few, large tasks.
"""

import asyncio
import importlib.util
import itertools
import logging
import multiprocessing
import pickle
import re
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from pathlib import Path

import dask
import numpy as np
from distributed import Client, LocalCluster, SchedulerPlugin, WorkerPlugin
from distributed import Scheduler as DaskScheduler
from distributed.gc import disable_gc_diagnosis

from taskgpt.errors import UserError
from taskgpt.schedulers import WorkerError
from taskgpt.schedulers.prepare import InTurn, OncePerGraph, worker_count
from taskgpt.schedulers.records import Recorder, ThreadTimes, Times
from taskgpt.tasks import Graph, Kernel, TwinError, coarsen, compile_kernels, one_blas_thread
from taskgpt.tasks.sources import Sources

CONFIG = {  # also of clusters that are started on other machines
    "distributed.scheduler.allowed-failures": 0,  # a task must not run again on another worker
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.worker-ttl": None,  # a kernel that holds the GIL silences its worker; a dead process is noticed by its socket
    "distributed.scheduler.active-memory-manager.start": False,
    "distributed.worker.profile.enabled": False,  # samples every thread every 10 ms
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.nanny.pre-spawn-environ": {},  # would also change this process' environment; the plugin below limits BLAS
}


@dataclass(frozen=True)
class Settings:
    """The keys of scheduler_configs/local-cluster.toml."""

    workers: int = field(metadata={"at_least": 0, "at_most": 4096})
    processes: bool
    coarsen: int = field(metadata={"at_least": 0})
    dashboard: int = field(metadata={"at_least": -1, "at_most": 65535})
    record: int = field(metadata={"at_least": 0, "at_most": 10**8})


class Scheduler(InTurn):
    """A cluster on 127.0.0.1, for as long as the `with` block lasts."""

    serves_dashboard = True

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        self.workers = worker_count(settings.workers)
        self.needs_shared_memory = settings.processes
        self._run_id = 0
        self.recorder = Recorder(settings.record)
        self._id = next(_ids)

    def _start(self) -> None:
        self._sent = OncePerGraph(self._send)
        with ExitStack() as stack:
            stack.enter_context(one_blas_thread)
            self._start_cluster(stack)
            self._stack = stack.pop_all()

    def _start_cluster(self, stack: ExitStack) -> None:
        self._watch, processes = _Watch(), self.settings.processes
        self._cluster, self._client = start(
            stack,
            processes,
            n_workers=self.workers if processes else 1,
            threads_per_worker=1 if processes else self.workers,
            dashboard_address=f"127.0.0.1:{max(self.settings.dashboard, 0)}",
            scheduler_kwargs={"dashboard": self.settings.dashboard >= 0, "plugins": [self._watch]},
        )
        self._watch.client = self._client

    def _stop(self) -> None:
        try:
            self._stack.close()
        finally:
            self._watch.kill_workers()

    def describe(self) -> str:
        kind = "worker processes" if self.settings.processes else "worker threads"
        size = f"at most {self.settings.coarsen} tasks a step" if self.settings.coarsen else "tasks as recorded"
        return f"local-cluster: dask.distributed on {self.workers} {kind}, {size}{self._describe_dashboard()}"

    def _describe_dashboard(self) -> str:
        if self.settings.dashboard < 0:
            return ""
        if importlib.util.find_spec("bokeh") is None:
            return "; its dashboard needs bokeh: pip install 'taskgpt[dashboard]'"
        return f", dashboard http://127.0.0.1:{self._cluster.scheduler.http_server.port}/status"

    @property
    def dask_scheduler(self) -> DaskScheduler:
        """Dask's own, which runs in this process."""
        return self._cluster.scheduler

    def _run(self, graph: Graph) -> None:
        graph_id, coarse, sources = self._sent(graph)
        _verify_as_sent(sources)
        run_id = self._run_id = next(_ids)
        times = self._id, self.recorder.count(coarse), self.settings.record
        tasks, last = coarse.to_dask(lambda task: (_run_task, run_id, graph_id, task.number, times))
        self._watch.lost_worker = ""
        try:
            self._watch.futures = self._client.get(tasks, last, sync=False)
            # Not gather() itself: Ctrl-C would leave its coroutines behind, which then complain.
            results = self._client.gather(self._watch.futures, asynchronous=True)
            asyncio.run_coroutine_threadsafe(results, self._client.loop.asyncio_loop).result()
            self._watch.futures = []
        except Exception:
            self._settle()
            if not self._watch.lost_worker:
                raise
        if self._watch.lost_worker:
            raise WorkerError(
                f"{self._watch.lost_worker} died in the middle of a step, killed or out of memory, and left tensors half written; "
                "go on from the last checkpoint"
            )

    def _settle(self) -> None:
        """Have no further task of the last run start, and wait for those that run."""
        self._client.cancel(self._watch.futures)
        self._client.run(_stop, self._run_id, on_error="ignore")
        self._watch.futures = []

    def as_run(self, graph: Graph) -> Graph:
        return self._sent(graph)[1]

    def take_records(self) -> tuple[np.ndarray, int]:
        for worker, kept in self._client.run(_take_times, self._id).items() if self.settings.record else ():
            for thread, rows, lost in kept:
                self.recorder.add((worker, thread), rows, lost)
        return self.recorder.take()

    def _send(self, graph: Graph) -> tuple[int, Graph, dict[Kernel, Sources]]:
        """Make the graph known to every worker, also to one that starts later.

        Return its number, the graph that will run, and what worker processes were found to compile its kernels from.
        """
        if graph.is_commutative and self.settings.processes:
            raise UserError(
                f"{graph.name}: commutative tasks lock their tiles, and a lock does not reach another process; "
                "set options.commutative=false, or processes=false"
            )
        for kernel in graph.kernels:
            if self.settings.processes and kernel.module == "__main__":
                raise UserError(f"{kernel.name}: worker processes import kernels, and cannot import __main__; move it to a module")
        coarse = coarsen(graph, self.settings.coarsen, self.workers) if self.settings.coarsen else graph
        graph_id = next(_ids)
        sources: dict[Kernel, Sources] = {}
        if self.settings.processes:
            sources = {kernel: found for kernel in coarse.kernels if (found := kernel.read_sources())}
            contents = [(kernel, _contents(found)) for kernel, found in sources.items()]
            self._client.register_plugin(_Prepare(graph_id, pickle.dumps((coarse, contents))))
        else:
            _graphs[graph_id] = coarse
            self._stack.callback(_graphs.pop, graph_id)
        return graph_id, coarse, sources


def start(stack: ExitStack, processes: bool, **others: object) -> tuple[LocalCluster, Client]:
    """Start a cluster on 127.0.0.1 and a client of it, which end with `stack`; `others` are LocalCluster's. Raises UserError.

    Its processes leave signals to this one. They watch over no memory, and no task of theirs runs twice.
    """
    if processes:
        _start_resource_tracker()
        _verify_can_start_processes()

    def begin() -> tuple[LocalCluster, Client]:
        if processes and hasattr(signal, "pthread_sigmask"):
            # A terminal sends Ctrl-C to every process, and SIGHUP when it closes; a batch system sends SIGTERM to all before it kills them.
            # What is started from here, and by that, inherits the mask and leaves them to the main process, which may yet save its work.
            # SIGUSR1, with which it says that the end is near, would end them.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})
        # Where the scheduler has no dashboard, worker processes have none: each would import bokeh, 0.8 s of a core. They listen on their
        # host all the same, 127.0.0.1; threads have none, and would listen on all.
        worker_dashboard = "127.0.0.1:0" if not processes or others["scheduler_kwargs"]["dashboard"] else None
        quiet = {"worker_dashboard_address": worker_dashboard, "silence_logs": logging.CRITICAL}  # what goes wrong is raised
        try:
            with dask.config.set(CONFIG):
                cluster = stack.enter_context(LocalCluster(processes=processes, memory_limit=0, **quiet, **others))
        except RuntimeError as error:
            if not processes:
                raise
            why: BaseException = error
            while cause := why.__cause__ or why.__context__:
                why = cause
            found = f"worker processes did not start: {type(why).__name__}: {why}"
            raise UserError(f"{found}; if the machine was not too busy for them: {_GUARD}") from None
        disable_gc_diagnosis(force=True)  # calls Python from the garbage collector, where a Ctrl-C is lost
        return cluster, stack.enter_context(Client(cluster, set_as_default=False))

    # In a thread of its own: Ctrl-C in the middle of a start waits for its end, and then finds a cluster that can be closed.
    with ThreadPoolExecutor(1) as starter:
        return starter.submit(begin).result()


_GUARD = (
    'each imports the main program anew: put what opens the scheduler below `if __name__ == "__main__":` there, or take processes=false'
)


def _contents(sources: Sources) -> list[tuple[str, str]]:
    """Return (what, its content) of what a twin is compiled from, for another process to compare: without addresses, which differ.

    The main program has another name there. Numba's settings are the same, and what else registers overloads need not be imported there.
    """
    return [(what, _NOT_COMPARED.sub("", content).replace("__mp_main__", "__main__")) for what, content in sources.parts]


_NOT_COMPARED = re.compile(r" at (0x[0-9a-f]+|\d+)|(?<=\bint )\d{14,15}\b")  # addresses, also those that a program has made an integer


def _verify_as_sent(sources: dict[Kernel, Sources]) -> None:
    """Raise TwinError if something has changed since worker processes compiled a kernel from it; if no name has, in microseconds."""
    for kernel, sent in sources.items():
        if not sent.are_untouched():
            sources[kernel] = kernel.reread(sent, _difference(kernel))


def _difference(kernel: Kernel) -> str:
    return (
        f"is not in the worker processes what it is in this one: they import {kernel.module} afresh, and compile the twin from what is "
        "there; pass what changes as a tile or a constant, or set it in the module's file before the program starts"
    )


def _start_resource_tracker() -> None:
    """Start Python's own process that cleans up behind others, so that no signal to all processes ends it: it ignores only two of them."""
    if hasattr(signal, "pthread_sigmask"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGUSR1})
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _verify_can_start_processes() -> None:
    """Raise UserError where worker processes would fail, with hundreds of lines about it. In one that imports the main program, end it."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # a program without a guard: the main process says so
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        what = f"worker processes need /dev/shm, which is missing, full or not writable here ({error.strerror})"
        raise UserError(f"{what}; mend that, or take processes=false") from None
    main = sys.modules["__main__"]
    module, program = getattr(getattr(main, "__spec__", None), "name", ""), getattr(main, "__file__", None)
    if module.split(".")[-1] == "__main__" or (not module and program and Path(program).stem == "ipython"):
        return  # `python -m package`, and `ipython`, are what multiprocessing does not import anew
    with suppress(OSError, UnicodeDecodeError):
        if program and program.endswith(".py") and "__name__" not in Path(program).read_text(encoding="utf-8"):
            raise UserError(f"{program}: worker processes cannot start; {_GUARD}")


# In the workers -------------------------------------------------------------------------------------------------------------------------

_ids = itertools.count(1)  # of schedulers, of graphs and of runs
_times: dict[tuple[int, int], ThreadTimes] = {}  # of a scheduler's tasks in a thread
_graphs: dict[int, Graph] = {}
_running: set[tuple[int, int]] = set()
_stopped: set[int] = set()


def _run_task(run_id: int, graph_id: int, number: int, times: tuple[int, int, int], *_predecessors: None) -> None:
    _running.add((run_id, number))
    try:
        if run_id not in _stopped:
            task = _graphs[graph_id].tasks[number]
            scheduler_id, run_number, capacity = times
            if capacity:
                place = scheduler_id, threading.get_ident()
                (_times.get(place) or _times.setdefault(place, ThreadTimes(capacity))).run(run_number, task)
            else:
                task.run_calls()
    finally:
        _running.discard((run_id, number))


def _take_times(scheduler_id: int) -> list[tuple[int, list[Times], int]]:
    """Return (thread, rows, how many found no room) of a scheduler's tasks in this process, and forget them."""
    mine = [place for place in list(_times) if place[0] == scheduler_id]
    return [(place[1], times.rows, times.lost) for place in mine if (times := _times.pop(place))]


async def _stop(run_id: int) -> None:
    """Start no further task of that run in this process; return when the last one is through."""
    _stopped.add(run_id)
    while _running:
        await asyncio.sleep(0.001)


class _Prepare(WorkerPlugin):
    """Prepares a worker process for a graph."""

    def __init__(self, graph_id: int, pickled: bytes):
        self.name = f"taskgpt-graph-{graph_id}"
        self.graph_id, self.pickled = graph_id, pickled

    def setup(self, worker: object) -> None:
        graph, contents = pickle.loads(self.pickled)
        for kernel, sent in contents:
            found = kernel.read_sources()
            for theirs, ours in itertools.zip_longest(sent, _contents(found) if found else ()):
                if theirs != ours:
                    raise TwinError(f"{kernel.name}: {(theirs or ours)[0]} {_difference(kernel)}")
        compile_kernels(graph.kernels)
        one_blas_thread.acquire()  # for good
        _graphs[self.graph_id] = graph


# In the cluster's scheduler -------------------------------------------------------------------------------------------------------------


class _Watch(SchedulerPlugin):
    """Ends the run when a worker is lost. Distributed alone would run tasks again elsewhere, on tensors that have moved on since."""

    name = "taskgpt-watch"

    def __init__(self):
        self.client: Client
        self.futures: list = []  # of the run that is under way
        self.lost_worker = ""
        self._pids: dict[str, int] = {}

    def add_worker(self, scheduler: DaskScheduler, worker: str) -> None:
        self._pids[worker] = scheduler.workers[worker].pid

    def kill_workers(self) -> None:
        """End those that a close that failed has left: they do not hear the SIGTERM that Python sends them at exit, before it waits."""
        for process in multiprocessing.active_children():
            if process.pid in self._pids.values():
                process.kill()

    async def remove_worker(self, scheduler: DaskScheduler, worker: str, **_: object) -> None:
        self.lost_worker = f"worker process {self._pids[worker]}"
        if self.futures:
            await self.client.cancel(self.futures, asynchronous=True)
