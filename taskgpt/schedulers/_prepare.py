"""What schedulers share: the number of workers, runs in turn, and plans that are made once per graph."""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

import numpy as np

from taskgpt.tasks import Graph

Plan = TypeVar("Plan")


def usable_cores() -> int:
    """Return the number of cores that this process may use: not all of the machine under taskset, SLURM or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(setting: int) -> int:
    """Return the setting, or for 0 the number of usable cores."""
    return setting or usable_cores()


class InTurn:
    """What schedulers share that run tasks in Python, one graph at a time, with a Recorder in `recorder`."""

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


class OncePerGraph(Generic[Plan]):
    """Calls `prepare(graph)` for a graph that is new, or that grew since, and keeps what it returns while the graph lives."""

    def __init__(self, prepare: Callable[[Graph], Plan]):
        self._prepare = prepare
        self._kept: weakref.WeakKeyDictionary[Graph, tuple[int, Plan]] = weakref.WeakKeyDictionary()

    def __call__(self, graph: Graph) -> Plan:
        known = self._kept.get(graph)
        if known is None or known[0] != len(graph.tasks):
            known = self._kept[graph] = len(graph.tasks), self._prepare(graph)
        return known[1]
