"""What a trace says of a graph: its tasks, what they cost, and what they wait for."""

import itertools
from dataclasses import dataclass

import numpy as np

from taskgpt.errors import shorten
from taskgpt.schedulers import loops
from taskgpt.tasks import Graph

LARGEST = 2**53  # of numbers that are added up, and drawn with JavaScript's


@dataclass(frozen=True, eq=False)
class TracedGraph:
    """What a trace says of the tasks of a graph.

    Arrays have an item a task: kernel (an index into kernels), phase (into phases), layer (-1 = none), flops, bytes, loop (fork-join's: a
    number that grows with each barrier). The predecessors of task t are predecessors[first[t]:first[t + 1]]. calls: a line of text a task.
    """

    name: str
    kernels: list[str]
    phases: list[str]
    calls: list[str]
    kernel: np.ndarray
    phase: np.ndarray
    layer: np.ndarray
    flops: np.ndarray
    bytes: np.ndarray
    loop: np.ndarray
    first: np.ndarray
    predecessors: np.ndarray

    ARRAYS = ("kernel", "phase", "layer", "flops", "bytes", "loop", "first", "predecessors")

    @classmethod
    def of(cls, graph: Graph) -> "TracedGraph":
        tasks = graph.tasks
        kernels = list(dict.fromkeys(task.name for task in tasks))
        phases = list(dict.fromkeys(task.section[0] for task in tasks))
        columns = {
            "kernel": [kernels.index(task.name) for task in tasks],
            "phase": [phases.index(task.section[0]) for task in tasks],
            "layer": [max(-1, task.section[1]) for task in tasks],
            "flops": [task.flops for task in tasks],
            "bytes": [task.bytes for task in tasks],
            "loop": [number for number, loop in enumerate(loops.cut(graph)) for _ in loop],
            "first": [0, *itertools.accumulate(len(task.predecessors) for task in tasks)],
            "predecessors": [p for task in tasks for p in task.predecessors],
        }
        calls = [str(task).partition(" ")[2] for task in tasks]
        return cls(graph.name, kernels, phases, calls, **{name: np.array(column, np.int64) for name, column in columns.items()})

    def __len__(self) -> int:
        return len(self.kernel)

    def verify(self) -> None:
        """Raise ValueError if arrays do not fit each other, hold impossible numbers, or let a task wait for a later one."""
        where = f"graph {shorten(self.name)}"
        lengths = {name: len(getattr(self, name)) for name in ("calls", *self.ARRAYS)}
        wanted = dict.fromkeys(lengths, len(self)) | {"first": len(self) + 1, "predecessors": lengths["predecessors"]}
        if lengths != wanted or any(getattr(self, name).dtype != np.int64 for name in self.ARRAYS):
            raise ValueError(f"{where}: wanted int64 arrays of these lengths, {wanted}, got {lengths}")
        if self.first[0] != 0 or self.first[-1] != len(self.predecessors) or (np.diff(self.first) < 0).any():
            raise ValueError(f"{where}: wanted predecessors cut into one part a task")
        earlier = np.repeat(np.arange(len(self)), np.diff(self.first))
        limits = {"kernel": len(self.kernels), "phase": len(self.phases), "predecessors": earlier, "loop": len(self) + 1}
        limits |= {"layer": 2**31, "flops": LARGEST, "bytes": LARGEST}
        for name, limit in limits.items():
            if not ((getattr(self, name) >= (-1 if name == "layer" else 0)) & (getattr(self, name) < limit)).all():
                raise ValueError(f"{where}: a number in {name} beyond what there is")
