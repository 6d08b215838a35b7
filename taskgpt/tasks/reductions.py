"""Reductions: the kernels that begin and combine copies of a tile, and the tasks that work on these copies.

Neighbouring tasks that reduce into one tile are a group. They go to its slots in turns; those of a slot run in program order, those of
different slots at the same time. The first slot is the tile itself, the others are copies of it. Before anything else touches the tile,
tasks that pairs of slots are given to make one of them all, as a tree: 0 += 1, 2 += 3, then 0 += 2. How many slots there are hangs on
the tile alone, so the program fixes every sum to the bit.
"""

import sys
from functools import lru_cache
from typing import Any

import numpy as np

from taskgpt.tasks.access import Dim, In, InOut, Out
from taskgpt.tasks.combiners import Combiner, Operator
from taskgpt.tasks.kernel import Kernel
from taskgpt.tasks.rows import dense
from taskgpt.tasks.tensor import ALIGNMENT_BYTES, Arena, Tensor, TensorSpec, Tile, aligned

_MOST_SLOTS, _LEAST_SLOTS = 64, 4
_COPIES_BYTES = 1 << 24  # of all slots together: a reduction into large tiles takes few of them, as its tasks are long, too


def slots_of(tile: Tile) -> int:
    """Return how many tasks of a group run at the same time, at most."""
    nbytes = max(1, tile.array.nbytes)
    return max(_LEAST_SLOTS, min(_MOST_SLOTS, _COPIES_BYTES // nbytes))


def copies_of(tile: Tile, first: int, count: int) -> list[Tile]:
    """Return memory for so many slots of a tile from the first on, which are named after it; shared between processes if the tile is."""
    memory, dtype = tile.tensor, tile.tensor.array.dtype
    spec = TensorSpec(tile.shape, (), dtype)
    specs = {f"{tile!r}'{slot}": spec for slot in range(first, first + count)}
    if memory.is_shared:
        return [tensor[()] for tensor in Arena(specs, shared=True).tensors.values()]
    distance = aligned(spec.nbytes)
    block = np.empty(count * distance + ALIGNMENT_BYTES, np.uint8)  # no arena, for a process may map memory some 65,000 times
    start = -block.ctypes.data % ALIGNMENT_BYTES
    starts = range(start, start + count * distance, distance)
    return [Tensor(name, np.ndarray(spec.shape, dtype, block, at))[()] for name, at in zip(specs, starts, strict=True)]


class ReductionKernel(Kernel):
    """A kernel that was made for a combiner, a type and a number of axes. Another process makes it again."""

    def __init__(self, body: Any, make: Any, combiner: Operator | Combiner, dtype: np.dtype, axes: int):
        super().__init__(body, tags=["begins"] if make is beginning else ())
        self._made_by = make, (combiner, dtype, axes)

    @property
    def is_importable(self) -> bool:
        combiner = self._made_by[1][0]
        if isinstance(combiner, Operator):
            return True
        function = combiner.combine
        if isinstance(function, Kernel):
            return function.is_importable
        module = getattr(function, "__module__", None) or "numpy"
        return module != "__main__" and getattr(sys.modules.get(module), function.__name__, None) is function

    def __reduce__(self):
        return self._made_by


@lru_cache(maxsize=1024)
def beginning(combiner: Operator | Combiner, dtype: np.dtype, axes: int) -> Kernel:
    """Return the kernel that fills a copy with what changes nothing."""
    value = combiner.neutral_of(dtype)

    def body(out):
        out[...] = value

    def number(out):
        out[()] = value

    def numbers(out):
        for at in range(out.shape[0]):
            out[at] = value

    def rows(out):
        for at in np.ndindex(out.shape[:-1]):
            row = dense(out[at])
            for column in range(row.shape[0]):
                row[column] = value

    made = _make(body, {"out": Out}, f"begin_{combiner.name}", beginning, combiner, dtype, axes)
    return made.compiled((number, numbers, rows)[min(axes, 2)]) if _is_compiled(combiner, dtype) else made


@lru_cache(maxsize=1024)
def combining(combiner: Operator | Combiner, dtype: np.dtype, axes: int) -> Kernel:
    """Return the kernel that brings one slot into another. Raises TypeError for a kernel of the user's that does not."""
    if isinstance(combiner.combine, Kernel):
        return _verified(combiner.combine, dtype, axes)
    if isinstance(combiner, Combiner):
        function = combiner.combine

        def combine(into, part):
            into[...] = function(into, part)

        return _make(combine, {"into": InOut, "part": In}, f"combine_{combiner.name}", combining, combiner, dtype, axes)
    ufunc, scalar = combiner.combine, combiner.scalar

    def body(into, part):
        ufunc(into, part, out=into)

    def number(into, part):
        into[()] = scalar(into[()], part[()])

    def numbers(into, part):
        for at in range(into.shape[0]):
            into[at] = scalar(into[at], part[at])

    def rows(into, part):
        for at in np.ndindex(into.shape[:-1]):
            row, other = dense(into[at]), dense(part[at])
            for column in range(row.shape[0]):
                row[column] = scalar(row[column], other[column])

    made = _make(body, {"into": InOut, "part": In}, f"combine_{combiner.name}", combining, combiner, dtype, axes)
    return made.compiled((number, numbers, rows)[min(axes, 2)]) if _is_compiled(combiner, dtype) else made


def _make(body: Any, accesses: dict[str, Any], name: str, make: Any, combiner: Operator | Combiner, dtype: np.dtype, axes: int) -> Kernel:
    sizes = tuple(Dim(f"N{axis}") for axis in range(axes))
    body.__annotations__ = {parameter: access[(*(sizes or ((),)), dtype)] for parameter, access in accesses.items()}
    body.__name__ = name
    return ReductionKernel(body, make, combiner, dtype, axes)


def _is_compiled(combiner: Operator | Combiner, dtype: np.dtype) -> bool:
    """Return True for what numba computes with: neither half nor long doubles."""
    return isinstance(combiner, Operator) and (dtype.kind in "biu" or dtype in (np.float32, np.float64, np.complex64, np.complex128))


def _verified(kernel: Kernel, dtype: np.dtype, axes: int) -> Kernel:
    kinds = [(each.kind, each.dtype, len(each.dims)) for each in kernel.accesses.values()]
    if len(kernel.parameters) != 2 or kinds != [("inout", dtype, axes), ("in", dtype, axes)]:
        what = f"into: InOut[...], part: In[...] of {axes} dimensions of {dtype}"
        raise TypeError(f"{kernel.name} cannot combine copies of this tile; it must take {what}, and nothing else")
    return kernel
