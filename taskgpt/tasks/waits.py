"""What tasks wait for, found in compiled code for all of them at once, from the cells that they access.

A task waits for the last writer of every cell that it touches (RAW, WAW) and, if it writes, for the readers since (WAR). Commutative or
concurrent tasks that follow each other are a group: none of them waits for another, all wait for what came before, and who comes after for
all of them.

What a task waits for already by way of a neighbour is left out here, where that is seen at once; edges.py finds the rest.
"""

import math
from typing import Any

import numba
import numpy as np
from numba import types

from taskgpt.tasks.cache import compile_function
from taskgpt.tasks.tensor import Tensor

READ, WRITE, COMMUTATIVE, CONCURRENT = range(4)  # what an access is to who comes after it; the last two make groups
CODES = {"in": READ, "commutative": COMMUTATIVE, "concurrent": CONCURRENT}  # of kinds; any other is a WRITE
_FEW = 16  # predecessors, whose own are looked through

_LONGS, _INTS, _BYTES, _RANGES = types.int64[::1], types.int32[::1], types.uint8[::1], types.int32[:, ::1]


def waits_of(first: np.ndarray, cells: np.ndarray, kinds: np.ndarray, cell_count: int, border: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (first, tasks), int64 and int32: task n waits for tasks[first[n]:first[n + 1]], ascending.

    Task n has the accesses from first[n] to first[n + 1]: in the way kinds[a] to the tile cells[2][a], and that one touches the cells
    cells[0][cells[1][tile]:cells[1][tile + 1]]. Groups end before the task `border`.
    """
    has_groups = bool((kinds >= COMMUTATIVE).any())
    signature = (_LONGS, _LONGS, _LONGS, _LONGS, _BYTES, types.int64, types.int64, types.boolean, _LONGS, _INTS)
    find = _compiled(_waits_of, signature)
    found, room = np.zeros(len(first), np.int64), 1024 + 4 * len(kinds)
    # Into memory that is given, not returned: an interrupt that strikes while numba makes an array of a result is a SystemError.
    while find(first, *cells, kinds, cell_count, border, has_groups, found, tasks := np.empty(room, np.int32)) < 0:
        room *= 4
    return found, tasks[: found[-1]].copy()


class TouchedCells:
    """Which cells tiles touch: those of tile n are cells[first[n]:first[n + 1]], after all tiles were added and the cells filled in."""

    def __init__(self, tiles: int):
        self.first = np.zeros(tiles + 1, np.int64)
        self.cells = np.empty(0, np.int64)
        self._parts: list[tuple] = []

    def add(self, numbers: np.ndarray, spans: np.ndarray, grid: Tensor, base: int) -> None:
        """Add tiles by their numbers: `spans`, int64, has a row for each, where it begins and ends on each axis.

        Their cells are those of the tensor `grid`, the first of which has the number `base`.
        """
        axes = len(grid.grid)
        steps = np.array(grid.steps, np.int64)
        uneven = [np.empty(0, np.int64) if step else places for step, places in zip(grid.steps, grid.places, strict=True)]
        flat = np.concatenate([np.empty(0, np.int64), *uneven])
        first = np.cumsum([0, *map(len, uneven)])
        strides = np.array([math.prod(grid.grid[axis + 1 :]) for axis in range(axes)], np.int64)
        ranges = np.empty(spans.shape, np.int32)
        count = _compiled(_ranges_of, (types.int64[:, ::1], _LONGS, _LONGS, _LONGS, _LONGS, _RANGES, _LONGS))
        count(spans, numbers, flat, first, steps, ranges, self.first)
        self._parts.append((ranges, numbers, strides, base))

    def fill(self) -> None:
        np.cumsum(self.first, out=self.first)
        self.cells = np.empty(self.first[-1], np.int64)
        fill = _compiled(_fill_cells, (_RANGES, _LONGS, _LONGS, types.int64, _LONGS, _LONGS))
        for part in self._parts:
            fill(*part, self.first, self.cells)
        self._parts.clear()


def _compiled(function: Any, signature: tuple) -> Any:
    if not numba.config.DISABLE_JIT:
        compile_function(function, signature)
    return function


@numba.njit(nogil=True)
def _ranges_of(spans, numbers, bounds, first, steps, ranges, counts):
    """Find the first cell of each tile on each axis and the one past the last; counts[number + 1] is how many cells they are together.

    Most tiles lie where the one before them did, or beside it: that is tried first, as a division takes long.
    """
    axes = len(steps)
    guess = np.zeros(2 * axes, np.int64)
    for tile in range(len(spans)):
        count = 1
        for axis in range(axes):
            step = steps[axis]
            for side in range(2):
                place = spans[tile, 2 * axis + side] - side  # the first and the last element
                if step > 1:
                    cell = guess[2 * axis + side]
                    if place >= (cell + 1) * step:
                        cell += 1
                    if not cell * step <= place < (cell + 1) * step:
                        cell = place // step
                    guess[2 * axis + side] = cell
                elif step:
                    cell = place
                else:
                    cell = np.searchsorted(bounds[first[axis] : first[axis + 1]], place, "right") - 1
                ranges[tile, 2 * axis + side] = cell + side
            count *= ranges[tile, 2 * axis + 1] - ranges[tile, 2 * axis]
        counts[numbers[tile] + 1] = count


@numba.njit(nogil=True)
def _fill_cells(ranges, numbers, strides, base, cell_first, cells):
    axes = len(strides)
    at = np.zeros(axes, np.int64)
    for tile in range(len(ranges)):
        number = base
        for axis in range(axes):
            at[axis] = ranges[tile, 2 * axis]
            number += at[axis] * strides[axis]
        start, stop = cell_first[numbers[tile]], cell_first[numbers[tile] + 1]
        cells[start] = number
        for filled in range(start + 1, stop):
            axis = axes - 1
            while at[axis] == ranges[tile, 2 * axis + 1] - 1:
                number -= (at[axis] - ranges[tile, 2 * axis]) * strides[axis]
                at[axis] = ranges[tile, 2 * axis]
                axis -= 1
            at[axis] += 1
            number += strides[axis]
            cells[filled] = number


@numba.njit(nogil=True)
def _waits_of(first, cells, cell_first, places, kinds, cell_count, border, has_groups, out_first, out):
    """Do what waits_of says; return -1 if there is too little room in `out`.

    Lists of tasks are chains of nodes; a node that is not needed any more is used again. Of a cell: `writer`, the last, or -1; `readers`, a
    list, since then; and of one that a group wrote: `group`, its kind, `begun`, its first task, `members`, and `before`, what all of them
    wait for.
    """
    tasks = len(first) - 1
    writer = np.full(cell_count, -1, np.int32)
    readers = np.full(cell_count, -1, np.int32)
    grouped = cell_count if has_groups else 0
    group, begun = np.zeros(grouped, np.uint8), np.zeros(grouped, np.int32)
    members, before = np.full(grouped, -1, np.int32), np.full(grouped, -1, np.int32)
    touches = 0
    for place in places:
        touches += cell_first[place + 1] - cell_first[place]
    nodes = 2 * touches if has_groups else touches  # at most; memory that is not touched costs nothing
    node_task, node_next = np.empty(nodes, np.int32), np.empty(nodes, np.int32)
    free, used = -1, 0  # free: a list
    noted = np.full(tasks, -1, np.int32)  # noted[p] == task: p is among what the task waits for
    passed = np.full(tasks, -1, np.int32)  # passed[p] == task: one that the task waits for waits for p
    count = 0
    for task in range(tasks):
        noted[task] = task  # who touches a cell twice does not wait for itself
        begin = count
        for access in range(first[task], first[task + 1]):
            kind, place = kinds[access], places[access]
            for cell in cells[cell_first[place] : cell_first[place + 1]]:
                in_group = has_groups and group[cell] != READ
                joins = in_group and kind == group[cell] and readers[cell] < 0 and (begun[cell] >= border or task < border)
                # What it waits for: a writer and up to two lists.
                a = b = -1
                if joins:
                    a = before[cell]
                else:
                    if in_group:
                        a = members[cell]
                    elif writer[cell] >= 0 and noted[writer[cell]] != task:
                        noted[writer[cell]] = task
                        if count == len(out):
                            return -1
                        out[count] = writer[cell]
                        count += 1
                    if kind != READ:
                        b = readers[cell]
                for head in (a, b):
                    at = head
                    while at >= 0:
                        other = node_task[at]
                        if noted[other] != task:
                            noted[other] = task
                            if count == len(out):
                                return -1
                            out[count] = other
                            count += 1
                        at = node_next[at]
                # What it leaves.
                if kind == WRITE:
                    free = _freed(node_next, readers[cell], free)
                    readers[cell] = -1
                    writer[cell] = task
                    if in_group:
                        free = _freed(node_next, members[cell], _freed(node_next, before[cell], free))
                        members[cell] = before[cell] = -1
                        group[cell] = READ
                    continue
                if kind != READ and not joins:
                    if in_group:
                        free = _freed(node_next, before[cell], free)
                        before[cell] = members[cell]
                    else:
                        before[cell] = -1
                    if not in_group and writer[cell] >= 0:
                        node = free if free >= 0 else used
                        free, used = (node_next[node], used) if free >= 0 else (-1, used + 1)
                        node_task[node], node_next[node] = writer[cell], before[cell]
                        before[cell] = node
                    last = readers[cell]
                    if last >= 0:
                        while node_next[last] >= 0:
                            last = node_next[last]
                        node_next[last] = before[cell]
                        before[cell] = readers[cell]
                    readers[cell] = writer[cell] = members[cell] = -1
                    group[cell], begun[cell] = kind, task
                node = free if free >= 0 else used
                free, used = (node_next[node], used) if free >= 0 else (-1, used + 1)
                node_task[node] = task
                if kind == READ:
                    node_next[node] = readers[cell]
                    readers[cell] = node
                else:
                    node_next[node] = members[cell]
                    members[cell] = node
        if 1 < count - begin <= _FEW:
            for at in range(begin, count):
                low, high = out_first[out[at]], out_first[out[at] + 1]
                if high - low <= _FEW:
                    for p in out[low:high]:
                        passed[p] = task
            kept = begin
            for at in range(begin, count):
                p = out[at]
                if passed[p] != task:
                    place_at = kept
                    while place_at > begin and out[place_at - 1] > p:
                        out[place_at] = out[place_at - 1]
                        place_at -= 1
                    out[place_at] = p
                    kept += 1
            count = kept
        elif count - begin > _FEW:
            out[begin:count].sort()
        out_first[task + 1] = count
    return count


@numba.njit(nogil=True)
def _freed(node_next, head, free):
    """Return the first free node, after those of a list have become free."""
    if head < 0:
        return free
    last = head
    while node_next[last] >= 0:
        last = node_next[last]
    node_next[last] = free
    return head
