"""The table: what compiled workers share, as int64 words, and the names of its parts.

First comes what all share, then a part for each queue, each of the two runs, each group of workers and each worker. What is written often
lies on cache lines of its own, so that nobody waits for a line because of another's word. A number from an array's name is a place in its
part: `t[WORKERS]`.

    instance   a ready task: of which run, and which task; 2 * task + slot, where slot is the run's place in the table, 0 or 1
"""

from numba import njit, types

from taskgpt.pointers import (
    CACHE_LINE_WORDS,
    MONOTONIC,
    WORD_BYTES,
    address_of,
    clock_gettime,
    words_at,
)
from taskgpt.schedulers.records import RECORD_TYPE

compiled = njit(nogil=True, error_model="numpy")

NOTHING = -1  # no task, no worker, no instance
LOOK, ON_WATCH = -2, -3  # in a worker's cell: look for work; be the one on the watch
MEMORY, COMPUTING = 1, 2  # kinds of tasks: what holds them up


def _lines(count: int) -> range:
    """Return where each of so many cache lines begins, and where the next one would."""
    return range(0, (count + 1) * CACHE_LINE_WORDS, CACHE_LINE_WORDS)


# What all share. Settings and addresses are written while no run is under way; each other line has one kind of news.
_SETTINGS, _STOP, _ROUSE, _FAILURE, TABLE_WORDS = _lines(4)
WORKERS, QUEUES, BY_AGE, IS_RANKED, PREFERS_HOME, IMMEDIATE, SPINS = range(_SETTINGS, _STOP)[:7]
QUEUES_AT, RUNS_AT, WORKERS_AT, IDLE_AT, NEAR_AT, NESTS_AT, MUTEX, GO, DONE = range(_SETTINGS, _STOP)[7:16]
# With more names than a line has words, there are too few values to unpack.
# STILL: workers that wait for GO; PRIORITIES: some task has one; SHARE: where this process' place in a share is (sharing/), 0 for none.
STOPPING, CLOSING, STILL, PRIORITIES, SHARE_AT = range(_STOP, _ROUSE)[:5]
WATCH, ROUSING = range(_ROUSE, _FAILURE)[:2]  # 1: a worker is on the watch; one has been woken who has not looked for work yet
FAILED, FAILED_CALL = range(_FAILURE, TABLE_WORDS)[:2]

# A queue: a lock, the ends of a ring of instances, and a heap; each line has another writer. At NESTS_AT, if tasks come from compiled code,
# are one more for each worker, his nest, which is a deque alone.
_TAKERS, _PUSHERS, _HEAP, QUEUE_WORDS = _lines(3)
LOCK, TOP = range(_TAKERS, _PUSHERS)[:2]
BOTTOM = _PUSHERS
DEQUE, INBOX, SIZE, SEQUENCE, KEYS, INSTANCES = range(_HEAP, QUEUE_WORDS)[:6]

# Which workers are idle, a bit each, of a group of workers.
GROUP = 32
_BITS, IDLE_WORDS = _lines(1)
SPINNING, ASLEEP = range(_BITS, IDLE_WORDS)[:2]

# A run of a graph. Addresses of arrays (0: none), first of the graph, then of this run; REMAINING is counted down by all.
_ARRAYS, _, _COUNT, RUN_WORDS = _lines(3)
CALL_FIRST, CALL_ENTRY, CALL_WORDS, SUCCESSOR_FIRST, SUCCESSOR, INDEGREE = range(_ARRAYS, _COUNT)[:6]
VALUES, OWN_PRIORITIES, FAVOURITES, LOCK_FIRST, LOCK_OF, LOCKS = range(_ARRAYS, _COUNT)[6:12]
TASKS, NUMBER, OFFSET, PENDING, MARKS, READY_AT, RAN_ON, DURATIONS, NEXT_FIRST, NEXT, OPEN, KINDS = range(_ARRAYS, _COUNT)[12:24]
REMAINING = _COUNT

# An open run, in which tasks are spawned while others run; open_run.py. Addresses of arrays, by place of a task or number of an edge; what
# tasks that compiled code spawns have besides; news.
_PLACES, _NESTED, _NEWS, OPEN_WORDS = _lines(3)
HEADS, STATES, ALIVE, PARENTS, HOLDS, ERRORS, SERIALS, NEXT_PLACE = range(_PLACES, _NESTED)[:8]
EDGE_FIRST, EDGE_NEXT, EDGE_TO, EDGE_OWN, OWN_WORDS, RESULTS_AT, BUFFER, POOLS_AT = range(_PLACES, _NESTED)[8:16]
PLACES, SHARE, RESULTS, TICKETS, NEXT_FUTURE, LINES = range(_NESTED, _NEWS)[:6]
CANCELLED_ALL, FAILED_PLACES = range(_NEWS, OPEN_WORDS)[:2]

# Places and edges of an open run are in pools: PLACES in the first, of Python's, and then SHARE in that of each worker. Who spawns writes
# the first line of his; who has run a task the second.
_SPAWNER, _ENDS, POOL_WORDS = _lines(2)
FREE, USED, LAST, FREE_EDGE, FREE_EDGES, USED_EDGES, LAST_EDGE, SPAWNED = range(_SPAWNER, _ENDS)[:8]
FREED, ENDED, FEW = range(_ENDS, POOL_WORDS)[:3]  # FEW: who waits until no more tasks than so many are open; NOTHING if nobody does

# A worker; one more stands for the thread that submits. INSIDE: how many tasks it runs inside of others that wait for them. On CELL it
# waits, alone, for what another worker hands over.
_OWN, _CELL, WORKER_WORDS = _lines(2)
CLOCK, CLOCK_NS, SCRATCH, RECORD, RECORD_CAPACITY, RECORD_COUNT, WANTED, INSIDE = range(_OWN, _CELL)[:8]  # WANTED: by so many threads
ERROR, RESULT, PLACE, NESTING = range(_OWN, _CELL)[8:12]  # in this order: what a kernel's entry is given, tasks/native_entry.py
UNTIL, UNTIL_NS = range(_OWN, _CELL)[12:14]  # of the thread that submits: how long it waits
RECORD_TAKEN, RECORD_LOST = range(_OWN, _CELL)[14:16]  # records are a ring: so many are free for new ones, and so many found no room
CELL, CELL_MUTEX, CELL_FILLED = range(_CELL, WORKER_WORDS)[:3]  # a mutex and a condition to sleep on

# What a worker records of a task: a row of RECORD_TYPE, but for the worker, whose rows they are.
ROW_NAMES = RECORD_TYPE.names[:-1]
ROW_WORDS = len(ROW_NAMES)
ROW_RUN, ROW_TASK, ROW_READY, ROW_START, ROW_STOP = map(ROW_NAMES.index, ("run", "task", "ready_ns", "start_ns", "stop_ns"))


@compiled
def task_of(instance):
    return instance >> 1


@compiled
def slot_of(instance):
    return instance & 1


@compiled
def instance_of(task, slot):
    return 2 * task + slot


@compiled
def queue_of(t, at):
    return words_at(t[QUEUES_AT] + at * (QUEUE_WORDS * WORD_BYTES))


@compiled
def nest_of(t, me):
    return words_at(t[NESTS_AT] + me * (QUEUE_WORDS * WORD_BYTES))


@compiled
def run_in(t, slot):
    return words_at(t[RUNS_AT] + slot * (RUN_WORDS * WORD_BYTES))


@compiled
def run_of(t, instance):
    return run_in(t, slot_of(instance))


@compiled
def worker_of(t, me):
    return words_at(t[WORKERS_AT] + me * (WORKER_WORDS * WORD_BYTES))


@compiled
def idle_of(t, group):
    return words_at(t[IDLE_AT] + group * (IDLE_WORDS * WORD_BYTES))


@compiled
def now(worker):
    """Return the time in ns, of CLOCK_MONOTONIC, which on Linux time.monotonic_ns() reads."""
    clock_gettime(types.int32(MONOTONIC), address_of(worker, CLOCK))
    return worker[CLOCK] * 1_000_000_000 + worker[CLOCK_NS]
