"""Messages between ranks over Dask's own comms: a rank dials the other's worker at its address, as Dask does to fetch a result.

So no port is opened beside the cluster's, and TCP, TLS or UCX and the cluster's certificates hold for these messages as for Dask's. A pair
of ranks has a comm from the moment that one of them sends or waits; each side sends a heartbeat on it. Nothing of ours is pickled.

    links = await connected(get_worker(), run, generation, rank, addresses)    # on the worker's event loop
    await links.send(1, ("gradients", 7), [array])
    ...
    await links.close()
"""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from distributed import Worker
from distributed.comm import Comm
from distributed.core import Status, connect
from distributed.protocol.serialize import Serialized

from taskgpt.collectives.links import PeerLost, Tag

TIMEOUT_S = 10.0
START_S = 120.0
_HANDLER = "taskgpt_links"
_PIECE_BYTES = (
    8 << 20
)  # at once on a comm: a heartbeat waits for no more. Costs who receives 0.4 s of a core a GiB; 1 MiB 1.1 s, 32 MiB 0.5 s
_GOODBYE_S = 1.0  # a rank that fails tells the others why, if they listen
_NOTHING = np.empty(0, np.uint8)


async def connected(
    worker: Worker,
    run: str,
    generation: int,
    rank: int,
    addresses: Sequence[str],
    timeout_s: float = TIMEOUT_S,
    start_s: float = START_S,
) -> "DaskLinks":
    """Return the links of a rank, whose generation begins here. What is left of the run's earlier one in this worker ends.

    `addresses`: of the ranks' workers. A peer whose comm closes, or from which nothing has come for `timeout_s`, ends the generation. One
    whose worker answers may begin up to `start_s` later. Raises PeerLost if the worker knows of this generation or of a later one.
    """
    listen(worker)
    here = _places[worker]
    if generation <= here.newest.get(run, -1):
        raise PeerLost(f"generation {generation} of run {run} is over: rank {rank} ({worker.address}) has seen {here.newest[run]}")
    if before := here.links.get(run):
        before.fail(f"generation {generation} has begun")
    here.newest[run] = generation
    links = here.links[run] = DaskLinks(worker, run, generation, rank, addresses, timeout_s, start_s)
    return links


def listen(worker: Worker) -> None:
    """Have a worker answer ranks that dial it before its own begins."""
    if worker not in _places:
        here = _places[worker] = _Place()
        worker.handlers[_HANDLER] = here.answer


def end(worker: Worker, run: str, why: str) -> None:
    """End what a worker has of a run, if it has, as `fail` does."""
    if worker in _places and (links := _places[worker].links.get(run)):
        links.fail(why)


@dataclass
class _Link:
    """A comm with another rank."""

    comm: Comm
    rank: int
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # the other has said goodbye, or the comm is closed
    beats_since: int = 0  # our own, since something came: while this process is stopped it counts nothing
    sent: int = 0  # bytes
    received: int = 0


class DaskLinks:
    """Carries messages between this rank and the others. Made by `connected`; coroutines run on the worker's event loop."""

    def __init__(
        self, worker: Worker, run: str, generation: int, rank: int, addresses: Sequence[str], timeout_s: float, start_s: float
    ) -> None:
        self.rank, self.count, self.generation = rank, len(addresses), generation
        self.loop = asyncio.get_running_loop()
        self.sent_bytes = self.received_bytes = 0
        self._worker, self._run, self._addresses = worker, run, list(addresses)
        self._timeout_s, self._start_s = timeout_s, start_s
        self._links: list[_Link] = []
        self._dials: dict[int, asyncio.Task[_Link | None]] = {}
        self._boxes: dict[tuple[int, Tag], asyncio.Future[np.ndarray | None]] = {}
        self._parts: dict[tuple[int, Tag], tuple[np.ndarray, int]] = {}  # of messages of several pieces: the array, and how much has come
        self._ended: set[int] = set()  # ranks that have said goodbye
        self.over = ""  # why nothing is sent or received any more
        self._leaving: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._start(self._beat())

    async def send(self, to: int, tag: Tag, buffers: Sequence[np.ndarray]) -> None:
        """Send arrays, whose elements lie side by side, as one message; when it returns, they may be written again.

        Raises PeerLost. Cancelled half way, it ends the generation. A single array of at most 8 MiB goes without a copy of ours.
        """
        flat = [buffer.ravel(order="K").view(np.uint8) for buffer in buffers]
        total = sum(part.size for part in flat)
        link = await self._link(to)
        try:
            for piece in _pieces(flat):
                await self._write(link, {"tag": tag, "bytes": total}, piece)
        except asyncio.CancelledError:
            self.fail(f"message {tag} to {self._name(to)} was cancelled half way")
            raise

    async def receive(self, source: int, tag: Tag) -> np.ndarray:
        """Wait for a message, and return its bytes, uint8. Messages may be asked for in any order. Raises PeerLost."""
        self._verify_not_over()
        key = source, tag
        box = self._box(key)
        if not box.done():
            self._verify_there(source)
            if not self._open(source):
                self._dial(source)  # that it is there is to be noticed, and that it dies
        data = await asyncio.shield(box)
        if data is None:
            self._verify_not_over()
            self._verify_there(source)
        del self._boxes[key]
        return data

    def fail(self, why: str) -> None:
        """End this generation here, from any thread: who waits gets PeerLost, and the others, whose comms close, get it too."""
        told = f"rank {self.rank} ({self._worker.address_safe}): {why}"
        with suppress(RuntimeError):  # a loop that is closed has ended it
            self.loop.call_soon_threadsafe(self._end, why, told)

    async def close(self) -> None:
        """End this rank's part, when nobody waits for a message here; what it has sent arrives. Return when no task and no comm is left."""
        self._end("this rank has closed its links", "")
        assert self._leaving
        await asyncio.shield(self._leaving)

    # Messages -------------------------------------------------------------------------------------------------------------------------

    async def _write(self, link: _Link, message: dict[str, Any], piece: np.ndarray | None = None) -> None:
        """Write a message, and wait until its piece of data is with the operating system."""
        self._verify_not_over()
        n = 0
        if piece is not None:
            n = piece.size
            if link.comm.peer_address.startswith("inproc"):
                piece = piece.copy()  # the other gets this very array
            # Two frames: Dask reads the first together with the header, so that the second begins at a whole address.
            message = {**message, "data": Serialized({}, [_NOTHING.data, piece.data])}
        try:
            async with link.writing:
                written = max(await link.comm.write({**message, "sent": link.sent}), n)
                link.sent += written
                self.sent_bytes += written
                if n and (stream := getattr(link.comm, "stream", None)):
                    await stream.write(b"")  # Dask's own write does not wait for it
        except OSError as error:
            self._lose(link)
            self._verify_not_over()
            raise PeerLost(f"{self._name(link.rank)} has ended its part") from error

    async def _read(self, link: _Link) -> None:
        """Take what comes on a comm, until it closes."""
        try:
            with suppress(OSError):
                while not link.gone.is_set():
                    message = await link.comm.read()
                    link.beats_since = 0
                    piece = np.frombuffer(message["data"].frames[1], np.uint8) if "data" in message else _NOTHING
                    received = message["sent"] + piece.size  # what frames it is known with the next message
                    self.received_bytes += received - link.received
                    link.received = received
                    if "end" in message:
                        await self._hear_end(link, message["end"])
                    elif "tag" in message:
                        self._take((link.rank, message["tag"]), message["bytes"], piece)
        finally:
            link.gone.set()
            self._lose(link)

    def _take(self, key: tuple[int, Tag], total: int, piece: np.ndarray) -> None:
        """Put a piece of a message to the others of it; deliver the message when it is whole."""
        if self.over:
            return
        if piece.size < total:
            whole, filled = self._parts.pop(key, None) or (np.empty(total, np.uint8), 0)
            whole[filled : filled + piece.size] = piece
            if filled + piece.size < total:
                self._parts[key] = whole, filled + piece.size
                return
            piece = whole
        elif piece.ctypes.data % 16:
            piece = piece.copy()
        box = self._box(key)
        if box.done():
            self.fail(f"two messages {key[1]} from {self._name(key[0])} at a time")
        else:
            box.set_result(piece)

    def _box(self, key: tuple[int, Tag]) -> "asyncio.Future[np.ndarray | None]":
        """Return where a message is put, whoever comes first: the message, or who waits for it."""
        return self._boxes.get(key) or self._boxes.setdefault(key, self.loop.create_future())

    # Comms ----------------------------------------------------------------------------------------------------------------------------

    async def _link(self, rank: int) -> _Link:
        """Return a comm with a rank. Raises PeerLost."""
        self._verify_not_over()
        self._verify_there(rank)
        link = self._open(rank) or await asyncio.shield(self._dial(rank))
        if link is None:
            self._verify_not_over()
        return link

    def _open(self, rank: int) -> _Link | None:
        return next((link for link in self._links if link.rank == rank), None)

    def _dial(self, rank: int) -> "asyncio.Task[_Link | None]":
        if rank not in self._dials:
            self._dials[rank] = self._start(self._dialled(rank))
            self._dials[rank].add_done_callback(lambda _: self._dials.pop(rank))
        return self._dials[rank]

    async def _dialled(self, rank: int) -> _Link | None:
        """Open a comm with a rank; None if that ends the generation."""
        late, pause = self.loop.time() + self._start_s, 0.02
        while not (link := self._open(rank)):
            try:
                async with asyncio.timeout(self._timeout_s):
                    comm, answer = await self._ask(rank)
            except (OSError, TimeoutError) as error:
                self._end(f"{self._name(rank)} cannot be reached: {str(error) or f'no answer within {self._timeout_s:g} s'}")
                return None
            if "welcome" in answer:
                link = _Link(comm, rank)
                self._links.append(link)
                self._start(self._read(link))
                break
            comm.abort()
            if "later" not in answer or self.loop.time() > late:
                self._end(f"{self._name(rank)} {answer.get('no') or answer['later']}")
                return None
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)
        return link

    async def _ask(self, rank: int) -> tuple[Comm, dict[str, Any]]:
        """Dial a rank's worker; return a comm, and what it answers."""
        hello = {"run": self._run, "generation": self.generation, "rank": self.rank, "count": self.count}
        comm = await connect(self._addresses[rank], timeout=self._timeout_s, deserialize=False, **self._worker.connection_args)
        try:
            await comm.write({"op": _HANDLER, "close": True, **hello})
            return comm, await comm.read() or {"later": "has no rank yet"}  # None: the worker does not listen yet
        except BaseException:
            comm.abort()
            raise

    async def take(self, comm: Comm, rank: int) -> None:
        """Serve a comm that another rank has dialled, until it closes."""
        await comm.write({"welcome": True})
        if not self.over:
            link = _Link(comm, rank)
            self._links.append(link)
            await self._read(link)

    async def _beat(self) -> None:
        """Send heartbeats, and end the generation when another rank's do not come."""
        every_s = min(1.0, self._timeout_s / 5)
        while not self.over:
            await asyncio.sleep(every_s)
            if self._worker.status in (Status.closing, Status.closed, Status.failed):
                self.fail("its worker closes")
            for link in list(self._links):
                link.beats_since += 1
                if link.beats_since * every_s > self._timeout_s:
                    self._end(f"{self._name(link.rank)} was silent for {self._timeout_s:g} s")
                elif not link.writing.locked():  # what is being written says that we are there
                    self._start(self._beat_once(link))

    async def _beat_once(self, link: _Link) -> None:
        with suppress(PeerLost):
            await self._write(link, {})

    # The end --------------------------------------------------------------------------------------------------------------------------

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._addresses[rank]})"

    def _verify_not_over(self) -> None:
        if self.over:
            raise PeerLost(f"generation {self.generation} is over: {self.over}")

    def _verify_there(self, rank: int) -> None:
        if rank in self._ended:
            raise PeerLost(f"{self._name(rank)} has ended its part of generation {self.generation}")

    def _lose(self, link: _Link) -> None:
        if link in self._links:  # has not said goodbye
            self._end(f"{self._name(link.rank)} is lost: its connection closed")

    async def _hear_end(self, link: _Link, why: str) -> None:
        """Take another rank's goodbye: it fails, or has ended its part."""
        link.gone.set()
        if why:
            self._end(why)
        if self.over:
            return  # we say goodbye too, or have
        self._links.remove(link)
        if not self._open(link.rank):  # on the other comm of two that dialled each other, something may come before the goodbye
            self._ended.add(link.rank)
            for (source, _), box in self._boxes.items():
                if source == link.rank and not box.done():
                    box.set_result(None)
        await self._say_end(link, "")

    def _end(self, why: str, told: str | None = None) -> None:
        """End the generation here, and tell the others why; an empty `told`: as agreed."""
        if self.over:
            return
        self.over = why
        for box in self._boxes.values():
            if not box.done():
                box.set_result(None)
        self._boxes.clear()
        self._parts.clear()
        if _places[self._worker].links.get(self._run) is self:
            del _places[self._worker].links[self._run]
        self._leaving = self.loop.create_task(self._leave(why if told is None else told))

    async def _leave(self, told: str) -> None:
        links, self._links = self._links, []
        await asyncio.gather(*(self._say_end(link, told) for link in links))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _say_end(self, link: _Link, told: str) -> None:
        """Write the last message on a comm, and close it when the other has read it."""
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_S if told else self._timeout_s):
                async with link.writing:
                    await link.comm.write({"end": told, "sent": link.sent})
                await link.gone.wait()  # closed before, what we have not read yet would take back what the other has not
                await link.comm.close()
        link.comm.abort()

    def _start(self, coroutine: Any) -> "asyncio.Task[Any]":
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Place:
    """What a worker knows of the ranks in it."""

    def __init__(self) -> None:
        self.links: dict[str, DaskLinks] = {}  # of the generation that each run is in
        self.newest: dict[str, int] = {}  # generation of each run; what is no newer is over

    async def answer(self, comm: Comm, run: str, generation: int, rank: int, count: int) -> Status:
        """Answer a rank that dials: welcome, later, or no, and why."""
        links, newest = self.links.get(run), self.newest.get(run, -1)
        if newest < generation:
            await comm.write({"later": f"has not begun generation {generation} of run {run}"})
        elif links is None or links.generation != generation:
            await comm.write({"no": f"refused: generation {generation} of run {run} is over there, the newest is {newest}"})
        elif count != links.count or not 0 <= rank < count or rank == links.rank:
            await comm.write({"no": f"refused: it is rank {links.rank} of {links.count}, and was dialled by rank {rank} of {count}"})
        else:
            comm.deserialize = False
            await links.take(comm, rank)
        return Status.dont_reply


_places: WeakKeyDictionary[Worker, _Place] = WeakKeyDictionary()


def _pieces(flat: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the bytes of a message in pieces; one that is empty for an empty message."""
    full = [part for part in flat if part.size] or [_NOTHING]
    for part in full:
        yield from (part[start : start + _PIECE_BYTES] for start in range(0, max(part.size, 1), _PIECE_BYTES))
