"""Tasks that compiled code spawns: what a body whose kernel declares `spawn: Spawn` calls, without Python and without the GIL.

Such a task is as any other of an open run, at a place of the worker's own pool. It is ready in the worker's nest, a deque: who waits for
tasks runs the newest of its nest meanwhile, and then the oldest of others'. That never ends in a circle: a task that waits inside of others
waits for its own children, which are younger than all that it runs on. If there is nothing to do, it leaves its worker to another thread,
as tasks in Python do (crew.py), which takes the GIL.

    frame      what a body has while it runs, words on its stack; tasks/frames.py has the first of them
    book       what its tasks access; regions.py
"""

from numba import types

from taskgpt.pointers import WORD_BYTES, address_of, call_entry, fetch_or, load, relax, store, words_at
from taskgpt.schedulers.native.open_run import (
    ALL_DONE,
    AWAITED,
    ONE_EVENT,
    begin_when_ready,
    own_words,
    run_spawned,
    settle_in,
)
from taskgpt.schedulers.native.places import has_edges, let_go, new_place, pool_in
from taskgpt.schedulers.native.queues import is_nested, push, take_others_nested, take_own_nested
from taskgpt.schedulers.native.regions import free_book, most_edges, new_book, note, region_of, wait_for
from taskgpt.schedulers.native.table import (
    ALIVE,
    CANCELLED_ALL,
    ERROR,
    HOLDS,
    INSIDE,
    LINES,
    NEXT_FUTURE,
    NOTHING,
    OPEN,
    OWN_PRIORITIES,
    PENDING,
    PLACE,
    RESULT,
    RESULTS,
    RESULTS_AT,
    SCRATCH,
    SERIALS,
    SHARE_AT,
    STATES,
    compiled,
    run_in,
    worker_of,
)
from taskgpt.schedulers.native.worker import hold_core_inside
from taskgpt.tasks.frames import (
    CALLED_WORDS,
    CARRIED,
    FIRST_TILE,
    FRAME_PLACE,
    FREE_IN_FRAME,
    FUNCTIONS,
    HAS_RESULT,
    NESTING,
    OVER,
    RAN,
    TILE_WORDS,
    TILES,
    TOO_DEEP,
    VALUE,
)

BLOCK, TABLE, ME = range(FUNCTIONS, FUNCTIONS + 3)  # behind the functions: how to wait; whose worker this is
_BOOK, _FUTURES = range(FREE_IN_FRAME, FREE_IN_FRAME + 2)  # _FUTURES: a list, of places and 1
_MANY = 1 << 40  # in PENDING, until all edges are there
_SPINS = 200  # before who waits leaves its worker
_MOST_INSIDE, _MOST_DEEP = 128, 1024  # tasks that a thread runs inside of each other: because it waits; because there is no place for more


@compiled
def spawn_nested(frame, entry, words, described, line):
    """Spawn a task from a body; return its place, RAN if it is done and its result is in the frame, OVER or TOO_DEEP.

    `words`: of its arguments, where. `described`: where it says how many they are, and which are tiles. `line`: of the source.
    """
    f, d = words_at(frame), words_at(described)
    t, me, o = _table_of(f), _me_of(f), _run_of(f)
    if load(o, CANCELLED_ALL) != 0 or f[CARRIED] != 0:
        return OVER
    run, pool = run_in(t, 0), pool_in(o, me + 1)
    place = new_place(o, pool)
    while place == NOTHING and _help(t, me):
        place = new_place(o, pool)
    if place == NOTHING:
        status = wait_for_all(frame) if d[TILES] > 0 else types.int64(0)
        status = status if status != 0 else _run_here(t, me, f, entry, words)
        waited = wait_for_all(frame) if status == RAN and d[TILES] > 0 else types.int64(0)  # what it has spawned is in no book of f's
        return status if waited == 0 else waited
    own_at = own_words(o, place)
    for at in range(d[CALLED_WORDS]):
        words_at(own_at)[at] = words_at(words)[at]
    store(words_at(run[PENDING]), place, _MANY)
    still = types.int64(0)
    if d[TILES] > 0 and f[_BOOK] == 0:
        f[_BOOK] = new_book()
    for tile in range(d[TILES]):
        tile_at = FIRST_TILE + TILE_WORDS * tile
        number = region_of(f[_BOOK], words_at(words + WORD_BYTES * d[tile_at]), d[tile_at + 1], d[tile_at + 2])
        is_written = d[tile_at + 3]
        if not has_edges(pool, most_edges(f[_BOOK], number, is_written)):
            status = wait_for_all(frame)
            if status != 0:
                store(words_at(o[HOLDS]), place, 1)
                let_go(t, o, place)
                return status
        still += wait_for(o, pool, f[_BOOK], number, is_written, place)
        note(o, f[_BOOK], number, is_written, place)
    words_at(run[OWN_PRIORITIES])[place] = 0
    words_at(o[SERIALS])[place] = NOTHING
    words_at(o[LINES])[place] = line
    words_at(o[RESULTS_AT])[place] = address_of(words_at(o[RESULTS]), place) if d[HAS_RESULT] else 0
    settle_in(run, o, place, f[FRAME_PLACE], entry, own_at, 2 + d[HAS_RESULT])  # a future looks at it, too
    if d[HAS_RESULT]:
        words_at(o[NEXT_FUTURE])[place] = f[_FUTURES]
        f[_FUTURES] = place + 1
    begin_when_ready(t, me, run, place, _MANY - still)
    return place


@compiled
def _run_here(t, me, f, entry, words):
    """Run a task for which there is no place, inside of the one that spawns it, whose children are done."""
    worker = worker_of(t, me)
    if worker[INSIDE] >= _MOST_DEEP:
        return TOO_DEEP
    worker[INSIDE] += 1
    worker[PLACE] = f[FRAME_PLACE]
    failed = call_entry(entry, words, worker[SCRATCH], address_of(worker, ERROR))
    worker[INSIDE] -= 1
    f[VALUE] = worker[RESULT]
    if failed == 0:
        return RAN
    f[CARRIED] = worker[ERROR]
    return OVER


@compiled
def wait_nested(frame, place):
    """Wait for a task that a body has spawned, whose result is in the frame then; return 0, OVER or TOO_DEEP."""
    f = words_at(frame)
    o = _run_of(f)
    states = words_at(o[STATES])
    while load(states, place) & ALL_DONE == 0:
        if load(o, CANCELLED_ALL) != 0:
            return OVER
        if not _help(_table_of(f), _me_of(f)):
            fetch_or(states, place, AWAITED)
            status = _leave_worker(f, place)
            if status != 0:
                return status
    if load(o, CANCELLED_ALL) != 0:  # it has failed, perhaps, or was skipped
        return OVER
    f[VALUE] = words_at(o[RESULTS])[place]
    return 0


@compiled
def wait_for_all(frame):
    """Wait for all tasks that a body has spawned; return as `wait_nested` does."""
    f = words_at(frame)
    o = _run_of(f)
    alive = words_at(o[ALIVE])
    while load(alive, f[FRAME_PLACE]) & (ONE_EVENT - 1) > 1:
        if load(o, CANCELLED_ALL) != 0:
            return OVER
        if not _help(_table_of(f), _me_of(f)):
            status = _leave_worker(f, f[FRAME_PLACE])
            if status != 0:
                return status
    return OVER if load(o, CANCELLED_ALL) != 0 else 0


@compiled
def end_body(frame):
    """Let go of what a body has had."""
    f = words_at(frame)
    if f[_BOOK] != 0:
        free_book(f[_BOOK])
    t, o = _table_of(f), _run_of(f)
    future = f[_FUTURES]
    while future != 0:
        place = future - 1
        future = words_at(o[NEXT_FUTURE])[place]
        let_go(t, o, place)
    return 0


@compiled
def _help(t, me):
    """Run a task of a nest inside of the one that waits; return False if there is none, or no room on the stack."""
    worker = worker_of(t, me)
    if worker[INSIDE] >= _MOST_INSIDE:
        return False
    instance = take_own_nested(t, me)
    if instance == NOTHING:
        instance = take_others_nested(t, me)
    if instance == NOTHING:
        return False
    worker[INSIDE] += 1
    while instance != NOTHING:
        if t[SHARE_AT] != 0:
            hold_core_inside(t, me)
        instance = run_spawned(t, me, instance)
        if instance != NOTHING and not is_nested(t, instance):  # a task of Python's may wait for what this thread is to do after it
            push(t, me, instance)
            instance = NOTHING
    worker[INSIDE] -= 1
    return True


@compiled
def _leave_worker(f, place):
    """Have another thread be this worker until a task is done, or, of the body's own place, all children are; return 0 or TOO_DEEP."""
    o = _run_of(f)
    states, alive = words_at(o[STATES]), words_at(o[ALIVE])
    is_own = place == f[FRAME_PLACE]
    for _ in range(_SPINS):
        if load(alive, place) & (ONE_EVENT - 1) <= 1 if is_own else load(states, place) & ALL_DONE != 0:
            return 0
        relax()
    worker = worker_of(_table_of(f), _me_of(f))
    inside = worker[INSIDE]
    worker[INSIDE] = 0
    failed = call_entry(words_at(f[NESTING])[BLOCK], place, types.int64(is_own), 0)
    worker[INSIDE] = inside
    return TOO_DEEP if failed != 0 else 0


@compiled
def _table_of(f):
    return words_at(words_at(f[NESTING])[TABLE])


@compiled
def _me_of(f):
    return words_at(f[NESTING])[ME]


@compiled
def _run_of(f):
    return words_at(run_in(_table_of(f), 0)[OPEN])


_WORD = types.int64
FUNCTIONS_OF_FRAMES = {  # in the order of tasks/frames.py
    spawn_nested: _WORD(*[_WORD] * 5),
    wait_nested: _WORD(_WORD, _WORD),
    wait_for_all: _WORD(_WORD),
    end_body: _WORD(_WORD),
}
