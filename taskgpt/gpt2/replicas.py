"""A model as one of several replicas: ranks with the same parameters, each of which trains on its own micro-batches of a step.

The gradients of the last micro-batch are handed in as backward completes them, layer by layer from the last, in buckets; a bucket is summed
up over all ranks while backward goes on. The gradient of wte, used first and last, comes in two parts: that of the head, which is complete
first, as it is, and at the end that of the embedding, which has only as many rows as there are tokens: these are gathered, not summed.

Parameters are updated when the norm of the whole gradient is known, and so when all buckets are there: until then a rank has the
parameters of the step before, all of them, and after that it needs nobody to have those of this one. A rank that loses the others in the
middle of a step can go on from what it has.

With `is_sharded`, each rank updates the parts of the parameters that it owns, for which alone it needs moments, and the parts are then
spread (ZeRO, stage 1: Rajbhandari et al. 2020). Two ranks then have the same bits as without; more add up in another order.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np

from taskgpt.collectives import GATHER, REDUCE, REDUCE_OWN, SPREAD
from taskgpt.collectives.kernels import exchange_matrix, exchange_numbers, gather_integers, gather_numbers, gather_rows
from taskgpt.tasks import In, InOut, Out, Tile, dims, kernel

A, W = dims("A W")
Spawn = Callable[..., object]
Index = Any  # of a tensor, as in tiles
Part = tuple[int, str, Index]  # place of its squares, parameter, index: see stored_updates.py

WORDS = 4  # that a rank says to all others in a step, in float64: its loss, times its micro-batches, and words for who trains


class Exchange(Protocol):
    """What replicas ask of a communicator."""

    number: int

    def new_bucket(self, what: str, parts: int, owners: Sequence[int] = ()) -> int: ...


def share(micro_batches: int, rank: int, count: int) -> range:
    """Return which micro-batches of a step a rank has: as many as the others, or one more."""
    return range(micro_batches * rank // count, micro_batches * (rank + 1) // count)


class Replica:
    """Which replica a model is, and what its program exchanges. `micro_batches`: of a step, those of all ranks."""

    def __init__(self, rank: int, count: int, micro_batches: int, exchange: Exchange, bucket_bytes: int, is_sharded: bool = False):
        self.rank, self.count, self.micro_batches = rank, count, micro_batches
        self.exchange, self.bucket_bytes, self.is_sharded = exchange, bucket_bytes, is_sharded
        self._owners: dict[tuple, tuple[int, int, int]] = {}  # of each part: the rank, and which elements of the parameter it is
        self._owned = [0] * count  # bytes of each rank's
        self._buckets: list[int] = []  # of a graph, in the order in which it asks for them: every graph uses the same
        self._next = 0
        self._parts: list[tuple[Tile, int]] = []  # of the next bucket, with the rank that owns it

    def begin(self) -> None:
        """Begin to record a graph."""
        self._next = 0

    def owner(self, name: str, index: Index, tile: Tile) -> int:
        """Return the rank that updates a part of the parameters, `tile` of one of its tensors: who has fewest, when it is asked first."""
        known = self._owners.get(key := (name, repr(index)))
        if known is None:
            begin = (tile.array.__array_interface__["data"][0] - tile.tensor.address) // tile.array.itemsize
            known = self._owners[key] = self._owned.index(min(self._owned)), begin, begin + tile.array.size
            self._owned[known[0]] += tile.array.nbytes
        return known[0]

    def owns(self, name: str, index: Index) -> bool:
        """Return True if this rank updates a part that was reduced."""
        return self._owners[name, repr(index)][0] == self.rank

    def owned(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield (parameter, range of its elements) of each part that this rank updates."""
        for (name, _), (owner, begin, end) in self._owners.items():
            if owner == self.rank:
                yield name, (begin, end)

    def _bucket(self, what: str, parts: int, owners: Sequence[int] = ()) -> int:
        if self._next == len(self._buckets):
            self._buckets.append(self.exchange.new_bucket(what, parts, owners))
        self._next += 1
        return self._buckets[self._next - 1]

    # What programs spawn ------------------------------------------------------------------------------------------------------------

    def reduce(self, spawn: Spawn, gradient: Callable[[str], Any], parts: Sequence[Part]) -> None:
        """Add up parts of the gradient over all ranks, when there are enough for a bucket. `gradient(name)`: the tensor."""
        pieces = [(gradient(name), index) for _, name, index in parts]
        if self.is_sharded:
            owners = [self.owner(name, index, gradient(name)[index]) for _, name, index in parts]
        else:
            pieces = _merged(pieces, self.bucket_bytes)
            owners = [0] * len(pieces)
        for (tensor, index), owner in zip(pieces, owners, strict=True):
            self._parts.append((tensor[index], owner))
            if sum(tile.array.nbytes for tile, _ in self._parts) >= self.bucket_bytes:
                self.flush(spawn)

    def flush(self, spawn: Spawn, what: str = "") -> None:
        """Exchange what waits for a full bucket: gradients, or what else `what` says."""
        parts, self._parts = self._parts, []
        if parts:
            owners = [owner for _, owner in parts] if self.is_sharded else []
            bucket = self._bucket(what or (REDUCE_OWN if self.is_sharded else REDUCE), len(parts), owners)
            for place, (tile, _) in enumerate(parts):
                spawn(exchange_matrix, tile, self.exchange.number, bucket, place, section=("network", -1))

    def spread(self, spawn: Spawn, parameter: Callable[[str], Any], parts: Iterable[Part]) -> None:
        """Give all ranks the parameters that each has updated."""
        for _, name, index in parts:
            tile = parameter(name)[index]
            self._parts.append((tile, self.owner(name, index, tile)))
            if sum(tile.array.nbytes for tile, _ in self._parts) >= self.bucket_bytes:
                self.flush(spawn, SPREAD)
        self.flush(spawn, SPREAD)

    def gather_rows(self, spawn: Spawn, rows: Tile, all_rows: Tile, numbers: Tile, all_numbers: Tile) -> None:
        """Gather rows, and an integer for each."""
        bucket, network = self._bucket(GATHER, 2), partial(spawn, section=("network", -1))
        network(gather_rows, all_rows, rows, self.exchange.number, bucket, 0)
        network(gather_integers, all_numbers, numbers, self.exchange.number, bucket, 1)

    def gather_words(self, spawn: Spawn, words: Tile, all_words: Tile) -> None:
        """Gather what ranks say."""
        spawn(gather_numbers, all_words, words, self.exchange.number, self._bucket(GATHER, 1), 0, section=("network", -1))

    def reduce_numbers(self, spawn: Spawn, numbers: Tile) -> None:
        """Add numbers up over all ranks."""
        spawn(exchange_numbers, numbers, self.exchange.number, self._bucket(REDUCE, 1), 0, section=("network", -1))


def _merged(pieces: list[tuple[Any, Index]], most_bytes: int) -> list[tuple[Any, Index]]:
    """Return tiles of one tensor whose rows follow each other as one tile, up to so many bytes; tensors in the order of their first."""
    by_tensor: dict[Any, list[Index]] = {}
    for tensor, index in pieces:
        by_tensor.setdefault(tensor, []).append(index)
    merged: list[tuple[Any, Index]] = []
    for tensor, indices in by_tensor.items():
        for index in indices:
            if merged and merged[-1][0] is tensor:
                joined = _joined(merged[-1][1], index)
                if joined is not None and tensor[joined].array.nbytes <= most_bytes:
                    merged[-1] = tensor, joined
                    continue
            merged.append((tensor, index))
    return merged


def _joined(first: Index, second: Index) -> Index | None:
    """Return the index of two tiles as one, if the last slice of the second begins where that of the first ends."""
    a, b = (index if isinstance(index, tuple) else (index,) for index in (first, second))
    if a[:-1] == b[:-1] and a[-1].stop == b[-1].start:
        whole = (*a[:-1], slice(a[-1].start, b[-1].stop))
        return whole if isinstance(first, tuple) else whole[0]
    return None


# What ranks say to each other -------------------------------------------------------------------------------------------------------------


@kernel
def say_loss(words: InOut[W, np.float64], loss: In[1], micro_batches: int):
    """Put the loss of this rank's micro-batches, times how many they are, before the other words."""
    words[0] = float(loss[0]) * micro_batches


@kernel
def loss_of_all(loss: Out[1], words: In[A, np.float64], micro_batches: int):
    """loss = the mean over all micro-batches of a step, of all ranks, in their order."""
    loss[0] = sum(words[::WORDS].tolist()) / micro_batches


@kernel
def clear(numbers: Out[A, np.float64]):
    """numbers = 0."""
    numbers[:] = 0
