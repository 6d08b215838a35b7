"""Regions: which tasks a task waits for, among those that one body in compiled code has spawned, by the memory that they access.

A region is where a tile lies: an address, a shape and strides. Each that the body has passed on is kept, with its last writer, its readers
since, and which others share memory with it. A task waits for the last writer of every region that meets its own and, if it writes, for
the readers. A task that is done counts no more: its place has another ticket, or has closed its list.

    book       the regions of one body: words that grow, by malloc
    ticket     how often a place has been used
"""

from numba import types

from taskgpt.pointers import WORD_BYTES, load, words_at
from taskgpt.schedulers.native.places import CLOSED, add_edge
from taskgpt.schedulers.native.table import HEADS, NOTHING, TICKETS, compiled
from taskgpt.tasks.frames import MOST_AXES

_allocate = types.ExternalFunction("realloc", types.int64(types.int64, types.int64))
_free = types.ExternalFunction("free", types.void(types.int64))

# A book: how many regions and links there are, and for how many there is room; where its arrays are; links that are free.
_REGIONS, _ROOM, _LINKS, _LINK_ROOM, _FREE_LINK, _TABLE_AT, _REGIONS_AT, _LINKS_AT, _BOOK_WORDS = range(9)
# A region; then its shape, and its strides. LOW, HIGH: its bytes. READERS, MEETS: lists of links.
_ADDRESS, _AXES, _ITEM, _HASH, _LOW, _HIGH, _WRITER, _WRITER_TICKET, _READERS, _READER_COUNT, _MOST_READERS, _MEETS, _SHAPE = range(13)
_STRIDES = _SHAPE + MOST_AXES
_REGION_WORDS = _STRIDES + MOST_AXES
# A link of a list: the next; a reader and its ticket, or a region.
_NEXT, _WHAT, _TICKET, _LINK_WORDS = range(4)
_FIRST_ROOM, _FEW_READERS = 16, 32


@compiled
def new_book():
    """Return the address of a book without regions."""
    address = _allocate(0, WORD_BYTES * _BOOK_WORDS)
    book = words_at(address)
    for at in range(_BOOK_WORDS):
        book[at] = 0
    book[_FREE_LINK] = NOTHING
    return address


@compiled
def free_book(address):
    book = words_at(address)
    _free(book[_TABLE_AT])
    _free(book[_REGIONS_AT])
    _free(book[_LINKS_AT])
    _free(address)


@compiled
def _region_in(book, number):
    return words_at(book[_REGIONS_AT] + number * (_REGION_WORDS * WORD_BYTES))


@compiled
def _link_in(book, number):
    return words_at(book[_LINKS_AT] + number * (_LINK_WORDS * WORD_BYTES))


@compiled
def region_of(address, words, axes, item):
    """Return the number of the region that a tile's words name (address, shape, strides), in the book at `address`."""
    book = words_at(address)
    mask = 2 * book[_ROOM] - 1  # there are twice as many entries as there may be regions
    table = words_at(book[_TABLE_AT])
    at = _hash(words, axes) & mask if book[_ROOM] > 0 else 0
    while book[_ROOM] > 0 and table[at] != NOTHING:
        if _is_same(_region_in(book, table[at]), words, axes, item):
            return table[at]
        at = (at + 1) & mask
    if book[_REGIONS] == book[_ROOM]:
        _make_room(book)
    number = book[_REGIONS]
    book[_REGIONS] += 1
    region = _region_in(book, number)
    _describe(region, words, axes, item)
    _enter(book, number)
    for other in range(number):
        if do_meet(region, _region_in(book, other)):
            region[_MEETS] = _linked(book, region[_MEETS], other, 0)
            _region_in(book, other)[_MEETS] = _linked(book, _region_in(book, other)[_MEETS], number, 0)
    return number


@compiled
def _hash(words, axes):
    found = types.int64(words[0])
    for at in range(1, axes + 1):  # the shape; strides are nearly always the same
        found = found * 1_000_003 + words[at]
    found ^= found >> 17
    return (found * 0x9E3779B97F4A7C1) >> 20


@compiled
def _is_same(region, words, axes, item):
    if region[_ADDRESS] != words[0] or region[_AXES] != axes or region[_ITEM] != item:
        return False
    same = True
    for axis in range(axes):
        same = same and region[_SHAPE + axis] == words[1 + axis] and region[_STRIDES + axis] == words[1 + axes + axis]
    return same


@compiled
def _describe(region, words, axes, item):
    region[_ADDRESS], region[_AXES], region[_ITEM], region[_HASH] = words[0], axes, item, _hash(words, axes)
    region[_LOW], region[_HIGH] = words[0], words[0] + item
    for axis in range(axes):
        size, stride = words[1 + axis], words[1 + axes + axis]
        region[_SHAPE + axis], region[_STRIDES + axis] = size, stride
        if stride < 0:
            region[_LOW] += (size - 1) * stride
        else:
            region[_HIGH] += (size - 1) * stride
    region[_WRITER] = region[_READERS] = region[_MEETS] = NOTHING
    region[_READER_COUNT], region[_MOST_READERS] = 0, _FEW_READERS


@compiled
def _make_room(book):
    """Double the room for regions, and enter those that there are anew."""
    room = max(_FIRST_ROOM, 2 * book[_ROOM])
    book[_ROOM] = room
    book[_REGIONS_AT] = _allocate(book[_REGIONS_AT], WORD_BYTES * _REGION_WORDS * room)
    book[_TABLE_AT] = _allocate(book[_TABLE_AT], WORD_BYTES * 2 * room)
    table = words_at(book[_TABLE_AT])
    for at in range(2 * room):
        table[at] = NOTHING
    for number in range(book[_REGIONS]):
        _enter(book, number)


@compiled
def _enter(book, number):
    region, table = _region_in(book, number), words_at(book[_TABLE_AT])
    mask = 2 * book[_ROOM] - 1
    at = region[_HASH] & mask
    while table[at] != NOTHING:
        at = (at + 1) & mask
    table[at] = number


@compiled
def _linked(book, following, what, ticket):
    """Return a new link in front of another."""
    link = book[_FREE_LINK]
    if link != NOTHING:
        book[_FREE_LINK] = _link_in(book, link)[_NEXT]
    else:
        if book[_LINKS] == book[_LINK_ROOM]:
            book[_LINK_ROOM] = max(_FIRST_ROOM, 2 * book[_LINK_ROOM])
            book[_LINKS_AT] = _allocate(book[_LINKS_AT], WORD_BYTES * _LINK_WORDS * book[_LINK_ROOM])
        link = book[_LINKS]
        book[_LINKS] += 1
    words = _link_in(book, link)
    words[_NEXT], words[_WHAT], words[_TICKET] = following, what, ticket
    return link


# Whether two meet -----------------------------------------------------------------------------------------------------------------------


@compiled
def do_meet(a, b):
    """Return True if two regions share memory. Of those with more than two axes, or with other strides, also if their ranges do."""
    if a[_HIGH] <= b[_LOW] or b[_HIGH] <= a[_LOW]:
        return False
    if a[_AXES] != 2 or b[_AXES] != 2 or a[_STRIDES] != b[_STRIDES] or a[_STRIDES + 1] != b[_STRIDES + 1]:
        return True
    outer, inner = a[_STRIDES], a[_STRIDES + 1]
    if outer < inner * max(a[_SHAPE + 1], b[_SHAPE + 1]):
        return True  # rows overlap, or run backwards
    # An element is in both where it is in row i of a and row k of b, and i - k rows and some columns lie between the two corners.
    far = b[_ADDRESS] - a[_ADDRESS]
    for rows in range(far // outer, far // outer + 2):
        columns = far - rows * outer  # in bytes
        if -b[_SHAPE] < rows < a[_SHAPE] and -inner * b[_SHAPE + 1] < columns < inner * a[_SHAPE + 1]:
            return True
    return False


# Who waits for whom ---------------------------------------------------------------------------------------------------------------------


@compiled
def is_over(o, place, ticket):
    """Return True if the task that had this ticket at a place is done."""
    return words_at(o[TICKETS])[place] != ticket or load(words_at(o[HEADS]), place) == CLOSED


@compiled
def most_edges(address, number, is_written):
    """Return how many edges `wait_for` may need."""
    book = words_at(address)
    region = _region_in(book, number)
    count = 1 + region[_READER_COUNT] * is_written
    link = region[_MEETS]
    while link != NOTHING:
        words = _link_in(book, link)
        count += 1 + _region_in(book, words[_WHAT])[_READER_COUNT] * is_written
        link = words[_NEXT]
    return count


@compiled
def wait_for(o, pool, address, number, is_written, place):
    """Have a task at a place wait for those that accessed what meets a region, on edges that are free; return for how many."""
    book = words_at(address)
    region = _region_in(book, number)
    still = _wait_for_one(o, pool, book, region, is_written, place)
    link = region[_MEETS]
    while link != NOTHING:
        words = _link_in(book, link)
        still += _wait_for_one(o, pool, book, _region_in(book, words[_WHAT]), is_written, place)
        link = words[_NEXT]
    return still


@compiled
def _wait_for_one(o, pool, book, region, is_written, place):
    still = types.int64(0)
    if region[_WRITER] != NOTHING and region[_WRITER] != place and not is_over(o, region[_WRITER], region[_WRITER_TICKET]):
        still += add_edge(o, pool, region[_WRITER], place)
    link = region[_READERS] if is_written else types.int64(NOTHING)
    while link != NOTHING:
        words = _link_in(book, link)
        if words[_WHAT] != place and not is_over(o, words[_WHAT], words[_TICKET]):
            still += add_edge(o, pool, words[_WHAT], place)
        link = words[_NEXT]
    return still


@compiled
def note(o, address, number, is_written, place):
    """Note that the task at a place accesses a region."""
    book = words_at(address)
    region, ticket = _region_in(book, number), words_at(o[TICKETS])[place]
    if is_written:
        region[_WRITER], region[_WRITER_TICKET] = place, ticket
        _drop_readers(o, book, region, True)
        return
    if region[_READER_COUNT] == region[_MOST_READERS]:
        _drop_readers(o, book, region, False)
        region[_MOST_READERS] = max(_FEW_READERS, 2 * region[_READER_COUNT])
    region[_READERS] = _linked(book, region[_READERS], place, ticket)
    region[_READER_COUNT] += 1


@compiled
def _drop_readers(o, book, region, are_all):
    """Forget the readers of a region: all, or those that are done."""
    link, kept = region[_READERS], types.int64(NOTHING)
    region[_READER_COUNT] = 0
    while link != NOTHING:
        words = _link_in(book, link)
        following = words[_NEXT]
        if are_all or is_over(o, words[_WHAT], words[_TICKET]):
            words[_NEXT] = book[_FREE_LINK]
            book[_FREE_LINK] = link
        else:
            words[_NEXT] = kept
            kept = link
            region[_READER_COUNT] += 1
        link = following
    region[_READERS] = kept
