"""Parts of a graph that are recorded again, alone, when what they hang on has changed: a sparse pattern, say.

    with graph.part() as assembly:
        assemble(graph.spawn, pattern)
    solve(graph.spawn)
    ...
    with assembly:                          # what is spawned now takes the place of what was there
        assemble(graph.spawn, new_pattern)

The graph is then the one that recording all of it would make.
"""

import itertools
from typing import Protocol, Self

_serials = itertools.count()


class Recording(Protocol):
    """What a part needs of its graph."""

    def begin_part(self, part: "Part") -> int: ...

    def end_part(self, part: "Part", begin: int) -> None: ...

    def drop_part(self, part: "Part", begin: int) -> None: ...


class Part:
    """The tasks that were spawned in its `with` block, last time: `numbers`, a range."""

    def __init__(self, graph: Recording):
        self._graph = graph
        self._begin = 0
        self.serial = 0  # of its first block: of two parts in the same one, the later has the larger
        self.begun = 0  # the serial of its last block, which what was first recorded there exceeds
        self.outer: tuple[Part, ...] = ()  # the parts that this one lies in
        self.is_gone = False  # a part around it was recorded again
        self.numbers: range | None = None  # not yet recorded

    def __enter__(self) -> Self:
        self._begin = self._graph.begin_part(self)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self._graph.end_part(self, self._begin)
        else:
            self._graph.drop_part(self, self._begin)

    def begin(self, around: "Part | None") -> None:
        """Take note that a block begins, in that of another part."""
        self.begun = next(_serials)
        if self.numbers is None:
            self.serial, self.outer = self.begun, (*around.outer, around) if around else ()

    def shift(self, other: "Part", begin: int, count: int) -> None:
        """Take note that another part was recorded again, as so many tasks, which were the last ones, from `begin` on."""
        mine, others = self.numbers, other.numbers
        if mine is None or others is None:
            return
        moved = count - len(others)
        if other in self.outer and self.serial < other.begun:
            self.is_gone = True
        elif other in self.outer:
            self.numbers = _moved(mine, others.start - begin)
        elif self in other.outer:
            self.numbers = range(mine.start, mine.stop + moved)
        elif self._is_behind(other):
            self.numbers = _moved(mine, moved)

    def _is_behind(self, other: "Part") -> bool:
        """Return True if it comes after another part, none of which lies in the other."""
        apart = zip((*self.outer, self), (*other.outer, other), strict=False)
        return next(mine.serial > others.serial for mine, others in apart if mine is not others)


def _moved(numbers: range, by: int) -> range:
    return range(numbers.start + by, numbers.stop + by)
