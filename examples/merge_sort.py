"""Merge sort: the recursion runs while tasks are recorded, and a task merges a list of sorted runs."""

import heapq

import numpy as np

from taskgpt.tasks import In, InOut, Out, Several, dims, kernel, wrap

N, M = dims("N M")


@kernel
def sort(x: InOut[N]):
    x.sort()


@kernel
def merge(out: Out[N], runs: Several[In[M]]):
    """Merge sorted runs into one."""
    out[:] = list(heapq.merge(*(run.tolist() for run in runs)))


class Problem:
    """`ways`**`depth` pieces of `piece` elements; `ways` runs are merged at a time."""

    def __init__(self, ways: int = 3, depth: int = 3, piece: int = 20):
        self.ways, self.piece = ways, piece
        self.values = np.random.default_rng(0).random(piece * ways**depth, np.float32)
        self.x, self.y = (wrap(np.empty_like(self.values), piece, name) for name in "xy")
        self.sorted_in = self.x if depth % 2 == 0 else self.y

    def begin(self) -> None:
        self.x.array[...] = self.values

    def program(self, spawn) -> None:
        self._sort(spawn, 0, len(self.values))

    def _sort(self, spawn, start: int, stop: int):
        """Sort a part; return the array in which it then is, and the one that is free there."""
        if stop - start == self.piece:
            spawn(sort, self.x[start:stop])
            return self.x, self.y
        length = (stop - start) // self.ways
        parts = [(at, at + length) for at in range(start, stop, length)]
        for part in parts:
            here, there = self._sort(spawn, *part)
        spawn(merge, there[start:stop], [here[slice(*part)] for part in parts])
        return there, here

    def result(self) -> np.ndarray:
        return self.sorted_in.array

    def wanted(self) -> np.ndarray:
        return np.sort(self.values)
