"""Discrete events, compiled: workers that take tasks, as schedulers have them do, and finish them when the clock says so.

A running task has seconds left, and a speed of 1 or less. It has a share of a core, all of it but where programs run side by side that have
more workers than there are cores (together.py). Two things slow it down. Clocks: the more cores of a socket are busy, the slower
is each, in a straight line from 1 for one core to `busy_speed` for all. Memory: what a task moves in a second at full speed is its demand.
When the demands of a socket's tasks exceed its bandwidth, it is shared out evenly: nobody gets more than he asks for, and who gets less
runs slower in proportion. The clock goes from one event to the next: a task's end, mostly.
"""

import heapq

import numpy as np
from numba import types

from taskgpt.pointers import words_at
from taskgpt.schedulers.native.queues import is_anything_ready, take
from taskgpt.schedulers.native.table import NOTHING, REMAINING, compiled, instance_of, run_in, slot_of, task_of
from taskgpt.schedulers.native.worker import release

# State of the workers, float64, a row each:
LEFT, SPEED, DEMAND, SHARE = range(4)


@compiled
def set_speeds(state, running, socket):
    """Set the speed of each busy worker. socket: its cores, for how many workers each has room; bandwidth, bytes a second; busy_speed.

    Workers are in the order of their cores.
    """
    cores, room, bandwidth, busy_speed = socket
    for first in range(0, len(running), cores * room):
        last = min(first + cores * room, len(running))
        busy, busy_cores = 0, 0.0
        for w in range(first, last):
            if running[w] != NOTHING:
                busy += 1
                busy_cores += state[SHARE, w]
        speed = 1.0 - (1.0 - busy_speed) * max(busy_cores - 1, 0.0) / max(cores - 1, 1)
        wanted = 0.0
        for w in range(first, last):
            state[SPEED, w] = speed * state[SHARE, w]
            if running[w] != NOTHING:
                wanted += state[DEMAND, w] * state[SPEED, w]
        if wanted <= bandwidth:
            continue
        fair = bandwidth / busy
        while True:  # who wants less than a fair share gets it, and the others share what is left
            left, others = bandwidth, 0
            for w in range(first, last):
                if running[w] != NOTHING:
                    if state[DEMAND, w] * state[SPEED, w] <= fair:
                        left -= state[DEMAND, w] * state[SPEED, w]
                    else:
                        others += 1
            if others == 0 or left / others <= fair * (1 + 1e-12):
                break
            fair = left / others
        for w in range(first, last):
            if running[w] != NOTHING and state[DEMAND, w] * state[SPEED, w] > fair:
                state[SPEED, w] = fair / state[DEMAND, w]


@compiled
def next_end(state, running):
    """Return how long it takes until the first task ends; -1 if none runs."""
    least = -1.0
    for w in range(len(running)):
        if running[w] != NOTHING:
            lasts = state[LEFT, w] / state[SPEED, w]
            if least < 0 or lasts < least:
                least = lasts
    return least


@compiled
def let_pass(state, running, seconds):
    for w in range(len(running)):
        if running[w] != NOTHING:
            state[LEFT, w] -= seconds * state[SPEED, w]
            if state[LEFT, w] < 1e-12:
                state[LEFT, w] = 0.0


@compiled
def advance(clock, state, running, socket, due):
    """Go to the first task's end, or to when something else is due; return False if nothing will ever happen."""
    set_speeds(state, running, socket)
    lasts = next_end(state, running)
    if lasts < 0 or clock[0] + lasts > due:
        lasts = due - clock[0]
    if np.isinf(lasts):
        return False
    clock[0] += lasts
    let_pass(state, running, lasts)
    return True


@compiled
def _begin(state, running, times, costs, w, instance, now, overhead):
    """Have worker w begin a task."""
    slot, task = slot_of(instance), task_of(instance)
    running[w] = instance
    state[LEFT, w] = costs[slot, 0, task] + overhead
    state[DEMAND, w] = costs[slot, 1, task] / max(costs[slot, 0, task], 1e-12)
    times[slot, 0, task] = now
    times[slot, 2, task] = w


@compiled
def until_over(table, slot, clock, state, running, times, costs, socket, overhead):
    """Simulate until the run in `slot` is over; return False if it never will be.

    clock[0]: seconds. running: of each worker what it runs. costs[slot]: seconds alone on the machine, and bytes through memory, of each
    task. times[slot]: when each task began and ended, and on which worker.
    """
    t, run = words_at(table), run_in(words_at(table), slot)
    while run[REMAINING] != 0:
        w = 0
        while w < len(running) and is_anything_ready(t):
            if running[w] == NOTHING:
                instance = take(t, w)
                if instance != NOTHING:
                    _begin(state, running, times, costs, w, instance, clock[0], overhead)
            w += 1
        set_speeds(state, running, socket)
        lasts = next_end(state, running)
        if lasts < 0:
            return False
        clock[0] += lasts
        let_pass(state, running, lasts)
        for w in range(len(running)):
            if running[w] != NOTHING and state[LEFT, w] == 0.0:
                instance = running[w]
                times[slot_of(instance), 1, task_of(instance)] = clock[0]
                running[w] = NOTHING
                instance = release(t, w, instance)
                if instance != NOTHING:
                    _begin(state, running, times, costs, w, instance, clock[0], overhead)
    return True


@compiled
def fork_join(clock, state, running, times, costs, loop_first, part_first, tasks, is_static, socket, barrier):
    """Simulate loops one after the other: part p of a loop goes to worker p, or, if not static, to whoever is free.

    Loop l has the parts loop_first[l] to loop_first[l + 1], part p the tasks tasks[part_first[p] : part_first[p + 1]]. A loop of more
    than one part costs `barrier` seconds.
    """
    at = np.zeros(len(running), np.int64)
    until = np.zeros(len(running), np.int64)
    for l in range(len(loop_first) - 1):
        part, last = loop_first[l], loop_first[l + 1]
        has_barrier = last - part > 1
        at[:], until[:] = 0, 0
        while True:
            for w in range(len(running)):
                if running[w] == NOTHING:
                    if at[w] == until[w] and part < last and (not is_static or part - loop_first[l] == w):
                        at[w], until[w] = part_first[part], part_first[part + 1]
                        part += 1
                    if at[w] < until[w]:
                        _begin(state, running, times, costs, w, instance_of(tasks[at[w]], 0), clock[0], 0.0)
                        at[w] += 1
            set_speeds(state, running, socket)
            lasts = next_end(state, running)
            if lasts < 0:
                break
            clock[0] += lasts
            let_pass(state, running, lasts)
            for w in range(len(running)):
                if running[w] != NOTHING and state[LEFT, w] == 0.0:
                    times[0, 1, task_of(running[w])] = clock[0]
                    running[w] = NOTHING
        if has_barrier:
            clock[0] += barrier


@compiled
def central(clock, state, running, times, costs, first, successor, indegree, order, is_newest_first, socket, server):
    """Simulate workers that one thread serves; return False if a task is never ready.

    A task that ended waits until that thread has served those that ended before it. `service` seconds later its worker is free, and its
    successors are ready with the next message to the workers: at once, or `batch` seconds after the one before. Of the ready tasks the one
    that comes first in `order` is next, or the one that became ready last: of several at once, those of the highest order become ready
    first, as they stand in `successor`. The thread needs a core as workers do: more threads than cores share them evenly.
    server: cores of the machine, service, batch.
    """
    all_cores, service, batch = server
    count, workers = len(order), len(running)
    ready = [(0, 0) for _ in range(0)]  # a heap of (rank, task)
    waits_for = indegree.copy()
    for task in np.argsort(-order):
        if waits_for[task] == 0:
            heapq.heappush(ready, (-len(ready) if is_newest_first else order[task], task))
    sequence = len(ready)
    is_free = np.ones(workers, np.bool_)
    ends, due = np.empty(count, np.int64), np.empty(count)  # tasks as they ended; when their successors are ready
    ended = served = known = 0
    left, sent = service, -np.inf
    while True:
        while known < served and due[known] <= clock[0] + 1e-12:
            for at in range(first[ends[known]], first[ends[known] + 1]):
                task = successor[at]
                waits_for[task] -= 1
                if waits_for[task] == 0:
                    heapq.heappush(ready, (-sequence if is_newest_first else order[task], task))
                    sequence += 1
            known += 1
        busy = 0
        for w in range(workers):
            if is_free[w] and len(ready) > 0:
                _begin(state, running, times, costs, w, instance_of(heapq.heappop(ready)[1], 0), clock[0], 0.0)
                is_free[w] = False
            busy += running[w] != NOTHING
        set_speeds(state, running, socket)
        is_serving = served < ended
        share = min(1.0, all_cores / max(busy + is_serving, 1))  # of a core, for each thread
        lasts = next_end(state, running) / share
        if is_serving and (lasts < 0 or left / share < lasts):
            lasts = left / share
        if known < served and (lasts < 0 or due[known] - clock[0] < lasts):
            lasts = due[known] - clock[0]
        if lasts < 0:
            return known == count
        clock[0] += lasts
        let_pass(state, running, lasts * share)
        if is_serving:
            left -= lasts * share
            if left <= 1e-12:
                if clock[0] >= sent + batch:
                    sent = clock[0]
                elif clock[0] > sent:
                    sent += batch
                due[served] = sent
                is_free[int(times[0, 2, ends[served]])] = True
                served += 1
                left = service
        for w in range(workers):
            if running[w] != NOTHING and state[LEFT, w] == 0.0:
                ends[ended] = task_of(running[w])
                times[0, 1, ends[ended]] = clock[0]
                running[w] = NOTHING
                ended += 1


_SECONDS, _NUMBERS = types.float64[::1], types.int64[::1]
_SHARED = (
    _SECONDS,
    types.float64[:, ::1],
    _NUMBERS,
    types.float64[:, :, ::1],
    types.float64[:, :, ::1],
)  # clock, state, running, times, costs
_SOCKET = types.Tuple((types.int64, types.int64, types.float64, types.float64))
UNTIL_OVER = {until_over: types.boolean(types.int64, types.int64, *_SHARED, _SOCKET, types.float64)}
FORK_JOIN = {fork_join: types.void(*_SHARED, _NUMBERS, _NUMBERS, _NUMBERS, types.boolean, _SOCKET, types.float64)}
_SERVER = types.Tuple((types.int64, types.float64, types.float64))
CENTRAL = {central: types.boolean(*_SHARED, _NUMBERS, _NUMBERS, _NUMBERS, _NUMBERS, types.boolean, _SOCKET, _SERVER)}
ADVANCE = {advance: types.boolean(_SECONDS, types.float64[:, ::1], _NUMBERS, _SOCKET, types.float64)}
