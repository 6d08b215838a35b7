"""The native scheduler's compiled part: what a worker does, and what the submitting thread does to start, await and stop runs.

A worker takes a ready task, calls its kernels, counts its successors down and goes on with what became ready, in one loop without Python
and without the GIL, from the scheduler's beginning to its end. Who finds nothing to do spins for a while, then sleeps.

Runs may overlap, two at a time. A task of the later run waits also for the tasks of the earlier one that used the same cells; the counts of
both kinds of predecessors are one number. Such an edge must be counted down once: by the worker that finishes its source, or, if that was
before the later run was submitted, by the submitting thread. Both set their bit in the mark of the source, in one atomic step each, and the
second of the two is the one to do it.
"""

from numba import types

from taskgpt.pointers import (
    REALTIME,
    address_of,
    call_entry,
    clock_gettime,
    condition_broadcast,
    condition_init,
    condition_timedwait,
    condition_wait,
    fetch_add,
    fetch_or,
    load,
    mutex_init,
    mutex_lock,
    mutex_unlock,
    store,
    words_at,
)
from taskgpt.schedulers.native.idle import accept, announce, begin_watch, end_watch, pause, rouse, sleep, wake, wake_some, withdraw
from taskgpt.schedulers.native.open_run import run_spawned
from taskgpt.schedulers.native.queues import empty, is_anything_ready, kind_of, push, take
from taskgpt.schedulers.native.release import FINISHED, SUBMITTED, note_ready, record, release, release_locks, release_next, take_locks
from taskgpt.schedulers.native.table import (
    ASLEEP,
    CALL_ENTRY,
    CALL_FIRST,
    CALL_WORDS,
    CELL,
    CLOSING,
    DONE,
    DURATIONS,
    ERROR,
    FAILED,
    FAILED_CALL,
    GO,
    INDEGREE,
    KINDS,
    LOCKS,
    LOOK,
    MARKS,
    MUTEX,
    NEXT,
    NEXT_FIRST,
    NOTHING,
    ON_WATCH,
    OPEN,
    PENDING,
    PLACE,
    READY_AT,
    RECORD,
    REMAINING,
    SCRATCH,
    SHARE_AT,
    SPINNING,
    SPINS,
    STILL,
    STOPPING,
    TASKS,
    UNTIL,
    UNTIL_NS,
    WANTED,
    WATCH,
    WORKERS,
    compiled,
    instance_of,
    now,
    run_in,
    run_of,
    slot_of,
    task_of,
    worker_of,
)
from taskgpt.sharing.layout import NOTHING as NO_CORE
from taskgpt.sharing.leases import (
    await_grant,
    begin_waiting,
    end_waiting,
    is_wanted,
    keeps_core,
    leave_core,
    look_for_core,
    rebind,
    say_kind,
    take_core,
    wake_waiting,
)
from taskgpt.tasks.native_entry import HELD

# Workers --------------------------------------------------------------------------------------------------------------------------------


@compiled
def work(table, me):
    """Be worker `me` until the scheduler closes, or until another thread wants to be it again (see `want_back`)."""
    t = words_at(table)
    instance = NOTHING
    if t[SHARE_AT] != 0:
        rebind(words_at(t[SHARE_AT]), me)
    while True:
        if load(t, STOPPING) != 0:
            instance = NOTHING  # dropped, with all that waits in the queues
            if t[SHARE_AT] != 0:
                leave_core(words_at(t[SHARE_AT]), me)
            if not _stand_still(t):
                return
        if load(worker_of(t, me), WANTED) != 0:
            if instance != NOTHING:
                push(t, me, instance)
            fetch_add(worker_of(t, me), WANTED, -1)
            return
        if t[SHARE_AT] != 0 and not keeps_core(words_at(t[SHARE_AT]), me):
            if instance != NOTHING:
                push(t, me, instance)  # another worker may have a core
            instance = begin_with_core(t, me)
            continue
        if instance == NOTHING:
            instance = take(t, me)
        instance = wait_for_work(t, me) if instance == NOTHING else run_task(t, me, instance)


@compiled
def must_leave(t, me):
    """Return True if this worker is to look for work no longer: all are to stop, or another thread wants to be it."""
    return load(t, STOPPING) != 0 or load(worker_of(t, me), WANTED) != 0


@compiled
def wait_for_work(t, me):
    """Return an instance when there is one, or NOTHING when there may be one or the workers are to stop."""
    if is_core_wanted(t):
        return _sleep(t, me)
    if begin_watch(t):
        return _watch(t, me)
    announce(t, me, SPINNING)
    spins, is_over = 0, load(t, WATCH) == 0  # else who is on the watch has seen my bit when he leaves it
    while not is_over and (t[SPINS] < 0 or spins < t[SPINS]) and load(worker_of(t, me), CELL) == NOTHING:
        pause(spins)
        spins += 1
        is_over = must_leave(t, me) or is_core_wanted(t)
    if load(worker_of(t, me), CELL) == NOTHING and withdraw(t, me, SPINNING):
        return NOTHING if is_over else _sleep(t, me)
    handed = accept(t, me)
    if handed == ON_WATCH:
        return _watch(t, me)
    return NOTHING if handed == LOOK else handed


@compiled
def _watch(t, me):
    """The same, as the one on the watch."""
    spins = 0
    while (t[SPINS] < 0 or spins < t[SPINS]) and not must_leave(t, me) and not is_core_wanted(t):
        instance = take(t, me) if is_anything_ready(t) else NOTHING
        if instance != NOTHING:
            end_watch(t, me)
            if is_anything_ready(t):  # pushed while there was a watch
                rouse(t, me)
            return instance
        pause(spins)
        spins += 1
    end_watch(t, me)
    return NOTHING if must_leave(t, me) else _sleep(t, me)


@compiled
def _sleep(t, me):
    """The same, asleep, without a core of a share."""
    if t[SHARE_AT] != 0:
        leave_core(words_at(t[SHARE_AT]), me)
    announce(t, me, ASLEEP)
    if not ((is_anything_ready(t) or must_leave(t, me)) and withdraw(t, me, ASLEEP)):
        sleep(t, me)
    return NOTHING if t[SHARE_AT] != 0 else _take_awake(t, me)


@compiled
def _take_awake(t, me):
    """Return an instance or NOTHING. Who has got a task wakes two others if there is more, so that all are awake soon."""
    instance = take(t, me)
    if instance != NOTHING and is_anything_ready(t):
        wake_some(t, me, 2)
    return instance


# Cores of a share -----------------------------------------------------------------------------------------------------------------------


@compiled
def is_core_wanted(t):
    """Return True if another process waits for a core."""
    return t[SHARE_AT] != 0 and is_wanted(words_at(t[SHARE_AT]))


@compiled
def begin_with_core(t, me):
    """Return an instance for a worker that had no core, and has one now; or NOTHING, if there is none or the worker is to leave."""
    if not is_anything_ready(t):
        return _sleep(t, me)
    return _take_awake(t, me) if get_core(t, me, False) else types.int64(NOTHING)


@compiled
def get_core(t, me, is_inside):
    """Return True when the worker has a core; False if all are to stop or, unless it is inside a task, if there is nothing to run on it."""
    m = words_at(t[SHARE_AT])
    if take_core(m, me):
        return True
    begin_waiting(m, me)
    grants = look_for_core(m, me)
    while grants != NO_CORE and not (load(t, STOPPING) != 0 if is_inside else must_leave(t, me) or not is_anything_ready(t)):
        await_grant(m, me, grants)
        grants = look_for_core(m, me)
    end_waiting(m, me)
    return grants == NO_CORE


@compiled
def get_core_back(table, me):
    """Have a thread that is worker `me` again, in the middle of a task, wait until it has a core."""
    t = words_at(table)
    if t[SHARE_AT] != 0:
        rebind(words_at(t[SHARE_AT]), me)
        hold_core_inside(t, me)


@compiled
def hold_core_inside(t, me):
    """Have a worker of a share that is in the middle of a task, which no other can go on with, wait until it has a core."""
    if not keeps_core(words_at(t[SHARE_AT]), me):
        get_core(t, me, True)


@compiled
def _stand_still(t):
    """Wait until the workers may go on; return False when the scheduler closes."""
    mutex_lock(t[MUTEX])
    fetch_add(t, STILL, 1)
    condition_broadcast(t[DONE])
    while load(t, STOPPING) != 0 and load(t, CLOSING) == 0:
        condition_wait(t[GO], t[MUTEX])
    fetch_add(t, STILL, -1)
    mutex_unlock(t[MUTEX])
    return load(t, CLOSING) == 0


@compiled
def run_task(t, me, instance):
    """Run a task and release its successors; return the one to go on with, or NOTHING."""
    run, worker, task = run_of(t, instance), worker_of(t, me), task_of(instance)
    if run[OPEN] != 0:
        return run_spawned(t, me, instance)
    is_timed = worker[RECORD] != 0 or run[DURATIONS] != 0
    if run[LOCKS] != 0 and not take_locks(t, run, task):
        return NOTHING
    if run[KINDS] != 0:
        say_kind(words_at(t[SHARE_AT]), me, kind_of(t, instance))
    start = now(worker) if is_timed else 0
    first = words_at(run[CALL_FIRST])
    entries, arguments = words_at(run[CALL_ENTRY]), words_at(run[CALL_WORDS])
    last = first[task + 1] - 1 if run[LOCKS] == 0 else NOTHING
    for call in range(first[task], first[task + 1]):
        worker[PLACE] = instance if call == last else NOTHING
        status = call_entry(entries[call], arguments[call], worker[SCRATCH], address_of(worker, ERROR))
        worker[PLACE] = NOTHING
        if status == HELD:
            return NOTHING  # and nothing more is asked of the run, which may be over by now
        if status != 0:
            _fail(t, me, instance, call)
            if run[LOCKS] != 0:
                release_locks(run, task)
            return NOTHING
    stop = now(worker) if is_timed else 0
    if run[LOCKS] != 0:
        release_locks(run, task)
    if run[DURATIONS] != 0:
        words_at(run[DURATIONS])[task] = stop - start
    if worker[RECORD] != 0:
        record(worker, run, task, words_at(run[READY_AT])[task], start, stop)
    return release(t, me, instance)


@compiled
def _fail(t, me, instance, call):
    """Note the first failure and have everybody stop."""
    mutex_lock(t[MUTEX])
    if t[FAILED] == 0:
        t[FAILED], t[FAILED_CALL] = worker_of(t, me)[ERROR], instance_of(call, slot_of(instance))
        store(t, STOPPING, 1)
        condition_broadcast(t[DONE])
    mutex_unlock(t[MUTEX])
    _wake_all(t)


@compiled
def _wake_all(t):
    """Have all workers look whether they are to stop."""
    wake_some(t, 0, t[WORKERS])
    if t[SHARE_AT] != 0:
        wake_waiting(words_at(t[SHARE_AT]))


# The submitting thread ------------------------------------------------------------------------------------------------------------------


@compiled
def initialize(mutex, go, done):
    """Make the mutex and the conditions."""
    mutex_init(mutex, 0)
    condition_init(go, 0)
    condition_init(done, 0)


@compiled
def initialize_cell(mutex, filled):
    """Make what a worker sleeps on."""
    mutex_init(mutex, 0)
    condition_init(filled, 0)


@compiled
def submit(table, slot, is_next):
    """Start the run in `slot`. With `is_next`, its tasks wait for those of the other slot's run, as the edges there say."""
    t = words_at(table)
    me, run, before = t[WORKERS], run_in(t, slot), run_in(t, slot ^ 1)
    tasks = run[TASKS]
    indegree, pending = words_at(run[INDEGREE]), words_at(run[PENDING])
    for task in range(tasks):
        pending[task] = indegree[task]
    if run[MARKS] != 0:
        marks = words_at(run[MARKS])
        for task in range(tasks):
            marks[task] = 0
    if is_next:
        firsts, successors = words_at(before[NEXT_FIRST]), words_at(before[NEXT])
        for at in range(firsts[before[TASKS]]):
            pending[successors[at]] += 1
    for task in range(tasks):
        if pending[task] == 0:
            pending[task] = NOTHING  # marked now, before any count can come down to 0
    if is_next:
        marks = words_at(before[MARKS])
        for task in range(before[TASKS]):
            if fetch_or(marks, task, SUBMITTED) & FINISHED:
                best = release_next(t, me, instance_of(task, slot ^ 1), NOTHING)
                if best != NOTHING:
                    push(t, me, best)
    for task in range(tasks):
        if load(pending, task) == NOTHING:
            note_ready(t, me, instance_of(task, slot))
            push(t, me, instance_of(task, slot))


@compiled
def wait(table, slot, milliseconds):
    """Wait so long for the run in `slot` to end; return True if it has ended or if the workers stop."""
    t = words_at(table)
    run, clock = run_in(t, slot), worker_of(t, t[WORKERS])
    clock_gettime(types.int32(REALTIME), address_of(clock, UNTIL))
    nanoseconds = clock[UNTIL_NS] + milliseconds * 1_000_000
    clock[UNTIL], clock[UNTIL_NS] = clock[UNTIL] + nanoseconds // 1_000_000_000, nanoseconds % 1_000_000_000
    mutex_lock(t[MUTEX])
    has_time = True
    while has_time and load(run, REMAINING) != 0 and load(t, STOPPING) == 0:
        has_time = condition_timedwait(t[DONE], t[MUTEX], address_of(clock, UNTIL)) == 0
    mutex_unlock(t[MUTEX])
    return load(run, REMAINING) == 0 or load(t, STOPPING) != 0


@compiled
def release_held(table, instance):
    """Release the successors of a task whose events have happened. While nothing is submitted, by one thread at a time."""
    t = words_at(table)
    me = t[WORKERS]
    best = release(t, me, instance)
    if best != NOTHING:
        push(t, me, best)


@compiled
def fail_held(table, instance, call, error):
    """Note the failure of a task one of whose events failed; `error`: the exception, a reference that is handed over."""
    t = words_at(table)
    worker_of(t, t[WORKERS])[ERROR] = error
    _fail(t, t[WORKERS], instance, call)


@compiled
def stop(table):
    """Have the workers finish the tasks they are at and take no other; return when all stand still."""
    t = words_at(table)
    store(t, STOPPING, 1)
    _wake_all(t)
    mutex_lock(t[MUTEX])
    while load(t, STILL) < t[WORKERS]:
        condition_wait(t[DONE], t[MUTEX])
    mutex_unlock(t[MUTEX])


@compiled
def drop_all(table):
    """Forget all ready tasks. No worker may be at work."""
    empty(words_at(table))


@compiled
def go_on(table):
    """Have workers that stand still go on."""
    t = words_at(table)
    mutex_lock(t[MUTEX])
    store(t, STOPPING, 0)
    condition_broadcast(t[GO])
    mutex_unlock(t[MUTEX])


@compiled
def close(table):
    """Have the workers return."""
    t = words_at(table)
    mutex_lock(t[MUTEX])
    store(t, CLOSING, 1)
    store(t, STOPPING, 1)
    condition_broadcast(t[GO])
    mutex_unlock(t[MUTEX])
    _wake_all(t)


@compiled
def want_back(table, me):
    """Have the thread that is worker `me` return from `work`, at the end of its task at the latest: this thread will be that worker."""
    t = words_at(table)
    fetch_add(worker_of(t, me), WANTED, 1)
    if withdraw(t, me, ASLEEP):
        wake(t, me)
    if t[SHARE_AT] != 0:
        wake_waiting(words_at(t[SHARE_AT]))


SIGNATURES = {
    initialize: types.void(types.int64, types.int64, types.int64),
    initialize_cell: types.void(types.int64, types.int64),
    work: types.void(types.int64, types.int64),
    submit: types.void(types.int64, types.int64, types.boolean),
    wait: types.boolean(types.int64, types.int64, types.int64),
    release_held: types.void(types.int64, types.int64),
    fail_held: types.void(types.int64, types.int64, types.int64, types.int64),
    stop: types.void(types.int64),
    drop_all: types.void(types.int64),
    go_on: types.void(types.int64),
    close: types.void(types.int64),
    want_back: types.void(types.int64, types.int64),
    get_core_back: types.void(types.int64, types.int64),
}
