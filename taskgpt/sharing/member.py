"""A process that takes part in a share: it joins, watches over the others as long as it is there, and leaves.

Every process that takes part looks at the others some times a second: whether they are dead, whose cores it gives back, or stopped, whose
cores it lends to who wants them. So it does not matter who dies.
"""

import os
import queue
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.pointers import HAS_FUTEX
from taskgpt.schedulers.cores import own_cores
from taskgpt.sharing import layout as w
from taskgpt.sharing import leases
from taskgpt.sharing.liveness import look, own_start, own_title
from taskgpt.sharing.segment import Segment, is_living, opened, path_of
from taskgpt.tasks.cache import compile_function

WATCH_S = 0.05  # between looks at the others
_LOOKS = 2  # that find a process stopped before its cores are lent
_MOST_GENERATIONS = 1 << 30


@dataclass(frozen=True)
class Terms:
    """On which terms a process shares cores: keys of a scheduler file. `share`: the name of a share, "" for none."""

    share: str
    share_weight: int = field(metadata={"at_least": 1, "at_most": 1000})
    share_priority: int = field(metadata={"at_least": -1000, "at_most": 1000})
    quantum_ms: float = field(metadata={"at_least": 0, "at_most": 10_000})


class Member:
    """A process' place in a share, for so many workers. `address`: of what compiled code is given; `cores`: that the workers may have.

    Raises UserError where there can be no shares, for a name or a segment that is none, if the share is full or has none of the cores
    that this process may use.
    """

    def __init__(self, terms: Terms, workers: int, binds: bool = False):
        if not HAS_FUTEX:
            raise UserError(f"share {terms.share}: processes share cores on Linux alone, got {sys.platform}; leave share out")
        for function, signature in leases.SIGNATURES.items():
            compile_function(function, signature)
        self.name, self.workers = terms.share, workers
        with opened(terms.share, own_cores()[: w.MOST_SLOTS]) as segment:
            may = _slots_of(segment)
            self._segment, self._terms, self._cores = segment, terms, segment.slots[:, w.CORE].tolist()
            self._write_own(terms, may, binds)
            self._join()
        self._is_over, self._is_alone = threading.Event(), False
        self._found_stopped: Counter[int] = Counter()  # by a member's identity
        self._watch = threading.Thread(target=self._watch_over_others, name="taskgpt-share", daemon=True)
        self._watch.start()

    def _write_own(self, terms: Terms, may: Sequence[int], binds: bool) -> None:
        """Lay out what is this process' alone: its settings, a part for each worker and one for who watches."""
        self._may = np.array(may, np.int64)
        self._words = words = w.make_own(self._segment.words, self._may, self.workers)
        self.address = words.ctypes.data
        words[[w.QUANTUM_NS, w.BINDS]] = int(terms.quantum_ms * 1e6), binds

    def _join(self) -> None:
        """Take a free place; the segment is locked. Those of the dead are free."""
        segment = self._segment
        for number, member in enumerate(segment.members):
            if member[w.IDENTITY] and not is_living(member):
                leases.forget_member(self.address, number, int(member[w.IDENTITY]))
        free = np.flatnonzero(segment.members[:, w.IDENTITY] == 0)
        if not len(free):
            raise UserError(f"share {self.name}: {w.MOST_MEMBERS} programs share it, as many as can; end one, or take another name")
        generation = int(segment.words[w.LAST_GENERATION]) % _MOST_GENERATIONS + 1
        segment.words[w.LAST_GENERATION] = generation
        self._words[[w.MEMBER, w.GENERATION]] = int(free[0]), generation
        self._identity = generation << 32 | os.getpid()
        self._write_place()

    def _write_place(self) -> None:
        """Write in the segment who this process is; its identity last, with which it takes part."""
        terms, member = self._terms, self._segment.members[self._words[w.MEMBER]]
        member[:] = 0
        member[[w.STARTED, w.WEIGHT, w.PRIORITY, w.WORKERS]] = own_start(), terms.share_weight, terms.share_priority, self.workers
        for slot in self._may.tolist():
            member[w.MAY + slot // w.MASK_BITS] |= 1 << slot % w.MASK_BITS
        room = 8 * w.NAME_WORDS
        member[w.NAME : w.NAME + w.NAME_WORDS] = np.frombuffer(own_title().encode()[:room].ljust(room, b"\0"), np.int64)
        member[w.IDENTITY] = self._identity

    def leave(self) -> None:
        """Give back what is left, and the segment if nobody else is in it. No worker may be at work any more."""
        self._is_over.set()
        self._watch.join()
        segment, number = self._segment, int(self._words[w.MEMBER])
        try:
            with segment.locked():
                is_shared = self._has_place and not self._is_alone
                leases.forget_member(self.address, number, self._identity)
                if is_shared and not segment.living():
                    segment.remove()
        except UserError:  # somebody else holds the lock for long: the next who joins finds out that nobody is here
            leases.forget_member(self.address, number, self._identity)
        segment.close()

    def is_short_of_cores(self) -> bool:
        """Return True if a worker waits for a core."""
        return bool(self._words[w.WAITING])

    @property
    def _has_place(self) -> bool:
        return bool(self._segment.members[self._words[w.MEMBER], w.IDENTITY] == self._identity)

    # Others -------------------------------------------------------------------------------------------------------------------------

    def _watch_over_others(self) -> None:
        while not self._is_over.wait(WATCH_S):
            if not self._has_place:
                self._go_on_alone()
            for number, member in enumerate(self._segment.members):
                identity = int(member[w.IDENTITY])
                if identity not in (0, self._identity):
                    self._look_at(number, identity, member)
            leases.free_orphans(self.address)

    def _go_on_alone(self) -> None:
        """Have a segment of its own in place of one in which this process has no place any more: somebody has cut or written its file."""
        self._is_alone = True
        self._segment.cut_off(self._cores)
        self._write_place()
        path = path_of(self.name)
        warnings.warn_explicit(f"share {self.name}: damaged; this program goes on without it", RuntimeWarning, str(path), 0)

    def _look_at(self, number: int, identity: int, member: np.ndarray) -> None:
        seen = look(identity & 0xFFFFFFFF)
        if seen is None or seen.started != member[w.STARTED]:
            leases.forget_member(self.address, number, identity)
            return
        if not seen.is_stopped:
            self._found_stopped.pop(identity, None)
            member[w.IS_STOPPED] = 0
            return
        self._found_stopped[identity] += 1
        if self._found_stopped[identity] >= _LOOKS:
            member[w.IS_STOPPED] = 1
            leases.lend_cores(self.address, number, identity)


class Cores:
    """Cores for workers that run tasks in Python, in a `with` block: those of the share that the terms name, or none to ask for."""

    def __init__(self, terms: Terms, workers: int):
        self._terms, self._workers = terms, workers
        self._member: Member | None = None
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        if self._terms.share:
            self._member = Member(self._terms, self._workers)
            for me in range(self._workers):
                self._free.put(me)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._member is not None:
            self._member.leave()
            self._member = None

    def hold(self, me: int) -> None:
        """Return when worker `me`, this thread, has a core: the one it had, unless others are to have it."""
        if self._member is not None:
            while not leases.hold_core(self._member.address, me):
                pass  # back in Python, where Ctrl-C is heard

    def are_awaited(self) -> bool:
        """Return True if a worker of these waits for a core."""
        return self._member is not None and self._member.is_short_of_cores()

    def let_go(self, me: int) -> None:
        """Give the core of worker `me` back, if it has one."""
        if self._member is not None:
            leases.let_core_go(self._member.address, me)

    @contextmanager
    def one(self) -> Iterator[None]:
        """Have a core within the `with` block, as whichever worker is free."""
        if self._member is None:
            yield
            return
        me = self._free.get()
        try:
            self.hold(me)
            yield
        finally:
            self.let_go(me)
            self._free.put(me)


def _slots_of(segment: Segment) -> list[int]:
    mine = os.sched_getaffinity(0)
    if may := [number for number, core in enumerate(segment.slots[:, w.CORE].tolist()) if core in mine]:
        return may
    raise UserError(
        f"share {segment.name}: this process may use cores {shorten(str(sorted(mine)))}, got a share of others, which "
        "another program has made; take another name"
    )
