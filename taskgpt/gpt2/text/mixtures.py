"""Batches of several sources, mixed by weight: which sequence of a batch comes from which source.

Each sequence is drawn for itself, so that every batch has nearly the proportions that were asked for: a batch of one source after one of
another would make losses and gradients jump. A source serves its own sequences in its own order and epochs, whatever the others do.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.files import fill
from taskgpt.gpt2.text.tokens import Loader

MIXING_SEED = 43  # not the one that shuffles
GOLDEN = 0x9E3779B97F4A7C15  # 2**64 divided by the golden ratio: its multiples fill the circle evenly, however many there are
WHOLE = 2.0**64


def read_mixture(spec: str) -> list[tuple[str, float]]:
    """Return the sources and weights of `NAME=WEIGHT,NAME=WEIGHT,...`; of the weights only their proportions matter.

    Raises: UserError if a name or a weight is missing, a weight is not above 0, or a name stands twice.
    """
    found: dict[str, float] = {}
    for word in spec.split(","):
        name, sign, written = word.strip().rpartition("=")
        try:
            weight = float(written)
        except ValueError:
            weight = 0.0
        if not name or not sign or not 0 < weight < float("inf"):
            raise UserError(
                f"data '{shorten(spec)}': '{shorten(word)}' is no NAME=WEIGHT with a weight above 0; write for instance "
                "tinyshakespeare=0.3,my.txt=0.7, with names that hold no comma"
            )
        if name in found:
            raise UserError(f"data '{shorten(spec)}': {shorten(name)} stands in it twice; add up its weights")
        found[name] = weight
    return list(found.items())


@dataclass(frozen=True)
class _Cursor:
    batches: int = field(metadata={"at_least": 0})
    """Served in all."""
    sources: list[dict[str, Any]]
    """Their own cursors."""


class Mixture:
    """Batches of B sequences of T tokens, each from one of the sources; has the methods of a Loader.

    The source of a sequence follows from its number alone. Shuffled, it is drawn with the weights as probabilities. In order, the sources
    take turns as evenly as their weights let them, so that each validation, however short, sees them in the same proportions.
    """

    def __init__(self, sources: Sequence[Loader], weights: Sequence[float], B: int, *, shuffle: bool = False):
        """`sources` have a batch size of 1, and the same T."""
        self.B, self.T, self.shuffle = B, sources[0].T, shuffle
        self._sources, self._weights = list(sources), list(weights)
        shares = np.array(weights) / max(weights)  # whose sum is finite
        self._shares = shares / shares.sum()
        self._ends = np.cumsum(self._shares)[:-1]
        self._batches = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of all sources."""
        return sum(source.num_tokens for source in self._sources)

    @property
    def num_batches(self) -> int:
        """Batches until a source has, on average, served all that it has; at least 1."""
        most = min(source.num_batches / share for source, share in zip(self._sources, self._shares, strict=True))
        return max(1, int(most // self.B))

    def reset(self):
        """Begin an epoch of each source, and the first turn. What is shuffled is drawn anew, and does not return to the first order."""
        for source in self._sources:
            source.reset()
        if not self.shuffle:
            self._batches = 0

    def cursor(self) -> dict[str, Any]:
        """Return where the mixture is, for JSON: `restore` with it goes on with the batch that is next here."""
        return {"batches": self._batches, "sources": [source.cursor() for source in self._sources]}

    def restore(self, cursor: Any):
        """Go on where another mixture of the same data was. Raises: UserError as `Loader.restore`; it then stays where it is."""
        found: _Cursor = fill(_Cursor, cursor, "cursor: ")
        if len(found.sources) != len(self._sources):
            raise UserError(
                f"cursor: of {len(found.sources)} sources, but this data has {len(self._sources)}; give the data that the run had"
            )
        before = [source.cursor() for source in self._sources]
        try:
            for source, each in zip(self._sources, found.sources, strict=True):
                source.restore(each)
        except UserError:
            for source, each in zip(self._sources, before, strict=True):
                source.restore(each)
            raise
        self._batches = found.batches

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells other data apart, for JSON: the weights, and of each source as `Loader.fingerprint`."""
        return {"shuffle": self.shuffle, "weights": self._weights, "sources": [source.fingerprint() for source in self._sources]}

    def next_batch(self, inputs: np.ndarray, targets: np.ndarray):
        """Fill inputs and targets, int32 (B, T) each, with the next batch. Raises: UserError as `Loader.next_batch`."""
        for row, source in enumerate(self._drawn()):
            self._sources[source].next_batch(inputs[row : row + 1], targets[row : row + 1])
        self._batches += 1

    def _drawn(self) -> list[int]:
        """Return which source each sequence of the next batch is from."""
        if self.shuffle:
            # A generator whose numbers follow from a counter: there is no state to keep. Only the raw ones are the same in every NumPy.
            raw = np.random.Philox(key=MIXING_SEED, counter=[0, self._batches, 0, 0]).random_raw(self.B)
        else:
            raw = np.array([number * GOLDEN % 2**64 for number in range(self._batches * self.B, (self._batches + 1) * self.B)], np.uint64)
        return np.searchsorted(self._ends, raw / WHOLE, side="right").tolist()
