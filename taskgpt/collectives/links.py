"""Messages between the ranks of a generation, whatever carries them: Dask's comms, MPI, or memory."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

import numpy as np

Tag = tuple[int | str, ...]  # what a message is: both sides know it, and no other message of a pair of ranks has it while it is under way


class PeerLost(RuntimeError):
    """Another rank is gone, or silent, or this generation is over. The message says which rank, and why."""


class Links(Protocol):
    """What carries messages between this rank and the others. Coroutines run on `loop`; only `fail` may be called from any thread."""

    rank: int
    count: int  # of ranks
    loop: asyncio.AbstractEventLoop
    sent_bytes: int  # with what frames them
    received_bytes: int
    over: str  # why this generation is over here, "" while it goes on; from any thread

    async def send(self, to: int, tag: Tag, buffers: Sequence[np.ndarray]) -> None:
        """Send arrays, whose elements lie side by side, as one message; when it returns, they may be written again. Raises PeerLost."""

    async def receive(self, source: int, tag: Tag) -> np.ndarray:
        """Wait for a message, and return its bytes, uint8. Messages may be asked for in any order. Raises PeerLost."""

    def fail(self, why: str) -> None:
        """End this generation here: who waits gets PeerLost, and the others, whose comms close, get it too."""
