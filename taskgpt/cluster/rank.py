"""What runs in a worker: a rank of a generation. It builds the model, takes over the state, and trains until the driver or a loss ends it.

A rank is one long Dask task. It holds a thread of the worker, and the cores that its own workers keep busy; Dask's event loop goes on
beside it, answers the driver and carries the messages of the links.
"""

import argparse
import asyncio
import gc
import hashlib
import json
import math
import resource
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from distributed import Worker, get_worker

from taskgpt.cluster import hangs
from taskgpt.cluster.dask_links import connected
from taskgpt.cluster.job import END, Ended, Job
from taskgpt.cluster.kept import Held, Kept, Offer, forget_later, give_back, kept
from taskgpt.cluster.mpi_links import MpiLinks
from taskgpt.cluster.rank_stages import StageTraining, sha256_of_stages
from taskgpt.cluster.rank_training import Asked, RankReport, RankSaver, RankTraining
from taskgpt.cluster.traces import answer_clock, offers
from taskgpt.cluster.worker_logs import told_to_driver
from taskgpt.collectives import Communicator, Links, NotedLinks, PeerLost, spread
from taskgpt.config import load_scheduler
from taskgpt.errors import UserError
from taskgpt.files import fill
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.pipeline import stage_loss_graph
from taskgpt.gpt2.program import loss_graph
from taskgpt.gpt2.replicas import Replica, share
from taskgpt.gpt2.sampling import Sampler
from taskgpt.gpt2.snapshot import Snapshot
from taskgpt.gpt2.stages import Stage
from taskgpt.gpt2.steps import Steps
from taskgpt.gpt2.text.data import Data, open_data
from taskgpt.gpt2.text.parts import Part
from taskgpt.lab.traces.trace import Traced
from taskgpt.schedulers import open_scheduler
from taskgpt.schedulers.native.doing import Doing
from taskgpt.tasks import TaskError, compile_kernels

_WATCH_S = 1.0  # between looks whether Dask still wants this task
_BETWEEN_S = 15.0  # beyond `timeout_s`: how long a driver may take from the end of a generation to the next


def train_rank(job: Job, rank: int) -> None:
    """Train as one rank of a generation; keep how that ended. Raises UserError for what is wrong here, not at another rank."""
    worker = get_worker()
    if worker.address != job.addresses[rank]:
        raise UserError(f"rank {rank} was to run on {job.addresses[rank]}, and runs on {worker.address}; it does not begin")
    here = kept(worker, job.run)
    answer_clock(worker)
    if job.generation <= here.generation:
        return  # Dask has asked twice
    here.generation, here.is_training = job.generation, True
    if job.is_staged and job.generation:
        gc.collect()  # of the model of the generation before, if a circle holds it: of two there would not be room
    key = worker.get_current_task()
    try:
        with told_to_driver(worker, job, rank):
            here.ended = job.generation, _train(job, rank, worker, here, key)
    except PeerLost as error:
        here.ended = job.generation, Ended(rank, max(0, here.held.step), str(error))
    finally:
        here.is_training = here.is_hung = False
        # The driver may need it again for the next generation, after it has waited for ranks that are silent.
        give_back(worker, job.run, job.timeout_s + _BETWEEN_S if _is_wanted(worker, key) else 0.0)
        forget_later(worker, job.run, job.generation, 0.0 if here.is_forgotten else job.lease_s)


def _train(job: Job, rank: int, worker: Worker, here: Kept, key: str) -> Ended:
    """Train, and leave nothing behind but what is kept. Raises PeerLost if that ends before it has begun."""
    if job.mpi:
        links: Any = MpiLinks(job.run, job.generation, rank, job.mpi, job.timeout_s, worker.loop.asyncio_loop)
    else:
        links = _on_loop(worker, connected(worker, job.run, job.generation, rank, job.addresses, job.timeout_s))
    watch = asyncio.run_coroutine_threadsafe(_watch(worker, links, key), worker.loop.asyncio_loop)
    communicator = Communicator(NotedLinks(links) if job.record else links, job.as_bf16)
    try:
        return _Rank(job, rank, worker, here, links, communicator).run()
    except PeerLost:
        raise
    except BaseException as error:
        links.fail(f"{type(error).__name__}: {error}")
        raise
    finally:
        watch.cancel()
        communicator.fail(PeerLost("this generation is over"))
        communicator.close()
        _on_loop(worker, links.close())


def _on_loop(worker: Worker, coroutine: Coroutine) -> Any:
    return asyncio.run_coroutine_threadsafe(coroutine, worker.loop.asyncio_loop).result()


async def _watch(worker: Worker, links: Links, key: str) -> None:
    """End the generation here when Dask does not want this task any more: the driver has cancelled it, or is gone."""
    while True:
        await asyncio.sleep(_WATCH_S)
        if not _is_wanted(worker, key):
            links.fail("the driver does not want it any more, or is gone")
            return


def _is_wanted(worker: Worker, key: str) -> bool:
    task = worker.state.tasks.get(key)
    return task is not None and task.state == "executing"


class _Rank:
    """A rank from its begin to its end."""

    def __init__(self, job: Job, rank: int, worker: Worker, here: Kept, links: Links, communicator: Communicator):
        self.job, self.rank, self.worker, self.here = job, rank, worker, here
        self.links, self.communicator = links, communicator
        self.flags = argparse.Namespace(**job.flags)
        self.mine = share(job.micro_batches, rank, job.count)

    def run(self) -> Ended:
        job, here = self.job, self.here
        graph = job.graph
        report = RankReport(job, self.rank, self.worker, here)
        data = open_data(self.flags.data, graph.batch.batch_size, graph.batch.seq_len, graph.model.vocabulary, report.say)
        m = self._model()
        steps = Steps(m)
        vals, sampler = [(stage_loss_graph if m.stage else loss_graph)(m, slot) for slot in range(len(m.slots))], Sampler(m)
        saver = self._saver(m)
        graphs = [*vals, *([] if m.stage else sampler.graphs), *([saver.graph] if saver and saver.graph else [])]
        compile_kernels(list(dict.fromkeys([*steps.kernels, *(kernel for each in graphs for kernel in each.kernels)])))
        about = self._take_over(m, data)
        report.data(data.description, data.fingerprint)
        stop = Asked(job, here, self.links)
        settings = {"workers": job.workers[self.rank], "record": job.record or (4 * steps.tasks if m.stage else 0)}
        config = load_scheduler("native", settings)
        scheduler = native = open_scheduler(config.scheduler, config.settings)
        if job.record:
            scheduler = Traced(scheduler)
        if m.replica:
            data = replace(data, train=Part(data.train, self.mine, job.micro_batches))
        training = (StageTraining if m.stage else RankTraining)(self.flags, scheduler, m, data, steps, vals, sampler, report, stop)
        training.join(job, self.rank, self.communicator, saver)
        if about is not None:
            training.resume(about, job.best_val_loss)
            training.saved_step = job.saved_step
        here.let_go()  # from the first step on, until it is whole again
        lost = ""
        with scheduler:
            try:
                with self._hangs_noticed(native.doing):
                    training.run()
                self.communicator.verify_goes_on()
                self._end_saving(training)
            except (PeerLost, TaskError) as error:
                cause = error if isinstance(error, PeerLost) else error.__cause__
                if not isinstance(cause, PeerLost):
                    raise
                lost = str(cause)
            traced = self._traced(training, scheduler) if isinstance(scheduler, Traced) else {}
        return self._ended(training, m, steps, lost, traced)

    @contextmanager
    def _hangs_noticed(self, doing: Callable[[], Doing]) -> Iterator[None]:
        """While the `with` block lasts, have the generation end, and the driver told, if nothing goes on here."""

        def tell(why: str) -> None:
            self.worker.log_event(self.job.topic, {"generation": self.job.generation, "what": "hung", "found": (self.rank, why)})
            self.links.fail(why)

        watch = hangs.watch(doing, self.communicator, self.here, self.job.hang_s, tell)
        watching = asyncio.run_coroutine_threadsafe(watch, self.worker.loop.asyncio_loop)
        try:
            yield
        finally:
            watching.cancel()

    def _end_saving(self, training: RankTraining) -> None:
        saver = training.saver
        if saver:
            saver.wait()
            if training.wants_last and not training.has_diverged:
                training.save_last()

    def _model(self) -> GPT2:
        job, graph = self.job, self.job.graph
        batch, replica, stage = graph.batch, None, None
        if job.is_staged:
            stage = Stage(self.rank, job.count, graph.model, job.micro_batches, GPT2.SLOTS, self.communicator)
        elif job.count > 1:
            batch = replace(batch, accumulate=len(self.mine))
            replica = Replica(self.rank, job.count, job.micro_batches, self.communicator, job.bucket_bytes, job.is_sharded)
        m = GPT2(graph.model, batch, graph.tiles, graph.options, replica=replica, stage=stage)
        if job.kept is None:
            self.here.let_go()  # of a state from before a new beginning, moments and all
        elif self.here.gpt is not None:
            m.take_state(self.here.gpt)
        return m

    def _saver(self, m: GPT2) -> RankSaver | None:
        if not self.flags.has_folder or not (self.rank == 0 or self.job.is_sharded or self.job.is_staged):
            return None
        snapshot = None if self.job.is_sharded or self.job.is_staged or not self.flags.save_every else Snapshot(m)
        return RankSaver(self.job, self.rank, self.worker, self.here, m, snapshot, self.communicator)

    def _take_over(self, m: GPT2, data: Data) -> About | None:
        """Have all ranks begin with the same state, and with the same data; return what it is. Raises UserError, PeerLost."""
        digest = hashlib.sha256(json.dumps(data.fingerprint, sort_keys=True).encode()).hexdigest()
        here = self.here
        about = asdict(here.about) if here.about else None
        words = _sum_of_words(m) if here.gpt is not None and not self.job.is_staged else 0  # stages have a part of the state each
        said = _Said(digest, list(here.held), words, list(map(list, here.steps)), about)
        others = [_Said(**json.loads(each)) for each in self._tell_all(json.dumps(asdict(said)).encode())]
        for rank, other in enumerate(others):
            if other.data != others[0].data:
                where = f"rank {rank} ({self.job.addresses[rank]})"
                what = (
                    "its data differs from that of rank 0; give all workers the same files, the same Python where the text is Python's own"
                )
                raise UserError(f"--data {self.flags.data}: {where}: {what}")
        if self.job.kept is None:
            m.initialize(self.flags.seed)
            return None
        roots = [rank for rank, each in enumerate(others) if Held(*each.held) == self.job.kept]
        if not roots:
            raise PeerLost("no rank has the state any more")
        if len({others[rank].words for rank in roots}) > 1:  # a defect, here or of a machine's memory: nobody's is trusted
            self.here.let_go()
            raise PeerLost(f"ranks have different states after {self.job.kept.step} steps")
        root = roots[0]
        here.steps.clear()  # who is rank 0 now tells the driver what a lost one may not have told
        here.steps.extend(map(tuple, others[root].steps))
        if len(roots) < self.job.count:
            if here.held != self.job.kept:
                here.let_go()  # which is overwritten from here on, and half of it if this does not come to its end
            _on_loop(self.worker, spread(self.links, list(m.state.values()), root, ("state",)))
        return fill(About, found, "state: ") if (found := others[root].about) else None

    def _tell_all(self, message: bytes) -> list[bytes]:
        """Return the messages of all ranks, by rank."""

        async def tell() -> list[bytes]:
            mine, others = np.frombuffer(message, np.uint8), [rank for rank in range(self.job.count) if rank != self.rank]
            await asyncio.gather(*(self.links.send(rank, ("said",), [mine]) for rank in others))
            return [
                message if rank == self.rank else (await self.links.receive(rank, ("said",))).tobytes() for rank in range(self.job.count)
            ]

        return _on_loop(self.worker, tell())

    def _traced(self, training: RankTraining, scheduler: Traced) -> dict[str, np.ndarray]:
        """Return what the driver is offered of this rank's trace."""
        links = self.communicator.links
        noted = links.noted if isinstance(links, NotedLinks) else []
        return offers(scheduler, [*training.transfers, *self.communicator.take_transfers()], noted)

    def _ended(self, training: RankTraining, m: GPT2, steps: Steps, lost: str, traced: dict[str, np.ndarray]) -> Ended:
        """Keep the state if it is whole, and say how it ended."""
        here, about = self.here, training.about_now()
        here.offers[self.job.offer_of(END)] = Offer(traced if lost and self.job.is_in_parts else m.state | traced)
        if not self.job.is_in_parts:
            here.keep(m, about, self.job.generation)
        parameters = {name: mine for name, array in m.parameters.items() if (mine := array[m.rows_here(name)]).size}
        bad = "" if checkpoints.is_finite(parameters) else "parameters are not finite"
        if training.has_diverged:
            bad = f"loss is {training.loss}" if not math.isfinite(training.loss) else f"norm of the gradient is {training.norm}"
        network, exposed = training.network_times()
        sha256 = "" if lost else _on_loop(self.worker, sha256_of_stages(self.links, m)) if m.stage else m.parameters_sha256()
        return Ended(
            self.rank, training.step, lost, diverged="" if lost else bad, asked=training.stop.heard,
            sha256=sha256, memory_bytes=_peak_bytes(), gflop_per_step=steps.flops / 1e9,
            tasks_per_step=steps.tasks, seconds=tuple(training.seconds), sent_bytes=self.links.sent_bytes,
            payload_bytes=training.payload_bytes, network_s=network, exposed_s=exposed, busy_s=tuple(training.busy_s),
            traced=tuple(len(each) for each in traced.values()), about=about,
        )  # fmt: skip


def _sum_of_words(m: GPT2) -> int:
    """Return the sum of the bits of a state, 32 by 32, mod 2^64: two states that differ anywhere hardly have the same."""
    return sum(int(array.reshape(-1).view(np.uint32).sum(dtype=np.uint64)) for array in m.state.values()) % 2**64


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class _Said:
    """What ranks say to each other first: the digest of their data; what their state is, if they have one, and the sum of its words."""

    data: str
    held: list[int]
    words: int
    steps: list[list]  # what its last steps found: see Kept
    about: dict[str, Any] | None
