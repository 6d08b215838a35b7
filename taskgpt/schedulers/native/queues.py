"""The queues that hold ready tasks, in the order of their ranks. Compiled; the simulator calls the same functions.

A queue is a binary heap behind a lock of its own. Its keys are ranks: policies.py says how tasks get them.
"""

from numba import types

from taskgpt.schedulers.native.pointers import (
    condition_signal,
    exchange,
    load,
    mutex_lock,
    mutex_unlock,
    relax,
    sched_yield,
    store,
    store_last,
    words_at,
)
from taskgpt.schedulers.native.table import (
    BY_AGE,
    FAVOURITES,
    INSTANCES,
    KEYS,
    LOCK,
    MUTEX,
    NOTHING,
    OFFSET,
    OWN_PRIORITIES,
    PARKED,
    PREFERS_HOME,
    PRIORITIES,
    QUEUES,
    RAN_ON,
    SEQUENCE,
    SIZE,
    VALUES,
    WORK,
    WORKERS,
    compiled,
    queue_of,
    run_of,
    task_of,
)

PRIORITY_LIMIT = 1 << 14  # of a task's own priority, either way
_PRIORITY_UNIT = 1 << 48  # more than any policy's rank: a nanosecond count of three days
_WINDOW = 16  # ready tasks that a worker looks through for one of its own: as many keys as two cache lines hold
_LOCK_SPINS = 100  # some 2 us: a queue is held for less, unless its owner has lost its core


@compiled
def rank(t, instance, age):
    """Return the rank of a ready task, the lower the earlier: what the policy says, below its own priority."""
    run, task = run_of(t, instance), task_of(instance)
    result = t[BY_AGE] * age
    if run[VALUES] != 0:
        result += run[OFFSET] + words_at(run[VALUES])[task]
    if run[OWN_PRIORITIES] != 0:
        result -= words_at(run[OWN_PRIORITIES])[task] * _PRIORITY_UNIT
    return result


@compiled
def home_of(t, instance):
    """Return the worker that wrote the largest part of the task's tiles, or NOTHING."""
    run = run_of(t, instance)
    if run[FAVOURITES] == 0:
        return NOTHING
    favourite = words_at(run[FAVOURITES])[task_of(instance)]
    return NOTHING if favourite == NOTHING else words_at(run[RAN_ON])[favourite]


# Ready tasks come and go ----------------------------------------------------------------------------------------------------------------


@compiled
def push(t, me, instance):
    """Put a ready task into its queue, and wake a worker if one sleeps."""
    at = 0
    if t[QUEUES] > 1:
        home = home_of(t, instance) if t[PREFERS_HOME] != 0 else NOTHING
        at = home if home != NOTHING else me if me < t[WORKERS] else task_of(instance) % t[QUEUES]
    queue = queue_of(t, at)
    lock(queue, LOCK)
    key = rank(t, instance, queue[SEQUENCE])
    queue[SEQUENCE] += 1
    _sift_up(words_at(queue[KEYS]), words_at(queue[INSTANCES]), queue[SIZE], key, instance)
    store(queue, SIZE, queue[SIZE] + 1)
    store_last(queue, LOCK, 0)
    if load(t, PARKED) > 0:
        mutex_lock(t[MUTEX])
        condition_signal(t[WORK])
        mutex_unlock(t[MUTEX])


@compiled
def take(t, me):
    """Return the instance that worker `me` is to run, from its own queue or else from another's, or NOTHING."""
    count = t[QUEUES]
    first = me if count > 1 else 0
    if t[PRIORITIES] != 0 and count > 1:
        first = _best_queue(t, first)
    for i in range(count):
        queue = queue_of(t, (first + i) % count)
        if load(queue, SIZE) > 0:
            instance = _pop(t, queue, me)
            if instance != NOTHING:
                return instance
    return NOTHING


@compiled
def is_anything_ready(t):
    for at in range(t[QUEUES]):  # noqa: SIM110 - numba has no any()
        if load(queue_of(t, at), SIZE) > 0:
            return True
    return False


@compiled
def _pop(t, queue, me):
    lock(queue, LOCK)
    size, instance = queue[SIZE], NOTHING
    if size > 0:
        keys, instances = words_at(queue[KEYS]), words_at(queue[INSTANCES])
        at = _own_in_window(t, keys, instances, size, me) if t[PREFERS_HOME] != 0 and t[QUEUES] == 1 else 0
        instance = instances[at]
        size -= 1
        key, moved = keys[size], instances[size]
        if at < size:
            if at > 0 and keys[(at - 1) >> 1] > key:
                _sift_up(keys, instances, at, key, moved)
            else:
                _sift_down(keys, instances, at, size, key, moved)
        store(queue, SIZE, size)
    store_last(queue, LOCK, 0)
    return instance


@compiled
def _own_in_window(t, keys, instances, size, me):
    """Return the place of the oldest task whose home is this worker, among the first few; 0 if there is none."""
    best = NOTHING
    for at in range(min(size, _WINDOW)):
        if (best == NOTHING or keys[at] < keys[best]) and keys[at] < keys[0] + _PRIORITY_UNIT // 2 and home_of(t, instances[at]) == me:
            best = at
    return max(best, 0)


@compiled
def _best_queue(t, own):
    """Return the queue whose first task ranks lowest, for graphs with priorities. A hint: queues change while this looks."""
    best, least = own, types.int64(0)
    for i in range(t[QUEUES]):
        at = (own + i) % t[QUEUES]
        queue = queue_of(t, at)
        if load(queue, SIZE) > 0:
            key = load(words_at(queue[KEYS]), 0)
            if i == 0 or key < least or load(queue_of(t, best), SIZE) == 0:
                best, least = at, key
    return best


@compiled
def _sift_up(keys, instances, at, key, instance):
    while at > 0:
        parent = (at - 1) >> 1
        if keys[parent] <= key:
            break
        keys[at], instances[at] = keys[parent], instances[parent]
        at = parent
    keys[at], instances[at] = key, instance


@compiled
def _sift_down(keys, instances, at, size, key, instance):
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] < keys[child]:
            child += 1
        if key <= keys[child]:
            break
        keys[at], instances[at] = keys[child], instances[child]
        at = child
    keys[at], instances[at] = key, instance


@compiled
def lock(words, index):
    while exchange(words, index, 1) != 0:
        spins = 0
        while load(words, index) != 0:
            relax()
            spins += 1
            if spins == _LOCK_SPINS:
                sched_yield()
                spins = 0
