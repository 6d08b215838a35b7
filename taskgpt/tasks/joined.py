"""Joining: several iterations of a loop in one task, over their tiles joined (OmpSs-2's taskloop with a grainsize)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from taskgpt.tasks.each import EachTile, Index, Loop, Places


def joins_of(loop: Loop, grainsize: Any) -> tuple[int | None, ...]:
    """Return how many iterations along each index a task has, None where they stay as they are. A number is for the last index.

    Raises TypeError or ValueError for a grainsize that is not so.
    """
    indices = len(loop.shape)
    joins = grainsize if isinstance(grainsize, tuple) else (*(None,) * (indices - 1), grainsize)
    for each in joins:
        if each is not None and (isinstance(each, bool) or not isinstance(each, int)):
            raise TypeError(f"grainsize is a number of iterations, or of {indices} indices a tuple of such or None; got {grainsize!r}")
        if each is not None and each < 1:
            raise ValueError(f"grainsize is 1 at least, got {each}")
    if len(joins) != indices:
        raise ValueError(f"grainsize has {len(joins)} numbers for {indices} indices: {grainsize!r}")
    return joins


def joined(loop: Loop, args: Sequence[Any], names: Sequence[str], joins: Sequence[int | None]) -> tuple[Loop, list[Any]]:
    """Return the loop over what is joined, and the arguments there. A place that moves, be it an integer, becomes a range of places.

    Raises ValueError, naming the parameter, for tiles that do not make one rectangle, and for a constant that changes.
    """
    larger = Loop(tuple(values[:: joins[at] or 1] for at, values in enumerate(loop.values)), joins)

    def join(argument: Any, name: str) -> Any:
        if isinstance(argument, (tuple, list)):
            return [join(each, name) for each in argument]
        if isinstance(argument, EachTile):
            return _joined(larger, argument, name, joins)
        if isinstance(argument, Index):
            for axis, each in enumerate(joins):
                if each and argument.values.shape[axis] > 1:
                    raise ValueError(f"grainsize: '{name}' is a constant that changes with index {axis}, and a task has one")
            return Index(argument.values, larger)
        return argument

    return larger, [join(argument, name) for argument, name in zip(args, names, strict=True)]


def _joined(loop: Loop, tiles: EachTile, name: str, joins: Sequence[int | None]) -> EachTile:
    starts, stops, drops = list(tiles.starts), list(tiles.stops), list(tiles.drops)
    for index, count in enumerate(joins):
        if count is None:
            continue
        moving = [axis for axis in range(len(starts)) if _moves(starts[axis], index) or _moves(stops[axis], index)]
        if len(moving) > 1:
            raise ValueError(f"grainsize: '{name}' moves along axes {moving} with index {index}, and such tiles make no rectangle")
        for axis in moving:
            start, stop = np.broadcast_arrays(starts[axis], stops[axis])
            first = np.arange(0, start.shape[index], count)
            last = np.minimum(first + count, start.shape[index]) - 1
            _verify_touch(start, stop, index, count, name)
            starts[axis] = np.minimum(start.take(first, index), start.take(last, index))
            stops[axis] = np.maximum(stop.take(first, index), stop.take(last, index))
            drops[axis] = False
    return EachTile(tiles.tensor, loop, starts, stops, drops)


def _moves(places: Places, index: int) -> bool:
    return isinstance(places, np.ndarray) and places.ndim > 0 and places.shape[index] > 1


def _verify_touch(start: np.ndarray, stop: np.ndarray, index: int, count: int, name: str) -> None:
    """Raise ValueError unless neighbours within a task touch or overlap, and go one way."""
    places = np.arange(start.shape[index] - 1)
    inside = places[(places + 1) % count != 0]
    before, after = (start.take(inside + more, index) for more in (0, 1))
    before_stop, after_stop = (stop.take(inside + more, index) for more in (0, 1))
    is_up = (before <= after).all() and (before_stop <= after_stop).all()
    is_down = (before >= after).all() and (before_stop >= after_stop).all()
    if not (is_up or is_down) or (np.maximum(before, after) > np.minimum(before_stop, after_stop)).any():
        raise ValueError(
            f"grainsize: the tiles of '{name}' do not touch each other from one iteration to the next, so they cannot be joined"
        )
