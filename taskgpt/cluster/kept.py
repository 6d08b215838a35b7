"""What a worker process keeps of a training run between its generations, and hands out: whole states, and what it is asked for.

Between the ranks of a run a state goes over their links. Between the driver and a rank it goes over Dask's own connections, in pieces: the
driver asks the worker's server, as Dask asks it for results. What is kept of a run goes with `forget`, or with the worker.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from distributed import Worker
from distributed.core import ConnectionPool
from distributed.protocol import to_serialize

from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.gpt2.model import GPT2

PIECE_BYTES = 16 << 20
Ranges = Mapping[str, Sequence[tuple[int, int]]]  # of elements of arrays, by their names
_HANDLER = "taskgpt_state"


@dataclass
class Kept:
    """What a worker has of a run. `gpt`: memory whose state is that after `step` steps, -1 if it has none that is whole.

    `about`: what the run is then, None if it begins.
    """

    gpt: GPT2 | None = None
    step: int = -1
    about: About | None = None
    offered: dict[str, np.ndarray] = field(default_factory=dict)  # arrays that the driver may fetch
    taken: threading.Event = field(default_factory=threading.Event)  # it has fetched them
    generation: int = -1  # the newest that has begun here
    is_training: bool = False  # a rank of it runs here
    asked: str = ""  # what the driver wants, "" nothing
    steps: deque[tuple] = field(default_factory=lambda: deque(maxlen=4))  # what the last ones found: who told the driver may have died

    def let_go(self) -> None:
        """Have no whole state any more."""
        self.gpt, self.step, self.about, self.offered = None, -1, None, {}


_of_worker: WeakKeyDictionary[Worker, dict[str, Kept]] = WeakKeyDictionary()
_reserved: WeakKeyDictionary[Worker, tuple[str, float]] = WeakKeyDictionary()  # for which run, and until when


def kept(worker: Worker, run: str) -> Kept:
    """Return what a worker has of a run."""
    if worker not in _of_worker:
        _of_worker[worker] = {}
        worker.handlers[_HANDLER] = lambda **request: _answer(worker, **request)
    return _of_worker[worker].setdefault(run, Kept())


def _answer(worker: Worker, run: str, name: str, start: int, stop: int, data: Any = None) -> Any:
    """Give a piece of an array that is offered, or take one."""
    array = kept(worker, run).offered.get(name)
    if array is None:
        return {"missing": name}
    piece = array.reshape(-1).view(np.uint8)[start:stop]
    if data is None:
        return {"data": to_serialize(piece)}
    piece[:] = data
    return {}


# In the worker, called by the driver through Client.run -----------------------------------------------------------------------------------


async def want(run: str, what: str, dask_worker: Worker) -> None:
    """Have a run's rank here do something as soon as a step ends: "stop", "regroup", "save"; or "taken": what it offered is fetched."""
    here = kept(dask_worker, run)
    if what == "taken":
        here.taken.set()
    else:
        here.asked = what


async def forget(run: str, dask_worker: Worker) -> None:
    """Let go of all that is kept of a run."""
    _of_worker.get(dask_worker, {}).pop(run, None)


async def make_room(run: str, gpt: tuple, about: About | None, dask_worker: Worker) -> None:
    """Make room for a state that the driver will put here; `gpt`: what GPT2 is made with."""
    here = kept(dask_worker, run)
    here.gpt, here.step, here.about = GPT2(*gpt), about.step if about else 0, about
    here.offered = here.gpt.state


async def reserve(run: str, seconds: float, dask_worker: Worker) -> bool:
    """Keep a worker for a run's next generation, for so long; return False if another run has it. 0 seconds: give it back."""
    now, (holder, until) = time.monotonic(), _reserved.get(dask_worker, ("", 0.0))
    if any(each.is_training for name, each in _of_worker.get(dask_worker, {}).items() if name != run) or (holder != run and until > now):
        return False
    _reserved[dask_worker] = run, now + seconds
    return True


def give_back(worker: Worker, run: str) -> None:
    """Have a worker that was kept for a run be anybody's, as its rank here has ended: the driver, if it wants it again, says so."""
    if _reserved.get(worker, ("", 0.0))[0] == run:
        del _reserved[worker]


async def forget_later(worker: Worker, run: str, generation: int, seconds: float) -> None:
    """Let go of all that is kept of a run whose driver has not come back after so long: it is gone."""
    await asyncio.sleep(seconds)
    here = _of_worker.get(worker, {}).get(run)
    if here is not None and here.generation == generation and not here.is_training:
        await forget(run, worker)


# In the driver ----------------------------------------------------------------------------------------------------------------------------


async def fetch(pool: ConnectionPool, address: str, run: str, arrays: Mapping[str, np.ndarray], ranges: Ranges) -> None:
    """Fill ranges of arrays with what a worker offers under their names. Raises OSError if it is gone, LookupError if it has none."""
    for name, start, stop in _pieces(arrays, ranges):
        answer = await pool(address).taskgpt_state(run=run, name=name, start=start, stop=stop)
        if "missing" in answer:
            raise LookupError(f"{address} has no array '{name}' of this run any more")
        arrays[name].reshape(-1).view(np.uint8)[start:stop] = answer["data"]


async def put(pool: ConnectionPool, address: str, run: str, arrays: Mapping[str, np.ndarray], ranges: Ranges) -> None:
    """Fill ranges of a worker's arrays with those of the same names. Raises as `fetch`."""
    for name, start, stop in _pieces(arrays, ranges):
        piece = arrays[name].reshape(-1).view(np.uint8)[start:stop]
        answer = await pool(address).taskgpt_state(run=run, name=name, start=start, stop=stop, data=to_serialize(piece))
        if "missing" in answer:
            raise LookupError(f"{address} has no room for array '{name}' of this run")


def _pieces(arrays: Mapping[str, np.ndarray], ranges: Ranges) -> Iterator[tuple[str, int, int]]:
    """Yield (name, first byte, byte after the last)."""
    for name, found in ranges.items():
        for first, last in found:
            begin, end = first * arrays[name].itemsize, last * arrays[name].itemsize
            for start in range(begin, end, PIECE_BYTES):
                yield name, start, min(start + PIECE_BYTES, end)
