"""Loops spawned as one: from the tiles of all iterations at once to what the columns of a graph hold of their tasks."""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from taskgpt.tasks.columns import Family
from taskgpt.tasks.each import EachTile, Index, Loop
from taskgpt.tasks.kernel import Kernel
from taskgpt.tasks.known_calls import CallSignature, KnownCalls
from taskgpt.tasks.tensor import Tile


class LoopCalls:
    """The calls of a loop: `args` are those of the function, an EachTile or an Index standing for what changes."""

    def __init__(self, kernel: Kernel, loop: Loop, args: Sequence[Any]):
        self.kernel, self.loop, self.args = kernel, loop, args
        self.tiles = list(self._flat(args))

    def _flat(self, args: Sequence[Any]) -> Iterator[Any]:
        for argument in args:
            if isinstance(argument, (tuple, list)):
                yield from self._flat(argument)
            elif isinstance(argument, (EachTile, Tile)):
                yield argument

    def at(self, number: int) -> tuple:
        """Return the arguments of an iteration."""
        place = [int(each) for each in np.unravel_index(number, self.loop.shape)]

        def found(argument: Any) -> Any:
            if isinstance(argument, (tuple, list)):
                return tuple([found(each) for each in argument])
            if isinstance(argument, EachTile):
                return argument.at(place)
            if isinstance(argument, Index):
                return argument.at(place)
            return argument

        return tuple([found(argument) for argument in self.args])

    def tensors(self) -> set:
        return {tile.tensor for tile in self.tiles}

    def signatures(self, calls: KnownCalls) -> tuple[list[CallSignature], np.ndarray | None]:
        """Return the signatures of the calls, and which of them each iteration has; None if there is one.

        Raises as `spawn` does in the first iteration that is wrong.
        """
        forms = self._forms()
        if forms is None:
            return [calls.look_up(self.kernel, self.at(0))[0]], None
        _, first, which = np.unique(forms, return_index=True, return_inverse=True)
        order = np.argsort(first)  # so that what is wrong is said of the first iteration
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        return [calls.look_up(self.kernel, self.at(int(first[at])))[0] for at in order], rank[which.reshape(-1)]

    def _forms(self) -> np.ndarray | None:
        """Return a number for each iteration that tells those apart whose tiles have other shapes; None if all are the same."""
        forms: np.ndarray | None = None
        for tile in self.tiles:
            if not isinstance(tile, EachTile):
                continue
            for start, stop, is_dropped in zip(tile.starts, tile.stops, tile.drops, strict=True):
                extent = np.asarray(stop - start)
                if is_dropped or not extent.ndim or (extent == extent.flat[0]).all():
                    continue
                values, which = np.unique(extent, return_inverse=True)
                which = which.reshape(extent.shape)
                forms = which if forms is None else forms * len(values) + which
        return None if forms is None else np.broadcast_to(forms, self.loop.shape).reshape(-1)

    def verify_apart(self, calls: KnownCalls, signature: CallSignature) -> None:
        """Raise AccessError, as `spawn` does, in the first iteration in which a written tile overlaps another, or is read-only."""
        first = None if all(tile.tensor.array.flags.writeable for tile in self.tiles) else 0
        written = {at for at, _ in signature.written}
        for one, other in combinations(range(len(self.tiles)), 2):
            if not written.isdisjoint((one, other)):
                overlap = _overlap(self.tiles[one], self.tiles[other])
                if overlap.any():
                    overlap = np.broadcast_to(overlap, self.loop.shape)
                    first = min(int(overlap.argmax()), self.loop.size if first is None else first)
        if first is not None:
            found, places, _ = calls.look_up(self.kernel, self.at(first))
            try:
                calls.verify_written(found, places)
            except Exception as error:
                raise type(error)(f"{error}, in {self.loop.name(first)}") from None

    def rows(self, calls: KnownCalls, signature: CallSignature, new_family: Callable[[Family], int]) -> np.ndarray:
        """Return the words of the tasks, a row for each."""
        places = iter(self.tiles)
        words = np.empty((*self.loop.shape, len(self.tiles) + len(signature.constants) + 1), np.int64)
        for at, tile in enumerate(places):
            words[..., at] = self._numbers(tile, calls, new_family)
        for at, (position, is_float) in enumerate(signature.constants, len(self.tiles)):
            argument = self.args[position]
            values = np.asarray(argument.values if isinstance(argument, Index) else argument)
            words[..., at] = values.astype(np.float64).view(np.int64) if is_float else values
        words[..., -1] = np.arange(self.loop.size).reshape(self.loop.shape)
        return words

    def _numbers(self, tile: Any, calls: KnownCalls, new_family: Callable[[Family], int]) -> Any:
        if isinstance(tile, Tile):
            return calls.place(tile).number
        ends = [np.asarray(end) for each in zip(tile.starts, tile.stops, strict=True) for end in each]
        shape = np.broadcast_shapes(*(end.shape for end in ends))
        if not shape or all(length == 1 for length in shape):
            return calls.place(tile.at((0,) * len(self.loop.shape))).number
        family = Family(tile.tensor, shape, ends, tile.drops)
        return new_family(family) - np.arange(family.size).reshape(shape)


def _overlap(one: Any, other: Any) -> np.ndarray:
    """Return in which iterations two tiles have an element in common."""
    if one.tensor is not other.tensor and not one.tensor.is_like(other.tensor):
        return np.False_
    found: Any = np.True_
    for (start, stop), (other_start, other_stop) in zip(_ends(one), _ends(other), strict=True):
        found = found & (np.asarray(start) < other_stop) & (np.asarray(other_start) < stop)
    return found


def _ends(tile: Any) -> Sequence[tuple]:
    return tile.ranges if isinstance(tile, Tile) else list(zip(tile.starts, tile.stops, strict=True))
