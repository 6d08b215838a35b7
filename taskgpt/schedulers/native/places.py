"""Places of open tasks, and edges between them, in pools: each has one who spawns with it, and anybody gives back to it.

A place keeps the edges to who waits for its task as a list, to which is added without waiting, until the task closes it. The edges on which
the task itself has waited are used again when its place is.
"""

from taskgpt.pointers import WORD_BYTES, compare_exchange, exchange, fetch_add, load, words_at
from taskgpt.schedulers.native.release import tell
from taskgpt.schedulers.native.table import (
    EDGE_FIRST,
    EDGE_NEXT,
    EDGE_OWN,
    EDGE_TO,
    ENDED,
    FEW,
    FREE,
    FREE_EDGE,
    FREE_EDGES,
    FREED,
    HEADS,
    HOLDS,
    LAST,
    LAST_EDGE,
    NEXT_PLACE,
    NOTHING,
    PLACES,
    POOL_WORDS,
    POOLS_AT,
    SHARE,
    SPAWNED,
    TICKETS,
    USED,
    USED_EDGES,
    compiled,
)

CLOSED = -2  # in HEADS: nobody can wait for the task any more


@compiled
def pool_in(o, number):
    """Return a pool of an open run: 0 is Python's, 1 that of the first worker."""
    return words_at(o[POOLS_AT] + number * (POOL_WORDS * WORD_BYTES))


@compiled
def pool_of(o, place):
    """Return the pool that a place belongs to."""
    return pool_in(o, 0 if place < o[PLACES] else 1 + (place - o[PLACES]) // o[SHARE])


@compiled
def new_place(o, pool):
    """Return a place that is free, for whom the pool is, or NOTHING."""
    places = words_at(o[NEXT_PLACE])
    if pool[FREE] == NOTHING:
        pool[FREE] = exchange(pool, FREED, NOTHING)
    place = pool[FREE]
    if place != NOTHING:
        pool[FREE] = places[place]
        _free_edges(o, pool, place)
    elif pool[USED] < pool[LAST]:
        place = pool[USED]
        pool[USED] += 1
        words_at(o[EDGE_FIRST])[place] = NOTHING
    if place != NOTHING:
        words_at(o[TICKETS])[place] += 1
        pool[SPAWNED] += 1
    return place


@compiled
def _free_edges(o, pool, place):
    """Use the edges again on which the place's last task has waited."""
    own, edge = words_at(o[EDGE_OWN]), words_at(o[EDGE_FIRST])[place]
    while edge != NOTHING:
        following = own[edge]
        own[edge] = pool[FREE_EDGE]
        pool[FREE_EDGE] = edge
        pool[FREE_EDGES] += 1
        edge = following
    words_at(o[EDGE_FIRST])[place] = NOTHING


@compiled
def has_edges(pool, count):
    """Return True if so many edges are free."""
    return pool[LAST_EDGE] - pool[USED_EDGES] + pool[FREE_EDGES] >= count


@compiled
def add_edge(o, pool, before, place):
    """Have a task wait for another, on an edge that is free; return 0 if that is done already, else 1."""
    own, heads = words_at(o[EDGE_OWN]), words_at(o[HEADS])
    edge = pool[FREE_EDGE]
    if edge != NOTHING:
        pool[FREE_EDGE] = own[edge]
        pool[FREE_EDGES] -= 1
    else:
        edge = pool[USED_EDGES]
        pool[USED_EDGES] += 1
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


@compiled
def let_go(t, o, place):
    """Have the place used again, if nobody else looks at it."""
    if fetch_add(words_at(o[HOLDS]), place, -1) != 1:
        return
    pool = pool_of(o, place)
    while True:
        head = load(pool, FREED)
        words_at(o[NEXT_PLACE])[place] = head
        if compare_exchange(pool, FREED, head, place) == head:
            break
    ended = fetch_add(pool, ENDED, 1) + 1
    few = load(pool, FEW)
    if few != NOTHING and load(pool, SPAWNED) - ended <= few:
        tell(t)
