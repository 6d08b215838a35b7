"""Workers that contend for cache lines: the native scheduler's own code on simulated cores, each atomic operation counted and paid for.

    with Contended(settings, machine, task_us=20) as scheduler:
        scheduler.run(graph)
    scheduler.counts, scheduler.span_us

A core has a line of memory, alone or with others, or has it sent by the core that wrote it last, which takes `line_us` within a socket and
`far_line_us` between sockets. To write, it must have the line alone. One core at a time gets a line that is written; whoever wants it, too,
waits in turn. What a core has, it reads or changes in about a nanosecond. Kernels are not called: a task takes its time.
"""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.lab.simulator.stepped import ATOMIC, Memory, Step, Stepped, Steps
from taskgpt.schedulers import native
from taskgpt.schedulers.native import worker
from taskgpt.schedulers.native.table import REMAINING
from taskgpt.tasks import Graph
from taskgpt.tasks.cache import compile_function

LINE_BYTES = 64
# Nanoseconds, of x86-64 processors since 2017, as their manuals and Agner Fog's tables have them to the nearest that matters here.
OWN_NS = 1.0  # a line that the core has
LOCKED_NS = 7.0  # an operation in one step, on a line that the core has: some 20 cycles
RELAX_NS = 40.0  # a pause: 40 to 140 cycles
CALL_NS = 500.0  # into the kernel and back, to yield the core or to wake somebody
LOCKED = ("store", "fetch_add", "fetch_or", "fetch_and", "exchange", "compare_exchange")  # loads in one step cost nothing extra
WARM_UP_NS = 20_000  # until all workers wait
WRITES = (*LOCKED, "store_last")


@dataclass
class Counts:
    """What happened, all workers together. locked: operations in one step. acquired, failed: attempts to take a lock, or to be the first
    to change a word. transfers: lines sent from core to core. wakes: threads that slept and were woken."""

    tasks: int = 0
    locked: int = 0
    acquired: int = 0
    failed: int = 0
    transfers: int = 0
    wakes: int = 0

    def a_task(self) -> dict[str, float]:
        """Return each count for a task."""
        return {name: value / max(1, self.tasks) for name, value in asdict(self).items() if name != "tasks"}


class Lines:
    """Which core has which line, and until when a line is on its way."""

    def __init__(self, machine: Machine, counts: Counts):
        self._cores = machine.cores_per_socket
        self._near_ns, self._far_ns = machine.line_us * 1e3, machine.far_line_us * 1e3
        self._counts = counts
        self._has: dict[int, set[int]] = {}
        self._writer: dict[int, int] = {}
        self._free_at: dict[int, float] = {}

    def reach(self, core: int, address: int, is_write: bool, now: float) -> float:
        """Return when the core has the line, to read or to write, that it asks for now."""
        line = address // LINE_BYTES
        has, writer = self._has.setdefault(line, set()), self._writer.get(line)
        if core in has and (not is_write or len(has) == 1):
            return now
        if writer is None and not has:  # its first use, which is no contention
            arrives = now
        else:
            source = writer if writer is not None and writer != core else min(has - {core}, default=core)
            is_near = source // self._cores == core // self._cores
            arrives = max(now, self._free_at.get(line, 0.0)) + (self._near_ns if is_near else self._far_ns)
            self._counts.transfers += 1
            if is_write or has == {writer}:  # the writer's copy goes out once; then the others' can be had from the shared cache
                self._free_at[line] = arrives
        if is_write:
            has.clear()
            self._writer[line] = core
        has.add(core)
        return arrives


@dataclass
class _Core:
    """A worker: its steps, the next one of them, its clock in ns."""

    number: int
    steps: Steps
    now: float = 0.0
    step: Step = ("relax", ())


@dataclass
class _Sleepers:
    """Who waits for a mutex or a condition, and whether the mutex is held."""

    cores: deque = field(default_factory=deque)  # of a condition: (core, mutex)
    is_held: bool = False


class Cores:
    """Workers as generators of steps, on one clock: the earliest step is next."""

    def __init__(self, machine: Machine, memory: Memory, counts: Counts, lasts_ns: Callable[[int], float]):
        self._lines, self._memory, self._counts, self._lasts_ns = Lines(machine, counts), memory, counts, lasts_ns
        self._wake_ns = machine.wake_us * 1e3
        self._due: list[tuple[float, int, _Core]] = []
        self._sleepers: dict[int, _Sleepers] = {}
        self._core: _Core | None = None  # whose code runs
        self._sequence = 0
        self.now = 0.0

    def touched(self, address: int, is_write: bool) -> None:
        """Have the core that runs pay for a plain access."""
        if self._core:
            self._core.now = self._lines.reach(self._core.number, address, is_write, self._core.now) + OWN_NS

    def start(self, number: int, steps: Steps) -> None:
        self._go_on(_Core(number, steps, self.now), None)

    @property
    def are_asleep(self) -> bool:
        """Whether nobody will ever go on."""
        return not self._due

    def run_until(self, is_over: Callable[[], bool]) -> None:
        """Run until that is so. Raises RuntimeError if all sleep."""
        while not is_over():
            if self.are_asleep:
                raise RuntimeError("all simulated workers sleep, and tasks are left")
            self.now, _, core = heapq.heappop(self._due)
            name, arguments = core.step
            if name in ATOMIC:
                self._go_on(core, self._atomic(core, name, arguments))
            else:
                getattr(self, f"_{name}")(core, *arguments)

    def _go_on(self, core: _Core, result: Any) -> None:
        """Have a core run until its next step, which is due then."""
        self._core = core
        try:
            core.step = core.steps.send(result)
        except StopIteration:  # it is through with its work
            return
        finally:
            self._core = None
        self._sequence += 1
        heapq.heappush(self._due, (core.now, self._sequence, core))

    def _atomic(self, core: _Core, name: str, arguments: tuple) -> int:
        words, index = arguments[:2]
        there = self._lines.reach(core.number, self._memory.address_of(words, index), name in WRITES, core.now)
        if name != "store_last":  # which a buffer takes: the core does not wait
            core.now = there
        core.now += LOCKED_NS if name in LOCKED else OWN_NS
        before = self._memory.do((name, arguments))
        self._counts.locked += name in LOCKED
        if name in ("exchange", "compare_exchange"):
            has_won = before == (arguments[2] if name == "compare_exchange" else 0)
            self._counts.acquired += has_won
            self._counts.failed += not has_won
        return before

    def _call_entry(self, core: _Core, entry: int, words: int, scratch: int, error: int) -> None:
        core.now += self._lasts_ns(words)
        self._counts.tasks += 1
        self._go_on(core, 0)

    def _relax(self, core: _Core) -> None:
        core.now += RELAX_NS
        self._go_on(core, 0)

    def _sched_yield(self, core: _Core) -> None:
        core.now += CALL_NS
        self._go_on(core, 0)

    def _locked(self, core: _Core, address: int) -> _Sleepers:
        core.now = self._lines.reach(core.number, address, True, core.now) + LOCKED_NS
        self._counts.locked += 1
        return self._sleepers.setdefault(address, _Sleepers())

    def _mutex_lock(self, core: _Core, mutex: int) -> None:
        held = self._locked(core, mutex)
        if held.is_held:
            self._counts.failed += 1
            core.now += CALL_NS
            held.cores.append(core)
        else:
            self._counts.acquired += 1
            held.is_held = True
            self._go_on(core, 0)

    def _mutex_unlock(self, core: _Core, mutex: int) -> None:
        self._give(core, self._locked(core, mutex))
        self._go_on(core, 0)

    def _give(self, core: _Core, held: _Sleepers) -> None:
        """Give a mutex back: to who waits for it longest."""
        held.is_held = bool(held.cores)
        if held.cores:
            self._wake(core, held.cores.popleft())

    def _wake(self, by: _Core, core: _Core) -> None:
        by.now += CALL_NS
        core.now = max(core.now, by.now) + self._wake_ns
        self._counts.wakes += 1
        self._counts.acquired += 1
        self._go_on(core, 0)

    def _condition_wait(self, core: _Core, condition: int, mutex: int) -> None:
        waiting = self._locked(core, condition)
        core.now += CALL_NS
        waiting.cores.append((core, mutex))
        self._give(core, self._locked(core, mutex))

    def _condition_signal(self, core: _Core, condition: int) -> None:
        self._signal(core, condition, 1)

    def _condition_broadcast(self, core: _Core, condition: int) -> None:
        self._signal(core, condition, len(self._sleepers.get(condition, _Sleepers()).cores))

    def _signal(self, core: _Core, condition: int, most: int) -> None:
        """Have those who wait go on to the mutex, which the caller holds: they get it when he gives it back."""
        waiting = self._locked(core, condition).cores
        for _ in range(min(most, len(waiting))):
            sleeper, mutex = waiting.popleft()
            self._sleepers[mutex].cores.append(sleeper)
        self._go_on(core, 0)


class Contended(native.Scheduler):
    """The native scheduler, whose workers are `Cores`. Its runs do not overlap."""

    def __init__(self, settings: native.Settings, machine: Machine, task_us: float):
        super().__init__(settings)
        self.counts = Counts()
        self._words = Memory(lambda address, is_write: self._cores.touched(address, is_write))
        self._cores = Cores(machine, self._words, self.counts, lambda words: self._lasts[words])
        self._task_ns = task_us * 1e3
        self._lasts: dict[int, float] = {}
        self._since_us = 0.0

    def _start(self) -> None:
        for function, signature in worker.SIGNATURES.items():
            compile_function(function, signature)
        self._make_table()
        self._code = Stepped(self._words)
        for me in range(self.workers):
            self._cores.start(me, self._code.work(self._address, me))

    def _stop(self) -> None:
        """No thread was started."""

    @property
    def span_us(self) -> float:
        """How long the last run has taken, by the clock of the cores."""
        return self._cores.now / 1e3 - self._since_us

    def run(self, graph: Graph) -> None:
        """Run the graph. No two tasks take the same time: from 3/4 to 5/4 of `task_us`, the same in every run."""
        plan = self._plans(graph)
        draw = np.random.default_rng(0)
        times = self._task_ns * draw.uniform(0.75, 1.25, plan.tasks)
        self._lasts = dict(zip(plan.call_words.tolist(), times.tolist(), strict=True))
        super().run(graph)

    def _begin(self, run: Any, is_next: bool) -> None:
        """Have the submitting thread, on a core of its own, meet workers that wait."""
        warm = self._cores.now + WARM_UP_NS
        self._cores.run_until(lambda: self._cores.now >= warm or self._cores.are_asleep)
        self._since_us = self._cores.now / 1e3
        self._cores.start(self.workers, self._code.submit(self._address, run.slot, is_next))

    def _finish(self, run: Any) -> None:
        words = self._run_words[run.slot]
        if not run.is_over:
            self._cores.run_until(lambda: words[REMAINING] == 0)
            run.is_over = True
            run.graph.runs.discard(run)
            self._runs.remove(run)

    def _abandon(self) -> None:
        self._forget_all()
