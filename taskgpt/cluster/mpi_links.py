"""Messages between ranks over MPI, where mpiexec has started the cluster's workers: over the interconnect that MPI knows.

A message is two of MPI's, on a communicator that all ranks have anyhow: a head, which says whose run, which generation, which tag and how
many bytes, and then the bytes. MPI keeps the order of what one process sends another. A thread looks for what has come, as MPI calls
nobody; it sends a heartbeat each second. When a process dies, MPI ends the whole job: that a rank is stopped is noticed here.
"""

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from taskgpt.collectives.links import PeerLost, Tag
from taskgpt.errors import UserError

_HEAD, _BODY = 7701, 7702  # MPI's tags of ours: nobody else here sends messages by MPI, Dask does not
_IDLE_S = 50e-6  # between looks when nothing comes
_BEAT_S = 1.0
_heads: dict[int, deque[list]] = {}  # by sender, of messages whose bodies are yet to come, maybe in a later generation of this process


class MpiLinks:
    """Carries messages between this rank and the others. `peers`: MPI's number of each rank. Coroutines run on `loop`."""

    def __init__(self, run: str, generation: int, rank: int, peers: Sequence[int], timeout_s: float, loop: asyncio.AbstractEventLoop):
        """Raises UserError if MPI was started so that only one thread may call it."""
        from mpi4py import MPI

        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            raise UserError("MPI was started for one thread; take collectives=dask, or an MPI that provides MPI_THREAD_MULTIPLE")
        self.rank, self.count, self.loop = rank, len(peers), loop
        self.sent_bytes = self.received_bytes = 0
        self._mpi, self._world = MPI, MPI.COMM_WORLD
        self._about, self._peers, self._timeout_s = [run, generation], list(peers), timeout_s
        self._boxes: dict[tuple[int, Tag], asyncio.Future] = {}
        self._sending: list[tuple[Any, np.ndarray, asyncio.Future | None]] = []  # requests, what they read, who waits for them
        self._lock = threading.Lock()  # a head and its body leave together
        self._heard = dict.fromkeys(range(self.count), time.monotonic())
        self.over = ""
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="taskgpt-mpi", daemon=True)
        self._thread.start()

    async def send(self, to: int, tag: Tag, buffers: Sequence[np.ndarray]) -> None:
        """Send arrays, whose elements lie side by side, as one message; when it returns, they may be written again. Raises PeerLost."""
        self._verify_not_over()
        parts = [buffer.reshape(-1).view(np.uint8) for buffer in buffers]
        body = parts[0] if len(parts) == 1 else np.concatenate(parts)
        done: asyncio.Future = self.loop.create_future()
        self._post(to, {"tag": tag, "bytes": body.size}, body, done)
        await done

    async def receive(self, source: int, tag: Tag) -> np.ndarray:
        """Wait for a message, and return its bytes, uint8. Messages may be asked for in any order. Raises PeerLost."""
        self._verify_not_over()
        box = self._box(source, tag)
        try:
            return await asyncio.shield(box)
        finally:
            if box.done():
                self._boxes.pop((source, tag), None)

    def fail(self, why: str) -> None:
        """End this generation here, from any thread: who waits gets PeerLost, and the others are told."""
        if self._end(why):
            for rank in range(self.count):
                if rank != self.rank:
                    self._post(rank, {"end": f"rank {self.rank}: {why}"})

    async def close(self) -> None:
        """End this rank's part; return when nothing is under way."""
        self._end("this rank has closed its links")
        self._is_closed.set()
        await asyncio.to_thread(self._thread.join)

    # In whatever thread -----------------------------------------------------------------------------------------------------------------

    def _post(self, to: int, head: dict[str, Any], body: np.ndarray | None = None, done: asyncio.Future | None = None) -> None:
        words = np.frombuffer(json.dumps([*self._about, self.rank, head]).encode(), np.uint8)
        with self._lock:
            self._sending.append((self._world.Isend([words, self._mpi.BYTE], self._peers[to], _HEAD), words, None))
            if body is not None:
                self._sending.append((self._world.Isend([body, self._mpi.BYTE], self._peers[to], _BODY), body, done))
            self.sent_bytes += words.size + (0 if body is None else body.size)

    def _end(self, why: str) -> bool:
        """End the generation here; return False if it has ended before."""
        with self._lock:
            if self.over:
                return False
            self.over = why

        def tell() -> None:
            with self._lock:
                waiting = [*self._boxes.values(), *(done for _, _, done in self._sending if done is not None)]
            for each in waiting:
                if each.done():
                    continue
                each.set_exception(PeerLost(f"generation {self._about[1]} is over: {why}"))
                each.exception()  # perhaps nobody asks

        self.loop.call_soon_threadsafe(tell)
        return True

    def _verify_not_over(self) -> None:
        if self.over:
            raise PeerLost(f"generation {self._about[1]} is over: {self.over}")

    def _box(self, source: int, tag: Tag) -> asyncio.Future:
        return self._boxes.get((source, tag)) or self._boxes.setdefault((source, tag), self.loop.create_future())

    # In the thread that looks -------------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        beat = time.monotonic()
        while not (self._is_closed.is_set() and not self._sending):
            if not (self._take() | self._finish_sends()):
                time.sleep(_IDLE_S)
            now = time.monotonic()
            if now - beat > _BEAT_S and not self.over:
                beat = now
                for rank, heard in self._heard.items():
                    if rank != self.rank:
                        self._post(rank, {})
                        if now - heard > self._timeout_s:
                            self.fail(f"rank {rank} was silent for {self._timeout_s:g} s")
            if self._is_closed.is_set() and now - beat > self._timeout_s:
                break  # a rank that is gone takes no message any more

    def _take(self) -> bool:
        """Take what has come, a head or a body, which may be long in coming: who sends it may be stopped. Return False if nothing has."""
        for source, heads in _heads.items():
            if heads and (body := self._world.Improbe(source, _BODY)):
                return self._take_message(*heads.popleft(), body)
        status = self._mpi.Status()
        head = self._world.Improbe(self._mpi.ANY_SOURCE, _HEAD, status)
        if head is None:
            return False
        words = bytearray(status.Get_count(self._mpi.BYTE))
        head.Recv([words, self._mpi.BYTE])
        self.received_bytes += len(words)
        found = json.loads(words)
        if "bytes" not in found[-1]:
            return self._take_message(*found)
        _heads.setdefault(status.Get_source(), deque()).append(found)
        return True

    def _take_message(self, run: str, generation: int, rank: int, about: dict[str, Any], incoming: Any = None) -> bool:
        """Take a message whose body, if it has one, is there; return True."""
        body = np.empty(about.get("bytes", 0), np.uint8)
        if incoming is not None:
            incoming.Recv([body, self._mpi.BYTE])
        self.received_bytes += body.size
        if [run, generation] != self._about:
            return True  # of a generation that is over
        self._heard[rank] = time.monotonic()
        if "end" in about:
            self._end(about["end"])
        elif "tag" in about:
            self.loop.call_soon_threadsafe(self._deliver, rank, tuple(about["tag"]), body)
        return True

    def _deliver(self, rank: int, tag: Tag, body: np.ndarray) -> None:
        box = self._box(rank, tag)
        if not box.done():
            box.set_result(body)

    def _finish_sends(self) -> bool:
        """Let go of what has been sent; return False if nothing has."""
        with self._lock:
            sent = [each for each in self._sending if each[0].Test()]
            gone = set(map(id, sent))
            self._sending = [each for each in self._sending if id(each) not in gone]
        for _, _, done in sent:
            if done is not None:
                self.loop.call_soon_threadsafe(lambda done=done: done.done() or done.set_result(None))
        return bool(sent)
