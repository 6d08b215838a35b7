"""Programs whose tasks spawn tasks at random: `python -m tests.programs_at_random [PROGRAMS] [FAULTS]`, by default 1,000 and 200.

So many programs that Hypothesis makes up run under `native`, with 1 to 8 workers and one queue or one each, and must leave the same bits as
under `sequential`. Bodies in Python and compiled ones, weak and final tasks, futures, groups and waiting are in them. Then so many with
exceptions, cancellations and events: nothing hangs, no thread is left, and the next program runs. A failure is told with the smallest
program that has it; a line at the end says how many ran. Some minutes; the suite does the same with fewer.
"""

import sys
import threading
import time
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taskgpt.tasks import In, InOut, Out, TaskError, WeakInOut, dims, kernel, wrap
from taskgpt.tasks.spawn import Spawn

sys.path.append(str(Path(__file__).parent))  # as a command
from plain_schedulers import scheduler

N, M = dims("N M")
I64 = np.int64
CELLS, CELL = 12, 4
BODIES: list[tuple] = []  # what the bodies of the program that runs do, by the number that they are given
PATIENCE_S = 30


@kernel(compiled=True)
def mix(a: InOut[N, I64], k: int):
    for i in range(a.shape[0]):
        a[i] = a[i] * 31 + k


@kernel
def gather(a: InOut[N, I64], b: In[M, I64], k: int):
    a[:] = a * 7 + k + np.sum(b * np.arange(1, b.shape[0] + 1))


@kernel(compiled=True)
def fill(a: Out[N, I64], b: In[M, I64]):
    a[:] = b.sum() % 1009


@kernel(compiled=True)
def total(a: In[N, I64]) -> int:
    return a.sum() % 1009


@kernel(compiled=True)
def nest(a: InOut[N, I64], seed: int, times: int, spawn: Spawn) -> int:
    """Spawn on parts of all lengths, in compiled code; some spawn more, and some are waited for."""
    draw, length, found = seed, a.shape[0], 0
    for k in range(times):
        draw = (draw * 1103515245 + 12345) & 0x7FFFFFFF
        start = (draw >> 8) % length
        part = a[start : start + 1 + (draw >> 16) % (length - start)]
        if draw % 5 == 0 and times > 2:
            future = spawn(nest, part, draw, times // 3)
            found += future.result() if draw % 2 else 0
        elif draw % 5 == 1:
            found += spawn(total, part).result()
        else:
            spawn(mix, part, k)
        if draw % 17 == 0:
            spawn.taskwait()
    return found


@kernel
def body(a: InOut[N, I64], number: int, spawn: Spawn):
    act(a, BODIES[number], spawn)


@kernel
def weak_body(a: WeakInOut[N, I64], number: int, spawn: Spawn):
    act(a, BODIES[number], spawn)


def act(a, actions: tuple, spawn) -> None:
    """Do what a body does. An action: its name, and what it needs; parts of `a` are numbers that `part_of` makes one of."""
    for what, *given_ in actions:
        if what == "mix":
            at, k, priority = given_
            spawn(mix, part_of(a, at), k, priority=priority)
        elif what in ("gather", "fill", "total", "nest"):
            one, other, k = given_
            if what == "nest":
                spawn(mix, part_of(a, other), spawn(nest, part_of(a, one), k, 12).result() % 1009 if k % 2 else k)
                spawn(nest, part_of(a, other), k, 8)
            elif what == "total":
                spawn(mix, part_of(a, other), spawn(total, part_of(a, one)).result())
            elif not part_of(a, one).overlaps(part_of(a, other)):
                parts = part_of(a, one), part_of(a, other)
                spawn(gather, *parts, k) if what == "gather" else spawn(fill, *parts)
        elif what == "spawn":
            at, actions_of_it, is_weak, is_final = given_
            BODIES.append(actions_of_it)
            spawn(weak_body if is_weak else body, part_of(a, at), len(BODIES) - 1, final=is_final)
        elif what == "wait":
            spawn.taskwait()
        elif what == "wait_on":
            spawn.wait_on(part_of(a, given_[0]))
        elif what == "group":
            with spawn.group() as group:
                act(a, given_[0], spawn)
            group.cancel() if given_[1] else group.wait()
        elif what == "fail":
            raise ValueError("at random")
        elif what == "event":
            event = spawn.event()
            threading.Timer(given_[0] / 1e3, event.fulfil).start()
            if given_[1]:
                event.wait()
        elif what == "sleep":
            spawn.sleep(given_[0] / 1e3)


def part_of(a, at: tuple[int, int]):
    """Return a part of a tile, in whole cells."""
    cells = a.shape[0] // CELL
    first = at[0] % cells
    return a[first * CELL : (first + 1 + at[1] % (cells - first)) * CELL]


parts = st.tuples(st.integers(0, CELLS - 1), st.integers(0, CELLS - 1))
numbers = st.integers(0, 1000)
simple = st.one_of(
    st.tuples(st.just("mix"), parts, numbers, st.integers(-2, 2)),
    st.tuples(st.sampled_from(["gather", "fill", "total", "nest"]), parts, parts, numbers),
    st.just(("wait",)),
    st.tuples(st.just("wait_on"), parts),
)
faults = st.one_of(
    simple,
    st.just(("fail",)),
    st.tuples(st.just("event"), st.integers(0, 5), st.booleans()),
    st.tuples(st.just("sleep"), st.integers(0, 3)),
)


def programs(leaves: st.SearchStrategy, may_cancel: bool) -> st.SearchStrategy:
    """Return what makes programs: what their roots do."""

    def deeper(actions: st.SearchStrategy) -> st.SearchStrategy:
        inner = st.lists(actions, max_size=6).map(tuple)
        cancels = st.booleans() if may_cancel else st.just(False)
        return st.one_of(
            actions, st.tuples(st.just("spawn"), parts, inner, st.booleans(), st.booleans()), st.tuples(st.just("group"), inner, cancels)
        )

    return st.lists(st.recursive(leaves, deeper, max_leaves=40), min_size=1, max_size=10).map(tuple)


SETUPS = [("native" if workers % 2 else "native-stealing", workers) for workers in (1, 2, 3, 4, 6, 8)]


def verify(count: int) -> int:
    """Run so many programs under `sequential` and a native set-up; return how many ran. Raises AssertionError where bits differ."""
    ran = 0
    with ExitStack() as opened:
        alone = opened.enter_context(scheduler("sequential"))
        natives = [opened.enter_context(scheduler(name, workers=workers)) for name, workers in SETUPS]

        @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(programs(simple, may_cancel=False), st.sampled_from(natives))
        def run(program: tuple, native) -> None:
            nonlocal ran
            left = []
            for each in (alone, native):
                BODIES.clear()
                x = wrap(np.arange(CELLS * CELL, dtype=I64), CELL)
                with each.program(patience_s=PATIENCE_S) as spawn:
                    act(x[:], program, spawn)
                left.append(x.array.tolist())
            assert left[0] == left[1]
            ran += 1

        run()
    return ran


def disturb(count: int) -> int:
    """Run so many programs with faults; return how many. Raises AssertionError for what hangs, or leaves a thread or a program behind."""
    before, ran = threading.active_count(), 0

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(programs(faults, may_cancel=True), st.sampled_from(SETUPS))
    def run(program: tuple, setup: tuple[str, int]) -> None:
        nonlocal ran
        BODIES.clear()
        x = wrap(np.arange(CELLS * CELL, dtype=I64), CELL)
        with scheduler(setup[0], workers=setup[1]) as native:
            with suppress(CancelledError):
                try:
                    with native.program(patience_s=PATIENCE_S) as spawn:
                        BODIES.append(program)
                        spawn(body, x[:], 0)
                except TaskError as error:
                    assert "at random" in str(error)
            with native.program() as spawn:
                assert spawn(total, x[:]).result() == x.array.sum() % 1009
        ran += 1

    run()
    until = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < until:
        time.sleep(0.01)  # timers of events that programs gave up
    assert threading.active_count() <= before
    return ran


def main(count: int = 1000, faulty: int = 200) -> None:
    print(f"{verify(count):,} programs left the bits of sequential")
    print(f"{disturb(faulty):,} programs with faults left nothing behind")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
