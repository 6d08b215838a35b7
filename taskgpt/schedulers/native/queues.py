"""Ready tasks: the policies that choose among them, and the queues that hold them. Compiled; a simulator may call the same functions.

A policy gives every ready task a rank, and the lowest rank goes first. To add one: a name here, a branch in `rank`.

    oldest_first         the task that became ready first: breadth first, fair
    newest_first         the task that became ready last: depth first, its inputs are still in cache
    longest_path_first   the task with the longest path behind it, by measured times
    same_core_first      oldest first, but each worker prefers tasks of whose tiles it has itself written the largest part

Two switches go with any policy. `work_stealing`: a queue per worker, who serves the others when his own is empty, against one queue for
all. `immediate_successor`: a worker goes on with the best task that it made ready itself, past the queue. A task's own priority wins over
all of this.

A queue is a binary heap behind a lock of its own. State lies in a table of words: first what all share, then a part for each queue, run and
worker; parts that are written often lie on cache lines of their own.
"""

from numba import njit, types

from taskgpt.schedulers.native.pointers import (
    MONOTONIC,
    address_of,
    clock_gettime,
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

POLICIES = ("oldest_first", "newest_first", "longest_path_first", "same_core_first")
OLDEST_FIRST, NEWEST_FIRST, LONGEST_PATH_FIRST, SAME_CORE_FIRST = range(4)
NOTHING = -1  # no task, no worker
PRIORITY_LIMIT = 1 << 14  # of a task's own priority, either way
_PRIORITY_UNIT = 1 << 48  # more than any policy's rank: a nanosecond count of three days
_WINDOW = 16  # ready tasks that a worker looks through for one of its own
_LOCK_SPINS = 100

# The table. What all share:
WORKERS, QUEUES, POLICY, IMMEDIATE, SPINS, PRIORITIES, QUEUES_AT, RUNS_AT, WORKERS_AT, MUTEX, WORK, DONE = range(12)
STOPPING, CLOSING = 16, 17
PARKED = 32
FAILED, FAILED_CALL = 48, 49
TABLE_WORDS = 64

# A queue:
LOCK = 0
SIZE, SEQUENCE, KEYS, ENTRIES = 16, 17, 18, 19
QUEUE_WORDS = 32

# A run of a graph. Addresses of arrays (0: none), first of the graph, then of this run:
CALL_FIRST, CALL_ENTRY, CALL_WORDS, SUCCESSOR_FIRST, SUCCESSOR, INDEGREE = range(6)
RANKS, OWN_PRIORITIES, FAVOURITES, LOCK_FIRST, LOCK_OF, LOCKS = range(6, 12)
TASKS, NUMBER, OFFSET, PENDING, MARKS, READY_AT, RAN_ON, DURATIONS, NEXT_FIRST, NEXT = range(12, 22)
REMAINING = 32
RUN_WORDS = 48

# A worker; one more stands for the thread that submits:
CLOCK, CLOCK_NS, SCRATCH, ERROR, RECORD, RECORD_CAPACITY, RECORD_COUNT = range(7)
WORKER_WORDS = 32

compiled = njit(nogil=True, error_model="numpy")


@compiled
def rank(policy, sequence, urgency):
    """Return the rank of a ready task: `sequence` counts the tasks as they became ready, `urgency` is when it must start, in ns."""
    if policy == NEWEST_FIRST:
        return -sequence
    if policy == LONGEST_PATH_FIRST:
        return urgency
    return sequence


@compiled
def full_rank(t, entry, sequence):
    """Return the policy's rank of an entry, below its own priority."""
    run, task = run_of(t, entry), entry >> 1
    urgency = run[OFFSET]
    if run[RANKS] != 0:
        urgency += words_at(run[RANKS])[task]
    result = rank(t[POLICY], sequence, urgency)
    if run[OWN_PRIORITIES] != 0:
        result -= words_at(run[OWN_PRIORITIES])[task] * _PRIORITY_UNIT
    return result


@compiled
def home_of(t, entry):
    """Return the worker that wrote the largest part of the entry's tiles, or NOTHING."""
    run = run_of(t, entry)
    if run[FAVOURITES] == 0:
        return NOTHING
    favourite = words_at(run[FAVOURITES])[entry >> 1]
    return NOTHING if favourite == NOTHING else words_at(run[RAN_ON])[favourite]


# Ready tasks come and go. An entry is a task's number and its run: 2 * task + (0 or 1) --------------------------------------------------


@compiled
def push(t, me, entry):
    """Put a ready task into its queue, and wake a worker if one sleeps."""
    at = 0
    if t[QUEUES] > 1:
        home = home_of(t, entry) if t[POLICY] == SAME_CORE_FIRST else NOTHING
        at = home if home != NOTHING else me if me < t[WORKERS] else (entry >> 1) % t[QUEUES]
    queue = queue_of(t, at)
    lock(queue, LOCK)
    key = full_rank(t, entry, queue[SEQUENCE])
    queue[SEQUENCE] += 1
    _sift_up(words_at(queue[KEYS]), words_at(queue[ENTRIES]), queue[SIZE], key, entry)
    store(queue, SIZE, queue[SIZE] + 1)
    store_last(queue, LOCK, 0)
    if load(t, PARKED) > 0:
        mutex_lock(t[MUTEX])
        condition_signal(t[WORK])
        mutex_unlock(t[MUTEX])


@compiled
def take(t, me):
    """Return the entry that worker `me` is to run, from its own queue or else from another's, or NOTHING."""
    count = t[QUEUES]
    first = me if count > 1 else 0
    if t[PRIORITIES] != 0 and count > 1:
        first = _best_queue(t, first)
    for i in range(count):
        queue = queue_of(t, (first + i) % count)
        if load(queue, SIZE) > 0:
            entry = _pop(t, queue, me)
            if entry != NOTHING:
                return entry
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
    size, entry = queue[SIZE], NOTHING
    if size > 0:
        keys, entries = words_at(queue[KEYS]), words_at(queue[ENTRIES])
        at = _own_in_window(t, keys, entries, size, me) if t[POLICY] == SAME_CORE_FIRST and t[QUEUES] == 1 else 0
        entry = entries[at]
        size -= 1
        key, moved = keys[size], entries[size]
        if at < size:
            if at > 0 and keys[(at - 1) >> 1] > key:
                _sift_up(keys, entries, at, key, moved)
            else:
                _sift_down(keys, entries, at, size, key, moved)
        store(queue, SIZE, size)
    store_last(queue, LOCK, 0)
    return entry


@compiled
def _own_in_window(t, keys, entries, size, me):
    """Return the place of the oldest task whose home is this worker, among the first few; 0 if there is none."""
    best = NOTHING
    for at in range(min(size, _WINDOW)):
        if (best == NOTHING or keys[at] < keys[best]) and keys[at] < keys[0] + _PRIORITY_UNIT // 2 and home_of(t, entries[at]) == me:
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
def _sift_up(keys, entries, at, key, entry):
    while at > 0:
        parent = (at - 1) >> 1
        if keys[parent] <= key:
            break
        keys[at], entries[at] = keys[parent], entries[parent]
        at = parent
    keys[at], entries[at] = key, entry


@compiled
def _sift_down(keys, entries, at, size, key, entry):
    while True:
        child = 2 * at + 1
        if child >= size:
            break
        if child + 1 < size and keys[child + 1] < keys[child]:
            child += 1
        if key <= keys[child]:
            break
        keys[at], entries[at] = keys[child], entries[child]
        at = child
    keys[at], entries[at] = key, entry


@compiled
def lock(words, index):
    while exchange(words, index, 1) != 0:
        spins = 0
        while load(words, index) != 0:
            relax()
            spins += 1
            if spins == _LOCK_SPINS:  # its owner may have lost its core
                sched_yield()
                spins = 0


@compiled
def now(worker):
    """Return the time in ns, of CLOCK_MONOTONIC, which on Linux time.monotonic_ns() reads."""
    clock_gettime(types.int32(MONOTONIC), address_of(worker, CLOCK))
    return worker[CLOCK] * 1_000_000_000 + worker[CLOCK_NS]


@compiled
def queue_of(t, at):
    return words_at(t[QUEUES_AT] + at * (QUEUE_WORDS * 8))


@compiled
def run_of(t, entry):
    return words_at(t[RUNS_AT] + (entry & 1) * (RUN_WORDS * 8))


@compiled
def worker_of(t, me):
    return words_at(t[WORKERS_AT] + me * (WORKER_WORDS * 8))
