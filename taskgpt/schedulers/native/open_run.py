"""Open runs: tasks are spawned while others run, by the program and by tasks; it has no graph.

A task has a place (places.py) as long as it is open: from its spawning until it has run and nobody will look at it any more. There stands
how many hold it alive: its body, and every child, which closes its list of who waits for it before it lets go of its parent. So a task
is done when all that it spawned is.

A ready task is in a queue once. Who takes it out of there, or a task that waits for its child, may run it: who sets TAKEN does, and the
other has come in vain. A place is free again when both have been there.

Spawning from Python holds the GIL, so that there is one who does so at a time; running does not, nor does spawning from compiled code
(nested.py).
"""

from numba import njit, types

from taskgpt.pointers import (
    REALTIME,
    WORD_BYTES,
    address_of,
    call_entry,
    clock_gettime,
    compare_exchange,
    condition_timedwait,
    exchange,
    fetch_add,
    fetch_or,
    load,
    mutex_lock,
    mutex_unlock,
    store,
    words_at,
)
from taskgpt.schedulers.native.places import CLOSED, add_edge, has_edges, let_go, new_place, pool_in
from taskgpt.schedulers.native.queues import push
from taskgpt.schedulers.native.release import go_on_with, note_ready, offer, record, tell
from taskgpt.schedulers.native.table import (
    ALIVE,
    BUFFER,
    CALL_ENTRY,
    CALL_WORDS,
    CANCELLED_ALL,
    DONE,
    EDGE_FIRST,
    EDGE_NEXT,
    EDGE_TO,
    ENDED,
    ERROR,
    ERRORS,
    FAILED_PLACES,
    FEW,
    HEADS,
    HOLDS,
    MUTEX,
    NOTHING,
    OPEN,
    OWN_PRIORITIES,
    OWN_WORDS,
    PARENTS,
    PENDING,
    PLACE,
    READY_AT,
    RECORD,
    RESULT,
    RESULTS_AT,
    SCRATCH,
    SERIALS,
    SPAWNED,
    STATES,
    compiled,
    instance_of,
    now,
    run_in,
    run_of,
    slot_of,
    task_of,
    worker_of,
)

ROOT = 0  # the place of the program itself, which is alive as long as the run
MOST_WORDS = 64  # of a call's arguments that a place has room for
TAKEN, ALL_DONE, AWAITED, CANCELLED, SKIPPED = 1, 2, 4, 8, 16  # bits of a state. ALL_DONE: with its children. SKIPPED: cancelled with all
ONE_EVENT = 1 << 20  # in ALIVE, beside the body and the children: more than there are places
CHILDREN_AWAITED = 1 << 40  # in ALIVE, beside the counts
NO_PLACE, NO_EDGES = -1, -2  # what `add_task` returns if there is no room
ENTRY, WORDS_AT, WORD_COUNT, WAIT_COUNT, PARENT, PRIORITY, IS_SHELL, SERIAL, RESULT_AT, FIRST_WAIT = range(
    10
)  # in the buffer; then the words

_spawning = njit(error_model="numpy")  # with the GIL


@_spawning
def add_task(table, me):
    """Spawn the task that is in the buffer; return its place, or NO_PLACE or NO_EDGES. It runs as soon as what it waits for is done.

    The buffer: the kernel's entry, 0 for nothing to do; where the words of its arguments are, 0 for behind this; how many; how many tasks
    it waits for; the place of the task that spawns it; its priority; whether it is a shell, which has no body, and is done when its last
    child is, after `fulfil` has said that it has them all; its number in records, -1 if it is in none; where its result goes, 0 for
    nowhere; the places of what it waits for, perhaps done by now; the words.
    """
    t = words_at(table)
    run = run_in(t, 0)
    o = words_at(run[OPEN])
    pool = pool_in(o, 0)
    buffer = words_at(o[BUFFER])
    waits = buffer[WAIT_COUNT]
    if not has_edges(pool, waits):
        return NO_EDGES
    place = new_place(o, pool)
    if place == NOTHING:
        return NO_PLACE
    is_shell = buffer[IS_SHELL]
    words = buffer[WORDS_AT]
    if words == 0:
        words = own_words(o, place)
        for at in range(buffer[WORD_COUNT]):
            words_at(words)[at] = buffer[FIRST_WAIT + waits + at]
    words_at(run[OWN_PRIORITIES])[place] = buffer[PRIORITY]
    words_at(o[SERIALS])[place] = buffer[SERIAL]
    words_at(o[RESULTS_AT])[place] = buffer[RESULT_AT]
    settle_in(run, o, place, buffer[PARENT], buffer[ENTRY], words, 1 if is_shell else 2)  # a shell is in no queue
    pending, still = words_at(run[PENDING]), types.int64(0)
    store(pending, place, waits + 1)  # one more than there are, so that it is not ready before all edges are there
    for at in range(waits):
        before = buffer[FIRST_WAIT + at]
        if before != place:  # else it is done, and this task has its place
            still += add_edge(o, pool, before, place)
    if is_shell == 0:
        begin_when_ready(t, me, run, place, waits - still + 1)
    return place


@compiled
def own_words(o, place):
    """Return where a place has room for the words of a call."""
    return o[OWN_WORDS] + WORD_BYTES * MOST_WORDS * place


@compiled
def settle_in(run, o, place, parent, entry, words, holds):
    """Have a task at a new place, which so many hold, be a child of another that is not done."""
    words_at(run[CALL_ENTRY])[place] = entry
    words_at(run[CALL_WORDS])[place] = words
    words_at(o[PARENTS])[place] = parent
    words_at(o[HOLDS])[place] = holds
    words_at(o[ALIVE])[place] = 1
    store(words_at(o[STATES]), place, 0)
    store(words_at(o[HEADS]), place, NOTHING)
    fetch_add(words_at(o[ALIVE]), parent, 1)


@compiled
def begin_when_ready(t, me, run, place, over):
    """Take from what a task waits for what was too much; push it if that was all."""
    if fetch_add(words_at(run[PENDING]), place, -over) == over:
        note_ready(t, me, instance_of(place, 0))
        push(t, me, instance_of(place, 0))


# Running --------------------------------------------------------------------------------------------------------------------------------


@compiled
def run_spawned(t, me, instance):
    """Run a task that was in a queue, unless its parent did; return the task to go on with, or NOTHING."""
    o, place = words_at(run_of(t, instance)[OPEN]), task_of(instance)
    state = fetch_or(words_at(o[STATES]), place, TAKEN)
    best = NOTHING if state & TAKEN else run_taken(t, me, instance, state)
    let_go(t, o, place)
    return best


@compiled
def run_claimed(table, me, place, state):
    """Run a task that `claim_task` has given to this thread, with what it returned."""
    t = words_at(table)
    best = run_taken(t, me, instance_of(place, 0), state)
    if best != NOTHING:
        push(t, me, best)


@compiled
def run_taken(t, me, instance, state):
    """Run a task whose TAKEN this thread has set, with the state before that; return as `run_spawned` does."""
    run, worker, place = run_of(t, instance), worker_of(t, me), task_of(instance)
    o = words_at(run[OPEN])
    if load(o, CANCELLED_ALL) != 0:
        fetch_or(words_at(o[STATES]), place, SKIPPED)
    elif state & CANCELLED == 0:
        serial = words_at(o[SERIALS])[place]
        is_timed = worker[RECORD] != 0 and serial >= 0
        ready = words_at(run[READY_AT])[place] if is_timed else 0
        start = now(worker) if is_timed else 0
        entry, words = words_at(run[CALL_ENTRY])[place], words_at(run[CALL_WORDS])[place]
        worker[PLACE] = place
        failed = call_entry(entry, words, worker[SCRATCH], address_of(worker, ERROR)) if entry != 0 else 0
        result_at = words_at(o[RESULTS_AT])[place]
        if result_at != 0:
            words_at(result_at)[0] = worker[RESULT]
        if is_timed:
            record(worker, run, serial, ready, start, now(worker))
        if failed != 0:
            _fail(t, o, place, worker[ERROR])
    return end(t, me, instance, 1)


@compiled
def end(t, me, instance, what):
    """Count down what holds a task alive, by 1 or ONE_EVENT; if that was all, release who waits for it, then its parent.

    Return as `run_spawned` does.
    """
    run, place, slot = run_of(t, instance), task_of(instance), slot_of(instance)
    o = words_at(run[OPEN])
    pending, best = words_at(run[PENDING]), NOTHING
    while place != NOTHING:
        alive = fetch_add(words_at(o[ALIVE]), place, -what)
        if alive & (CHILDREN_AWAITED - 1) != what:
            if alive & CHILDREN_AWAITED and alive & (ONE_EVENT - 1) == 2:  # without children, its body is left, which waits
                tell(t)
            break
        what = types.int64(1)
        parent = words_at(o[PARENTS])[place]
        edge = exchange(words_at(o[HEADS]), place, CLOSED)
        while edge != NOTHING:
            following, to = words_at(o[EDGE_NEXT])[edge], words_at(o[EDGE_TO])[edge]
            if fetch_add(pending, to, -1) == 1:
                best = offer(t, me, best, instance_of(to, slot))
            edge = following
        if fetch_or(words_at(o[STATES]), place, ALL_DONE) & AWAITED:
            tell(t)
        let_go(t, o, place)
        place = parent
    return go_on_with(t, me, best)


@compiled
def _fail(t, o, place, error):
    """Keep the exception for who spawned, whom it is told; no other task begins."""
    words_at(o[ERRORS])[place] = error
    fetch_add(words_at(o[HOLDS]), place, 1)
    while True:
        head = load(o, FAILED_PLACES)
        words_at(o[EDGE_FIRST])[place] = head  # the edges of the last run of a program are not used again
        if compare_exchange(o, FAILED_PLACES, head, place) == head:
            break
    store(o, CANCELLED_ALL, 1)  # who sees it finds the exception
    tell(t)


# Waiting --------------------------------------------------------------------------------------------------------------------------------


@_spawning
def begin_wait(table, place):
    """Return True if a task is done; else keep its place for who waits for it, until `end_wait`."""
    t = words_at(table)
    o = words_at(run_in(t, 0)[OPEN])
    holds = words_at(o[HOLDS])
    while True:
        held = load(holds, place)
        if held == 0:  # it is done, and its place is free
            return True
        if compare_exchange(holds, place, held, held + 1) == held:
            break
    if fetch_or(words_at(o[STATES]), place, AWAITED) & ALL_DONE == 0:
        return False
    let_go(t, o, place)
    return True


@_spawning
def end_wait(table, place):
    """Let go of a place."""
    t = words_at(table)
    let_go(t, words_at(run_in(t, 0)[OPEN]), place)


@compiled
def await_task(table, place, until, milliseconds):
    """Wait so long for a task; return True if it is done. `until`: the address of two words of the calling thread's own."""
    t = words_at(table)
    states = words_at(words_at(run_in(t, 0)[OPEN])[STATES])
    _set_time(until, milliseconds)
    mutex_lock(t[MUTEX])
    while load(states, place) & ALL_DONE == 0 and condition_timedwait(t[DONE], t[MUTEX], until) == 0:
        pass
    mutex_unlock(t[MUTEX])
    return load(states, place) & ALL_DONE != 0


@compiled
def await_children(table, place, until, milliseconds):
    """Wait so long for all that a task has spawned; return True if it is done."""
    t = words_at(table)
    alive = words_at(words_at(run_in(t, 0)[OPEN])[ALIVE])
    if fetch_or(alive, place, CHILDREN_AWAITED) & (ONE_EVENT - 1) > 1:
        _set_time(until, milliseconds)
        mutex_lock(t[MUTEX])
        while load(alive, place) & (ONE_EVENT - 1) > 1 and condition_timedwait(t[DONE], t[MUTEX], until) == 0:
            pass
        mutex_unlock(t[MUTEX])
    return load(alive, place) & (ONE_EVENT - 1) <= 1


@compiled
def await_few(table, few, until, milliseconds):
    """Wait so long until no more than so many tasks that Python spawned are open; return True if that is so."""
    t = words_at(table)
    pool = pool_in(words_at(run_in(t, 0)[OPEN]), 0)
    store(pool, FEW, few)
    _set_time(until, milliseconds)
    mutex_lock(t[MUTEX])
    while load(pool, SPAWNED) - load(pool, ENDED) > few and condition_timedwait(t[DONE], t[MUTEX], until) == 0:
        pass
    mutex_unlock(t[MUTEX])
    store(pool, FEW, NOTHING)
    return load(pool, SPAWNED) - load(pool, ENDED) <= few


@compiled
def _set_time(until, milliseconds):
    clock = words_at(until)
    clock_gettime(types.int32(REALTIME), until)
    nanoseconds = clock[1] + milliseconds * 1_000_000
    clock[0], clock[1] = clock[0] + nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000


# What Python asks for, one thread at a time --------------------------------------------------------------------------------------------


@_spawning
def claim_task(table, place):
    """Take a task out of all others' hands, if it is ready and nobody has begun it; return its state, else NOTHING."""
    run = run_in(words_at(table), 0)
    states = words_at(words_at(run[OPEN])[STATES])
    if load(words_at(run[PENDING]), place) != 0:
        return NOTHING
    state = fetch_or(states, place, TAKEN)
    return NOTHING if state & TAKEN else state


@_spawning
def hold(table, place):
    """Have a task that runs be alive until one more `fulfil`."""
    fetch_add(words_at(words_at(run_in(words_at(table), 0)[OPEN])[ALIVE]), place, ONE_EVENT)


@_spawning
def fulfil(table, me, place, what):
    """Do what was awaited for a task, ONE_EVENT or 1, that a shell has all its children: it is done if nothing else is awaited."""
    t = words_at(table)
    best = end(t, me, instance_of(place, 0), what)
    if best != NOTHING:
        push(t, me, best)


@_spawning
def cancel(table, place):
    """Have a task not begin; return True if it has not."""
    return fetch_or(words_at(words_at(run_in(words_at(table), 0)[OPEN])[STATES]), place, CANCELLED) & TAKEN == 0


@_spawning
def cancel_all(table):
    """Have no other task begin."""
    t = words_at(table)
    store(words_at(run_in(t, 0)[OPEN]), CANCELLED_ALL, 1)
    tell(t)


@_spawning
def take_failed(table):
    """Return the place of a task that failed, and whose exception nobody has taken over yet, or NOTHING."""
    t = words_at(table)
    o = words_at(run_in(t, 0)[OPEN])
    while True:
        place = load(o, FAILED_PLACES)
        if place == NOTHING:
            return place
        if compare_exchange(o, FAILED_PLACES, place, words_at(o[EDGE_FIRST])[place]) == place:
            words_at(o[EDGE_FIRST])[place] = NOTHING
            return place  # `end_wait` follows


SIGNATURES = {
    take_failed: types.int64(types.int64),
    add_task: types.int64(types.int64, types.int64),
    claim_task: types.int64(types.int64, types.int64),
    run_claimed: types.void(*[types.int64] * 4),
    begin_wait: types.boolean(types.int64, types.int64),
    end_wait: types.void(types.int64, types.int64),
    await_task: types.boolean(*[types.int64] * 4),
    await_children: types.boolean(*[types.int64] * 4),
    await_few: types.boolean(*[types.int64] * 4),
    hold: types.void(types.int64, types.int64),
    fulfil: types.void(*[types.int64] * 4),
    cancel: types.boolean(types.int64, types.int64),
    cancel_all: types.void(types.int64),
}
