"""The edges of a recorded graph, and those from one graph to the next, from the columns of their tasks."""

import math
from collections.abc import Callable, Sequence

import numba
import numpy as np
from numba import types

from taskgpt.tasks.cache import compile_function
from taskgpt.tasks.columns import FAMILY_BITS, Columns
from taskgpt.tasks.edges import FoundEdges, reduce_edges
from taskgpt.tasks.tensor import Tensor
from taskgpt.tasks.waits import CODES, WRITE, TouchedCells, waits_of

_MOST_CELLS = 1 << 22  # of all grids: if there are more, only those that are touched are numbered


def edges_of(columns: Columns) -> FoundEdges:
    """Return the edges of the tasks that are in the columns, now and later."""
    return FoundEdges(lambda: _waits([columns]), lambda: columns.version)


def edges_between(columns: Columns, following: Columns) -> list[tuple[int, int]]:
    """Return (task, task of the following) for what tasks wait for that run right after others, less what other edges imply."""
    count = len(columns)
    first, before = _waits([columns, following])
    before = before[: reduce_edges(first, before, 0)]
    waiting = np.repeat(np.arange(len(first) - 1), np.diff(first))
    between = (waiting >= count) & (before < count)
    return list(zip(before[between].tolist(), (waiting[between] - count).tolist(), strict=True))


def _waits(parts: Sequence[Columns]) -> tuple[np.ndarray, np.ndarray]:
    """Return what each task waits for, of one graph or of two that run one after the other; numbered on."""
    numbering = _Numbering(parts)
    firsts, places, kinds = [np.zeros(1, np.int64)], [], []
    tiles = [int(columns.tile_begins()[-1]) for columns in parts]
    touched = TouchedCells(sum(tiles))
    for at, columns in enumerate(parts):
        before, accesses = sum(tiles[:at]), sum(map(len, places))
        _touch(columns, before, numbering, touched)
        first, own_places, own_kinds = _accesses(columns, before)
        firsts.append(first + accesses)
        places.append(own_places)
        kinds.append(own_kinds)
    touched.fill()
    cells, count = touched.cells, numbering.count
    if count > max(_MOST_CELLS, len(cells)):
        found, cells = np.unique(cells, return_inverse=True)
        count = len(found)
    border = len(parts[0]) if len(parts) > 1 else 0
    return waits_of(_together(firsts), (cells, touched.first, _together(places)), _together(kinds), count, border)


def _together(parts: list[np.ndarray]) -> np.ndarray:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _Numbering:
    """Numbers for the cells of all tensors; those that share memory have the same. `count`: of all."""

    def __init__(self, parts: Sequence[Columns]):
        self._grids = [columns.calls.grids for columns in parts]
        self._begin: dict[int, int] = {}
        self.count = 0

    def of(self, tensor: Tensor) -> tuple[Tensor, int]:
        """Return the tensor whose cells a tensor goes by, and the number of the first one."""
        grids = next(grids for grids in self._grids if tensor in grids)
        finest, memory = grids.finest_of(tensor), grids.memory(tensor)
        if memory not in self._begin:
            self._begin[memory] = self.count
            self.count += math.prod(finest.grid)
        return finest, self._begin[memory]


def _touch(columns: Columns, before: int, numbering: _Numbering, touched: TouchedCells) -> None:
    """Add all tiles of a graph, which have so many of another one before them."""
    for tensor, known in columns.calls.places():
        if known:
            touched.add(np.array(known.numbers) + before, np.array(known.ends).reshape(len(known), -1), *numbering.of(tensor))
    for family, begin in zip(columns.families, columns.tile_begins() + before, strict=False):
        if family is not None:
            touched.add(np.arange(begin, begin + family.size), family.spans(), *numbering.of(family.tensor))


def _accesses(columns: Columns, before: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (first, places, kinds): where each task's accesses end, to which tiles they are, numbered as by `_touch`, and how."""
    kinds = [[CODES.get(kind, WRITE) for kind in origin.signature.kinds] for origin in columns.table]
    kind_first = np.cumsum([0, *map(len, kinds)])
    flat = np.array([code for each in kinds for code in each], np.uint8)
    begins = columns.tile_begins() + before
    origins, words = np.frombuffer(columns.origins, np.int32), np.frombuffer(columns.words, np.int64)
    ends = np.cumsum(np.diff(kind_first)[origins])
    count = ends[-1] if len(ends) else 0
    places, codes = np.empty(count, np.int64), np.empty(count, np.uint8)
    _compiled()(origins, words, columns.rows(), kind_first, flat, before, begins, places, codes)
    return ends, places, codes


def _compiled() -> Callable:
    if not numba.config.DISABLE_JIT:
        longs, codes = types.int64[::1], types.uint8[::1]
        compile_function(_flatten, (types.int32[::1], longs, longs, longs, codes, types.int64, longs, longs, codes))
    return _flatten


@numba.njit(nogil=True)
def _flatten(origins, words, rows, kind_first, kinds, before, begins, places, codes):
    """Copy the tiles of each task, out of its row of words, and how it accesses them."""
    row, filled = 0, 0
    for origin in origins:
        for at in range(kind_first[origin], kind_first[origin + 1]):
            word = words[row + at - kind_first[origin]]
            if word < 0:
                word = begins[-1 - word >> FAMILY_BITS] + (-1 - word & (1 << FAMILY_BITS) - 1)
            else:
                word += before
            places[filled] = word
            codes[filled] = kinds[at]
            filled += 1
        row += rows[origin]
