"""Which workers a run may have as ranks: who is there, who is fit, what each still has of the run, and whose it is meanwhile.

Whether a worker is there is judged by what the scheduler last heard of it. A worker that comes later is asked beside everything else what
it is, so that one that does not answer holds up nobody.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from distributed import Client

from taskgpt.cluster.checks import Answers, Member, ask, asking, crowded, fit, looking, workers_of
from taskgpt.cluster.kept import Held, holding, reserve
from taskgpt.cluster.settings import Settings

RESERVE_S = 60.0  # how long workers are kept for a generation to begin
_AGAIN_S = 10.0  # until a worker that was not fit, or did not answer, is asked again


class Roster:
    """The workers that are fit to be ranks: `members`, which were found so, and those that come later."""

    def __init__(self, client: Client, members: Sequence[Member], needed_bytes: int):
        self._client, self._needed_bytes = client, needed_bytes
        self._members = {member.address: member for member in members}
        self._asked_s: dict[str, float] = {}  # when each other one was asked last
        self._asking: Future[Answers] | None = None

    def members(self, alive: set[str]) -> list[Member]:
        """Return those of these addresses that are known to be fit, those that were there first before others."""
        if self._asking and self._asking.done():
            self._take(self._asking.result())
            self._asking = None
        now = time.monotonic()
        new = [each for each in sorted(alive - self._members.keys()) if now - self._asked_s.get(each, -_AGAIN_S) >= _AGAIN_S]
        if new and not self._asking:
            self._asking = looking(self._client, new)
            self._asked_s |= dict.fromkeys(new, now)
        return [member for address, member in self._members.items() if address in alive]

    def _take(self, found: Answers) -> None:
        """Take those that are fit, as many of a machine as there is memory for."""
        taken: list[Member] = []
        for member in fit(found, self._needed_bytes)[0]:
            if not any(crowded([*taken, member], found, self._needed_bytes)):
                taken.append(member)
        self._members |= {member.address: member for member in taken}


class Membership:
    """The workers of a run, as its driver sees them. `roster`: returns those of some addresses that are fit to be ranks."""

    def __init__(self, client: Client, settings: Settings, run_id: str, roster: Callable[[set[str]], list[Member]]):
        self._client, self._settings, self._run_id, self._roster = client, settings, run_id, roster
        self._heard: dict[str, tuple[float, float]] = {}  # of each: when the scheduler last heard of it, and when we saw that
        self._lost: dict[str, float] = {}  # those that were lost, and what the scheduler had heard of them then
        self._reserving: Future[Answers] | None = None

    def call(self, addresses: Sequence[str], function: Callable, *arguments: object) -> Answers:
        """Call a function of kept.py in workers; return what they answer. One that does not, or is gone, is no reason to wait for long."""
        return ask(self._client, addresses, function, self._run_id, *arguments, timeout_s=self._settings.timeout_s)

    def alive(self) -> set[str]:
        """Return the addresses of workers of which the scheduler has heard of late, without those that were lost and not heard of since.
        Raises UserError if the scheduler itself is gone.
        """
        now, alive = time.monotonic(), set()
        for address, about in workers_of(self._client).items():
            seen = about["last_seen"]
            if address not in self._heard or self._heard[address][0] != seen:
                self._heard[address] = seen, now
            if address in self._lost and seen > self._lost[address] + 1:
                del self._lost[address]
            if now - self._heard[address][1] < self._settings.timeout_s and address not in self._lost:
                alive.add(address)
        self._roster(alive)  # asks those that are new what they are, so that it is known when they are needed
        return alive

    def lose(self, address: str) -> None:
        """Have a worker count as lost until the scheduler hears of it again."""
        self._lost[address] = self._heard.get(address, (0.0, 0.0))[0]

    def holding(self) -> dict[Member, Held]:
        """Return the workers that are there and fit, and what each says that it has of the run."""
        members = self._roster(self.alive())
        answers = self.call([member.address for member in members], holding)
        return {member: held for member in members if isinstance(held := answers[member.address], Held)}

    def reserve(self, held: dict[Member, Held], least: int, most: int) -> tuple[list[Member], int]:
        """Return so many members that no other run has, who has the newest state first of all, or none; and how many others have.

        They are asked one after the other, as by every run, so that of two that need all workers one gets them.
        """
        mine: list[Member] = []
        taken = 0
        order = sorted(held, key=lambda member: (-held[member].step, -held[member].generation, member.address))
        for number, member in enumerate(order):
            if len(mine) == most or len(mine) + len(order) - number < least:
                break
            answer = self.call([member.address], reserve, RESERVE_S).get(member.address)
            mine += [member] if answer is True else []
            taken += answer is False
        if len(mine) < least:
            self.call([member.address for member in mine], reserve, 0.0)
            return [], taken
        return [member for member in held if member in mine], taken

    def has_newcomer(self, addresses: Sequence[str], alive: set[str]) -> bool:
        """Return True if a worker beside these was reserved for the run since the last call. Asks beside everything else."""
        if self._reserving is None:
            if others := [member.address for member in self._roster(alive) if member.address not in addresses]:
                of = self._run_id, RESERVE_S
                self._reserving = asking(self._client, others, reserve, *of, timeout_s=self._settings.timeout_s)
            return False
        if not self._reserving.done():
            return False
        answers, self._reserving = self._reserving.result(), None
        return any(answer is True and address not in addresses for address, answer in answers.items())
