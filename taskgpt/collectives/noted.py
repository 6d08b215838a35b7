"""Links that note each message: what a trace of several ranks shows between them."""

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from taskgpt.collectives.links import Links, Tag


class Noted(NamedTuple):
    """A message as one side saw it. Times by time.monotonic_ns(): while it was sent, or while this rank waited for it."""

    peer: int
    is_sent: bool
    tag: Tag
    nbytes: int
    begin_ns: int
    end_ns: int


class NotedLinks:
    """Links, of which `noted` says what they have carried."""

    def __init__(self, links: Links):
        self._links = links
        self.rank, self.count, self.loop = links.rank, links.count, links.loop
        self.noted: list[Noted] = []

    @property
    def sent_bytes(self) -> int:
        return self._links.sent_bytes

    @property
    def received_bytes(self) -> int:
        return self._links.received_bytes

    @property
    def over(self) -> str:
        return self._links.over

    async def send(self, to: int, tag: Tag, buffers: Sequence[np.ndarray]) -> None:
        begin_ns = time.monotonic_ns()
        await self._links.send(to, tag, buffers)
        self.noted.append(Noted(to, True, tag, sum(buffer.nbytes for buffer in buffers), begin_ns, time.monotonic_ns()))

    async def receive(self, source: int, tag: Tag) -> np.ndarray:
        begin_ns = time.monotonic_ns()
        message = await self._links.receive(source, tag)
        self.noted.append(Noted(source, False, tag, message.nbytes, begin_ns, time.monotonic_ns()))
        return message

    def fail(self, why: str) -> None:
        self._links.fail(why)
