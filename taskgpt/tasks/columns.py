"""Columns: what was spawned into a graph, in flat arrays, with no object for a task. Tasks are made of them for whoever looks.

A task has the number of its *origin*, what tasks that were spawned alike have in common, and a row of words: the numbers of its tiles, its
constants by their bits and, of a loop's task, its iteration. A tile's number is that of its place; that of a loop's tile is negative:
-1 - (its family << 32) - its number there, where a family is what one parameter's tiles are in all iterations.
"""

import math
import struct
import threading
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from taskgpt.tasks.each import Loop
from taskgpt.tasks.known_calls import CallSignature, KnownCalls
from taskgpt.tasks.lines import Iteration, Line
from taskgpt.tasks.task import Call, Section
from taskgpt.tasks.tensor import Span, Tensor, Tile

FAMILY_BITS = 32  # from this bit on a number of a loop's tile is that of its family
_DOUBLE, _WORD = struct.Struct("d"), struct.Struct("q")


_counting = threading.Lock()  # threads of a scheduler may look at one graph together


class Origin(NamedTuple):
    """What tasks that were spawned alike have in common. `families`: those of a loop."""

    signature: CallSignature
    section: Section
    priority: int
    line: Line
    loop: Loop | None = None
    families: tuple[int, ...] = ()

    @property
    def row(self) -> int:
        """How many words each of them has."""
        return len(self.signature.names) + len(self.signature.constants) + (self.loop is not None)


class Family(NamedTuple):
    """The tiles of one parameter in all iterations of a loop in which it moves, which have a shape of their own.

    `ends`: where they begin and end on each axis, arrays that can be broadcast to that shape. `drops`: whether each axis is dropped, as by
    an integer.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    ends: list[np.ndarray]
    drops: tuple[bool, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def spans(self) -> np.ndarray:
        """Return the ends of all tiles, int64, a row for each."""
        spans = np.empty((*self.shape, len(self.ends)), np.int64)
        for at, end in enumerate(self.ends):
            spans[..., at] = end
        return spans.reshape(-1, len(self.ends))

    def tile(self, number: int) -> Tile:
        place = np.unravel_index(number, self.shape)
        ends = [int(np.broadcast_to(end, self.shape)[place]) for end in self.ends]
        spans: list[Span] = [ends[2 * axis] if drops else (ends[2 * axis], ends[2 * axis + 1]) for axis, drops in enumerate(self.drops)]
        return Tile.of(self.tensor, tuple(spans))


class Columns:
    """`origins`, `words`: of all tasks; `table`: the origins by number; `families`: by number, None for one that is not in use.

    `begins`: calls that come before that of a task, by its number.
    """

    def __init__(self, calls: KnownCalls):
        self.calls = calls
        self.origins, self.words = array("i"), array("q")
        self.table: list[Origin] = []
        self.families: list[Family | None] = []
        self.begins: dict[int, tuple[Call, ...]] = {}
        self.replaced = 0  # how often tasks have been replaced by others
        self._numbers: dict[tuple, int] = {}
        self._free: list[int] = []  # numbers of origins that are not in use
        self._rows = array("q")  # of each origin
        self._first = array("q", [0])  # where the words of each task begin, as far as somebody asked

    def __len__(self) -> int:
        return len(self.origins)

    @property
    def version(self) -> tuple[int, int]:
        """What changes whenever the tasks do."""
        return len(self.origins), self.replaced

    # Recording ----------------------------------------------------------------------------------------------------------------------

    def origin(self, key: tuple) -> int | None:
        """Return the number of the origin that was added under a key."""
        return self._numbers.get(key)

    def add_origin(self, origin: Origin, key: tuple | None = None) -> int:
        """Return the number of a new origin; of a loop's there is no key."""
        if self._free:
            number = self._free.pop()
            self.table[number], self._rows[number] = origin, origin.row
        else:
            number = len(self.table)
            self.table.append(origin)
            self._rows.append(origin.row)
        if key is not None:
            self._numbers[key] = number
        return number

    def add_family(self, family: Family) -> int:
        """Return the number of its first tile; those of the others follow, downwards."""
        number = self.families.index(None) if None in self.families else len(self.families)
        self.families[number : number + 1] = [family]
        return -1 - (number << FAMILY_BITS)

    def family_of(self, tile: int) -> int:
        """Return the number of the family of a loop's tile."""
        return -1 - tile >> FAMILY_BITS

    def add_rows(self, origins: np.ndarray, words: np.ndarray) -> None:
        """Add many tasks with rows of one length."""
        number, known = len(self), len(self.words)
        try:
            self.words.frombytes(words.data.cast("B"))
            self.origins.frombytes(origins.astype(np.int32).data.cast("B"))
        except BaseException:  # an interrupt
            if len(self) == number:
                del self.words[known:]
            raise

    def drop(self, begin: int) -> None:
        """Take out the tasks from that number on."""
        self._forget_loops(begin, len(self))
        del self.words[self.first()[begin] :]
        del self.origins[begin:]
        self.begins = {number: calls for number, calls in self.begins.items() if number < begin}
        self._changed()

    def replace(self, start: int, stop: int, begin: int) -> None:
        """Put the tasks from `begin` on, the last ones, in the place of those from `start` to `stop`."""
        first = self.first()
        origins = self.origins[:start] + self.origins[begin:] + self.origins[stop:begin]
        words = self.words[: first[start]] + self.words[first[begin] :] + self.words[first[stop] : first[begin]]
        moved = len(self) - begin - (stop - start)
        begins = {number - begin + start: calls for number, calls in self.begins.items() if number >= begin}
        begins |= {number + moved: calls for number, calls in self.begins.items() if stop <= number < begin}
        begins |= {number: calls for number, calls in self.begins.items() if number < start}
        self._forget_loops(start, stop)
        self.origins, self.words, self.begins = origins, words, begins
        self._changed()

    def _forget_loops(self, start: int, stop: int) -> None:
        for number in np.unique(np.array(self.origins[start:stop], np.int32)).tolist():
            if self.table[number].loop is not None:
                for family in self.table[number].families:
                    self.families[family] = None
                self._free.append(number)

    def _changed(self) -> None:
        self.replaced += 1
        self._first = array("q", [0])

    def change(self, number: int, **what: Any) -> None:
        """Change the section or the priority of a task."""
        self.origins[number] = self.add_origin(self.origin_of(number)._replace(**what))

    # Looking ------------------------------------------------------------------------------------------------------------------------

    def first(self) -> array:
        """Return where the words of each task begin, and where the last one's end."""
        if len(self._first) <= len(self.origins):
            with _counting:
                first, known = self._first, len(self._first) - 1
                if known == len(self.origins) - 1:
                    first.append(first[-1] + self._rows[self.origins[-1]])
                else:
                    first.frombytes((np.cumsum(self.rows()[np.array(self.origins[known:])]) + first[-1]).data.cast("B"))
        return self._first

    def rows(self) -> np.ndarray:
        """Return how many words the tasks of each origin have."""
        return np.array(self._rows)

    def first_uses(self) -> list[tuple[int, int]]:
        """Return (number of an origin, number of the first task that has it) for all origins that tasks have."""
        origins = np.array(self.origins)
        first = np.full(len(self.table), len(origins))
        first[origins[::-1]] = np.arange(len(origins))[::-1]
        return [(number, at) for number, at in enumerate(first.tolist()) if at < len(origins)]

    def kernels(self) -> Iterator:
        """Yield the kernels in the order of their first use, some of them again."""
        uses = [(at, 1, self.table[number].signature.kernel) for number, at in self.first_uses()]
        uses += [(at, 0, call.kernel) for at, calls in self.begins.items() for call in calls]
        for *_, kernel in sorted(uses, key=lambda use: use[:2]):
            yield kernel

    def tile_begins(self) -> np.ndarray:
        """Return where the tiles of each family begin where all are counted, those of places first; and at last how many there are."""
        return np.cumsum([len(self.calls.place_of), *(0 if family is None else family.size for family in self.families)])

    def origin_of(self, number: int) -> Origin:
        return self.table[self.origins[number]]

    def calls_of(self, number: int) -> tuple[Call, ...]:
        """Return the calls of a task."""
        origin, first = self.origin_of(number), self.first()
        signature = origin.signature
        words = iter(self.words[first[number] : first[number + 1]])
        tiles = iter([self._tile(next(words)) for _ in signature.names])
        args: list = []
        for kind in signature.layout:
            if kind is None:
                args.append(next(tiles))
            elif isinstance(kind, int):
                args.append(tuple([next(tiles) for _ in range(kind)]))
            else:
                args.append(kind(next(words)) if kind is not float else _DOUBLE.unpack(_WORD.pack(next(words)))[0])
        where = origin.line if origin.loop is None else Iteration(origin.line, origin.loop.name(next(words)))
        return *self.begins.get(number, ()), Call.verified(signature, tuple(args), where)

    def _tile(self, number: int) -> Tile:
        if number >= 0:
            return self.calls.place_of[number].tile
        family = self.families[self.family_of(number)]
        return self.calls.place(family.tile(-1 - number & (1 << FAMILY_BITS) - 1)).tile

    def tensors(self) -> list[Tensor]:
        """Return those that tasks access, and others that they have accessed."""
        return [tensor for tensor, _ in self.calls.places()] + [family.tensor for family in self.families if family is not None]

    def locks(self, number: int) -> tuple:
        """Return what excludes a task from others, in the order in which every task takes it."""
        if not self.is_commutative(number):
            return ()
        signature = self.origin_of(number).signature
        tiles = [self._tile(word) for word in self.words[self.first()[number] :][: len(signature.names)]]
        cells = [
            cell
            for tile, kind in zip(tiles, signature.kinds, strict=True)
            if kind == "commutative"
            for cell in self.calls.place(tile).cells
        ]
        return tuple(sorted({cell.numbered_lock() for cell in cells}))

    def is_commutative(self, number: int) -> bool:
        return "commutative" in self.origin_of(number).signature.kinds


def bits_of(number: float) -> int:
    """Return the word that a double is."""
    return _WORD.unpack(_DOUBLE.pack(number))[0]
