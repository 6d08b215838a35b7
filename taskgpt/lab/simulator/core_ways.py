"""Ways in which programs beside each other come to cores: each its own, time slices of the system, or leases of a share.

All have the same methods. A program goes by its number, a worker by its own. A `place` is where a task runs: there are `room` to a core.
`take` returns False if the worker is to wait until `told` says that some of its program's may `retry`, or longer, until `stop_waiting`.
"""

from collections.abc import Sequence

import numpy as np
from numba import types

from taskgpt.pointers import words_at
from taskgpt.sharing import layout as w
from taskgpt.sharing.leases import begin_waiting, end_waiting, keeps_core, let_core_go, look_for_core, take_core
from taskgpt.sharing.member import Terms

Worker = tuple[int, int]  # its program and its number


class OwnCores:
    """Each worker has a core of its own; those of a program begin at its `first`."""

    room = 1

    def __init__(self, first: Sequence[int]):
        self._first = first

    def take(self, program: int, me: int) -> bool:
        return True

    def keeps(self, program: int, me: int) -> bool:
        return True

    def leave(self, program: int, me: int) -> None:
        """Leave a core that nobody else wants."""

    def place(self, program: int, me: int) -> int:
        return self._first[program] + me

    def told(self) -> list[int]:
        return []


class TimeSlices(OwnCores):
    """All cores are everybody's, and the system's: at most two workers to a core, as long as it takes, of which each has half of its time.

    A kind system: a worker gets an idle core if there is one, the one it had last if it can. A core that falls idle takes a worker over
    from a core that has two. `shares`: of a core, by place; a switch takes a part of every slice. `moves`: (from, to) of tasks that run.
    """

    room = 2

    def __init__(self, cores: int, shares: np.ndarray, slice_us: float, switch_us: float):
        self._shares, self._half = shares, 0.5 * (slice_us / (slice_us + switch_us) if switch_us else 1.0)
        self._at: dict[Worker, int] = {}
        self._last: dict[Worker, int] = {}
        self._on: list[Worker | None] = [None] * (2 * cores)
        self._empty, self._single, self._double = set(range(cores)), set[int](), set[int]()
        self.moves: list[tuple[int, int]] = []

    def take(self, program: int, me: int) -> bool:
        worker = program, me
        last = self._last.get(worker, me)
        among = self._empty or self._single
        self._put(worker, last if last in among else min(among))
        return True

    def leave(self, program: int, me: int) -> None:
        left = self._at.pop((program, me))
        core = left // 2
        self._on[left] = None
        self._sort(core)
        if core in self._empty and self._double:
            moved = 2 * min(self._double) + 1
            worker = self._on[moved]
            assert worker is not None
            self._on[moved] = None
            self._sort(moved // 2)
            self.moves.append((moved, self._put(worker, core)))

    def place(self, program: int, me: int) -> int:
        return self._at[program, me]

    def _put(self, worker: Worker, core: int) -> int:
        place = 2 * core + (self._on[2 * core] is not None)
        self._on[place] = worker
        self._at[worker], self._last[worker] = place, core
        self._sort(core)
        return place

    def _sort(self, core: int) -> None:
        count = sum(each is not None for each in self._on[2 * core : 2 * core + 2])
        for number, cores in enumerate((self._empty, self._single, self._double)):
            (cores.add if number == count else cores.discard)(core)
        self._shares[2 * core : 2 * core + 2] = self._half if count == 2 else 1.0


class Leases:
    """The cores of a share, by its own protocol, compiled, on a segment in memory and a clock that is simulated, in ns."""

    room = 1

    def __init__(self, cores: int, terms: Sequence[Terms], workers: Sequence[int], clock_ns: np.ndarray):
        self._segment, self._may = np.zeros(w.SEGMENT_WORDS, np.int64), np.arange(cores)
        self._clock_ns = clock_ns
        self._segment[w.SLOTS] = cores
        self._members = self._segment[w.MEMBERS_AT :][: len(terms) * w.MEMBER_WORDS].reshape(-1, w.MEMBER_WORDS)
        self._own = [self._join(*each) for each in zip(range(len(terms)), terms, workers, strict=True)]
        self._addresses = [own.ctypes.data for own in self._own]
        self._held = [w.leases_in(own)[:, w.HELD] for own in self._own]
        self._grants = self._members[:, w.GRANTS].copy()

    def _join(self, number: int, terms: Terms, workers: int) -> np.ndarray:
        own, generation = w.make_own(self._segment, self._may, workers), number + 1
        own[[w.MEMBER, w.GENERATION, w.QUANTUM_NS]] = number, generation, int(terms.quantum_ms * 1e6)
        own[w.CLOCK_AT] = self._clock_ns.ctypes.data
        self._members[number, [w.IDENTITY, w.WEIGHT, w.PRIORITY]] = generation << 32 | 1, terms.share_weight, terms.share_priority
        self._members[number, w.MAY : w.MAY + w.MASK_WORDS] = (1 << w.MASK_BITS) - 1
        return own

    def take(self, program: int, me: int) -> bool:
        return ask(self._addresses[program], me)

    def retry(self, program: int, me: int) -> bool:
        return ask_again(self._addresses[program], me)

    def stop_waiting(self, program: int, me: int) -> None:
        ask_no_more(self._addresses[program], me)

    def keeps(self, program: int, me: int) -> bool:
        return keeps(self._addresses[program], me)

    def leave(self, program: int, me: int) -> None:
        let_core_go(self._addresses[program], me)

    def place(self, program: int, me: int) -> int:
        return int(self._held[program][me])

    def told(self) -> list[int]:
        """Return the programs of which one worker each is woken, as often as cores have been offered since this was asked."""
        grants = self._members[:, w.GRANTS]
        new = (grants - self._grants).tolist()
        self._grants = grants.copy()
        return [program for program, count in enumerate(new) for _ in range(count)]


@w.compiled
def keeps(address, me):
    """Return True if the worker goes on with its core."""
    return keeps_core(words_at(address), me)


@w.compiled
def ask(address, me):
    """Return True if the worker has got a core; else it waits for one."""
    m = words_at(address)
    if take_core(m, me):
        return True
    begin_waiting(m, me)
    if look_for_core(m, me) != w.NOTHING:
        return False
    end_waiting(m, me)
    return True


@w.compiled
def ask_again(address, me):
    """Return True if the worker, which waited, has got a core; else it waits on."""
    if look_for_core(words_at(address), me) != w.NOTHING:
        return False
    end_waiting(words_at(address), me)
    return True


@w.compiled
def ask_no_more(address, me):
    """Have the worker, which waited, wait no longer."""
    end_waiting(words_at(address), me)


_OF_WORKER = types.int64, types.int64
SIGNATURES = {
    keeps: types.boolean(*_OF_WORKER),
    ask: types.boolean(*_OF_WORKER),
    ask_again: types.boolean(*_OF_WORKER),
    ask_no_more: types.void(*_OF_WORKER),
    let_core_go: types.void(*_OF_WORKER),
}
