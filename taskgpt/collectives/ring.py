"""Collectives on a ring of ranks, each with the same arrays: what is sent, and in which order it is added.

Arrays are dealt into as many chunks as there are ranks. A reduce-scatter sends each chunk once around, and everybody on its way adds his
own part, so that chunk r is whole on rank r; an all-gather sends the whole chunks around. Each rank sends 2 (N - 1) / N of the arrays,
which is the least there is (Patarasuk and Yuan 2009). Who adds first depends on the chunk, and on nothing else: all ranks have the same
bits, run after run.

On the wire, float32 can be bfloat16: half the bytes. The owner of a chunk then rounds its own copy, too, and all have the same bits.
"""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import numba
import numpy as np
from numba import types

from taskgpt.collectives.links import Links, Tag
from taskgpt.tasks.cache import compile_function

Chunk = list[np.ndarray]  # parts of arrays, flat


def deal(arrays: Sequence[np.ndarray], count: int) -> list[Chunk]:
    """Cut flat arrays into so many chunks of equal size, to an element; the last are empty where there are fewer elements."""
    total = sum(array.size for array in arrays)
    bounds = [total * at // count for at in range(count + 1)]
    chunks: list[Chunk] = []
    for start, stop in pairwise(bounds):
        chunk, begin = [], 0
        for array in arrays:
            part = array[max(0, start - begin) : max(0, stop - begin)]
            if part.size:
                chunk.append(part)
            begin += array.size
        chunks.append(chunk)
    return chunks


def deal_to(arrays: Sequence[np.ndarray], owners: Sequence[int], count: int) -> list[Chunk]:
    """Deal whole arrays into so many chunks, each to its owner's."""
    chunks: list[Chunk] = [[] for _ in range(count)]
    for array, owner in zip(arrays, owners, strict=True):
        chunks[owner].append(array)
    return chunks


async def reduce_scatter(links: Links, chunks: Sequence[Chunk], tag: Tag, as_bf16: bool = False) -> None:
    """Add the chunks of all ranks up; chunk r is then whole on rank r, and the others hold sums of some ranks. Raises PeerLost."""
    me, count = links.rank, links.count
    for step in range(count - 1):
        out, into = chunks[(me - step - 1) % count], chunks[(me - step - 2) % count]
        for part, got in zip(into, await _pass_on(links, out, into, (*tag, "add", step), as_bf16), strict=True):
            if as_bf16 and part.dtype == np.float32:
                add_bf16(part, got)
            else:
                part += got


async def all_gather(links: Links, chunks: Sequence[Chunk], tag: Tag, as_bf16: bool = False) -> None:
    """Give all ranks the chunk that each has whole: chunk r of rank r. Raises PeerLost."""
    me, count = links.rank, links.count
    if as_bf16 and count > 1:
        for part in chunks[me]:
            if part.dtype == np.float32:
                from_bf16(part, to_bf16(part))  # what the others get
    for step in range(count - 1):
        out, into = chunks[(me - step) % count], chunks[(me - step - 1) % count]
        for part, got in zip(into, await _pass_on(links, out, into, (*tag, "all", step), as_bf16), strict=True):
            if as_bf16 and part.dtype == np.float32:
                from_bf16(part, got)
            else:
                part[:] = got


async def spread(links: Links, arrays: Sequence[np.ndarray], root: int, tag: Tag) -> None:
    """Give all ranks the arrays of one, which is `root`, along the ring, an array after the other. Raises PeerLost."""
    place, count = (links.rank - root) % links.count, links.count
    for number, array in enumerate(arrays):
        flat, here = array.reshape(-1), (*tag, number)
        if place > 0:
            flat[:] = (await links.receive((links.rank - 1) % count, here)).view(flat.dtype)
        if place < count - 1:
            await links.send((links.rank + 1) % count, here, [flat])


async def _pass_on(links: Links, out: Chunk, into: Chunk, tag: Tag, as_bf16: bool) -> list[np.ndarray]:
    """Send a chunk to the right, and return what comes from the left: an array for each part of `into`."""
    right, left = (links.rank + 1) % links.count, (links.rank - 1) % links.count
    tasks = []
    if out:
        sent = [to_bf16(part) if as_bf16 and part.dtype == np.float32 else part for part in out]
        tasks.append(asyncio.create_task(links.send(right, tag, sent)))
    try:
        message = await links.receive(left, tag) if into else np.empty(0, np.uint8)
        if tasks:
            await tasks[0]
    finally:
        for task in tasks:
            task.cancel()
    parts, at = [], 0
    for part in into:
        dtype = np.dtype(np.uint16) if as_bf16 and part.dtype == np.float32 else part.dtype
        parts.append(message[at : at + part.size * dtype.itemsize].view(dtype))
        at += parts[-1].nbytes
    return parts


# bfloat16: the upper half of a float32 ----------------------------------------------------------------------------------------------------


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """Return float32 rounded to bfloat16, to nearest, ties to even, as uint16; NaN stays NaN."""
    rounded = np.empty(numbers.size, np.uint16)
    _round(numbers.view(np.uint32), rounded)
    return rounded


def from_bf16(numbers: np.ndarray, rounded: np.ndarray) -> None:
    """numbers = rounded."""
    _widen(numbers.view(np.uint32), rounded)


def add_bf16(numbers: np.ndarray, rounded: np.ndarray) -> None:
    """numbers += rounded."""
    wide = np.empty(numbers.size, np.uint32)
    _widen(wide, rounded)
    numbers += wide.view(np.float32)


@numba.njit(nogil=True)
def _round(bits, rounded):
    for n in range(bits.shape[0]):
        b = bits[n]
        if b & 0x7FFFFFFF > 0x7F800000:
            rounded[n] = (b >> 16) | 0x40
        else:
            rounded[n] = (b + 0x7FFF + ((b >> 16) & 1)) >> 16


@numba.njit(nogil=True)
def _widen(bits, rounded):
    for n in range(bits.shape[0]):
        bits[n] = types.uint32(rounded[n]) << types.uint32(16)


def compile_all() -> None:
    """Compile what else would be at the first message."""
    words, halves = types.uint32[::1], types.uint16[::1]
    compile_function(_round, types.void(words, halves))
    compile_function(_widen, types.void(words, types.Array(types.uint16, 1, "C", readonly=True)))
