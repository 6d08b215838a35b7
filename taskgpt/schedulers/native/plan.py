"""Plans: a recorded graph as flat arrays, which is what compiled workers read. Made once per graph."""

import weakref
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from taskgpt.schedulers.native.table import COMPUTING, MEMORY, NOTHING
from taskgpt.tasks import AccessError, Graph, TaskError, TwinError, compile_kernels
from taskgpt.tasks.lowered import LoweredCalls, firsts
from taskgpt.tasks.native_entry import Held, waits_inside
from taskgpt.tasks.spawn import PRIORITY_LIMIT

_LEAST_S = 1e-6  # a task takes, whatever it does
_BALANCE = 8  # operations a byte: a core of some 100 GFLOP/s has 10 GB/s of memory for its own, and half of what it reads is in a cache


class Plan:
    """The arrays of a graph, all int64 (`first` arrays: what belongs to task n stands from first[n] to first[n + 1] of the other).

    Attributes: call_first, call_entry, call_words (addresses); successor_first, successor; indegree; sinks, the number of tasks without
    successors; locks, lock_first, lock_of; priorities; seconds, the estimate for each task, until they are timed; values, what the policy
    says of them; scratch_bytes; functions, what each kernel ran when the plan was made, kept alive with its machine code. None stands for
    what the graph has not. Compiles the kernels.
    Raises ValueError if a priority is too large, TaskError, naming the first task of a kernel that does not compile.
    """

    def __init__(self, graph: Graph, held: Held = waits_inside):
        _compile(graph)
        self.functions = [kernel.function for kernel in graph.kernels]
        tasks = graph.tasks
        self.tasks = len(tasks)
        self._calls = LoweredCalls(tasks, held)
        self.call_first, self.call_entry = self._calls.first, self._calls.entries
        self.call_words = self._calls.words.ctypes.data + 8 * self._calls.starts
        self.scratch_bytes = self._calls.scratch_bytes
        self.successor_first, self.successor = graph.edges.successors()
        self.indegree = np.diff(graph.edges.predecessors()[0])
        self.sinks = int((np.diff(self.successor_first) == 0).sum())
        self._graph = weakref.ref(graph)
        self.runs = 0
        self.values: tuple[np.ndarray, int] | None = None
        self.durations = np.zeros(self.tasks, np.int64)
        self.seconds = _LEAST_S + self._calls.seconds
        self._lower_locks(graph)
        self.priorities = self._priorities(tasks.priorities())

    def _lower_locks(self, graph: Graph) -> None:
        self.locks = self.lock_first = self.lock_of = None
        if graph.is_commutative:
            locks, counts = graph.tasks.locks(), np.zeros(self.tasks, np.int64)
            counts[list(locks)] = [len(each) for each in locks.values()]
            numbers: dict[int, int] = {}
            self.lock_first = firsts(counts)
            self.lock_of = _int64([numbers.setdefault(serial, len(numbers)) for each in locks.values() for serial, _ in each])
            self.locks = np.zeros(len(numbers), np.int64)

    @staticmethod
    def _priorities(priorities: np.ndarray) -> np.ndarray | None:
        if not priorities.any():
            return None
        if abs(priorities).max() > PRIORITY_LIMIT:
            raise ValueError(f"priorities go from {-PRIORITY_LIMIT} to {PRIORITY_LIMIT}, got {priorities[abs(priorities).argmax()]}")
        return priorities

    @cached_property
    def kinds(self) -> np.ndarray:
        """What holds each task up, MEMORY or COMPUTING, by what its kernels say of their operations and bytes."""
        tasks = self._graph().tasks
        return np.array([MEMORY if task.flops < _BALANCE * task.bytes else COMPUTING for task in tasks], np.int64)

    @cached_property
    def favourites(self) -> np.ndarray:
        return favourites(self._graph())


def _compile(graph: Graph) -> None:
    for kernel in graph.kernels:
        try:
            compile_kernels([kernel])
        except (AccessError, TwinError) as error:
            task, call = next((task, call) for task in graph.tasks for call in task.calls if call.kernel is kernel)
            raise TaskError.of(task, call, error) from error


def edges_to_next(graph: Graph, following: Graph) -> tuple[np.ndarray, np.ndarray] | None:
    """Return (first, successor): for each task of `graph`, the tasks of `following`, run next, that wait for it. None: all wait for all."""
    edges = graph.edges_to(following)
    if edges is None:
        return None
    before, after = np.array(edges, np.int64).reshape(-1, 2).T
    return firsts(np.bincount(before, minlength=len(graph.tasks))), after[np.argsort(before, kind="stable")]


def favourites(graph: Graph) -> np.ndarray:
    """Return, for each task, the earlier one that wrote the largest part of its tiles, or NOTHING."""
    writer: dict[tuple, int] = {}
    chosen = np.full(len(graph.tasks), NOTHING, np.int64)
    for task in graph.tasks:
        weights: dict[int, float] = {}
        written = []
        for call in task.calls:
            for name, tile in call.tiles():
                cells = [(id(tile.tensor), position) for position in tile.cells()]
                share = tile.array.nbytes / len(cells)
                for cell in cells:
                    if cell in writer:
                        weights[writer[cell]] = weights.get(writer[cell], 0) + share
                if call.kernel.accesses[name].is_written:
                    written += cells
        if weights:
            chosen[task.number] = max(weights, key=weights.__getitem__)
        writer.update(dict.fromkeys(written, task.number))
    return chosen


def _int64(values: Sequence[int]) -> np.ndarray:
    return np.array(values, np.int64)
