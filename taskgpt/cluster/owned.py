"""Any tiled program on a Dask cluster: each tile has a worker as its home, and tasks run at the home of what they write.

    done = run_owned(client, program, specs, gather=["x"])
    done.tensors["x"]            # NumPy's array
    print(done.listing())

A rank is one long Dask task in each worker process, which runs its share of the program on native workers. Tiles go from rank to rank over
Dask's comms; Dask hears nothing of tasks and tiles.
"""

import asyncio
import contextlib
import itertools
import resource
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from distributed import Client, Future, KilledWorker, Worker, get_worker, wait

from taskgpt.cluster.checks import ask, fit, look
from taskgpt.cluster.dask_links import TIMEOUT_S, connected, end, listen
from taskgpt.collectives.links import PeerLost
from taskgpt.collectives.owners import Exchange, Home, block_cyclic, share_of
from taskgpt.collectives.partial import PartialArena
from taskgpt.config import scheduler
from taskgpt.errors import UserError
from taskgpt.lab import layout
from taskgpt.schedulers import WorkerError
from taskgpt.tasks import TaskError, TensorSpec, compile_kernels

_POLL_S = 1.0
_LAST_WORDS_S = 3.0  # for ranks to end, after one has failed: its own error tells more than theirs


class RankDone(NamedTuple):
    """What a rank did. `bound_bytes`: each version of its tiles once to each rank that reads it. `wire_bytes`: with what frames them."""

    address: str
    tasks: int
    seconds: float
    sent_tiles: int
    sent_bytes: int
    bound_bytes: int
    wire_bytes: int
    peak_bytes: int  # of its process, since it began


@dataclass(frozen=True)
class Done:
    """What a program has left: the tensors that were asked for, whole, and what each rank did."""

    tensors: dict[str, np.ndarray]
    ranks: tuple[RankDone, ...]

    @property
    def sent_bytes(self) -> int:
        """Of tiles, by all ranks."""
        return sum(rank.sent_bytes for rank in self.ranks)

    @property
    def bound_bytes(self) -> int:
        """The least that owner computes can send."""
        return sum(rank.bound_bytes for rank in self.ranks)

    @property
    def wire_bytes(self) -> int:
        """As handed to the comms."""
        return sum(rank.wire_bytes for rank in self.ranks)

    def listing(self) -> str:
        """Return a table: a rank a line, and what crossed beside the least that can."""
        ratio = f", {self.wire_bytes / self.bound_bytes:.4f} times that with what frames it" if self.bound_bytes else ""
        caption = f"moved {_mib(self.sent_bytes)} MiB of tiles; owner computes needs {_mib(self.bound_bytes)} MiB{ratio}"
        head = ["rank", "worker", "tasks", "seconds", "sent MiB", "bound MiB", "tiles", "peak MiB"]
        rows = [
            [
                str(n),
                r.address,
                str(r.tasks),
                f"{r.seconds:.2f}",
                _mib(r.sent_bytes),
                _mib(r.bound_bytes),
                str(r.sent_tiles),
                _mib(r.peak_bytes),
            ]
            for n, r in enumerate(self.ranks)
        ]
        return layout.to_text({"caption": caption, "head": head, "rows": rows})


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f}"


def run_owned(
    client: Client,
    program: Callable[..., None],
    specs: Mapping[str, TensorSpec],
    home: Home = block_cyclic,
    gather: Sequence[str] = (),
    ranks: int = 0,
    timeout_s: float = TIMEOUT_S,
) -> Done:
    """Run `program(spawn, arena)` on the workers of a cluster, and return when all its tasks are done.

    `specs`: the tensors, all zero at first. `home(tensor, cell, ranks)`: the rank that has a cell. `program` and `home` are functions that
    workers can import, and make the same calls on each. `gather`: tensors to be brought here. `ranks`: how many workers take part; 0: all
    that are there. A rank has as many native workers as its Dask worker has threads.

    Raises UserError where there is nothing to run on or a function is in __main__, what `share_of` raises for the program, TaskError for a
    task that fails, and WorkerError if a worker is lost, for its tiles are.
    """
    for function in program, home:
        if getattr(function, "__module__", "__main__") == "__main__":
            name = getattr(function, "__qualname__", repr(function))
            raise UserError(f"run_owned: workers import '{name}', and cannot import __main__; move it to a module")
    members, faults = fit(look(client), 0)
    if len(members) < max(1, ranks) or (faults and not ranks):
        wanted = f"{max(1, ranks)} workers" if len(members) < max(1, ranks) else "all workers"
        raise UserError("; ".join([f"run_owned: wanted {wanted}, got {len(members)} that are fit", *faults]))
    addresses = [member.address for member in members][: ranks or None]
    arena = PartialArena(dict(specs))
    for name in gather:
        if name not in arena.tensors:
            raise UserError(f"run_owned: gather: there is no tensor '{name}'; there are {', '.join(arena.tensors)}")
    share_of(program, arena, home, 0, len(addresses))  # a mistake of the program is raised here
    run = uuid.uuid4().hex
    client.run(_listen_here, workers=addresses)
    job = _Job(run, addresses, program, dict(specs), home, tuple(gather), timeout_s)
    futures = [
        client.submit(
            _run_rank, job, rank, key=f"taskgpt-owned-{run}-{rank}", workers=[address], allow_other_workers=False, pure=False, retries=0
        )
        for rank, address in enumerate(addresses)
    ]
    try:
        _wait(client, futures, addresses)
        if any(future.status != "finished" for future in futures):
            raise _failure(client, run, futures, addresses)
        found = client.gather(futures)
    except KeyboardInterrupt:
        _end(client, run, addresses, "the program was given up")
        raise
    finally:
        client.cancel(futures)
    tensors = {name: np.zeros(specs[name].shape, specs[name].dtype) for name in gather}
    for cells, _ in found:
        for name, position, array in cells:
            tensors[name][arena.tensors[name].cell(*position).index] = array
    return Done(tensors, tuple(done for _, done in found))


def _wait(client: Client, futures: Sequence[Future], addresses: Sequence[str]) -> None:
    """Wait until all ranks are done, one fails, or the worker of one is gone."""
    pending = dict(zip(futures, addresses, strict=True))
    while pending and all(future.status in ("pending", "finished") for future in futures):
        with contextlib.suppress(asyncio.TimeoutError), client.as_current():
            wait(list(pending), timeout=_POLL_S, return_when="FIRST_COMPLETED")
        pending = {future: address for future, address in pending.items() if not future.done()}
        if not client.scheduler_info()["workers"].keys() >= set(pending.values()):
            break


def _failure(client: Client, run: str, futures: Sequence[Future], addresses: Sequence[str]) -> Exception:
    """End all ranks, and return the one error that says why."""
    _end(client, run, addresses, "another rank has failed")
    workers = client.scheduler_info()["workers"]
    if there := [future for future, address in zip(futures, addresses, strict=True) if address in workers]:
        with contextlib.suppress(asyncio.TimeoutError), client.as_current():
            wait(there, timeout=_LAST_WORDS_S)
    errors = {rank: future.exception() for rank, future in enumerate(futures) if future.status == "error"}
    for rank, error in errors.items():
        where = f"rank {rank} ({addresses[rank]})"
        if isinstance(error, TaskError):
            return TaskError(f"{where}: {error}")
        if not isinstance(error, (PeerLost, KilledWorker)):
            return WorkerError(f"{where}: {type(error).__name__}: {error}")
    gone = [f"rank {rank} ({address}) is lost: its worker is gone" for rank, address in enumerate(addresses) if address not in workers]
    why = [*gone, *map(str, errors.values()), "ranks were cancelled"]
    return WorkerError(f"{why[0]}; the tiles whose home it was are gone: run the program again")


def _end(client: Client, run: str, addresses: Sequence[str], why: str) -> None:
    """End all ranks that answer: one that hangs does not."""
    ask(client, addresses, _end_here, run, why, timeout_s=_LAST_WORDS_S)


# In a worker ----------------------------------------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    run: str
    addresses: list[str]
    program: Callable[..., None]
    specs: dict[str, TensorSpec]
    home: Home
    gather: tuple[str, ...]
    timeout_s: float


def _listen_here(dask_worker: Worker) -> None:
    listen(dask_worker)


def _end_here(run: str, why: str, dask_worker: Worker) -> None:
    end(dask_worker, run, why)


def _run_rank(job: _Job, rank: int) -> tuple[list[tuple[str, tuple[int, ...], np.ndarray]], RankDone]:
    """Run a rank's share; return the cells of gathered tensors that are at home here, and what it did.

    Raises PeerLost, or what a task raised.
    """
    worker = get_worker()

    def on_loop(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, worker.loop.asyncio_loop).result()

    arena, count = PartialArena(job.specs), len(job.addresses)
    share = share_of(job.program, arena, job.home, rank, count)
    links = on_loop(connected(worker, job.run, 0, rank, job.addresses, job.timeout_s))
    try:
        exchange = Exchange(share, arena, links)
        compile_kernels(exchange.graph.kernels)
        with exchange, scheduler("native", workers=worker.state.nthreads) as opened:
            begin = time.perf_counter()
            opened.run(exchange.graph)
            seconds = time.perf_counter() - begin
    except BaseException as error:
        cause = error.__cause__ if isinstance(error, TaskError) else None
        if isinstance(cause, PeerLost):
            raise PeerLost(str(cause)) from None
        links.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        on_loop(links.close())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    tasks = len(exchange.graph.tasks)
    done = RankDone(worker.address, tasks, seconds, share.sends, exchange.sent_bytes, share.bound_bytes, links.sent_bytes, peak)
    cells = [
        (name, position, np.array(arena.tensors[name].cell(*position).array))
        for name in job.gather
        for position in itertools.product(*map(range, arena.tensors[name].grid))
        if job.home(name, position, count) == rank
    ]
    return cells, done
