"""A loop's index and its tiles in all iterations at once: what the function is given, and gives, that says what a loop spawns.

    graph.spawn_each(axpy, range(n), lambda i: (y.cell(i), x.cell(i), 2.0))

The function is called once. `i` is an Index: arithmetic with it gives another one, and a tensor that it indexes an EachTile.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Tensor = Any  # of tensor.py, which imports this file
Tile = Any
Places = Any  # of an axis, in all iterations: an integer, or an array of as many axes as the loop has, of length 1 where it does not change
_ASKED = "the function of a loop is called once, for all iterations, and cannot ask what an index is; write such a loop with spawn"


class Loop:
    """The iterations over all combinations of the values of its indices, the last one fastest.

    `count`: how many values each index takes together in one iteration, see joined.py.

    Raises TypeError for what is neither a number, a range nor an array of integers, nor a tuple of them.
    """

    def __init__(self, over: Any, joins: Sequence[int | None] = ()):
        parts = over if isinstance(over, tuple) else (over,)
        self.values = [_values(each, over) for each in parts]
        self.joins = joins
        self.shape = tuple(map(len, self.values))
        self.size = int(np.prod(self.shape, dtype=np.int64))

    def indices(self) -> "list[Index]":
        found = []
        for axis, values in enumerate(self.values):
            found.append(Index(values.reshape([-1 if axis == other else 1 for other in range(len(self.shape))]), self))
        return found

    def name(self, iteration: int | Sequence[int]) -> str:
        """Return an iteration in words, by its number, or its place in the loop's shape."""
        at = np.unravel_index(iteration, self.shape) if isinstance(iteration, int) else iteration
        said = [int(values[place]) for values, place in zip(self.values, at, strict=True)]
        index = str(said[0]) if len(said) == 1 else f"({', '.join(map(str, said))})"
        return f"the iterations from {index} on" if any(self.joins) else f"iteration {index}"


def _values(given: Any, over: Any) -> np.ndarray:
    if isinstance(given, range):
        return np.arange(given.start, given.stop, given.step, np.int64)
    if isinstance(given, np.ndarray) and given.ndim == 1 and given.dtype.kind in "iu":
        return given.astype(np.int64)
    if isinstance(given, (int, np.integer)) and not isinstance(given, bool) and given >= 0:
        return np.arange(given, dtype=np.int64)
    raise TypeError(f"a loop goes over a range, a number of iterations, an array of integers, or a tuple of those; got {over!r:.60}")


class Index:
    """What an index is in all iterations: `values`, an array of as many axes as the loop has indices."""

    __slots__ = ("loop", "values")
    __array_ufunc__ = None  # NumPy's numbers leave arithmetic to this class

    def __init__(self, values: np.ndarray, loop: Loop):
        self.values, self.loop = values, loop

    def at(self, iteration: Sequence[int]) -> int | float:
        """Return what it is in an iteration."""
        return _at(self.values, iteration)

    def _with(self, operate: Callable, other: Any, is_right: bool = False) -> "Index":
        if isinstance(other, Index):
            value = other.values
        elif isinstance(other, (int, float, np.integer, np.floating)):
            value = other
        else:
            return NotImplemented
        return Index(operate(value, self.values) if is_right else operate(self.values, value), self.loop)

    def __add__(self, other: Any) -> "Index":
        return self._with(operator.add, other)

    def __radd__(self, other: Any) -> "Index":
        return self._with(operator.add, other, True)

    def __sub__(self, other: Any) -> "Index":
        return self._with(operator.sub, other)

    def __rsub__(self, other: Any) -> "Index":
        return self._with(operator.sub, other, True)

    def __mul__(self, other: Any) -> "Index":
        return self._with(operator.mul, other)

    def __rmul__(self, other: Any) -> "Index":
        return self._with(operator.mul, other, True)

    def __floordiv__(self, other: Any) -> "Index":
        return self._with(operator.floordiv, other)

    def __mod__(self, other: Any) -> "Index":
        return self._with(operator.mod, other)

    def __neg__(self) -> "Index":
        return Index(-self.values, self.loop)

    def _asked(self, *_: Any) -> Any:
        raise TypeError(_ASKED)

    __bool__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _asked  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class EachTile:
    """The tiles that an indexed tensor stands for, one for each iteration.

    `starts`, `stops`: where they begin and end on each axis of the tensor; `drops`: whether the axis is dropped, as by an integer.
    """

    __slots__ = ("drops", "loop", "starts", "stops", "tensor")

    def __init__(self, tensor: Tensor, loop: Loop, starts: Sequence[Places], stops: Sequence[Places], drops: Sequence[bool]):
        self.tensor, self.loop = tensor, loop
        self.starts, self.stops, self.drops = tuple(starts), tuple(stops), tuple(drops)

    def at(self, iteration: Sequence[int]) -> Tile:
        """Return the tile of an iteration. Raises IndexError as indexing the tensor does."""
        index = []
        for start, stop, is_dropped in zip(self.starts, self.stops, self.drops, strict=True):
            index.append(_at(start, iteration) if is_dropped else slice(_at(start, iteration), _at(stop, iteration)))
        return self.tensor[tuple(index)]

    def __getitem__(self, index: Any) -> "EachTile":
        inner = list(index) if isinstance(index, tuple) else [index]
        starts, stops, drops = [], [], []
        for start, stop, is_dropped in zip(self.starts, self.stops, self.drops, strict=True):
            if not is_dropped and inner:
                own_start, own_stop, is_dropped = _ends(inner.pop(0), stop - start)
                _verify(self.loop, own_start, own_stop, stop - start, lambda at: self.at(at)[_index_at(index, at)])
                start, stop = start + own_start, start + own_stop
            starts.append(start)
            stops.append(stop)
            drops.append(is_dropped)
        if inner:
            self.at(self._first)[index]  # says why not
        return EachTile(self.tensor, self.loop, starts, stops, drops)

    def grown(self, *borders: int) -> "EachTile":
        """Return the tiles with a border, as Tile.grown does."""
        axes = sum(not is_dropped for is_dropped in self.drops)
        self.at(self._first).grown(*borders)  # says what is wrong with them
        widths = iter(borders * axes if len(borders) == 1 else borders)
        starts, stops = list(self.starts), list(self.stops)
        for axis, (is_dropped, length) in enumerate(zip(self.drops, self.tensor.shape, strict=True)):
            if not is_dropped:
                width = next(widths)
                starts[axis], stops[axis] = np.maximum(starts[axis] - width, 0), np.minimum(stops[axis] + width, length)
        return EachTile(self.tensor, self.loop, starts, stops, self.drops)

    @property
    def _first(self) -> tuple[int, ...]:
        return (0,) * len(self.loop.shape)

    def __repr__(self) -> str:
        return f"{self.tensor.name}[...]"


def each_tile(tensor: Tensor, index: Any) -> Any:
    """Return the tiles, an EachTile, of a tensor that an index with Index in it stands for; None if there is none.

    Raises IndexError as indexing the tensor does, with the first iteration in which it would.
    """
    given = index if isinstance(index, tuple) else (index,)
    loop = _loop_of(given)
    if loop is None:
        return None
    _say_where(loop, (0,) * len(loop.shape), lambda at: tensor[_index_at(index, at)])
    ends = [
        _ends(each, length) for each, length in zip((*given, *(slice(None),) * (len(tensor.shape) - len(given))), tensor.shape, strict=True)
    ]
    for (start, stop, _), length in zip(ends, tensor.shape, strict=True):
        _verify(loop, start, stop, length, lambda at: tensor[_index_at(index, at)])
    return EachTile(tensor, loop, *zip(*ends, strict=True))


def each_inner(tile: Tile, index: Any) -> Any:
    """Return the tiles within one tile that an index with Index in it stands for, as `each_tile` does."""
    loop = _loop_of(index if isinstance(index, tuple) else (index,))
    if loop is None:
        return None
    starts, stops = zip(*tile.ranges, strict=True)
    return EachTile(tile.tensor, loop, starts, stops, [not isinstance(span, tuple) for span in tile.spans])[index]


def each_cell(tensor: Tensor, position: Sequence) -> Any:
    """Return the cells of a tensor at a position with Index in it, as `each_tile` does."""
    loop = _loop_of(position)
    if loop is None:
        return None

    def cell(at: Sequence[int]) -> Tile:
        return tensor.cell(*_index_at(tuple(position), at))

    _say_where(loop, (0,) * len(loop.shape), cell)
    starts, stops = [], []
    for place, bounds in zip(position, tensor.places, strict=True):
        number = place.values if isinstance(place, Index) else operator.index(place)
        _verify(loop, number, number + 1, len(bounds) - 1, cell)
        starts.append(bounds[number])
        stops.append(bounds[number + 1])
    return EachTile(tensor, loop, starts, stops, [False] * len(starts))


def _loop_of(index: Sequence) -> Loop | None:
    """Return the loop whose index stands in one of a tensor's."""
    for each in index:
        for part in (each.start, each.stop, each.step) if isinstance(each, slice) else (each,):
            if isinstance(part, Index):
                return part.loop
    return None


def _ends(index: Any, length: Places) -> tuple[Places, Places, bool]:
    """Return where what an index selects of an axis begins and ends, and whether it drops the axis."""
    if isinstance(index, slice):
        start = 0 if index.start is None else _number(index.start)
        return start, length if index.stop is None else _number(index.stop), False
    place = _number(index)
    return place, place + 1, True


def _number(given: Any) -> Places:
    return given.values if isinstance(given, Index) else operator.index(given)


def _index_at(index: Any, iteration: Sequence[int]) -> Any:
    """Return an index as it is in one iteration."""
    if isinstance(index, tuple):
        return tuple([_index_at(each, iteration) for each in index])
    if isinstance(index, slice):
        return slice(*(_index_at(each, iteration) for each in (index.start, index.stop, index.step)))
    return _at(index.values, iteration) if isinstance(index, Index) else index


def _at(values: Places, iteration: Sequence[int]) -> Any:
    """Return a number as it is in one iteration."""
    if not isinstance(values, np.ndarray) or not values.ndim:
        return values if isinstance(values, (int, float)) else values.item()
    return values[tuple([0 if length == 1 else place for place, length in zip(iteration, values.shape, strict=True)])].item()


def _verify(loop: Loop, start: Places, stop: Places, length: Places, make: Callable) -> None:
    """Raise what `make` does in the first iteration in which a tile would leave its axis, or be empty."""
    wrong = np.asarray((start < 0) | (stop > length) | (np.asarray(start) >= stop))
    if wrong.any():
        at = np.unravel_index(int(wrong.argmax()), wrong.shape) if wrong.ndim else (0,) * len(loop.shape)
        _say_where(loop, [int(place) for place in at], make)


def _say_where(loop: Loop, iteration: Sequence[int], make: Callable) -> None:
    try:
        make(iteration)
    except (IndexError, TypeError) as error:
        raise type(error)(f"{error}, in {loop.name(iteration)}") from None
