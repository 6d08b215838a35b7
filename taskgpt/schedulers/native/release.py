"""What happens when a task has run: who waited for it is counted down and pushed if it is ready; locks are given back; times are kept."""

from taskgpt.pointers import (
    WORD_BYTES,
    condition_broadcast,
    exchange,
    fetch_add,
    fetch_or,
    load,
    mutex_lock,
    mutex_unlock,
    relax,
    sched_yield,
    store_last,
    words_at,
)
from taskgpt.schedulers.native.queues import push, rank
from taskgpt.schedulers.native.table import (
    DONE,
    IMMEDIATE,
    LOCK_FIRST,
    LOCK_OF,
    LOCKS,
    MARKS,
    MUTEX,
    NEXT,
    NEXT_FIRST,
    NOTHING,
    NUMBER,
    PENDING,
    PRIORITIES,
    RAN_ON,
    READY_AT,
    RECORD,
    RECORD_CAPACITY,
    RECORD_COUNT,
    RECORD_LOST,
    RECORD_TAKEN,
    REMAINING,
    ROW_READY,
    ROW_RUN,
    ROW_START,
    ROW_STOP,
    ROW_TASK,
    ROW_WORDS,
    STOPPING,
    SUCCESSOR,
    SUCCESSOR_FIRST,
    compiled,
    instance_of,
    now,
    run_in,
    run_of,
    slot_of,
    task_of,
    worker_of,
)

FINISHED, SUBMITTED = 1, 2  # bits of a task's mark: it has run; the next run has been submitted


@compiled
def release(t, me, instance):
    """Count the successors of a finished task down, and push all that became ready but the best; return that, or NOTHING."""
    run, task = run_of(t, instance), task_of(instance)
    if run[RAN_ON] != 0:
        words_at(run[RAN_ON])[task] = me
    best = NOTHING
    # The next run first: once the last of this run's own edges is counted down, the run may end and its arrays be used again.
    if run[MARKS] != 0 and fetch_or(words_at(run[MARKS]), task, FINISHED) & SUBMITTED:
        best = release_next(t, me, instance, best)
    firsts, successors, pending = words_at(run[SUCCESSOR_FIRST]), words_at(run[SUCCESSOR]), words_at(run[PENDING])
    first, last = firsts[task], firsts[task + 1]
    for at in range(first, last):
        if fetch_add(pending, successors[at], -1) == 1:
            best = offer(t, me, best, instance_of(successors[at], slot_of(instance)))
    # A run is over when its last tasks are: all others come before one of them.
    if first == last and fetch_add(run, REMAINING, -1) == 1:
        tell(t)
    return go_on_with(t, me, best)


@compiled
def tell(t):
    """Have those who wait for DONE look again."""
    mutex_lock(t[MUTEX])
    condition_broadcast(t[DONE])
    mutex_unlock(t[MUTEX])


@compiled
def go_on_with(t, me, best):
    """Return the best task that became ready, for this worker to run, or NOTHING: push it where another may come before it."""
    if best != NOTHING and t[PRIORITIES] != 0:
        push(t, me, best)
        return NOTHING
    return best


@compiled
def release_next(t, me, instance, best):
    """Count down the tasks of the next run that wait for this one."""
    run, task, other = run_of(t, instance), task_of(instance), slot_of(instance) ^ 1
    firsts, successors = words_at(run[NEXT_FIRST]), words_at(run[NEXT])
    pending = words_at(run_in(t, other)[PENDING])
    for at in range(firsts[task], firsts[task + 1]):
        if fetch_add(pending, successors[at], -1) == 1:
            best = offer(t, me, best, instance_of(successors[at], other))
    return best


@compiled
def offer(t, me, best, instance):
    """Keep the better of two ready tasks and push the other; without immediate successor, push every one."""
    note_ready(t, me, instance)
    if t[IMMEDIATE] == 0:
        push(t, me, instance)
        return best
    if best == NOTHING:
        return instance
    if rank(t, instance, 1) < rank(t, best, 0):
        best, instance = instance, best
    push(t, me, instance)
    return best


@compiled
def note_ready(t, me, instance):
    run = run_of(t, instance)
    if run[READY_AT] != 0:
        words_at(run[READY_AT])[task_of(instance)] = now(worker_of(t, me))


@compiled
def take_locks(t, run, task):
    """Take a commutative task's locks, in the same order as every task, so that none waits for ever. Return False, with none, to stop."""
    firsts, locks, which = words_at(run[LOCK_FIRST]), words_at(run[LOCKS]), words_at(run[LOCK_OF])
    for at in range(firsts[task], firsts[task + 1]):
        while exchange(locks, which[at], 1) != 0:
            if load(t, STOPPING) != 0:
                for held in range(firsts[task], at):
                    store_last(locks, which[held], 0)
                return False
            relax()
            sched_yield()
    return True


@compiled
def release_locks(run, task):
    firsts, locks, which = words_at(run[LOCK_FIRST]), words_at(run[LOCKS]), words_at(run[LOCK_OF])
    for at in range(firsts[task], firsts[task + 1]):
        store_last(locks, which[at], 0)


@compiled
def record(worker, run, task, ready, start, stop):
    """Keep when a task ran, by its number in the graph, if there is room."""
    count = worker[RECORD_COUNT]
    if count - load(worker, RECORD_TAKEN) >= worker[RECORD_CAPACITY]:
        worker[RECORD_LOST] += 1
        return
    row = words_at(worker[RECORD] + count % worker[RECORD_CAPACITY] * (ROW_WORDS * WORD_BYTES))
    row[ROW_RUN], row[ROW_TASK], row[ROW_READY] = run[NUMBER], task, ready
    row[ROW_START], row[ROW_STOP] = start, stop
    store_last(worker, RECORD_COUNT, count + 1)  # after the row, which may be read as soon as it counts
