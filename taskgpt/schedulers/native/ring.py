"""Rings of instances, between TOP, where the oldest is, and BOTTOM, where the next will be: two kinds of queues without waiting.

A deque (after Chase and Lev, 2005) has one owner, who pushes, and may take the newest. Anybody may take the oldest, at any moment: who has
moved TOP owns it. An inbox is pushed into by anybody, and emptied by one at a time, who holds the queue's lock. A slot of it is 0, or one
more than an instance.

TOP and BOTTOM only grow, but for a moment in `take_newest`. A ring has room for every instance that can be ready, so that nobody overwrites
what another is about to take: who was late finds that TOP has moved.
"""

from taskgpt.pointers import compare_exchange, fetch_add, load, store, store_last, words_at
from taskgpt.schedulers.native.table import BOTTOM, DEQUE, INBOX, NOTHING, TOP, compiled

RING_HEAD = 1  # words before the slots: their number less 1. Both in one block, so that who finds it finds what belongs together


@compiled
def _slot(ring, at):
    return RING_HEAD + (at & ring[0])


# Deques ---------------------------------------------------------------------------------------------------------------------------------


@compiled
def is_deque_empty(queue):
    top = load(queue, TOP)
    return load(queue, BOTTOM) <= top


@compiled
def put(queue, instance):
    """Push an instance. For the owner."""
    bottom, ring = load(queue, BOTTOM), words_at(load(queue, DEQUE))
    store(ring, _slot(ring, bottom), instance)
    store(queue, BOTTOM, bottom + 1)


@compiled
def take_oldest(queue):
    """Return the instance that was pushed first; NOTHING if there is none, or if another took it at the same time."""
    top = load(queue, TOP)
    if load(queue, BOTTOM) <= top:
        return NOTHING
    ring = words_at(load(queue, DEQUE))
    instance = load(ring, _slot(ring, top))
    return instance if compare_exchange(queue, TOP, top, top + 1) == top else NOTHING


@compiled
def take_newest(queue):
    """Return the instance that was pushed last; NOTHING if there is none. For the owner."""
    bottom = load(queue, BOTTOM) - 1
    store(queue, BOTTOM, bottom)  # from here on nobody else begins to take it
    top = load(queue, TOP)
    if top > bottom:
        store(queue, BOTTOM, bottom + 1)
        return NOTHING
    ring = words_at(load(queue, DEQUE))
    instance = load(ring, _slot(ring, bottom))
    if top == bottom:  # it is the oldest, too: others may be about to take it
        if compare_exchange(queue, TOP, top, top + 1) != top:
            instance = NOTHING
        store(queue, BOTTOM, bottom + 1)
    return instance


# Inboxes --------------------------------------------------------------------------------------------------------------------------------


@compiled
def is_inbox_empty(queue):
    ring = words_at(load(queue, INBOX))
    return load(ring, _slot(ring, load(queue, TOP))) == 0


@compiled
def drop_into(queue, instance):
    """Push an instance. For anybody."""
    ring = words_at(load(queue, INBOX))
    store(ring, _slot(ring, fetch_add(queue, BOTTOM, 1)), instance + 1)


@compiled
def take_out(queue):
    """Return the instance that was pushed first, or NOTHING: also if that one is still being pushed. For who holds the lock."""
    top, ring = load(queue, TOP), words_at(load(queue, INBOX))
    slot = _slot(ring, top)
    found = load(ring, slot)
    if found == 0:
        return NOTHING
    store_last(ring, slot, 0)
    store_last(queue, TOP, top + 1)
    return found - 1
