"""dask.threaded on threads of this process: Dask's local scheduler as it is, with its callbacks and its order.

Dask orders the graph anew in every step and wakes its main thread between any two tasks, 40 to 70 us a task: it wants few, large tasks.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import dask.threaded

from taskgpt.schedulers.prepare import InTurn, OncePerGraph, worker_count
from taskgpt.schedulers.records import Recorder
from taskgpt.sharing.member import Cores, Terms
from taskgpt.tasks import Graph, Task, coarsen, one_blas_thread

_TOKEN = "0" * 32  # of a form that Dask's tools take off, so that the kernel's name is left


@dataclass(frozen=True)
class Settings(Terms):
    """The keys of scheduler_configs/threads.toml."""

    workers: int = field(metadata={"at_least": 0, "at_most": 4096})
    coarsen: int = field(metadata={"at_least": 0})
    record: int = field(metadata={"at_least": 0, "at_most": 10**8})


class Scheduler(InTurn):
    """Hands the graph, coarsened, to dask.threaded.get."""

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        self.workers = worker_count(settings.workers)
        self.recorder = Recorder(settings.record)
        self._run_task: Callable[[Task], None] = Task.run_calls
        self._cores = Cores(settings, self.workers)
        self._coarse = OncePerGraph(self._coarsen)
        self._dask_graph = OncePerGraph(self._translate)

    def _start(self) -> None:
        self._cores.__enter__()
        self._coordinator = ThreadPoolExecutor(1, "taskgpt-coordinator")
        self._pool = ThreadPoolExecutor(self.workers, "taskgpt-threads")
        one_blas_thread.acquire()

    def _stop(self) -> None:
        self._coordinator.shutdown()
        self._pool.shutdown()
        one_blas_thread.release()
        self._cores.__exit__()

    def describe(self) -> str:
        size = f"at most {self.settings.coarsen} tasks a step" if self.settings.coarsen else "tasks as recorded"
        return f"threads: dask.threaded on {self.workers} workers, {size}"

    def _run(self, graph: Graph) -> None:
        tasks, last = self._dask_graph(graph)
        self._run_task = self.recorder.begin(self.as_run(graph))
        # Not in this thread, which is the one that Ctrl-C interrupts: Dask's loop makes garbage, and Python loses an interrupt that meets
        # the collector calling a weak reference back. This thread only waits.
        self._coordinator.submit(dask.threaded.get, tasks, last, pool=self._pool).result()

    def _settle(self) -> None:
        """Wait for the tasks that Dask leaves running on our tensors when it raises, then start with a fresh pool."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        # In the coordinator, after Dask's loop: to Python below 3.13, a thread whose join() was interrupted has ended.
        self._coordinator.submit(self._pool.shutdown).result()
        self._pool = ThreadPoolExecutor(self.workers, "taskgpt-threads")
        self.recorder.forget_threads()

    def _translate(self, graph: Graph) -> tuple[Mapping, list[tuple]]:
        """Return the Dask graph and its last keys. Dask's local schedulers remember nothing, so that every step can use the same keys."""
        layers, last = self.as_run(graph).to_dask(lambda task: (self._call, task), token=_TOKEN)
        return layers.to_dict(), last

    def _call(self, task: Task, *_predecessors: None) -> None:
        with self._cores.one():
            self._run_task(task)

    def as_run(self, graph: Graph) -> Graph:
        return self._coarse(graph) or graph

    def _coarsen(self, graph: Graph) -> Graph | None:
        """Return a graph of fewer tasks, or None: kept as its own coarsened self, a graph would never go."""
        merged = coarsen(graph, self.settings.coarsen, self.workers) if self.settings.coarsen else graph
        return None if merged is graph else merged
