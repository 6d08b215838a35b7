"""The ways to run a pair of programs, and what a turn of each tells.

    exclusive        one after the other, each on all cores
    oversubscribed   both at once, each with a worker for every core
    split            both at once, each bound to half of the cores
    shared           both at once, each with a worker for every core, in one share

A makespan is the time from the common go to the end of the later one; of `exclusive` the sum of both. Preparing is no part of it.
"""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self

from taskgpt.errors import UserError
from taskgpt.lab.contests.served import AskingFailed, Served
from taskgpt.lab.pairs.partner import Partner, Place
from taskgpt.lab.pairs.words import Word
from taskgpt.pointers import HAS_FUTEX
from taskgpt.schedulers.cores import usable_cores
from taskgpt.sharing.seen import share

WAYS = ("exclusive", "oversubscribed", "split", "shared")
BOTH = (0, 1)
START_S = 0.02  # from the word go until it counts: both have heard it by then


class PairFailed(RuntimeError):
    """A pair could not be run; the message says which program, and why."""


@dataclass
class Turn:
    """A pair, run once in a way; lists have a number for each program. `ends_s`: from go to its end; alone, of `exclusive`.

    `core_s`: the time of cores that each had in the share, and `offers`: how often it was woken to take one; None without a share.
    """

    way: str
    makespan_s: float
    ends_s: list[float]
    sha256: list[str]
    core_s: list[float] | None = None
    offers: list[int] | None = None


class Pair:
    """Two programs in processes of their own, within a `with` block, prepared. Raises PairFailed, and does so for all that they do."""

    def __init__(self, words: Sequence[Word], cores: Sequence[int]):
        self.words, self.cores = words, tuple(cores)
        self._partners: list[Served] = []
        self._share = f"pairs-{os.getpid()}"

    def __enter__(self) -> Self:
        try:
            self._partners += [Served(Partner, word) for word in self.words]
            self.is_exact = all(self._ask("prepare", [(), ()]))
        except BaseException as error:
            self.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        for partner in self._partners:
            if kind is not None:
                partner.interrupt()
        for partner in self._partners:
            partner.end()

    def calibrate(self, seconds: float) -> list[int]:
        """Return how often each is to run: as its word says, or as often as it can alone in so many seconds; the same for equal words."""
        found: dict[Word, int] = {}
        for number, word in enumerate(self.words):
            if word.times is None and word not in found:
                self._ask("open", [(Place(self.cores),)], [number])
                (found[word],) = self._ask("calibrate", [(seconds,)], [number])
                self._ask("close", [()], [number])
        return [word.times or found[word] for word in self.words]

    def turn(self, way: str, times: Sequence[int]) -> Turn:
        """Run the pair in a way."""
        if way == "exclusive":
            alone = [self._at_once(way, [Place(self.cores)], [times[number]], [number]) for number in BOTH]
            ends_s = [turn.makespan_s for turn in alone]
            return Turn(way, sum(ends_s), ends_s, [sha256 for turn in alone for sha256 in turn.sha256])
        half = len(self.cores) // 2
        places = {
            "oversubscribed": [Place(self.cores)] * 2,
            "split": [Place(self.cores[:half]), Place(self.cores[half:])],
            "shared": [Place(self.cores, self._share)] * 2,
        }
        return self._at_once(way, places[way], times, BOTH)

    def core_seconds(self, weights: Sequence[int], seconds: float) -> list[float]:
        """Run both again and again for so long, in a share with these weights; return the time of cores that each had."""
        self._ask("open", [(Place(self.cores, self._share, weight),) for weight in weights])
        at = time.monotonic() + START_S
        self._tell("run_until", [(at, at + seconds)] * 2)
        seen = []
        for moment in (at, at + seconds):
            time.sleep(max(0.0, moment - time.monotonic()))
            seen.append([member["core_s"] for member in self._members()])
        self._hear()
        self._ask("close", [(), ()])
        return [after - before for before, after in zip(*seen, strict=True)]

    def _at_once(self, way: str, places: Sequence[Place], times: Sequence[int], numbers: Sequence[int]) -> Turn:
        self._ask("open", [(place,) for place in places], numbers)
        is_shared = any(place.share for place in places)
        before = self._members() if is_shared else []
        at = time.monotonic() + START_S
        ends_s = self._ask("run", [(at, each) for each in times], numbers)
        after = self._members() if is_shared else []
        turn = Turn(way, max(ends_s), ends_s, self._ask("close", [()] * len(numbers), numbers))
        if is_shared:
            turn.core_s, turn.offers = (
                [new[key] - old[key] for old, new in zip(before, after, strict=True)] for key in ("core_s", "offers")
            )
        return turn

    def _members(self) -> list[dict[str, Any]]:
        """Return what the share says of the two, in their order."""
        with suppress(FileNotFoundError):
            members = {member["pid"]: member for member in share(self._share)["members"]}
            if all(partner.pid in members for partner in self._partners):
                return [members[partner.pid] for partner in self._partners]
        raise PairFailed("a program has left the share before its end")

    def _ask(self, verb: str, arguments: Sequence[tuple], numbers: Sequence[int] = BOTH) -> list[Any]:
        """Have programs do something at the same time; return what each answers."""
        self._tell(verb, arguments, numbers)
        return self._hear(numbers)

    def _tell(self, verb: str, arguments: Sequence[tuple], numbers: Sequence[int] = BOTH) -> None:
        for number, given in zip(numbers, arguments, strict=True):
            with self._named(number):
                self._partners[number].tell(verb, *given)

    def _hear(self, numbers: Sequence[int] = BOTH) -> list[Any]:
        found = []
        for number in numbers:
            with self._named(number):
                found.append(self._partners[number].hear())
        return found

    @contextmanager
    def _named(self, number: int) -> Iterator[None]:
        try:
            yield
        except AskingFailed as error:
            raise PairFailed(f"{self.words[number].said}: {error}") from None


def cores_for_pairs() -> list[int]:
    """Return the cores to run pairs on. Raises UserError where programs cannot share them, or where there is one."""
    if not HAS_FUTEX:
        raise UserError("--pairs: programs share cores on Linux alone")
    cores = sorted(os.sched_getaffinity(0))[: usable_cores()]
    if len(cores) < 2:
        raise UserError("--pairs: wanted two cores to share at least, this process may use 1")
    return cores
