"""What schedulers share: the number of workers, one run at a time, and plans that are made once per graph."""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Generic, Self, TypeVar

import numpy as np

from taskgpt.schedulers.cores import usable_cores
from taskgpt.schedulers.repetition import Runs, run_while
from taskgpt.tasks import Graph, Spawn, Tile

Kept = TypeVar("Kept")


def worker_count(setting: int) -> int:
    """Return the setting, or for 0 the number of usable cores."""
    return setting or usable_cores()


class OneAtATime:
    """A scheduler's `with` block, and the rule that it does one thing at a time. A scheduler gives `_start` and `_stop`.

    It is as most are: tasks run in this process, without barriers and without Dask's dashboard.
    """

    needs_shared_memory = False
    is_fork_join = False
    serves_dashboard = False

    def __init__(self):
        self._is_open = False
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        if self._is_open:
            raise RuntimeError("this scheduler is in its `with` block already; open a second one")
        self._start()
        self._is_open = True
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_open = False
        self._stop()

    def run_while(self: Runs, step: Graph | Callable, until: Callable[[], bool], reads: Sequence[Tile] = ()) -> int:
        return run_while(self, step, until, reads)

    def program(self, patience_s: float = 60.0, check: bool = False) -> AbstractContextManager[Spawn]:
        name = type(self).__module__.rpartition(".")[2].replace("_", "-")
        raise NotImplementedError(f"scheduler {name} runs recorded graphs alone; programs run on native, and on sequential")

    def _turn(self) -> threading.Lock:
        """Return the lock to hold while something runs. Raises RuntimeError if it is held: a task would wait for itself; or if closed."""
        if not self._is_open:
            raise RuntimeError("this scheduler is closed; use it inside its `with` block")
        if self._lock.locked():
            raise RuntimeError(IS_BUSY)
        return self._lock


IS_BUSY = (
    "this scheduler is in the middle of a run, and neither a task of it nor another thread can start one beside it yet; "
    "start it afterwards, or with a scheduler of its own"
)


class InTurn(OneAtATime):
    """What schedulers share that run tasks in Python, one graph at a time, with a Recorder in `recorder`.

    They give `_run(graph)`, and `_settle()`, which waits for the tasks of a run that was cut short.
    """

    def __init__(self):
        super().__init__()
        self._is_cut_short = False  # and perhaps not settled, where a second Ctrl-C came

    def run(self, graph: Graph) -> None:
        with self._turn():
            graph.verify_untouched()
            if self._is_cut_short:
                self._settle()
            try:
                self._is_cut_short = True
                graph.runs.add(self)
                self._run(graph)
                self._is_cut_short = False
            except BaseException:
                self._settle()
                self._is_cut_short = False
                raise
            finally:
                graph.runs.discard(self)

    def _settle(self) -> None:
        """In the calling thread alone there is nothing to wait for."""

    def ahead(self) -> float:
        return 0.0

    def as_run(self, graph: Graph) -> Graph:
        return graph

    def take_records(self) -> tuple[np.ndarray, int]:
        return self.recorder.take()

    def run_each(self, graphs: Iterable[Graph]) -> Iterator[Graph]:
        for graph in graphs:
            self.run(graph)
            yield graph


class OncePerGraph(Generic[Kept]):
    """Calls `prepare(graph)` for a graph that is new, or has other tasks now, and keeps what it returns while the graph lives."""

    def __init__(self, prepare: Callable[[Graph], Kept]):
        self._prepare = prepare
        self._kept: weakref.WeakKeyDictionary[Graph, tuple[object, Kept]] = weakref.WeakKeyDictionary()

    def __call__(self, graph: Graph) -> Kept:
        known = self._kept.get(graph)
        if known is None or known[0] != graph.version:
            return self.renew(graph)
        return known[1]

    def renew(self, graph: Graph) -> Kept:
        """Prepare a graph anew, as something else than its tasks has changed."""
        version = graph.version
        plan = self._prepare(graph)
        self._kept[graph] = version, plan
        return plan
