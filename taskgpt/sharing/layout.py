"""The segment: what the processes of a share have in common, as int64 words; and the words that each member keeps to itself.

    slot     a core's place in the segment: who holds it, since when
    member   a process that takes part; its number is its place in the segment
    lease    a worker of a member has a slot: its token is in OWNER

A token is one word: the member's number and one, its worker, which of that one's leases it is, modulo 128, and the member's generation. No
two members that ever were have the same generation, so that nobody takes the token of one that has died for another's. A slot may also be
offered to a member, before one of its workers has it.
Numbers that come from the segment are cut to what there is room for: whatever stands there, nothing beside it is read or written.
"""

import numpy as np
from numba import njit, types

from taskgpt.pointers import CACHE_LINE_WORDS, MONOTONIC, WORD_BYTES, address_of, clock_gettime, load, words_at

compiled = njit(nogil=True, error_model="numpy")

MAGIC, VERSION = 0x6572616873676B74, 1
MOST_MEMBERS, MOST_SLOTS, MOST_WORKERS = 60, 1024, 4096
NAME_WORDS = 8
MASK_BITS = 32
MASK_WORDS = MOST_SLOTS // MASK_BITS
NOTHING = -1


def _lines(count: int) -> range:
    return range(0, (count + 1) * CACHE_LINE_WORDS, CACHE_LINE_WORDS)


# The head: written when the segment is made, but for LAST_GENERATION. WANTING: a bit for each member that has a worker without a core.
_MADE, _NEWS, HEAD_WORDS = _lines(2)
MAGIC_AT, VERSION_AT, SLOTS, LAST_GENERATION = range(_MADE, _NEWS)[:4]
WANTING = _NEWS

# A member. IDENTITY: 0, or generation and process id. STARTED: when its process began, in the kernel's ticks. Then which slots it may have.
# USED: the time of cores that it has had, in ns; VIRTUAL: that over its weight. GRANTS: counts offers, and who waits sleeps on it.
_SAID, _MAY, _, _USE, MEMBER_WORDS = _lines(4)
IDENTITY, STARTED, WEIGHT, PRIORITY, IS_STOPPED, WORKERS = range(_SAID, _MAY)[:6]
NAME = _SAID + 8
MAY = _MAY
VIRTUAL, USED, GRANTS = range(_USE, MEMBER_WORDS)[:3]

# A slot. SINCE: when the lease has begun whose token is in SINCE_OF: written when the slot is had already, perhaps much later. KIND: what
# the task is that runs there, for policies.
_LEASE, SLOT_WORDS = _lines(1)
OWNER, SINCE, SINCE_OF, KIND, CORE = range(_LEASE, SLOT_WORDS)[:5]
OFFERED = 1 << 24  # in a token, in the place of a worker

MEMBERS_AT = HEAD_WORDS
SLOTS_AT = MEMBERS_AT + MOST_MEMBERS * MEMBER_WORDS
SEGMENT_WORDS = SLOTS_AT + MOST_SLOTS * SLOT_WORDS

# What a member keeps to itself: settings and addresses; news; a part for each worker, and one more for the thread that watches over the
# others. At MAY_AT are the slots that it may have, CORES of them. At CLOCK_AT is the time in ns where it is simulated; 0: the system's.
_OWN, _OWN_NEWS, MINE_WORDS = _lines(2)
SEGMENT_AT, MEMBER, GENERATION, CORES, QUANTUM_NS, BINDS, WORKERS_AT, MAY_AT, WATCHER, CLOCK_AT = range(_OWN, _OWN_NEWS)[:10]
WAITING, ACTIVE = range(_OWN_NEWS, MINE_WORDS)[:2]  # workers without a core that want one; those and workers that have one
_WORKER, _WORKER_MASK, LEASE_WORDS = _lines(2)
HELD, LAST, TOKEN, COUNT, BOUND, LOOK_AT = range(_WORKER, _WORKER_MASK)[:6]  # HELD: a slot or NOTHING; LAST: before; COUNT: of leases
TIME, TIME_NS, UNTIL, UNTIL_NS = range(_WORKER, _WORKER_MASK)[6:10]
MASK = _WORKER_MASK  # of cores, for the kernel


def make_own(segment: np.ndarray, may: np.ndarray, workers: int) -> np.ndarray:
    """Return what a member with so many workers keeps to itself, int64 words that refer to a segment and to the slots that it may have."""
    room = np.zeros(MINE_WORDS + (workers + 1) * LEASE_WORDS + CACHE_LINE_WORDS, np.int64)
    words = room[-room.ctypes.data // WORD_BYTES % CACHE_LINE_WORDS :]
    words[[SEGMENT_AT, CORES, MAY_AT, WATCHER]] = segment.ctypes.data, len(may), may.ctypes.data, workers
    words[WORKERS_AT] = words[MINE_WORDS:].ctypes.data
    leases_in(words)[:, [HELD, LAST, BOUND]] = NOTHING
    return words


def leases_in(own: np.ndarray) -> np.ndarray:
    """Return the parts of the workers, and of who watches, in what a member keeps to itself: a row each."""
    return own[MINE_WORDS:][: (own[WATCHER] + 1) * LEASE_WORDS].reshape(-1, LEASE_WORDS)


@compiled
def head_of(m):
    return words_at(m[SEGMENT_AT])


@compiled
def member_of(m, number):
    return words_at(m[SEGMENT_AT] + (MEMBERS_AT + number * MEMBER_WORDS) * WORD_BYTES)


@compiled
def slot_at(m, number):
    return words_at(m[SEGMENT_AT] + (SLOTS_AT + number * SLOT_WORDS) * WORD_BYTES)


@compiled
def lease_of(m, me):
    """Return a worker's own part."""
    return words_at(m[WORKERS_AT] + me * (LEASE_WORDS * WORD_BYTES))


@compiled
def new_token(m, me, lease):
    return m[GENERATION] << 32 | (lease[COUNT] & 127) << 25 | me << 8 | (m[MEMBER] + 1)


@compiled
def held_ns(slot, owner, time):
    """Return for how long a slot's owner has had it, 0 if he has not said so yet, or has it no longer."""
    since = load(slot, SINCE)
    return max(time - since, types.int64(0)) if load(slot, SINCE_OF) == owner else types.int64(0)


@compiled
def offer_to(generation, number):
    return generation << 32 | OFFERED | (number + 1)


@compiled
def member_in(owner):
    """Return the member that a slot is leased or offered to, NOTHING if to nobody, or if there is no such member."""
    number = (owner & 0xFF) - 1
    return number if number < MOST_MEMBERS else types.int64(NOTHING)


@compiled
def generation_in(owner):
    return owner >> 32


@compiled
def now_of(m, lease):
    """Return the time in ns, of CLOCK_MONOTONIC, which all processes of a machine share."""
    if m[CLOCK_AT] != 0:
        return words_at(m[CLOCK_AT])[0]
    clock_gettime(types.int32(MONOTONIC), address_of(lease, TIME))
    return lease[TIME] * 1_000_000_000 + lease[TIME_NS]
