"""One trace of a run on a cluster: what a rank hands out of what it recorded, and how the driver fetches and merges it.

A rank's times are of its machine's monotonic clock. Between machines the driver measures how far theirs are from its own: it asks for the
time some times, at the begin and at the end of a generation, and believes the fastest answers; between the two a clock drifts evenly.
Processes of one machine have one clock, which the system's boot id tells.
"""

import asyncio
import hashlib
import io
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from distributed import Client, Worker
from distributed.core import ConnectionPool

from taskgpt.cluster.job import END, Ended, Job
from taskgpt.cluster.kept import fetch
from taskgpt.collectives import Noted, Transfer
from taskgpt.lab.traces.network import EXCHANGE_TYPE, WHATS
from taskgpt.lab.traces.process import boot_id
from taskgpt.lab.traces.ranks import NOTED_TYPE, Clock, Part, merged
from taskgpt.lab.traces.trace import Trace, Traced

_ASKED = 20  # times that a clock is asked
_TRACE, _EXCHANGES, _NOTED = "trace", "trace exchanges", "trace messages"  # names of what is offered


# In the worker ----------------------------------------------------------------------------------------------------------------------------


def answer_clock(worker: Worker) -> None:
    """Have a worker tell the driver what its clock says."""
    worker.handlers["taskgpt_clock"] = lambda: {"ns": time.monotonic_ns(), "boot": boot_id()}


def offers(traced: Traced, transfers: Sequence[Transfer], noted: Sequence[Noted]) -> dict[str, np.ndarray]:
    """Return, for the driver to fetch, the trace of a rank, its exchanges and its messages."""
    file = io.BytesIO()
    traced.trace().put(file)
    exchanges = [(0, t.bucket, t.turn, WHATS.index(t.what), t.first_ns, t.begin_ns, t.end_ns, t.payload_bytes) for t in transfers]
    messages = [(m.peer, m.is_sent, *_tag(m.tag), m.nbytes, m.begin_ns, m.end_ns) for m in noted]
    return {
        _TRACE: np.frombuffer(file.getvalue(), np.uint8),
        _EXCHANGES: np.array(exchanges, EXCHANGE_TYPE),
        _NOTED: np.array(messages, NOTED_TYPE),
    }


def _tag(tag: tuple) -> tuple[int, int]:
    """Return the bucket of a message, -1 if it is of none, and a number for all of its tag."""
    bucket = tag[0] if isinstance(tag[0], int) else -1
    return bucket, int.from_bytes(hashlib.blake2b(repr(tag).encode(), digest_size=7).digest(), "little")


# In the driver ----------------------------------------------------------------------------------------------------------------------------


class Traces:
    """Collects what the ranks of a run have recorded. notes: what is missing, and why."""

    def __init__(self, client: Client, timeout_s: float):
        self._client, self._timeout_s = client, timeout_s
        self._names: dict[str, str] = {}  # of processes, by their addresses, in the order in which they took part
        self._parts: list[Part] = []
        self._clocks: dict[str, list[tuple[int, int, int]]] = {}  # of this generation: what `_ask` found
        self.notes: list[str] = []

    def begin(self, job: Job) -> None:
        """Take note of a generation whose ranks have begun."""
        self._clocks = {address: [] for address in job.addresses}
        for address in job.addresses:
            self._names.setdefault(address, f"rank {len(self._names)} {address}")
        self._measure(job.addresses)

    def collect(self, job: Job, ended: dict[int, Ended]) -> None:
        """Fetch what these ranks of a generation have recorded."""
        if not self._clocks:
            return  # none has begun
        places = {address: at for at, address in enumerate(self._names)}
        peers = [places[address] for address in job.addresses]
        self._measure([job.addresses[rank] for rank in ended])
        for rank, address in enumerate(job.addresses):
            sizes = ended[rank].traced if rank in ended else ()
            if not sizes:
                self.notes.append(f"the trace has nothing of {self._names[address]} in generation {job.generation}: it was lost")
                continue
            types = np.dtype(np.uint8), EXCHANGE_TYPE, NOTED_TYPE
            arrays = {name: np.empty(size, of) for name, size, of in zip((_TRACE, _EXCHANGES, _NOTED), sizes, types, strict=True)}
            try:
                whole = {name: [(0, len(each))] for name, each in arrays.items()}
                self._client.sync(fetch, self._client.rpc, address, job.run, job.offer_of(END), arrays, whole, self._timeout_s)
            except (OSError, LookupError) as error:
                self.notes.append(f"the trace has nothing of {self._names[address]} in generation {job.generation}: {error}")
                continue
            trace = Trace.parse(arrays[_TRACE].tobytes(), f"trace of rank {rank} ({address})")
            own = arrays[_EXCHANGES], arrays[_NOTED], self._clock(address)
            self._parts.append(Part(places[address], peers, job.generation, trace, *own))
        self._clocks = {}

    def merged(self, about: dict[str, Any]) -> Trace | None:
        """Return the trace of all, None if there is nothing. Raises ValueError if it holds what cannot be."""
        if not self._parts:
            return None
        trace = merged(list(self._names.values()), self._parts, about)
        trace.verify()
        return trace

    def _measure(self, addresses: Sequence[str]) -> None:
        for address in addresses:
            with suppress(OSError):  # it is gone, which is noticed otherwise
                self._clocks[address].append(self._client.sync(_ask, self._client.rpc, address, self._timeout_s))

    def _clock(self, address: str) -> Clock:
        found = self._clocks[address]
        if not found:
            return Clock()
        at, add, error = zip(*found, strict=True)
        return Clock(at, add, max(error))


async def _ask(pool: ConnectionPool, address: str, timeout_s: float) -> tuple[int, int, int]:
    """Return what a clock says, how far ours is ahead of it then, and how wrong that may be, in ns. Raises OSError."""
    found = []
    for _ in range(_ASKED):
        before_ns = time.monotonic_ns()
        answer = await asyncio.wait_for(pool(address).taskgpt_clock(), timeout_s)
        after_ns = time.monotonic_ns()
        if answer["boot"] and answer["boot"] == boot_id():
            return answer["ns"], 0, 0
        found.append(((after_ns - before_ns) // 2, answer["ns"], (before_ns + after_ns) // 2 - answer["ns"]))
    error, at, add = min(found)
    return at, add, error
