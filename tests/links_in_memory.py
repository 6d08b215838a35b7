"""Links between ranks of one process, on one loop in a thread: for tests of what goes over them."""

import asyncio
import threading
from collections import defaultdict
from contextlib import contextmanager

import numpy as np

from taskgpt.collectives import PeerLost


class InMemoryLinks:
    """The links of one rank; `peers` are those of all."""

    def __init__(self, rank: int, peers: list, loop: asyncio.AbstractEventLoop):
        self.rank, self.peers, self.loop = rank, peers, loop
        self.sent_bytes = self.received_bytes = 0
        self._mail: dict = defaultdict(asyncio.Queue)
        self._over = asyncio.Event()
        self.over = ""

    @property
    def count(self) -> int:
        return len(self.peers)

    async def send(self, to, tag, buffers):
        if self._over.is_set():
            raise PeerLost(self.over)
        message = np.concatenate([np.frombuffer(each, np.uint8) for each in buffers])
        self.sent_bytes += message.nbytes
        await asyncio.sleep(0)
        self.peers[to]._mail[self.rank, tag].put_nowait(message)

    async def receive(self, source, tag):
        got = asyncio.ensure_future(self._mail[source, tag].get())
        over = asyncio.ensure_future(self._over.wait())
        await asyncio.wait([got, over], return_when=asyncio.FIRST_COMPLETED)
        over.cancel()
        if not got.done():
            got.cancel()
            raise PeerLost(self.over)
        self.received_bytes += got.result().nbytes
        return got.result()

    def fail(self, why):
        def end():
            for each in self.peers:
                each.over = each.over or why
                each._over.set()

        self.loop.call_soon_threadsafe(end)


@contextmanager
def linked(count: int):
    """Yield the links of so many ranks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    peers: list = []
    peers += [InMemoryLinks(rank, peers, loop) for rank in range(count)]
    try:
        yield peers
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(_end_all())
        loop.close()


async def _end_all() -> None:
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
