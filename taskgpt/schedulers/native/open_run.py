"""Open runs: tasks are spawned while others run, by the program and by tasks; it has no graph.

A task has a place as long as it is open: from its spawning until it has run and nobody will look at it any more. A place keeps the edges to
who waits for the task as a list, to which is added without waiting, until the task closes it; and how many hold the task alive: its body,
and every child, which closes its own list before it lets go of its parent. So a task is done when all that it spawned is.

A ready task is in a queue once. Who takes it out of there, or a task that waits for its child, may run it: who sets TAKEN does, and the
other has come in vain. A place is free again when both have been there.

Spawning holds the GIL, so that there is one who spawns at a time; running does not.
"""

from numba import njit, types

from taskgpt.schedulers.native.pointers import (
    REALTIME,
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
    EDGE_OWN,
    EDGE_TO,
    EDGES,
    ENDED,
    ERROR,
    ERRORS,
    FAILED_PLACES,
    FEW,
    FREE,
    FREE_EDGE,
    FREE_EDGES,
    FREED,
    HEADS,
    HOLDS,
    MUTEX,
    NEXT_PLACE,
    NOTHING,
    OPEN,
    OWN_PRIORITIES,
    OWN_WORDS,
    PARENTS,
    PENDING,
    PLACES,
    READY_AT,
    RECORD,
    SCRATCH,
    SERIALS,
    SPAWNED,
    STATES,
    USED,
    USED_EDGES,
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
CLOSED = -2  # in HEADS: nobody can wait for the task any more
NO_PLACE, NO_EDGES = -1, -2  # what `add_task` returns if there is no room
ENTRY, WORDS_AT, WORD_COUNT, WAIT_COUNT, PARENT, PRIORITY, IS_SHELL, SERIAL, FIRST_WAIT = range(9)  # in the buffer; then the words

_spawning = njit(error_model="numpy")  # with the GIL


@_spawning
def add_task(table, me):
    """Spawn the task that is in the buffer; return its place, or NO_PLACE or NO_EDGES. It runs as soon as what it waits for is done.

    The buffer: the kernel's entry, 0 for nothing to do; where the words of its arguments are, 0 for behind this; how many; how many tasks
    it waits for; the place of the task that spawns it; its priority; whether it is a shell, which has no body, and is done when its last
    child is, after `fulfil` has said that it has them all; its number in records, -1 if it is in none; the places of what it waits for,
    perhaps done by now; the words.
    """
    t = words_at(table)
    run = run_in(t, 0)
    o = words_at(run[OPEN])
    buffer = words_at(o[BUFFER])
    waits = buffer[WAIT_COUNT]
    if o[EDGES] - o[USED_EDGES] + o[FREE_EDGES] < waits:
        return NO_EDGES
    place = _new_place(o)
    if place == NOTHING:
        return NO_PLACE
    is_shell, parent = buffer[IS_SHELL], buffer[PARENT]
    words_at(run[CALL_ENTRY])[place] = buffer[ENTRY]
    words = buffer[WORDS_AT]
    if words == 0:
        words = o[OWN_WORDS] + 8 * MOST_WORDS * place
        for at in range(buffer[WORD_COUNT]):
            words_at(words)[at] = buffer[FIRST_WAIT + waits + at]
    words_at(run[CALL_WORDS])[place] = words
    words_at(run[OWN_PRIORITIES])[place] = buffer[PRIORITY]
    words_at(o[SERIALS])[place] = buffer[SERIAL]
    words_at(o[PARENTS])[place] = parent
    words_at(o[HOLDS])[place] = 1 if is_shell else 2  # a shell is in no queue
    words_at(o[ALIVE])[place] = 1
    store(words_at(o[STATES]), place, 0)
    store(words_at(o[HEADS]), place, NOTHING)
    o[SPAWNED] += 1
    fetch_add(words_at(o[ALIVE]), parent, 1)
    pending, still = words_at(run[PENDING]), types.int64(0)
    store(pending, place, waits + 1)  # one more than there are, so that it is not ready before all edges are there
    for at in range(waits):
        before = buffer[FIRST_WAIT + at]
        if before != place:  # else it is done, and this task has its place
            still += _add_edge(o, before, place)
    if is_shell == 0:
        over = waits - still + 1
        if fetch_add(pending, place, -over) == over:
            note_ready(t, me, instance_of(place, 0))
            push(t, me, instance_of(place, 0))
    return place


@_spawning
def _new_place(o):
    places = words_at(o[NEXT_PLACE])
    if o[FREE] == NOTHING:
        o[FREE] = exchange(o, FREED, NOTHING)
    place = o[FREE]
    if place != NOTHING:
        o[FREE] = places[place]
        _free_edges(o, place)
    elif o[USED] < o[PLACES]:
        place = o[USED]
        o[USED] += 1
        words_at(o[EDGE_FIRST])[place] = NOTHING
    return place


@_spawning
def _free_edges(o, place):
    """Use the edges again on which the place's last task has waited."""
    own, edge = words_at(o[EDGE_OWN]), words_at(o[EDGE_FIRST])[place]
    while edge != NOTHING:
        following = own[edge]
        own[edge] = o[FREE_EDGE]
        o[FREE_EDGE] = edge
        o[FREE_EDGES] += 1
        edge = following
    words_at(o[EDGE_FIRST])[place] = NOTHING


@_spawning
def _add_edge(o, before, place):
    """Have a task wait for another; return 0 if that is done already."""
    own, heads = words_at(o[EDGE_OWN]), words_at(o[HEADS])
    edge = o[FREE_EDGE]
    if edge != NOTHING:
        o[FREE_EDGE] = own[edge]
        o[FREE_EDGES] -= 1
    else:
        edge = o[USED_EDGES]
        o[USED_EDGES] += 1
    own[edge] = words_at(o[EDGE_FIRST])[place]
    words_at(o[EDGE_FIRST])[place] = edge
    words_at(o[EDGE_TO])[edge] = place
    while True:
        head = load(heads, before)
        if head == CLOSED:
            return 0
        words_at(o[EDGE_NEXT])[edge] = head
        if compare_exchange(heads, before, head, edge) == head:
            return 1


# Running --------------------------------------------------------------------------------------------------------------------------------


@compiled
def run_spawned(t, me, instance):
    """Run a task that was in a queue, unless its parent did; return the task to go on with, or NOTHING."""
    o, place = words_at(run_of(t, instance)[OPEN]), task_of(instance)
    state = fetch_or(words_at(o[STATES]), place, TAKEN)
    best = NOTHING if state & TAKEN else _run(t, me, instance, state)
    _let_go(t, o, place)
    return best


@compiled
def run_claimed(table, me, place, state):
    """Run a task that `claim_task` has given to this thread, with what it returned."""
    t = words_at(table)
    best = _run(t, me, instance_of(place, 0), state)
    if best != NOTHING:
        push(t, me, best)


@compiled
def _run(t, me, instance, state):
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
        failed = call_entry(entry, words, worker[SCRATCH], address_of(worker, ERROR)) if entry != 0 else 0
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
        _let_go(t, o, place)
        place = parent
    return go_on_with(t, me, best)


@compiled
def _let_go(t, o, place):
    """Have the place used again, if nobody else looks at it."""
    if fetch_add(words_at(o[HOLDS]), place, -1) != 1:
        return
    while True:
        head = load(o, FREED)
        words_at(o[NEXT_PLACE])[place] = head
        if compare_exchange(o, FREED, head, place) == head:
            break
    ended = fetch_add(o, ENDED, 1) + 1
    few = load(o, FEW)
    if few != NOTHING and load(o, SPAWNED) - ended <= few:
        tell(t)


@compiled
def _fail(t, o, place, error):
    """Keep the exception for who spawned, whom it is told; no other task begins."""
    words_at(o[ERRORS])[place] = error
    fetch_add(words_at(o[HOLDS]), place, 1)
    store(o, CANCELLED_ALL, 1)
    while True:
        head = load(o, FAILED_PLACES)
        words_at(o[EDGE_FIRST])[place] = head  # the edges of the last run of a program are not used again
        if compare_exchange(o, FAILED_PLACES, head, place) == head:
            break
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
    _let_go(t, o, place)
    return True


@_spawning
def end_wait(table, place):
    """Let go of a place."""
    t = words_at(table)
    _let_go(t, words_at(run_in(t, 0)[OPEN]), place)


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
    """Wait so long until no more than so many tasks are open; return True if that is so."""
    t = words_at(table)
    o = words_at(run_in(t, 0)[OPEN])
    store(o, FEW, few)
    _set_time(until, milliseconds)
    mutex_lock(t[MUTEX])
    while load(o, SPAWNED) - load(o, ENDED) > few and condition_timedwait(t[DONE], t[MUTEX], until) == 0:
        pass
    mutex_unlock(t[MUTEX])
    store(o, FEW, NOTHING)
    return load(o, SPAWNED) - load(o, ENDED) <= few


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
