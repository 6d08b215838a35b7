"""Owner computes: a tiled program on several ranks, of which each tile has one as its home.

A task runs at the home of the tiles that it writes. What else it reads comes from its home: each version of a tile once to each rank that
needs it, by a task there that waits for the message, and goes when it was last needed. Every rank goes through the same program, and keeps
the tasks that are its own, so that nobody hands out work, and the order of what is done to a tile is the program's.

    arena = PartialArena(specs)
    share = share_of(program, arena, block_cyclic, links.rank, links.count)
    with Exchange(share, arena, links) as exchange:
        scheduler.run(exchange.graph)

Nothing waits for ever: all that a task waits for, on this rank or another, stands before it in the program.
"""

import asyncio
import inspect
import itertools
import math
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Self

import numpy as np

from taskgpt.collectives.links import Links, PeerLost
from taskgpt.collectives.partial import PartialArena
from taskgpt.tasks import Call, Graph, In, InOut, Kernel, Out, Section, Tile, dims, event, kernel, wrap
from taskgpt.tasks.spawn import Event
from taskgpt.tasks.task_graph import Where

Home = Callable[[str, tuple[int, ...], int], int]  # of a tensor's cell, by its position, among so many ranks
WINDOW = 32  # tiles of others that a rank asks for ahead of their use; more are there only while tasks need them
_FIRST = 1 << 12  # priority: what others wait for goes before what is computed here


def block_cyclic(tensor: str, cell: tuple[int, ...], ranks: int) -> int:
    """Return the home of a cell: ranks lie as near a square as can be over the first two axes that are there, again and again."""
    rows = next(n for n in range(math.isqrt(ranks), 0, -1) if ranks % n == 0)
    i, j = (*cell, 0, 0)[:2]
    return i % rows * (ranks // rows) + j % (ranks // rows) if len(cell) > 1 else i % ranks


_Cell = tuple[str, tuple[int, ...]]  # of a tensor, by its name: the position


class Move(NamedTuple):
    """A version of a tile that goes from its home to a rank."""

    number: int  # the same on all ranks
    tile: Tile
    source: int
    to: int


class _Task(NamedTuple):
    kernel: Kernel
    args: tuple[Any, ...]
    section: Section
    priority: int
    where: Where  # who spawned it


class _Drop(NamedTuple):
    move: Move


_Step = _Task | Move | _Drop


@dataclass(frozen=True)
class Share:
    """What one rank does of a program: its steps in program order.

    `bound_bytes`: of the `sends` tiles that it sends, each version once to each rank that reads it. Owner computes cannot send less.
    """

    rank: int
    steps: list[_Step]
    sends: int
    bound_bytes: int


def share_of(program: Callable[..., None], arena: PartialArena, home: Home, rank: int, ranks: int) -> Share:
    """Go through a program, `program(spawn, arena)`, and return what a rank does of it.

    `spawn` takes what a graph's does. Raises what that raises, TypeError for a kernel that spawns, and ValueError for a task that writes
    tiles of two homes, or whose tile has none.
    """
    walk = _Walk(arena, home, rank, ranks)
    program(walk.spawn, arena)
    return walk.share()


class _Walk:
    """Goes through a program as each rank does."""

    def __init__(self, arena: PartialArena, home: Home, rank: int, ranks: int):
        self._arena, self._home, self._rank, self._ranks = arena, home, rank, ranks
        self._homes: dict[_Cell, int] = {}
        self._sent: dict[_Cell, dict[int, Move]] = {}  # of each cell, to whom its newest version goes
        self._numbers = itertools.count()
        self._steps: list[_Step] = []
        self._last_use: dict[Move, int] = {}  # of those to this rank: the step that reads it last

    def spawn(self, kernel: Kernel, *args: Any, section: Section = ("", -1), priority: int = 0) -> None:
        """Note a task, and what it needs from elsewhere."""
        call = Call(kernel, args)
        call.verify()
        call.kernel.verify_recordable()
        read, written = self._cells(call)
        homes = {self._home_of(cell) for cell in written}
        if len(homes) > 1 or not (read or written):
            found = f"tiles of ranks {', '.join(map(str, sorted(homes)))}" if homes else "no tiles"
            raise ValueError(f"{call}: a task runs at the home of the tiles that it writes; wanted tiles of one rank, got {found}")
        at = self._home_of(next(iter(written or read)))
        moves = [self._move(cell, at) for cell in read if self._home_of(cell) != at]
        if at == self._rank:
            self._last_use.update(dict.fromkeys(moves, len(self._steps)))
            caller = sys._getframe(1)
            self._steps.append(_Task(kernel, args, section, priority, (caller.f_code, caller.f_lasti)))
        for cell in written:
            self._sent.pop(cell, None)

    def share(self) -> Share:
        """Return the steps so far, and what was moved dropped after its last use."""
        drops: dict[int, list[Move]] = {}
        for move, step in self._last_use.items():
            drops.setdefault(step, []).append(move)
        steps: list[_Step] = []
        for number, step in enumerate(self._steps):
            steps += [step, *map(_Drop, drops.get(number, ()))]
        sent = [step.tile.array.nbytes for step in steps if isinstance(step, Move) and step.source == self._rank]
        return Share(self._rank, steps, len(sent), sum(sent))

    def _move(self, cell: _Cell, to: int) -> Move:
        """Return the move of a cell's newest version to a rank: a new one if it was not sent there."""
        sent = self._sent.setdefault(cell, {})
        if to not in sent:
            source = self._home_of(cell)
            name, position = cell
            sent[to] = Move(next(self._numbers), self._arena.tensors[name].cell(*position), source, to)
            if self._rank in (source, to):
                self._steps.append(sent[to])
        return sent[to]

    def _cells(self, call: Call) -> tuple[dict[_Cell, None], dict[_Cell, None]]:
        """Return the cells that a call reads, and those that it writes, in the order of its arguments."""
        read: dict[_Cell, None] = {}
        written: dict[_Cell, None] = {}
        for name, tile in call.tiles():
            if self._arena.tensors.get(tile.tensor.name) is not tile.tensor:
                raise ValueError(f"{call}: '{name}' wants a tile of a tensor that all ranks have, got one of '{tile.tensor.name}'")
            cells = dict.fromkeys((tile.tensor.name, cell) for cell in tile.cells())
            access = call.kernel.accesses[name]
            if access.is_read:
                read |= cells
            if access.is_written:
                written |= cells
        return read, written

    def _home_of(self, cell: _Cell) -> int:
        found = self._homes.get(cell)
        if found is None:
            found = self._homes[cell] = self._home(*cell, self._ranks)
            if found not in range(self._ranks):
                raise ValueError(f"home of cell {cell[1]} of '{cell[0]}': wanted a rank from 0 to {self._ranks - 1}, got {found!r}")
        return found


class Exchange:
    """What the tasks of a share send and receive, within a `with` block. PeerLost, in a TaskError, ends a run whose peer is gone.

    `graph`: the share's tasks, and those that send, receive and drop tiles. A tile that is received takes one of `window` slots, which
    another has left that was dropped before it in the program; if none is free, a new one. `sent_bytes`: of tiles, so far.
    """

    def __init__(self, share: Share, arena: PartialArena, links: Links, window: int = WINDOW):
        self.sent_bytes = 0
        self._arena, self._links = arena, links
        self._moves = {step.number: step for step in share.steps if isinstance(step, Move)}
        self._number = next(_numbers)  # its name in kernels' constants
        self.graph = self._graph(share, window)

    def __enter__(self) -> Self:
        _exchanges[self._number] = self
        return self

    def __exit__(self, *exception: object) -> None:
        del _exchanges[self._number]

    def _graph(self, share: Share, window: int) -> Graph:
        graph, taken = Graph(f"share of rank {share.rank}"), _slots(share, window)
        slots = wrap(np.zeros(1 + max(taken.values(), default=0), np.int8), 1, "slots")
        for step in share.steps:
            if isinstance(step, _Task):
                graph.spawn_at(*step)
                continue
            what, move = ("drop", step.move) if isinstance(step, _Drop) else ("send" if step.source == share.rank else "receive", step)
            slot = () if what == "send" else (slots.cell(taken[move.number]),)
            chosen = _kernel(what, len(move.tile.shape), move.tile.tensor.array.dtype)
            graph.spawn(chosen, move.tile, *slot, self._number, move.number, section=("network", -1), priority=_FIRST)
        return graph

    def send(self, number: int, array: np.ndarray, done: Event) -> None:
        """Send a tile when it is asked for."""
        self._start(self._send(self._moves[number], np.ascontiguousarray(array)), done)

    def receive(self, number: int, array: np.ndarray, done: Event) -> None:
        """Ask for a tile, and put it where it belongs."""
        self._start(self._receive(self._moves[number], array), done)

    def drop(self, number: int) -> None:
        """Forget a tile that was received."""
        self._arena.forget(self._moves[number].tile)

    def _start(self, transfer: Coroutine[Any, Any, None], done: Event) -> None:
        async def run() -> None:
            try:
                await transfer
            except BaseException as error:
                done.fail(PeerLost("the links were closed") if isinstance(error, asyncio.CancelledError) else error)
            else:
                done.fulfil()

        asyncio.run_coroutine_threadsafe(run(), self._links.loop)

    async def _send(self, move: Move, array: np.ndarray) -> None:
        await self._links.receive(move.to, ("want", move.number))  # not before there is room: messages that come early take memory, too
        await self._links.send(move.to, ("tile", move.number), [array])
        self.sent_bytes += array.nbytes

    async def _receive(self, move: Move, array: np.ndarray) -> None:
        await self._links.send(move.source, ("want", move.number), [_WANT])
        got = await self._links.receive(move.source, ("tile", move.number))
        array[...] = got.view(array.dtype).reshape(array.shape)


_WANT = np.zeros(1, np.uint8)
_numbers = itertools.count(1)
_exchanges: dict[int, Exchange] = {}


def _slots(share: Share, window: int) -> dict[int, int]:
    """Return the slot of each move to the share's rank, by its number."""
    taken: dict[int, int] = {}
    free: deque[int] = deque()
    made = 0
    for step in share.steps:
        if isinstance(step, _Drop):
            free.append(taken[step.move.number])
        elif isinstance(step, Move) and step.to == share.rank:
            if made < window or not free:
                free.appendleft(made)
                made += 1
            taken[step.number] = free.popleft()
    return taken


@cache
def _kernel(what: str, axes: int, dtype: np.dtype) -> Kernel:
    """Return the kernel that sends, receives or drops tiles of so many axes. `exchange` and `move` are numbers, as constants are."""

    def send(tile, exchange, move):
        _exchange(exchange).send(move, tile, event())

    def receive(tile, slot, exchange, move):
        _exchange(exchange).receive(move, tile, event())

    def drop(tile, slot, exchange, move):
        _exchange(exchange).drop(move)

    body, access = {"send": (send, In), "receive": (receive, Out), "drop": (drop, InOut)}[what]
    sizes = dims(" ".join(f"N{axis}" for axis in range(axes))) or [()]
    declared = {"tile": access[(*sizes, dtype)], "slot": InOut[1, np.int8], "exchange": int, "move": int}
    body.__annotations__ = {name: declared[name] for name in inspect.signature(body).parameters}
    return kernel(flops=lambda: 0, tags=["network"])(body)


def _exchange(number: int) -> Exchange:
    found = _exchanges.get(number)
    if found is None:
        raise PeerLost("this exchange has ended; run its graph within the `with` block")
    return found
