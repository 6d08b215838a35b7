"""A part of the batches of a step, where several ranks share them."""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np


class Batches(Protocol):
    """What a Loader and a Mixture have."""

    B: int
    T: int

    def next_batch(self, inputs: np.ndarray, targets: np.ndarray) -> None: ...

    def cursor(self) -> dict[str, Any]: ...

    def restore(self, cursor: Any) -> None: ...


class Part:
    """Of every `count` batches, those of a range: next_batch gives one after the other, and passes over those of the other ranks.

    Between two of these groups it is where everybody is: `cursor` and `restore` are those of the batches themselves.
    """

    def __init__(self, batches: Batches, mine: range, count: int):
        self._batches, self._mine, self._count = batches, mine, count
        self._others = np.empty((2, batches.B, batches.T), np.int32)
        self._turns = self._walk()

    def next_batch(self, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Fill inputs and targets with the next batch of this part."""
        next(self._turns)
        self._batches.next_batch(inputs, targets)
        if self._is_last:
            self._pass(self._count - self._mine.stop)

    def _walk(self) -> Iterator[None]:
        while True:
            self._pass(self._mine.start)
            for at in self._mine:
                self._is_last = at == self._mine[-1]
                yield

    def _pass(self, batches: int) -> None:
        for _ in range(batches):
            self._batches.next_batch(*self._others)

    def cursor(self) -> dict[str, Any]:
        """Return where all ranks are. Between two groups alone."""
        return self._batches.cursor()

    def restore(self, cursor: Any) -> None:
        """Go on at the beginning of a group."""
        self._batches.restore(cursor)
        self._turns = self._walk()
