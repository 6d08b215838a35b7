"""What the driver makes of the checkpoints that ranks offer: fetched and written one after the other, beside everything else it does.

Who offers a checkpoint waits until it is told that the driver has it, or that the generation is over. So every offer is answered, also one
that is not wanted, or cannot be fetched; and those of a generation that is over are dropped, which these ranks hear of otherwise.
"""

import dataclasses
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from distributed import Client

from taskgpt.cluster.checks import ask
from taskgpt.cluster.job import Job
from taskgpt.cluster.kept import Ranges, fetch, take
from taskgpt.files import fill
from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.runs.saving import Saver

_Parts = list[tuple[int, Ranges]]  # (rank, which elements it has)


class Offers:
    """The checkpoints of a run. `new_state`: makes the arrays that one is fetched into.

    saved_step: after how many steps the newest is that was fetched, or where the run begins; saved_s: when that was, by
    time.monotonic(); generations: by step, that of the newest which offered one.
    """

    def __init__(self, client: Client, timeout_s: float, new_state: Callable[[], dict[str, np.ndarray]]):
        self._client, self._timeout_s, self._new_state = client, timeout_s, new_state
        self.saver: Saver | None = None
        self.saved_step, self.saved_s = 0, time.monotonic()
        self.generations: dict[int, int] = {}
        self.is_fetching = False  # a rank gives what it has, which may take longer than it is waited for otherwise
        self._job: Job | None = None
        self._parts: dict[int, _Parts] = {}  # of checkpoints, by step, of which some ranks have not offered theirs yet
        self._whole: deque[tuple[Job, About, _Parts]] = deque()  # those that wait while another one is written

    def begin(self, job: Job) -> None:
        """Take offers of this generation from now on, and drop those before."""
        self._job = job
        self._parts.clear()
        self._whole.clear()

    def take(self, rank: int, about: dict[str, Any], ranges: dict) -> None:
        """Take a rank's offer of its part of a checkpoint; fetch the checkpoint as soon as all parts are there, and no other is written."""
        job, said = self._job, fill(About, about, "offer: ")
        assert job is not None
        parts = self._parts.setdefault(said.step, [])
        parts.append((rank, ranges))
        if len(parts) == (job.count if job.is_in_parts else 1):
            self._whole.append((job, said, self._parts.pop(said.step)))
            self.poll()

    def poll(self) -> None:
        """Begin what waits if nothing is written; tell what was. Raises as Saver.poll."""
        if self.saver:
            self.saver.poll()
        while self._whole and not self.is_writing:
            job, about, parts = self._whole.popleft()
            if self.saver:
                self.saver.write_state(dataclasses.replace(about, run=self.saver.run), partial(self._fetched, job, about.step, parts))
            else:
                self._answer(job, about.step, parts)

    @property
    def is_writing(self) -> bool:
        """True while a checkpoint is fetched or written."""
        return self.saver is not None and self.saver.is_writing

    def wait(self) -> None:
        """Wait until nothing is written."""
        if self.saver:
            self.saver.wait()

    def _fetched(self, job: Job, step: int, parts: _Parts) -> dict[str, np.ndarray]:
        """Return a state, whose parts the ranks need not keep any longer. Raises OSError, LookupError, MemoryError."""
        self.is_fetching = True
        try:
            state = self._new_state()
            for rank, ranges in parts:
                where = self._client.rpc, job.addresses[rank], job.run, job.offer_of(step)
                self._client.sync(fetch, *where, state, ranges, self._timeout_s)
            self.saved_step, self.saved_s, self.generations[step] = step, time.monotonic(), job.generation
            return state
        finally:
            self._answer(job, step, parts)
            self.is_fetching = False

    def _answer(self, job: Job, step: int, parts: _Parts) -> None:
        addresses = [job.addresses[rank] for rank, _ in parts]
        ask(self._client, addresses, take, job.run, job.offer_of(step), timeout_s=self._timeout_s)
