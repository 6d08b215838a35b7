"""A communicator: the buckets that a rank exchanges with the others, in collectives that begin when all parts of a bucket are handed in.

A part is a tile, handed in by a task of its own (kernels.py), which waits for an event, so that no worker waits for the network. When the
last part of a bucket is there, its collective runs on the links' loop, beside those of other buckets, and then fulfils the events of all.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from taskgpt.collectives.links import Links, PeerLost
from taskgpt.collectives.ring import all_gather, compile_all, deal, deal_to, reduce_scatter
from taskgpt.tasks.spawn import Event

REDUCE, REDUCE_OWN, SPREAD, GATHER, MOVE = "reduce", "reduce-own", "spread", "gather", "move"


class Transfer(NamedTuple):
    """What became of a bucket once: its number and what is done with it, how often it was exchanged before, when its first and its last
    part were handed in, and when it was done, by time.monotonic_ns(); payload_bytes that this rank sent for it."""

    bucket: int
    what: str
    turn: int
    first_ns: int
    begin_ns: int
    end_ns: int
    payload_bytes: int


@dataclass
class _Bucket:
    """How its parts are exchanged. `owners`: of each part, the rank that has the whole of it; empty: parts are cut for all ranks."""

    what: str
    parts: int
    owners: tuple[int, ...]
    arrays: dict[int, np.ndarray] = field(default_factory=dict)  # those handed in so far
    events: list[Event] = field(default_factory=list)
    first_ns: int = 0
    times: int = 0  # how often it was exchanged


class Communicator:
    """What a rank exchanges with the others of its generation, over links. `number` is its name in kernels' constants.

    `as_bf16`: gradients on the wire. `transfers`: of all buckets that are done, until `take_transfers`.
    """

    def __init__(self, links: Links, as_bf16: bool = False):
        compile_all()
        self.links, self.as_bf16 = links, as_bf16
        self.number = next(_numbers)
        self._buckets: list[_Bucket] = []
        self._lock = threading.Lock()
        self._running: set[asyncio.Task] = set()
        self._failure: BaseException | None = None
        self._transfers: list[Transfer] = []
        self._gathers = itertools.count()
        self._is_gathering = False
        _communicators[self.number] = self

    def close(self) -> None:
        """Have no kernel find it any more."""
        _communicators.pop(self.number, None)

    def new_bucket(self, what: str, parts: int, owners: Sequence[int] = ()) -> int:
        """Return the number of a new bucket. All ranks ask for the same ones in the same order.

        `what`: REDUCE, all parts summed up on all ranks; REDUCE_OWN, each on its owner alone; SPREAD, each from its owner to all; GATHER,
        a part of as many equal pieces as there are ranks, of which each rank has its own; MOVE, its one part from the first of `owners` to
        the second, and other ranks hand none in.
        """
        self._buckets.append(_Bucket(what, parts, tuple(owners)))
        return len(self._buckets) - 1

    def hand_in(self, number: int, place: int, array: np.ndarray, happened: Event) -> None:
        """Take a part of a bucket, whose elements lie side by side; from then on it is the communicator's, until the event is fulfilled."""
        flat = array.reshape(-1)
        if flat.size and not np.shares_memory(flat, array):
            raise ValueError(f"part {place} of bucket {number}: wanted rows that follow each other in memory, got strides {array.strides}")
        now_ns = time.monotonic_ns()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            bucket = self._buckets[number]
            bucket.first_ns = bucket.first_ns or now_ns
            bucket.arrays[place] = flat
            bucket.events.append(happened)
            is_whole = len(bucket.arrays) == bucket.parts
        if is_whole:
            self.links.loop.call_soon_threadsafe(self._begin, number)

    def _begin(self, number: int) -> None:
        task = self.links.loop.create_task(self._exchange(number))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _exchange(self, number: int) -> None:
        bucket, begin_ns = self._buckets[number], time.monotonic_ns()
        arrays = [bucket.arrays[place] for place in range(bucket.parts)]
        tag = (number, bucket.times)
        try:
            sent = await self._run(bucket, arrays, tag)
        except asyncio.CancelledError:
            self.fail(PeerLost("this generation is over"))
            raise
        except Exception as error:  # also a defect: no task is to wait for ever
            self.fail(error)
            return
        with self._lock:
            if self._failure is not None:
                return
            events, bucket.events, bucket.arrays = bucket.events, [], {}
            self._transfers.append(Transfer(number, bucket.what, bucket.times, bucket.first_ns, begin_ns, time.monotonic_ns(), sent))
            bucket.first_ns, bucket.times = 0, bucket.times + 1
        for event in events:
            event.fulfil()

    async def _run(self, bucket: _Bucket, arrays: list[np.ndarray], tag: tuple[int, int]) -> int:
        """Run a bucket's collective; return how many bytes of its arrays this rank has sent."""
        links, count = self.links, self.links.count
        if bucket.what == MOVE:
            source, to = bucket.owners
            if links.rank == source:
                await links.send(to, tag, arrays)
                return sum(array.nbytes for array in arrays)
            arrays[0][:] = (await links.receive(source, tag)).view(arrays[0].dtype)
            return 0
        if bucket.what == GATHER:
            sent = 0
            for part, array in enumerate(arrays):
                await all_gather(links, [[piece] for piece in np.split(array, count)], (*tag, part))
                sent += array.nbytes * (count - 1) // count
            return sent
        chunks = deal_to(arrays, bucket.owners, count) if bucket.owners else deal(arrays, count)
        sizes = [sum(part.nbytes // (2 if self._halves(part) else 1) for part in chunk) for chunk in chunks]
        sent = 0
        if bucket.what != SPREAD:
            await reduce_scatter(links, chunks, (*tag, 0), self.as_bf16)
            sent += sum(sizes) - sizes[links.rank]
        if bucket.what == REDUCE:
            await all_gather(links, chunks, (*tag, 1), self.as_bf16)
            sent += sum(sizes) - sizes[(links.rank + 1) % count]
        elif bucket.what == SPREAD:
            await all_gather(links, chunks, (*tag, 1))
            sent += sum(part.nbytes for chunk in chunks for part in chunk) - sum(part.nbytes for part in chunks[(links.rank + 1) % count])
        return sent

    def _halves(self, part: np.ndarray) -> bool:
        return self.as_bf16 and part.dtype == np.float32

    def gather(self, rows: np.ndarray) -> None:
        """Fill an array, whose row r rank r has written, with all rows, and wait for that; outside of graphs. Raises PeerLost."""
        tag = ("rows", next(self._gathers))
        chunks = [[row.reshape(-1)] for row in rows]
        self._is_gathering = True
        try:
            asyncio.run_coroutine_threadsafe(all_gather(self.links, chunks, tag), self.links.loop).result()
        finally:
            self._is_gathering = False

    @property
    def is_exchanging(self) -> bool:
        """True while this rank waits for what others send it, or sends."""
        return self._is_gathering or bool(self._running)

    def verify_goes_on(self) -> None:
        """Raise PeerLost if this generation is over, which a rank without others notices in no other way."""
        if self.links.over:
            raise PeerLost(f"this generation is over: {self.links.over}")

    def fail(self, error: BaseException) -> None:
        """Have every task fail that waits for an exchange, and those to come. From any thread."""
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            events = [event for bucket in self._buckets for event in bucket.events]
        for event in events:
            event.fail(error)

    def take_transfers(self) -> list[Transfer]:
        """Return what was exchanged since the last call, in the order of its ends."""
        with self._lock:
            taken, self._transfers = self._transfers, []
        return taken


def communicator(number: int) -> Communicator:
    """Return the communicator of that number. Raises PeerLost if it is closed."""
    found = _communicators.get(number)
    if found is None:
        raise PeerLost("this generation is over: its communicator is closed")
    return found


_numbers = itertools.count(1)
_communicators: dict[int, Communicator] = {}
