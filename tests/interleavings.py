"""Every order in which threads can do their atomic steps: of generators that stand for threads, or of the native scheduler's own code.

Atomics are sequentially consistent (LLVM's seq_cst), so that interleavings are all there is.
"""

from collections.abc import Callable, Iterator
from typing import Any

from taskgpt import config
from taskgpt.lab.simulator.stepped import ATOMIC, Memory, Step, Stepped, Steps
from taskgpt.schedulers import native
from taskgpt.schedulers.native import worker
from taskgpt.tasks.cache import compile_function

EVERY = 10**9


def interleavings(threads, shared: dict):
    """Yield the shared state at the end of every interleaving of generator functions, each of whose stretches is one atomic step."""

    def explore(schedule: list[int]):
        state = dict(shared)
        running = [thread(state) for thread in threads]
        alive = [True] * len(threads)
        for at in schedule:
            alive[at] = next(running[at], "end") != "end"
        if not any(alive):
            yield state
        for at in range(len(threads)):
            if alive[at]:
                yield from explore([*schedule, at])

    return explore([])


class Still(native.Scheduler):
    """The native scheduler without threads: its table, and its code a step at a time."""

    def _start(self) -> None:
        for function, signature in worker.SIGNATURES.items():
            compile_function(function, signature)
        self._make_table()
        self._make_room(4, 0)
        self.code = Stepped(self.memory)
        self.t = self.memory.words_at(self._address)
        self.found: list = []
        self.everything = [self._memory, *self._room[-2:]]  # queues and rings too

    def _stop(self) -> None:
        """No thread was started."""

    def __init__(self, **overrides: Any):
        self.memory = Memory()
        super().__init__(config.load_scheduler("native", overrides).settings)


class _Thread:
    """A generator, the step that it is about to take, and whether it sleeps."""

    def __init__(self, steps: Steps, machine: "_Machine"):
        self.steps, self.machine = steps, machine
        self.step: Step | None = None
        self.is_over = False
        self._state: tuple | None = None  # as long as it is known: until somebody changes what it is made of
        self._go_on(None)

    def _go_on(self, result: Any) -> None:
        try:
            self.step = self.steps.send(result)
        except StopIteration:
            self.is_over = True

    @property
    def can_go_on(self) -> bool:
        if self.is_over or self.step[0] == "asleep":
            return False
        return self.step[0] != "mutex_lock" or self.step[1][0] not in self.machine.held

    def do(self) -> None:
        name, arguments = self.step
        self._state = None
        held, sleepers = self.machine.held, self.machine.sleepers
        result = 0
        if name in ATOMIC:
            result = Memory.do(self.step)
        elif name == "mutex_lock":
            held[arguments[0]] = self
        elif name == "mutex_unlock":
            del held[arguments[0]]
        elif name in (
            "condition_wait",
            "condition_timedwait",
        ):  # falls asleep, and gives the mutex back in the same step; time stands still
            sleepers[self] = arguments[0]
            del held[arguments[1]]
            self.step = ("asleep", arguments)
            return
        elif name in ("condition_signal", "condition_broadcast"):  # at most one thread waits for what is signalled
            for sleeper in [each for each, condition in sleepers.items() if condition == arguments[0]]:
                del sleepers[sleeper]
                sleeper.step, sleeper._state = ("mutex_lock", (sleeper.step[1][1],)), None
        elif name == "call_entry":  # into Python, which has no thread to spare
            result = 1
        elif name == "futex_wait":
            if Memory.word(arguments[0]) & 0xFFFFFFFF == arguments[1] & 0xFFFFFFFF:
                sleepers[self] = arguments[0]
                self.step = ("asleep", arguments)
                return
        elif name == "futex_wake":
            for sleeper in [each for each, address in sleepers.items() if address == arguments[0]][: arguments[1]]:
                del sleepers[sleeper]
                sleeper.wake()
        elif name not in ("relax", "sched_yield"):
            raise ValueError(f"no step '{name}'")
        self._go_on(result)

    def wake(self) -> None:
        self.step, self._state = ("relax", ()), None

    def state(self) -> tuple:
        """Return all that decides what the thread will do."""
        if self._state is not None:
            return self._state
        frames, steps = [], self.steps
        while steps is not None and getattr(steps, "gi_frame", None) is not None:
            frame = steps.gi_frame
            kept = sorted(
                (name, min(value, 3) if name == "spins" else value) for name, value in frame.f_locals.items() if isinstance(value, int)
            )
            frames.append((frame.f_code.co_name, frame.f_lasti, tuple(kept)))
            steps = steps.gi_yieldfrom
        self._state = self.is_over, self.step and self.step[0], tuple(frames)
        return self._state


class _Machine:
    """Threads on the memory of a scheduler, from the beginning."""

    def __init__(self, threads: list[Callable[[], Steps]], sleeps: int):
        self.sleeps = sleeps
        self.held: dict[int, _Thread] = {}
        self.sleepers: dict[_Thread, int] = {}
        self.threads = [_Thread(thread(), self) for thread in threads]

    def those_that_can(self) -> list[int]:
        can = [at for at, thread in enumerate(self.threads) if thread.can_go_on]
        if not can and self.sleeps:
            self.sleeps -= 1
            for sleeper in self.sleepers:
                sleeper.wake()
            self.sleepers.clear()
            return self.those_that_can()
        return can


def run_alone(steps: Steps) -> Any:
    """Return what a thread returns that no other disturbs."""
    try:
        step = next(steps)
        while True:
            step = steps.send(Memory.do(step))
    except StopIteration as end:
        return end.value


def ends(still: Any, threads: list[Callable[[], Steps]], most_switches: int = EVERY, sleeps: int = 0) -> Iterator[bool]:
    """Yield whether all threads are through, at the end of every interleaving, or of those that leave a thread that could go on so often.

    `still`: the memory, `everything`, and what threads have `found`. `sleeps`: how often those that sleep on a futex wake up because their
    time is over, when no thread can go on.
    An end is when no thread can go on; then what threads wrote to `still.found` is there. From a state that was met, nobody goes on again.
    """
    before = [array.copy() for array in still.everything]
    met: dict[tuple, int] = {}

    def replay(schedule: list[int]) -> _Machine:
        for array, content in zip(still.everything, before, strict=True):
            array[...] = content
        still.found.clear()
        machine = _Machine(threads, sleeps)
        for at in schedule:
            machine.threads[at].do()
        return machine

    todo: list[tuple[list[int], int]] = [([], 0)]
    while todo:
        schedule, switches = todo.pop()
        machine = replay(schedule)
        while True:
            can = machine.those_that_can()
            if not can:
                yield all(thread.is_over for thread in machine.threads)
                break
            contents = hash(b"".join(array.tobytes() for array in still.everything))
            last = schedule[-1] if schedule else -1
            key = (
                contents,
                machine.sleeps,
                tuple(still.found),
                last if most_switches < EVERY else 0,
                *(thread.state() for thread in machine.threads),
            )
            if met.get(key, most_switches + 1) <= switches:
                break
            met[key] = switches
            first = last if last in can else can[0]
            for at in can:
                more = switches + (last in can and at != last)
                if at != first and more <= most_switches:
                    todo.append(([*schedule, at], more))
            schedule = [*schedule, first]
            machine.threads[first].do()
