"""The queues that hold ready tasks. Compiled; the simulator calls the same functions.

With a queue for each worker, and tasks that go by their age alone, a queue is a deque (ring.py), which needs no lock. Else it is an inbox,
into which anybody pushes without waiting. Who takes needs its lock; if another has it, he waits in his cell (idle.py), where the holder
hands him what is left. Where tasks have ranks (policies.py), who takes empties the inbox into a heap (heap.py) first.
"""

from numba import types

from taskgpt.pointers import exchange, load, store, words_at
from taskgpt.schedulers.native.heap import insert, remove
from taskgpt.schedulers.native.idle import claim, hand, rouse
from taskgpt.schedulers.native.ring import drop_into, is_deque_empty, is_inbox_empty, put, take_newest, take_oldest, take_out
from taskgpt.schedulers.native.table import (
    BOTTOM,
    BY_AGE,
    COMPUTING,
    FAVOURITES,
    INSTANCES,
    IS_RANKED,
    KEYS,
    KINDS,
    LOCK,
    LOOK,
    MEMORY,
    NEAR_AT,
    NESTS_AT,
    NOTHING,
    OFFSET,
    OPEN,
    OWN_PRIORITIES,
    PLACES,
    PREFERS_HOME,
    PRIORITIES,
    QUEUES,
    RAN_ON,
    SEQUENCE,
    SHARE_AT,
    SIZE,
    SPINNING,
    TOP,
    VALUES,
    WATCH,
    WORKERS,
    compiled,
    nest_of,
    queue_of,
    run_of,
    task_of,
)
from taskgpt.sharing.leases import others_of_kind

_PRIORITY_UNIT = 1 << 48  # more than any policy's rank: a nanosecond count of three days
_WINDOW = 16  # ready tasks that a worker looks through for one of its own: as many keys as two cache lines hold


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
    """Put a ready task into its queue; have somebody look for it, if nobody is on the watch."""
    if t[NESTS_AT] != 0 and is_nested(t, instance):
        put(nest_of(t, me), instance)
        if load(t, WATCH) == 0:
            rouse(t, me)
        return
    at = 0
    if t[QUEUES] > 1:
        home = home_of(t, instance) if t[PREFERS_HOME] != 0 else NOTHING
        at = home if home != NOTHING else me
    if _are_deques(t):
        put(queue_of(t, at), instance)
    else:
        drop_into(queue_of(t, at), instance)
    if load(t, WATCH) == 0:
        rouse(t, at)


@compiled
def take(t, me):
    """Return the instance that worker `me` is to run, from its own queue or else from another's, or NOTHING."""
    if t[NESTS_AT] != 0:
        instance = take_own_nested(t, me)
        if instance != NOTHING:
            return instance
    count = t[QUEUES]
    first = me if count > 1 else 0
    if t[PRIORITIES] != 0 and count > 1:
        first = _best_queue(t, first)
    for i in range(count):
        at = _near(t, first, i)
        queue = queue_of(t, at)
        if not _is_empty(t, queue):
            instance = _take_from(t, me, at, queue)
            if instance != NOTHING:
                return instance
    return take_others_nested(t, me) if t[NESTS_AT] != 0 else NOTHING


@compiled
def is_nested(t, instance):
    """Return True if compiled code has spawned the task."""
    opened = run_of(t, instance)[OPEN]
    return opened != 0 and task_of(instance) >= words_at(opened)[PLACES]


@compiled
def take_own_nested(t, me):
    """Return the newest instance in the nest of worker `me`, or NOTHING."""
    return take_newest(nest_of(t, me))


@compiled
def take_others_nested(t, me):
    """Return the oldest instance in the nest of another worker, or NOTHING."""
    for i in range(1, t[WORKERS]):
        instance = take_oldest(nest_of(t, (me + i) % t[WORKERS]))
        if instance != NOTHING:
            return instance
    return NOTHING


@compiled
def _near(t, first, i):
    """Return the queue that comes i-th from this one: by the distance of memory nodes, where workers are bound to cores."""
    count = t[QUEUES]
    if t[NEAR_AT] == 0 or first == count - 1:  # the last one is of no worker
        return (first + i) % count
    return words_at(t[NEAR_AT])[first * count + i]


@compiled
def is_anything_ready(t):
    """Return True if there is a task to take: not one behind a lock that is held, as who holds it shares out what is left."""
    for at in range(t[QUEUES]):
        queue = queue_of(t, at)
        if not _is_empty(t, queue) and load(queue, LOCK) == 0:
            return True
    return t[NESTS_AT] != 0 and _is_any_nested(t)


@compiled
def _is_any_nested(t):
    found = False
    for me in range(t[WORKERS]):
        found = found or not is_deque_empty(nest_of(t, me))
    return found


@compiled
def empty(t):
    """Drop all instances. For one thread, while no other is at the queues."""
    for at in range(t[QUEUES]):
        queue = queue_of(t, at)
        while not _are_deques(t) and take_out(queue) != NOTHING:
            pass
        queue[TOP], queue[SIZE] = queue[BOTTOM], 0
    for me in range(t[WORKERS] if t[NESTS_AT] != 0 else 0):
        nest = nest_of(t, me)
        nest[TOP] = nest[BOTTOM]


@compiled
def _take_from(t, me, at, queue):
    if _are_deques(t):
        return take_newest(queue) if at == me and t[BY_AGE] < 0 else take_oldest(queue)
    if exchange(queue, LOCK, 1) != 0:
        return NOTHING
    instance = _pop(t, me, queue)
    if instance != NOTHING:
        _share_out(t, me, queue)
    _give_back(t, me, queue)
    return instance


@compiled
def _give_back(t, near, queue):
    """Give a lock back; have somebody look for what is left, for those who found it held."""
    store(queue, LOCK, 0)
    if load(t, WATCH) == 0 and not _is_empty(t, queue):
        rouse(t, near)


@compiled
def _share_out(t, near, queue):
    """Hand tasks of a queue whose lock is held to workers that spin, as long as there are both."""
    while not _is_empty(t, queue):
        worker = claim(t, near, SPINNING)
        if worker == NOTHING:
            return
        instance = _pop(t, worker, queue)
        hand(t, worker, LOOK if instance == NOTHING else instance)


@compiled
def _are_deques(t):
    return t[QUEUES] > 1 and t[IS_RANKED] == 0


@compiled
def _is_empty(t, queue):
    return is_deque_empty(queue) if _are_deques(t) else load(queue, SIZE) == 0 and is_inbox_empty(queue)


@compiled
def _pop(t, me, queue):
    """Return what worker `me` is to run of a queue whose lock is held, or NOTHING."""
    if t[IS_RANKED] == 0:
        return take_out(queue)
    _sort_in(t, queue)
    if queue[SIZE] == 0:
        return NOTHING
    if t[PREFERS_HOME] != 0 and t[QUEUES] == 1:
        return remove(queue, _own_in_window(t, queue, me))
    return remove(queue, _other_kind_in_window(t, queue, me) if t[SHARE_AT] != 0 else 0)


@compiled
def _sort_in(t, queue):
    """Empty the inbox of a queue whose lock is held into its heap."""
    instance = take_out(queue)
    while instance != NOTHING:
        insert(queue, rank(t, instance, queue[SEQUENCE]), instance)
        queue[SEQUENCE] += 1
        instance = take_out(queue)


@compiled
def _own_in_window(t, queue, me):
    """Return the place of the oldest task whose home is this worker, among the first few; 0 if there is none."""
    keys, instances = words_at(queue[KEYS]), words_at(queue[INSTANCES])
    best = NOTHING
    for at in range(min(queue[SIZE], _WINDOW)):
        if (best == NOTHING or keys[at] < keys[best]) and keys[at] < keys[0] + _PRIORITY_UNIT // 2 and home_of(t, instances[at]) == me:
            best = at
    return max(best, 0)


@compiled
def kind_of(t, instance):
    """Return what holds a task up, 0 if the policy does not ask."""
    run = run_of(t, instance)
    return words_at(run[KINDS])[task_of(instance)] if run[KINDS] != 0 else types.int64(0)


@compiled
def _other_kind_in_window(t, queue, me):
    """Return the place of the oldest task, among the first few, that wants what fewer on the cores of the share do; 0 if there is none."""
    instances = words_at(queue[INSTANCES])
    if kind_of(t, instances[0]) == 0:
        return types.int64(0)
    m = words_at(t[SHARE_AT])
    memory, computing = others_of_kind(m, me, MEMORY), others_of_kind(m, me, COMPUTING)
    if memory == computing:
        return types.int64(0)
    wanted = COMPUTING if memory > computing else MEMORY
    keys, best = words_at(queue[KEYS]), types.int64(NOTHING)
    for at in range(min(queue[SIZE], _WINDOW)):
        is_better = best == NOTHING or keys[at] < keys[best]
        if is_better and keys[at] < keys[0] + _PRIORITY_UNIT // 2 and kind_of(t, instances[at]) == wanted:
            best = at
    return max(best, types.int64(0))


@compiled
def _best_queue(t, own):
    """Return the queue whose first task ranks lowest, for graphs with priorities. A hint: queues change while this looks."""
    best, least = own, types.int64(0)
    for i in range(t[QUEUES]):
        at = (own + i) % t[QUEUES]
        queue = queue_of(t, at)
        if not is_inbox_empty(queue) and exchange(queue, LOCK, 1) == 0:
            _sort_in(t, queue)
            _give_back(t, at, queue)
        if load(queue, SIZE) > 0:
            key = load(words_at(queue[KEYS]), 0)
            if i == 0 or key < least or load(queue_of(t, best), SIZE) == 0:
                best, least = at, key
    return best
