"""Edges: which task waits for which, in flat arrays, less what other edges imply.

Recording notes all that a task waits for. Which of these edges others imply is found when somebody first looks, for all new tasks at once:
then it needs no set of ancestors for each task, only, for as many tasks as fit into a few words, a bit for each that a later task comes
after. It costs time for as far as edges reach back: little for a stencil, whose tasks wait for the row before; more for GPT-2, whose
backward pass reads what the forward pass wrote. Exact, but for edges that reach back over more than REACH tasks: those stay, which costs
a scheduler a little and nobody the order. So time is linear in the number of tasks, whatever the graph.
"""

import threading
from array import array
from collections.abc import Callable, Iterable

import numba
import numpy as np
from numba import types

from taskgpt.tasks.cache import compile_function

REACH = 1 << 17  # GPT-2 XL with 112,000 tasks stays exact, and takes 10 us each
_LEAST_WORDS, _MOST_WORDS = 8, 64  # of bits for each task in a pass: a cache line at least, for speed
_PASS_WORDS = 1 << 22  # of all tasks together, 32 MiB, unless there are too many for that


class Edges:
    """The predecessors of each task, ascending, and from them its successors.

    A graph's tasks share one, and read theirs from it.
    """

    __slots__ = ("_after", "_before", "_first", "_reduced")

    def __init__(self):
        self._first = array("q", [0])  # what task n waits for is _before[_first[n]:_first[n + 1]]
        self._before = array("i")
        self._reduced = 0  # tasks whose edges are sorted and none implied by others
        self._after: tuple[np.ndarray, np.ndarray] | None = None  # the same for successors

    def add(self, waits: Iterable[int]) -> None:
        """Add a task by what it waits for, in any order, and perhaps also through others of them."""
        self._before.extend(waits)
        self._first.append(len(self._before))

    def add_exact(self, predecessors: Iterable[int]) -> None:
        """Add a task with exactly these edges, after tasks that were added so."""
        self.add(sorted(predecessors))
        self._reduced = len(self._first) - 1

    def __len__(self) -> int:
        if not self._is_reduced:
            self._reduce()
        return len(self._before)

    @property
    def _is_reduced(self) -> bool:
        return self._reduced == len(self._first) - 1

    def before(self, task: int) -> tuple[int, ...]:
        """Return the predecessors of a task."""
        if not self._is_reduced:
            self._reduce()
        return tuple(self._before[self._first[task] : self._first[task + 1]])

    def after(self, task: int) -> list[int]:
        """Return the successors of a task."""
        first, successors = self.successors()
        return successors[first[task] : first[task + 1]].tolist()

    def predecessors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (first, predecessors), int64: those of task n are predecessors[first[n]:first[n + 1]]."""
        if not self._is_reduced:
            self._reduce()
        return np.array(self._first, np.int64), np.array(self._before, np.int64)

    def successors(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (first, successors), int64, as of predecessors. Both are kept, and not to be written."""
        if not self._is_reduced:
            self._reduce()
        tasks = len(self._first) - 1
        if self._after is None or len(self._after[0]) != tasks + 1:
            first, before = self.predecessors()
            waiting = np.repeat(np.arange(tasks), np.diff(first))
            counts = np.bincount(before, minlength=tasks)
            self._after = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), waiting[np.argsort(before, kind="stable")]
        return self._after

    def _reduce(self) -> None:
        with _reducing:
            if self._is_reduced:
                return  # by the thread that was before this one
            first, before = np.frombuffer(self._first, np.int64), np.frombuffer(self._before, np.int32)
            kept = reduce_edges(first, before, self._reduced)
            del before  # which keeps the array as long as it is
            del self._before[kept:]
            self._reduced = len(first) - 1

    def __reduce__(self):
        if not self._is_reduced:
            self._reduce()
        return _edges_of, (self._first, self._before)


def _edges_of(first: array, before: array) -> Edges:
    edges = Edges()
    edges._first, edges._before, edges._reduced = first, before, len(first) - 1
    return edges


class FoundEdges(Edges):
    """The edges of tasks that are known otherwise, found when somebody looks, and again when the tasks are others.

    `find()` returns what each task waits for as waits.waits_of does; `version()` changes whenever the tasks do.
    """

    __slots__ = ("_find", "_found", "_version")

    def __init__(self, find: Callable[[], tuple[np.ndarray, np.ndarray]], version: Callable[[], object]):
        super().__init__()
        self._find, self._version = find, version
        self._found = version()

    @property
    def _is_reduced(self) -> bool:
        return self._found == self._version()

    def _reduce(self) -> None:
        with _reducing:
            if self._is_reduced:
                return  # by the thread that was before this one
            version = self._version()
            first, before = self._find()
            kept = reduce_edges(first, before, 0)
            self._first, self._before, self._after = array("q", first.tobytes()), array("i", before[:kept].tobytes()), None
            self._found = version


def reduce_edges(first: np.ndarray, before: np.ndarray, done: int) -> int:
    """Take out the edges that others imply, of tasks from `done` on, in place; return how many edges are left.

    The edges of task n, all from earlier tasks, are before[first[n]:first[n + 1]]; those of tasks below `done` are sorted, and stay.
    """
    if not numba.config.DISABLE_JIT:
        compile_function(_reduce_edges, types.int64(types.int64[::1], types.int32[::1], types.int64))
    return _reduce_edges(first, before, done)


_reducing = threading.Lock()  # threads of a scheduler may look at one graph together


@numba.njit(nogil=True)
def _reduce_edges(first, before, done):
    """Do what reduce_edges says, in passes over the tasks, each for the edges from a block of tasks, the latest block first.

    In a pass, bit p of row n says that task n comes after task low + p. The latest predecessor of a task is never implied by others.
    """
    tasks = len(first) - 1
    words = min(_MOST_WORDS, max(_LEAST_WORDS, _PASS_WORDS // max(1, tasks)))
    block = 64 * words
    end = np.zeros(tasks // block + 1, np.int64)  # for each block, one past the last task with an edge from it that others may imply
    depths = np.zeros(tasks, np.int32)  # of two tasks, the one that comes before the other is less deep
    for task in range(tasks):
        edges = before[first[task] : first[task + 1]]
        for at in range(1, len(edges) if task >= done else 0):
            if edges[at - 1] > edges[at]:
                edges.sort()
                break
        deepest = -1
        for at in range(len(edges) - 1, -1, -1):
            p = edges[at]
            if depths[p] < deepest and task >= done and p >= task - REACH:
                end[p // block] = task + 1
            deepest = max(deepest, depths[p])
        depths[task] = deepest + 1
    longest = 0
    for number in range(len(end)):
        longest = max(longest, end[number] - number * block)
    implied = np.zeros(len(before), np.uint8)
    after = np.empty((longest, words), np.uint64)
    for number in range(len(end) - 1, -1, -1):
        low = number * block
        for task in range(low, end[number]):
            row = after[task - low]
            row[:] = 0
            for at in range(first[task + 1] - 1, first[task] - 1, -1):
                p = before[at] - low
                if p < 0:
                    break
                if implied[at]:
                    continue
                if p < block:
                    bit = np.uint64(1) << np.uint64(p & 63)
                    if row[p >> 6] & bit:
                        implied[at] = task >= done
                        continue
                    row[p >> 6] |= bit
                row |= after[p]
    kept = first[done]
    begin = kept
    for task in range(done, tasks):
        next_begin = first[task + 1]
        for at in range(begin, next_begin):
            if not implied[at]:
                before[kept] = before[at]
                kept += 1
        begin = next_begin
        first[task + 1] = kept
    return kept
