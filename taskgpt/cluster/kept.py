"""What a worker process keeps of a training run between its generations, and hands out: whole states, and what it is asked for.

Between the ranks of a run a state goes over their links. Between the driver and a rank it goes over Dask's own connections, in pieces: the
driver asks the worker's server, as Dask asks it for results, by the name of an offer. Who offers takes the offer back before its arrays
change, so that all pieces of an offer are of one moment. What is kept of a run goes with `forget`, or with the worker.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from distributed import Worker
from distributed.core import ConnectionPool
from distributed.protocol import to_serialize

from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.gpt2.model import GPT2

PIECE_BYTES = 16 << 20
Ranges = Mapping[str, Sequence[tuple[int, int]]]  # of elements of arrays, by their names
ROOM = "room"  # the offer to which the driver puts a state
_HANDLER = "taskgpt_state"
_POLL_S = 0.05


class Held(NamedTuple):
    """Which whole state a worker has: after how many steps, and of which generation. Those of one generation and step are the same."""

    step: int
    generation: int


NO_STATE = Held(-1, -1)


@dataclass
class Offer:
    """Arrays that the driver may fetch, or fill. `taken`: it has, or it does not want them."""

    arrays: Mapping[str, np.ndarray]
    taken: threading.Event = field(default_factory=threading.Event)


@dataclass
class Kept:
    """What a worker has of a run. `gpt`: memory whose state is `held`; `about`: what the run is then, None if it begins."""

    gpt: GPT2 | None = None
    held: Held = NO_STATE
    about: About | None = None
    room: GPT2 | None = None  # for a state that the driver is putting here
    offers: dict[str, Offer] = field(default_factory=dict)
    generation: int = -1  # the newest that has begun here
    is_training: bool = False  # a rank of it runs here
    is_hung: bool = False  # and does not go on, nor end
    is_forgotten: bool = False  # nothing is to be left once it has ended
    ended: tuple[int, Any] = -1, None  # the newest generation whose rank has ended here, and how: job.Ended
    asked: tuple[int, str] = -1, ""  # which generation the driver wants something of, and what
    steps: deque[tuple] = field(default_factory=lambda: deque(maxlen=4))  # what the last ones found: who told the driver may have died

    def let_go(self) -> None:
        """Have no whole state any more, and offer nothing."""
        self.gpt, self.held, self.about, self.room = None, NO_STATE, None, None
        self.offers.clear()

    def keep(self, gpt: GPT2, about: About | None, generation: int) -> None:
        """Have a whole state from now on."""
        self.gpt, self.about, self.held = gpt, about, Held(about.step if about else 0, generation)


_of_worker: WeakKeyDictionary[Worker, dict[str, Kept]] = WeakKeyDictionary()
_reserved: WeakKeyDictionary[Worker, tuple[str, float]] = WeakKeyDictionary()  # for which run, and until when


def kept(worker: Worker, run: str) -> Kept:
    """Return what a worker has of a run."""
    if worker not in _of_worker:
        _of_worker[worker] = {}
        worker.handlers[_HANDLER] = lambda **request: _answer(worker, **request)
    return _of_worker[worker].setdefault(run, Kept())


def _answer(worker: Worker, run: str, offer: str, name: str, start: int, stop: int, data: Any = None) -> Any:
    """Give a piece of an array that is offered, or take one."""
    found = kept(worker, run).offers.get(offer)
    if found is None or name not in found.arrays:
        return {"missing": name}
    piece = found.arrays[name].reshape(-1).view(np.uint8)[start:stop]
    if data is None:
        return {"data": to_serialize(piece)}
    piece[:] = data
    return {}


# In the worker, called by the driver through Client.run -----------------------------------------------------------------------------------


async def want(run: str, generation: int, what: str, dask_worker: Worker) -> bool:
    """Have a generation's rank here do something as soon as a step ends, also one that is yet to begin: "stop", "regroup", "save"."""
    kept(dask_worker, run).asked = generation, what
    return True


async def take(run: str, offer: str, dask_worker: Worker) -> None:
    """Have who has offered something not wait any longer: it is fetched, or not wanted."""
    if found := kept(dask_worker, run).offers.get(offer):
        found.taken.set()


async def forget(run: str, dask_worker: Worker) -> None:
    """Let go of all that is kept of a run; while a rank of it is here, as soon as that has ended."""
    _forget(dask_worker, run)


def _forget(worker: Worker, run: str) -> None:
    here = _of_worker.get(worker, {}).get(run)
    if here is not None and here.is_training:
        here.is_forgotten = True
    elif here is not None:
        del _of_worker[worker][run]


async def holding(run: str, dask_worker: Worker) -> Held | None:
    """Return which state of a run is here, when no rank of it is here any more, which may yet have to notice that it is not wanted; None if
    one hangs.
    """
    here = _of_worker.get(dask_worker, {}).get(run, Kept())
    while here.is_training and not here.is_hung:
        await asyncio.sleep(_POLL_S)
    return None if here.is_hung else here.held


async def ending(run: str, generation: int, dask_worker: Worker) -> Any:
    """Return how a generation's rank here has ended; None if that is not known any more."""
    number, ended = _of_worker.get(dask_worker, {}).get(run, Kept()).ended
    return ended if number == generation else None


async def make_room(run: str, gpt: tuple, seconds: float, dask_worker: Worker) -> None:
    """Make room for a state that the driver will put here; `gpt`: what GPT2 is made with; `seconds`: for a driver that is silent."""
    here = kept(dask_worker, run)
    here.let_go()
    here.room = GPT2(*gpt)
    here.offers[ROOM] = Offer(here.room.state)
    forget_later(dask_worker, run, here.generation, seconds)


async def keep_room(run: str, about: About | None, generation: int, dask_worker: Worker) -> None:
    """Take what was put here for a state: it is whole. `generation`: that it is for."""
    here = kept(dask_worker, run)
    assert here.room is not None
    here.keep(here.room, about, generation)
    here.room = None
    del here.offers[ROOM]


async def reserve(run: str, seconds: float, dask_worker: Worker) -> bool:
    """Keep a worker for a run's next generation, for so long; return False if another run has it. 0 seconds: give it back.

    One that hangs can be nobody's.
    """
    now, (holder, until) = time.monotonic(), _reserved.get(dask_worker, ("", 0.0))
    runs = _of_worker.get(dask_worker, {})
    if any(each.is_hung or (each.is_training and name != run) for name, each in runs.items()) or (holder != run and until > now):
        return False
    _reserved[dask_worker] = run, now + seconds
    return True


def give_back(worker: Worker, run: str, seconds: float) -> None:
    """Have a worker be anybody's in so long, as its rank here has ended: until then the driver may want it again."""
    if _reserved.get(worker, ("", 0.0))[0] == run:
        _reserved[worker] = run, time.monotonic() + seconds


def forget_later(worker: Worker, run: str, generation: int, seconds: float) -> None:
    """Let go of all that is kept of a run if its driver has not come back after so long: it is gone. From any thread."""

    def look() -> None:
        here = _of_worker.get(worker, {}).get(run)
        if here is not None and here.generation == generation and not here.is_training:
            _forget(worker, run)

    loop = worker.loop.asyncio_loop
    loop.call_soon_threadsafe(loop.call_later, seconds, look)


# In the driver ----------------------------------------------------------------------------------------------------------------------------


async def fetch(
    pool: ConnectionPool, address: str, run: str, offer: str, arrays: Mapping[str, np.ndarray], ranges: Ranges, timeout_s: float
) -> None:
    """Fill ranges of arrays with what a worker offers under their names.

    Raises OSError if it is gone, or gives no piece within `timeout_s`; LookupError if it does not offer that any more.
    """
    for name, start, stop in _pieces(arrays, ranges):
        piece = pool(address).taskgpt_state(run=run, offer=offer, name=name, start=start, stop=stop)
        answer = await asyncio.wait_for(piece, timeout_s)
        if "missing" in answer:
            raise LookupError(f"{address} does not offer array '{name}' of this run any more")
        arrays[name].reshape(-1).view(np.uint8)[start:stop] = answer["data"]


async def put(pool: ConnectionPool, address: str, run: str, arrays: Mapping[str, np.ndarray], ranges: Ranges, timeout_s: float) -> None:
    """Fill ranges of the arrays that a worker has made room for with those of the same names. Raises as `fetch`."""
    for name, start, stop in _pieces(arrays, ranges):
        data = to_serialize(arrays[name].reshape(-1).view(np.uint8)[start:stop])
        taken = pool(address).taskgpt_state(run=run, offer=ROOM, name=name, start=start, stop=stop, data=data)
        if "missing" in await asyncio.wait_for(taken, timeout_s):
            raise LookupError(f"{address} has no room for array '{name}' of this run")


def _pieces(arrays: Mapping[str, np.ndarray], ranges: Ranges) -> Iterator[tuple[str, int, int]]:
    """Yield (name, first byte, byte after the last)."""
    for name, found in ranges.items():
        for first, last in found:
            begin, end = first * arrays[name].itemsize, last * arrays[name].itemsize
            for start in range(begin, end, PIECE_BYTES):
                yield name, start, min(start + PIECE_BYTES, end)
