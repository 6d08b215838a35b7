"""Workers without work. One of them is on the watch: it looks at the queues. The others wait, each on a cell of its own, or sleep.

Who is on the watch and finds a task leaves the watch to another. So a push has nobody to tell, as long as there is a watch; else it tells
one, and that one the next if there is more. A worker sets its bit among those that spin, or sleep, looks once more whether there is work,
and waits. Who has something for him claims him: takes the bit back, in one step, so that nobody else does, and fills his cell: with a
task, or with what to do. Who wants to wait no longer takes his own bit back; if it is gone, his cell is about to be filled. The bit comes
before the look, and the push of a task before the look for bits: so one of the two sees the other.
"""

from taskgpt.pointers import (
    condition_signal,
    condition_wait,
    exchange,
    fetch_and,
    fetch_or,
    load,
    mutex_lock,
    mutex_unlock,
    relax,
    sched_yield,
    store,
)
from taskgpt.schedulers.native.table import (
    ASLEEP,
    CELL,
    CELL_FILLED,
    CELL_MUTEX,
    GROUP,
    LOOK,
    NOTHING,
    ON_WATCH,
    ROUSING,
    SPINNING,
    WATCH,
    WORKERS,
    compiled,
    idle_of,
    worker_of,
)

_YIELD_EVERY = 64  # spins: where there are fewer cores than workers, the one that has work gets its turn after some 2 us


@compiled
def announce(t, me, how):
    """Set my bit; `how`: SPINNING or ASLEEP."""
    fetch_or(idle_of(t, me // GROUP), how, 1 << (me % GROUP))


@compiled
def withdraw(t, me, how):
    """Take my bit back; return False if somebody has claimed me."""
    bit = 1 << (me % GROUP)
    return fetch_and(idle_of(t, me // GROUP), how, ~bit) & bit != 0


@compiled
def claim(t, near, how):
    """Return a worker that spins, or sleeps, and whom nobody else will claim: this one or the next after it. NOTHING if there is none."""
    groups = (t[WORKERS] + GROUP - 1) // GROUP
    for i in range(groups):
        group = (near // GROUP + i) % groups
        words = idle_of(t, group)
        bits = load(words, how)
        for j in range(GROUP):
            if bits == 0:
                break
            at = (near + j) % GROUP
            bit = 1 << at
            if bits & bit != 0:
                if fetch_and(words, how, ~bit) & bit != 0:
                    return group * GROUP + at
                bits &= ~bit
    return NOTHING


@compiled
def hand(t, worker, what):
    """Give a claimed worker that spins an instance, LOOK or ON_WATCH."""
    store(worker_of(t, worker), CELL, what)


@compiled
def begin_watch(t):
    """Return True if nobody was on the watch; now I am."""
    return load(t, WATCH) == 0 and exchange(t, WATCH, 1) == 0


@compiled
def end_watch(t, near):
    """Leave the watch to a worker that spins, if there is one. Before I look for work the last time, or after I found some."""
    worker = claim(t, near, SPINNING)
    if worker != NOTHING:
        hand(t, worker, ON_WATCH)
    else:
        store(t, WATCH, 0)
        _give_watch(t, near)  # to one that has begun to spin since


@compiled
def _give_watch(t, near):
    while is_anybody(t, SPINNING) and begin_watch(t):
        worker = claim(t, near, SPINNING)
        if worker != NOTHING:
            hand(t, worker, ON_WATCH)
            return
        store(t, WATCH, 0)


@compiled
def rouse(t, near):
    """Have somebody look for work, later than this, if nobody is on the watch: one that spins, or else one that sleeps."""
    _give_watch(t, near)
    while load(t, WATCH) == 0 and is_anybody(t, ASLEEP) and load(t, ROUSING) == 0 and exchange(t, ROUSING, 1) == 0:
        sleeper = claim(t, near, ASLEEP)
        if sleeper != NOTHING:
            wake(t, sleeper)
            return
        store(t, ROUSING, 0)


@compiled
def wake_some(t, near, most):
    """Wake so many of those that sleep."""
    for _ in range(most):
        sleeper = claim(t, near, ASLEEP)
        if sleeper == NOTHING:
            return
        wake(t, sleeper)


@compiled
def wake(t, worker):
    """Have a claimed worker that sleeps look for work."""
    cell = worker_of(t, worker)
    mutex_lock(cell[CELL_MUTEX])
    store(cell, CELL, LOOK)
    condition_signal(cell[CELL_FILLED])
    mutex_unlock(cell[CELL_MUTEX])


@compiled
def accept(t, me):
    """Return what is in my cell, which somebody fills who has claimed me."""
    cell = worker_of(t, me)
    spins = 0
    while load(cell, CELL) == NOTHING:
        pause(spins)
        spins += 1
    handed = load(cell, CELL)
    store(cell, CELL, NOTHING)
    return handed


@compiled
def pause(spins):
    """Wait a moment; after some of them, let another thread have the core."""
    relax()
    if (spins + 1) % _YIELD_EVERY == 0:
        sched_yield()


@compiled
def sleep(t, me):
    """Sleep until somebody wakes me."""
    cell = worker_of(t, me)
    mutex_lock(cell[CELL_MUTEX])
    while load(cell, CELL) == NOTHING:
        condition_wait(cell[CELL_FILLED], cell[CELL_MUTEX])
    store(cell, CELL, NOTHING)
    mutex_unlock(cell[CELL_MUTEX])
    store(t, ROUSING, 0)  # before I look for work: who finds a 1 there relies on that


@compiled
def is_anybody(t, how):
    """Return True if a worker spins, or sleeps, whom nobody has claimed."""
    for group in range((t[WORKERS] + GROUP - 1) // GROUP):  # noqa: SIM110 - numba has no any()
        if load(idle_of(t, group), how) != 0:
            return True
    return False
