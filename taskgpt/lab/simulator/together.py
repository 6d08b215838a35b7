"""Programs beside each other on one simulated machine: the scheduler of each, one clock, and a way to come to cores (core_ways.py).

    setups = [SetUp("native", graph, costs, steps=12), SetUp("loops-llmc", graph, costs, steps=4)]
    run(setups, "shared", machine, cores=112)      # when each is over, in seconds

Who has no task gives its core back at once, and sleeps. Where a core is to be waited for, workers of native wake each other as its own do:
one, and two more by each that has got a task while there are others. Of a loop each worker wakes that has a part of it.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import types

from taskgpt.config import SchedulerConfig
from taskgpt.errors import UserError
from taskgpt.lab.named import named_config
from taskgpt.lab.simulator import core_ways, events
from taskgpt.lab.simulator.core_ways import Leases, OwnCores, TimeSlices
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.lab.simulator.simulated import Costs, Simulated, SimulatedLoops, socket_of
from taskgpt.pointers import words_at
from taskgpt.schedulers.native import queues, release
from taskgpt.schedulers.native.table import NOTHING, REMAINING, compiled, slot_of, task_of
from taskgpt.sharing.leases import LOOK_MS
from taskgpt.tasks import Graph
from taskgpt.tasks.cache import compile_function

WAYS = ("exclusive", "split", "oversubscribed", "shared")
SOON_S = 1e-12  # what is due so soon is due


@dataclass(frozen=True)
class Piece:
    """A task that is ready, by what the program calls it: what it takes, and how many bytes a second it moves meanwhile."""

    name: int
    seconds: float
    demand: float


# Programs -------------------------------------------------------------------------------------------------------------------------------


class Tasks(Simulated):
    """Steps of a graph on the native scheduler, two under way at a time."""

    wakes_one_by_one = True
    resumes_at = math.inf

    def begin(self, graph: Graph, steps: int) -> None:
        self._graph, self._left, self._under_way = graph, steps, deque[Any]()
        self.go_on(0.0)

    def go_on(self, now: float) -> None:
        """End the steps whose tasks have all run, and submit others."""
        while self._under_way and self._run_words[self._under_way[0].slot, REMAINING] == 0:
            self._end(self._under_way.popleft())
        while self._left and len(self._under_way) < 2:
            self._left -= 1
            self._under_way.append(self._submit(self._graph, self._under_way[-1] if self._under_way else None, owner=self._under_way))

    @property
    def is_over(self) -> bool:
        return not self._under_way

    def has_any(self) -> bool:
        """Return True if there may be a task for some worker."""
        return not self.is_over and is_any_ready(self._address)

    def has_for(self, me: int) -> bool:
        return True

    def take(self, me: int) -> Piece | None:
        return self._piece(take_task(self._address, me))

    def ended(self, me: int, piece: Piece, now: float) -> Piece | None:
        """Return the task that worker `me` goes on with, if there is one, when it has run a task."""
        return self._piece(release_task(self._address, me, piece.name))

    def put_back(self, me: int, piece: Piece) -> None:
        push_task(self._address, me, piece.name)

    def _piece(self, instance: int) -> Piece | None:
        if instance == NOTHING:
            return None
        seconds, moved = self._costs[slot_of.py_func(instance), :, task_of.py_func(instance)].tolist()
        return Piece(instance, seconds + self.machine.task_us * 1e-6, moved / max(seconds, SOON_S))


class Loops(SimulatedLoops):
    """Steps of a graph as loops, one after the other."""

    wakes_one_by_one = False

    def begin(self, graph: Graph, steps: int) -> None:
        costs = self._costs_of(graph)
        self._lay_out_calls(graph, costs)
        self._left = itertools.chain.from_iterable(itertools.repeat(self._loops(graph), steps))
        self._mine: dict[int, deque[int]] = {}  # of workers, the tasks of the part that each is at
        self._chunks: deque[deque[int]] = deque()  # which anybody may take
        self._missing = 0  # tasks of this loop that have not run
        self.resumes_at = 0.0
        self.is_over = False

    def go_on(self, now: float) -> None:
        """Begin the next loop, if it is time."""
        if self.resumes_at > now + SOON_S:
            return
        self.resumes_at = math.inf
        loop = next(self._left, None)
        if loop is None:
            self.is_over = True
            return
        parts = [deque(task.number for task in part) for part in loop]
        self._missing, self._is_parallel = sum(map(len, parts)), len(parts) > 1
        if self.settings.chunks == "static":
            self._mine.update(enumerate(parts))
        else:
            self._chunks.extend(parts)

    def has_any(self) -> bool:
        return bool(self._mine or self._chunks)

    def has_for(self, me: int) -> bool:
        return me in self._mine or bool(self._chunks)

    def take(self, me: int) -> Piece | None:
        if me not in self._mine:
            if not self._chunks:
                return None
            self._mine[me] = self._chunks.popleft()
        number = self._mine[me].popleft()
        if not self._mine[me]:
            del self._mine[me]
        seconds, moved = self._costs[0, :, number].tolist()
        return Piece(number, seconds, moved / max(seconds, SOON_S))

    def ended(self, me: int, piece: Piece, now: float) -> Piece | None:
        self._missing -= 1
        if not self._missing:
            self.resumes_at = now + self._is_parallel * self.machine.barrier_us * 1e-6
        return self.take(me)

    def put_back(self, me: int, piece: Piece) -> None:
        self._mine.setdefault(me, deque()).appendleft(piece.name)


KINDS: dict[str, type[Tasks | Loops]] = {"native": Tasks, "loops": Loops}


def config_of(word: str, workers: int) -> SchedulerConfig:
    """Return the configuration of a scheduler by its word. Raises UserError for one that has no model beside others."""
    config = named_config(word, workers)
    if config.scheduler not in KINDS:
        raise UserError(f"--pairs {word}: no model of {config.scheduler} beside other programs; those with one: {', '.join(KINDS)}")
    return config


@dataclass(frozen=True, eq=False)
class SetUp:
    """A program: a scheduler by its word, a graph whose tasks cost so much, and how often it runs."""

    scheduler: str
    graph: Graph
    costs: Costs
    steps: int

    def program(self, machine: Machine, workers: int) -> Tasks | Loops:
        config = config_of(self.scheduler, workers)
        return KINDS[config.scheduler](config.settings, machine, lambda _: self.costs)


# On one clock ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class _Team:
    """A program's workers.

    idle: without a task; of those, `holding` have a core yet, and who has `lost` his to others asks for one at once. waiting: for a core,
    or on the way to it; of those, `asleep` who sleeps, in turn, and since which timer. may_wake: so many, whoever waits.
    """

    number: int
    program: Tasks | Loops
    idle: set[int]
    holding: set[int] = field(default_factory=set)
    lost: set[int] = field(default_factory=set)
    waiting: set[int] = field(default_factory=set)
    asleep: dict[int, int] = field(default_factory=dict)
    may_wake: int = 0
    over_at: float | None = None


class _Node:
    """Programs at once, each of which begins with its steps."""

    def __init__(self, machine: Machine, cores: int, programs: Sequence[Tasks | Loops]):
        self._machine, self._cores = machine, cores
        self._teams = [_Team(number, each, set(range(each.workers))) for number, each in enumerate(programs)]
        self._clock, self._clock_ns = np.zeros(1), np.zeros(1, np.int64)
        self._timers: list[tuple[float, int, _Team, int]] = []
        self._timer = 0

    def _lay_out(self, room: int) -> np.ndarray:
        places = self._cores * room
        self._state, self._running = np.ones((4, places)), np.full(places, NOTHING, np.int64)
        self._tasks: list[tuple[_Team, int, Piece] | None] = [None] * places
        self._socket = socket_of(self._machine, room)
        return self._state[events.SHARE]

    def run(self, way: str) -> list[float]:
        """Return when each program is over, in seconds."""
        self._ways = self._make_ways(way)
        while True:
            for team in self._teams:
                team.program.go_on(self._now)
                if team.program.is_over and team.over_at is None:
                    team.over_at = self._now
            for team in self._teams:
                self._hand_out(team)
            self._wake_told()
            if (ends := [team.over_at for team in self._teams if team.over_at is not None]) and len(ends) == len(self._teams):
                return ends
            self._advance()

    def _make_ways(self, way: str) -> OwnCores | TimeSlices | Leases:
        programs = [team.program for team in self._teams]
        shares = self._lay_out(TimeSlices.room if way == "oversubscribed" else 1)
        if way == "oversubscribed":
            return TimeSlices(self._cores, shares, self._machine.slice_us, self._machine.switch_us)
        if way == "shared":
            settings = [program.settings for program in programs]
            return Leases(self._cores, settings, [program.workers for program in programs], self._clock_ns)
        return OwnCores([sum(before.workers for before in programs[:number]) for number in range(len(programs))])

    @property
    def _now(self) -> float:
        return float(self._clock[0])

    def _hand_out(self, team: _Team) -> None:
        """Have idle workers take tasks, if there are any; the others give their cores back."""
        program, number = team.program, team.number
        most = max(team.may_wake, 0 if team.waiting else 1) if program.wakes_one_by_one else program.workers
        team.may_wake = 0
        if program.has_any():
            for me in sorted(team.idle):
                if not program.has_any():
                    break
                is_awake = me in team.holding or me in team.lost
                if not program.has_for(me) or (most == 0 and not is_awake):
                    continue
                team.idle.remove(me)
                if me in team.holding or self._ways.take(number, me):
                    team.holding.discard(me)
                    self._start(team, me, program.take(me))
                else:
                    most -= not is_awake
                    team.waiting.add(me)
                    self._sleep(team, me)
        for me in sorted(team.holding):
            self._leave(team, me)
        team.holding.clear()
        team.lost.clear()

    def _start(self, team: _Team, me: int, piece: Piece | None) -> None:
        """Have a worker that has a core run a task; without one it gives the core back."""
        if piece is None:
            team.idle.add(me)
            self._leave(team, me)
            return
        place = self._ways.place(team.number, me)
        self._tasks[place], self._running[place] = (team, me, piece), piece.name
        self._state[[events.LEFT, events.DEMAND], place] = piece.seconds, piece.demand

    def _leave(self, team: _Team, me: int) -> None:
        self._ways.leave(team.number, me)
        if isinstance(self._ways, TimeSlices):
            for source, to in self._ways.moves:
                self._tasks[to], self._running[to] = self._tasks[source], self._running[source]
                self._state[[events.LEFT, events.DEMAND], to] = self._state[[events.LEFT, events.DEMAND], source]
                self._tasks[source], self._running[source] = None, NOTHING
            self._ways.moves.clear()

    # Waiting ------------------------------------------------------------------------------------------------------------------------

    def _sleep(self, team: _Team, me: int) -> None:
        """Have a worker sleep until it is woken, or for the time after which it looks again."""
        team.asleep[me] = self._set_timer(team, me, LOOK_MS * 1e-3)

    def _set_timer(self, team: _Team, me: int, seconds: float) -> int:
        self._timer += 1
        heapq.heappush(self._timers, (self._now + seconds, self._timer, team, me))
        return self._timer

    def _wake_told(self) -> None:
        for number in self._ways.told():
            team = self._teams[number]
            if team.asleep:
                me = next(iter(team.asleep))
                del team.asleep[me]
                self._set_timer(team, me, self._machine.wake_us * 1e-6)

    def _look_again(self, team: _Team, me: int) -> None:
        ways, program = self._ways, team.program
        assert isinstance(ways, Leases)
        if ways.retry(team.number, me):
            team.waiting.remove(me)
            self._start(team, me, program.take(me))
            team.may_wake = 2
        elif program.has_any() and program.has_for(me):
            self._sleep(team, me)
        else:
            ways.stop_waiting(team.number, me)
            team.waiting.remove(me)
            team.idle.add(me)

    # Time ---------------------------------------------------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Go to what happens next, and have it happen."""
        while self._timers and not self._is_valid(*self._timers[0][1:]):
            heapq.heappop(self._timers)
        due = min([team.program.resumes_at for team in self._teams] + [timer[0] for timer in self._timers[:1]])
        if not events.advance(self._clock, self._state, self._running, self._socket, due):
            raise RuntimeError("no simulated worker will ever go on, and tasks are left")
        self._clock_ns[0] = round(self._now * 1e9)
        for place in np.flatnonzero((self._running != NOTHING) & (self._state[events.LEFT] == 0)).tolist():
            self._end(place)
        while self._timers and self._timers[0][0] <= self._now + SOON_S:
            _, timer, team, me = heapq.heappop(self._timers)
            if self._is_valid(timer, team, me):
                team.asleep.pop(me, None)
                self._look_again(team, me)

    def _is_valid(self, timer: int, team: _Team, me: int) -> bool:
        """Return True unless it is the timer of a sleep from which the worker was woken."""
        return me in team.waiting and team.asleep.get(me, timer) == timer

    def _end(self, place: int) -> None:
        found = self._tasks[place]
        assert found is not None
        team, me, piece = found
        self._tasks[place], self._running[place] = None, NOTHING
        following = team.program.ended(me, piece, self._now)
        if self._ways.keeps(team.number, me):
            if following is not None:
                self._start(team, me, following)
                return
            team.holding.add(me)
        else:
            team.lost.add(me)
            if following is not None:
                team.program.put_back(me, following)
        team.idle.add(me)


def run(setups: Sequence[SetUp], way: str, machine: Machine, cores: int) -> list[float]:
    """Return when each program is over, in seconds, all of which begin at 0. `way`: one of WAYS; exclusive is for one program alone."""
    workers = [cores] * len(setups)
    if way == "split":
        workers = [cores * (number + 1) // len(setups) - cores * number // len(setups) for number in range(len(setups))]
    for function, signature in SIGNATURES.items():
        compile_function(function, signature)
    with ExitStack() as stack:
        programs = [stack.enter_context(each.program(machine, count)) for each, count in zip(setups, workers, strict=True)]
        for program, setup in zip(programs, setups, strict=True):
            program.begin(setup.graph, setup.steps)
        return _Node(machine, cores, programs).run(way)


# Of the native scheduler, by the address of its table -----------------------------------------------------------------------------------


@compiled
def is_any_ready(table):
    return queues.is_anything_ready(words_at(table))


@compiled
def take_task(table, me):
    return queues.take(words_at(table), me)


@compiled
def push_task(table, me, instance):
    queues.push(words_at(table), me, instance)


@compiled
def release_task(table, me, instance):
    return release.release(words_at(table), me, instance)


_WORD = types.int64
SIGNATURES = core_ways.SIGNATURES | events.ADVANCE
SIGNATURES |= {
    is_any_ready: types.boolean(_WORD),
    take_task: _WORD(_WORD, _WORD),
    push_task: types.void(_WORD, _WORD, _WORD),
    release_task: _WORD(_WORD, _WORD, _WORD),
}
