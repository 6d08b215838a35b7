"""The protocol of leases: who holds which core, who waits for one, who is next. Compiled; the simulator calls the same functions.

A worker holds a slot while it has tasks to run. Who gives one up looks whether a member wants it, and offers it to that one, who is woken.
A worker that wants one sets its member's bit in WANTING, then looks for a free slot, then sleeps. The bit comes before the look, and the
slot is free before the look for bits: so one of the two sees the other. A member whose last waiting worker has got a slot takes its bit
back, and then hands on what was offered to it besides; who has made such an offer meanwhile sees the bit gone, and takes the offer back.

Every step is one atomic operation on one word. So nobody holds anything when he is killed but his slots, his offers and his bit, which
`reclaim` gives back, and nobody waits for one that is stopped.

Between two tasks a worker looks whether another member wants a core, which costs two reads while none does. If so, and its own lease is
older than the quantum, it gives the slot to the member that is farthest behind: that has had the least time of cores for its weight, with
the leases that it has now. Where all have as many cores as their weights say, each keeps its own, unless one is far behind.
"""

from numba import types

from taskgpt.pointers import (
    address_of,
    compare_exchange,
    fetch_add,
    fetch_and,
    fetch_or,
    futex_wait,
    futex_wake,
    load,
    sched_setaffinity,
    store,
    words_at,
)
from taskgpt.sharing.layout import (
    ACTIVE,
    BINDS,
    BOUND,
    CORE,
    CORES,
    COUNT,
    GENERATION,
    GRANTS,
    HELD,
    IDENTITY,
    IS_STOPPED,
    KIND,
    LAST,
    LOOK_AT,
    MASK,
    MASK_BITS,
    MASK_WORDS,
    MAY,
    MAY_AT,
    MEMBER,
    MOST_MEMBERS,
    MOST_SLOTS,
    NOTHING,
    OFFERED,
    OWNER,
    PRIORITY,
    QUANTUM_NS,
    SINCE,
    SINCE_OF,
    SLOTS,
    TOKEN,
    UNTIL,
    UNTIL_NS,
    USED,
    VIRTUAL,
    WAITING,
    WANTING,
    WATCHER,
    WEIGHT,
    compiled,
    generation_in,
    head_of,
    held_ns,
    lease_of,
    member_in,
    member_of,
    new_token,
    now_of,
    offer_to,
    slot_at,
)

SOON = 2  # quanta: who is so far behind gets a core before the lease is as old as that
FAR = 4  # quanta: who is so far behind gets a core though he has as many as his weight says; and nobody is owed more
WEIGHT_UNIT = 1000  # of virtual time: what a member of weight 1 gets for a ns is so much
LOOK_MS = 50  # how often who sleeps looks again, if nobody wakes him


# Between two tasks ----------------------------------------------------------------------------------------------------------------------


@compiled
def keeps_core(m, me):
    """Return True if worker `me` has a core and may go on; if another member is to have it, it is given up."""
    lease = lease_of(m, me)
    if lease[HELD] == NOTHING:
        return False
    slot = slot_at(m, lease[HELD])
    if load(slot, OWNER) != lease[TOKEN]:  # lent to others while this process was stopped
        lease[HELD] = NOTHING
        fetch_add(m, ACTIVE, -1)
        return False
    if not is_wanted(m):
        return True
    time = now_of(m, lease)
    if time < lease[LOOK_AT]:
        return True
    best = best_waiting(m, lease[HELD], time)
    if best == NOTHING or not _is_to_have(m, best, lease, time):
        lease[LOOK_AT] = time + m[QUANTUM_NS] // 8
        return True
    _give_up(m, me, time)
    return False


@compiled
def is_wanted(m):
    """Return True if another member waits for a core."""
    return load(head_of(m), WANTING) & ~(types.int64(1) << m[MEMBER]) != 0


@compiled
def _is_to_have(m, best, lease, time):
    """Return True if a member that waits is to have the slot of one of mine now."""
    mine, other = member_of(m, m[MEMBER]), member_of(m, best)
    if other[PRIORITY] != mine[PRIORITY]:
        return other[PRIORITY] > mine[PRIORITY]
    ahead, quantum = virtual_time(m, m[MEMBER], time) - virtual_time(m, best, time), _virtual(mine, m[QUANTUM_NS])
    if held_ns(slot_at(m, lease[HELD]), lease[TOKEN], time) < m[QUANTUM_NS]:
        return ahead > SOON * quantum
    has_less = cores_of(m, best) * _weight(mine) < cores_of(m, m[MEMBER]) * _weight(other)
    return ahead > (quantum if has_less else FAR * quantum)


# A core is had, and given up ------------------------------------------------------------------------------------------------------------


@compiled
def take_core(m, me):
    """Return True if worker `me` has got a slot that was free or offered to its member: the one it had last, if it can."""
    lease = lease_of(m, me)
    if lease[LAST] != NOTHING and _take(m, me, lease, lease[LAST]):
        return True
    may = words_at(m[MAY_AT])
    for i in range(m[CORES]):  # noqa: SIM110 - numba has no any()
        if _take(m, me, lease, may[(me + i) % m[CORES]]):
            return True
    return False


@compiled
def _take(m, me, lease, number):
    slot = slot_at(m, number)
    found = load(slot, OWNER)
    if found != 0 and found != offer_to(m[GENERATION], m[MEMBER]):
        return False
    lease[COUNT] += 1
    lease[TOKEN] = new_token(m, me, lease)
    if compare_exchange(slot, OWNER, found, lease[TOKEN]) != found:
        return False
    if fetch_add(m, ACTIVE, 1) == 0:
        _catch_up(m, now_of(m, lease))
    store(slot, SINCE, now_of(m, lease))
    store(slot, SINCE_OF, lease[TOKEN])
    lease[HELD] = lease[LAST] = number
    _bind(m, me)
    return True


@compiled
def leave_core(m, me):
    """Give the slot of worker `me` up, if it has one."""
    lease = lease_of(m, me)
    if lease[HELD] != NOTHING:
        _give_up(m, me, now_of(m, lease))


@compiled
def _give_up(m, me, time):
    lease = lease_of(m, me)
    number = lease[HELD]
    slot = slot_at(m, number)
    held = held_ns(slot, lease[TOKEN], time)
    lease[HELD] = NOTHING
    fetch_add(m, ACTIVE, -1)
    if compare_exchange(slot, OWNER, lease[TOKEN], 0) == lease[TOKEN]:
        _account(member_of(m, m[MEMBER]), held)
        pass_on(m, number, time)


@compiled
def _account(member, ns):
    fetch_add(member, USED, ns)
    fetch_add(member, VIRTUAL, _virtual(member, ns))


@compiled
def _catch_up(m, time):
    """Have my member, that had nothing to do, begin not far behind the others, though all pause: what it did not want it is not owed."""
    mine = member_of(m, m[MEMBER])
    least, most, found = types.int64(0), types.int64(0), False
    for number in range(MOST_MEMBERS):
        if number != m[MEMBER] and member_of(m, number)[IDENTITY] != 0:
            virtual = virtual_time(m, number, time)
            most = max(most, virtual)
            if _is_active(m, number):
                least = virtual if not found or virtual < least else least
                found = True
    if not found:
        least = min(most, types.int64(1) << 62)  # cut, as all that is read here
    before = load(mine, VIRTUAL)
    if before != 0:  # else it is new, and is owed nothing
        least -= FAR * _virtual(mine, m[QUANTUM_NS])
    while before < least and compare_exchange(mine, VIRTUAL, before, least) != before:
        before = load(mine, VIRTUAL)


@compiled
def _is_active(m, number):
    return cores_of(m, number) > 0 or load(head_of(m), WANTING) >> number & 1 != 0


@compiled
def rebind(m, me):
    """Have a thread that is worker `me` from now on run on the core alone that the worker has, if members are to."""
    lease_of(m, me)[BOUND] = NOTHING
    _bind(m, me)


@compiled
def _bind(m, me):
    """Have this thread, which is worker `me`, run on the core alone that it has, if members are to."""
    lease = lease_of(m, me)
    if m[BINDS] == 0 or lease[HELD] == NOTHING or lease[BOUND] == slot_at(m, lease[HELD])[CORE]:
        return
    core = min(max(slot_at(m, lease[HELD])[CORE], types.int64(0)), types.int64(MOST_SLOTS - 1))
    for word in range(MASK_WORDS // 2):
        lease[MASK + word] = 0
    lease[MASK + core // 64] = types.int64(1) << (core % 64)
    sched_setaffinity(types.int32(0), types.int64(MASK_WORDS // 2 * 8), address_of(lease, MASK))
    lease[BOUND] = core


@compiled
def say_kind(m, me, kind):
    """Say what the task is that worker `me` begins, for the policies of all members."""
    lease = lease_of(m, me)
    if lease[HELD] != NOTHING:
        store(slot_at(m, lease[HELD]), KIND, kind)


@compiled
def others_of_kind(m, me, kind):
    """Return on how many cores but that of worker `me` tasks of a kind run."""
    own, count = lease_of(m, me)[HELD], types.int64(0)
    for at in range(slots_of(m)):
        count += at != own and load(slot_at(m, at), OWNER) != 0 and load(slot_at(m, at), KIND) == kind
    return count


# Who is next ----------------------------------------------------------------------------------------------------------------------------


@compiled
def pass_on(m, number, time):
    """Offer a slot that is free to the member that is to have it, if one waits."""
    slot = slot_at(m, number)
    for _ in range(MOST_MEMBERS):  # members may go while I look
        best = best_waiting(m, number, time)
        if best == NOTHING:
            return
        other = member_of(m, best)
        offer = offer_to(load(other, IDENTITY) >> 32, best)
        if compare_exchange(slot, OWNER, 0, offer) != 0:
            return  # somebody has it
        if load(head_of(m), WANTING) >> best & 1 != 0:
            _tell(other, 1)
            return
        if compare_exchange(slot, OWNER, offer, 0) != offer:
            return


@compiled
def best_waiting(m, number, time):
    """Return the member that is to have a slot next, of those that wait and may have it: the most urgent, then the farthest behind."""
    bits = load(head_of(m), WANTING)
    best, priority, least = types.int64(NOTHING), types.int64(0), types.int64(0)
    for other in range(MOST_MEMBERS):
        if bits >> other & 1 == 0:
            continue
        member = member_of(m, other)
        if load(member, IDENTITY) == 0 or load(member, IS_STOPPED) != 0:
            continue
        if member[MAY + number // MASK_BITS] >> (number % MASK_BITS) & 1 == 0:
            continue
        virtual = virtual_time(m, other, time)
        if best == NOTHING or member[PRIORITY] > priority or (member[PRIORITY] == priority and virtual < least):
            best, priority, least = types.int64(other), member[PRIORITY], virtual
    return best


@compiled
def _virtual(member, ns):
    return ns * WEIGHT_UNIT // _weight(member)


@compiled
def _weight(member):
    return max(member[WEIGHT], types.int64(1))


@compiled
def virtual_time(m, number, time):
    """Return the time of cores that a member has had over its weight, with that of the leases that it has now."""
    member, running = member_of(m, number), types.int64(0)
    for at in range(slots_of(m)):
        slot = slot_at(m, at)
        owner = load(slot, OWNER)
        if member_in(owner) == number and not is_offer(owner):
            running += held_ns(slot, owner, time)
    return load(member, VIRTUAL) + _virtual(member, running)


@compiled
def cores_of(m, number):
    """Return how many slots a member has, or is offered."""
    count = types.int64(0)
    for at in range(slots_of(m)):
        count += member_in(load(slot_at(m, at), OWNER)) == number
    return count


@compiled
def slots_of(m):
    return min(max(head_of(m)[SLOTS], types.int64(0)), types.int64(MOST_SLOTS))


@compiled
def is_offer(owner):
    return owner & OFFERED != 0


# Waiting --------------------------------------------------------------------------------------------------------------------------------


@compiled
def begin_waiting(m, me):
    """Say that worker `me` wants a core."""
    fetch_add(m, WAITING, 1)
    if fetch_add(m, ACTIVE, 1) == 0:
        _catch_up(m, now_of(m, lease_of(m, me)))


@compiled
def look_for_core(m, me):
    """Return the number of grants to sleep at, or NOTHING if worker `me`, that waits, has got a core."""
    grants = load(member_of(m, m[MEMBER]), GRANTS)
    fetch_or(head_of(m), WANTING, types.int64(1) << m[MEMBER])  # again: who took me for dead has taken it back
    return types.int64(NOTHING) if take_core(m, me) else grants


@compiled
def await_grant(m, me, grants):
    """Sleep until a core is offered to my member, or for a while."""
    lease = lease_of(m, me)
    lease[UNTIL], lease[UNTIL_NS] = 0, LOOK_MS * 1_000_000
    futex_wait(address_of(member_of(m, m[MEMBER]), GRANTS), grants, address_of(lease, UNTIL))


@compiled
def end_waiting(m, me):
    """Say that worker `me` waits no longer."""
    fetch_add(m, ACTIVE, -1)
    if fetch_add(m, WAITING, -1) != 1:
        return
    bit = types.int64(1) << m[MEMBER]
    fetch_and(head_of(m), WANTING, ~bit)
    if load(m, WAITING) > 0:
        fetch_or(head_of(m), WANTING, bit)
    else:
        _return_offers(m, now_of(m, lease_of(m, me)))


@compiled
def wake_waiting(m):
    """Have all my workers that wait look whether they are to wait on."""
    _tell(member_of(m, m[MEMBER]), 1 << 30)


@compiled
def _tell(member, most):
    fetch_add(member, GRANTS, 1)
    futex_wake(address_of(member, GRANTS), most)


@compiled
def _return_offers(m, time):
    offer = offer_to(m[GENERATION], m[MEMBER])
    for at in range(slots_of(m)):
        if load(slot_at(m, at), OWNER) == offer and compare_exchange(slot_at(m, at), OWNER, offer, 0) == offer:
            pass_on(m, at, time)


# Others' ends ---------------------------------------------------------------------------------------------------------------------------


@compiled
def reclaim(m, me, number, generation):
    """Give back what a member has that is dead, or stopped: its bit, its offers, its slots. `me`: whose clock is read."""
    fetch_and(head_of(m), WANTING, ~(types.int64(1) << number))
    time = now_of(m, lease_of(m, me))
    for at in range(slots_of(m)):
        slot = slot_at(m, at)
        owner = load(slot, OWNER)
        if member_in(owner) == number and generation_in(owner) == generation:
            held = held_ns(slot, owner, time)
            if compare_exchange(slot, OWNER, owner, 0) == owner:
                _account(member_of(m, number), held)
                pass_on(m, at, time)


# From Python ----------------------------------------------------------------------------------------------------------------------------


@compiled
def forget_member(address, number, identity):
    """Give back what a member has who is dead, or who leaves, and his place. Who waits looks again: he may have died before he woke one."""
    m = words_at(address)
    reclaim(m, m[WATCHER], number, identity >> 32)
    compare_exchange(member_of(m, number), IDENTITY, identity, 0)
    bits = load(head_of(m), WANTING)
    for other in range(MOST_MEMBERS):
        if bits >> other & 1 != 0:
            _tell(member_of(m, other), 1 << 30)
    _return_unwanted(m)


@compiled
def _return_unwanted(m):
    """Hand on what is offered to my member if it does not wait: who has offered it has died before he saw that."""
    if load(m, WAITING) == 0:
        _return_offers(m, now_of(m, lease_of(m, m[WATCHER])))


@compiled
def lend_cores(address, number, identity):
    """Give back what a member has who is stopped."""
    m = words_at(address)
    reclaim(m, m[WATCHER], number, identity >> 32)


@compiled
def free_orphans(address):
    """Give back slots whose owner is no member, as what stands there is damaged; and what is offered to mine, that does not want it."""
    m = words_at(address)
    _return_unwanted(m)
    time = now_of(m, lease_of(m, m[WATCHER]))
    for at in range(slots_of(m)):
        slot = slot_at(m, at)
        owner = load(slot, OWNER)
        number = member_in(owner)
        is_orphan = owner != 0 and (number == NOTHING or load(member_of(m, number), IDENTITY) >> 32 != generation_in(owner))
        if is_orphan and compare_exchange(slot, OWNER, owner, 0) == owner:
            pass_on(m, at, time)


@compiled
def hold_core(address, me):
    """Return True if worker `me` has a core now, after a while at most."""
    m = words_at(address)
    if keeps_core(m, me) or take_core(m, me):
        return True
    begin_waiting(m, me)
    grants = look_for_core(m, me)
    if grants != NOTHING:
        await_grant(m, me, grants)
        grants = look_for_core(m, me)
    end_waiting(m, me)
    return grants == NOTHING


@compiled
def let_core_go(address, me):
    """Give the core of worker `me` back, if it has one."""
    leave_core(words_at(address), me)


_WORD = types.int64
SIGNATURES = {
    forget_member: types.void(_WORD, _WORD, _WORD),
    lend_cores: types.void(_WORD, _WORD, _WORD),
    free_orphans: types.void(_WORD),
    hold_core: types.boolean(_WORD, _WORD),
    let_core_go: types.void(_WORD, _WORD),
}
