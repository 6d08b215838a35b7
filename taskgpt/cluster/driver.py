"""The driver: the process that a person has started. It keeps who takes part, and leads a run through its generations.

A generation is a fixed set of ranks, a long Dask task in a worker each. It ends as agreed, after its last step; or because a rank is lost:
then the others, who hear it from each other, keep their state, which is that after a whole number of steps. The next generation begins with
the workers that are there, from the newest state that one of them has, or else from the newest checkpoint. A worker that has come meanwhile
takes part as soon as a step ends.

Nothing of the cluster's own settings is relied on: every generation has keys of its own, is pinned to its workers and is never run twice,
and whether a worker is there is judged by what the scheduler last heard of it.
"""

import dataclasses
import json
import math
import queue
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, Future, KilledWorker

from taskgpt.cluster.checks import Member, ask, native_workers
from taskgpt.cluster.job import Ended, Job
from taskgpt.cluster.kept import fetch, forget, make_room, put, reserve, want
from taskgpt.cluster.rank import train_rank
from taskgpt.cluster.settings import Settings, schedule
from taskgpt.cluster.traces import Traces
from taskgpt.config import GraphConfig
from taskgpt.errors import UserError
from taskgpt.files import fill
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.checkpoints import resumable
from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.replicas import share
from taskgpt.gpt2.stages import Stage
from taskgpt.lab.dashboard.live import Live, Rank
from taskgpt.runs.console import Console, StopRequest
from taskgpt.runs.saving import Saver

_LOOK_S, _POLL_S = 0.1, 0.5  # between looks for news of ranks, and for workers that have come or gone
_RESERVE_S, _LEASE_S = 60.0, 120.0  # how long workers are kept for a generation to begin; what a driver may be silent beside `wait_s`
_MOST_FRUITLESS = 5
_RESULT_S = 10.0  # for a result that a worker has
_GRACE_S = 5.0  # beyond the time after which a silent rank is lost: until then the others have noticed


class Driver:
    """Leads a run. `roster`: which of some addresses are fit to be ranks; `on_data(description, fingerprint)`: called when rank 0 has
    opened its data, before it trains; `on_log(line)`: called for what a worker logs; `saver`: what writes checkpoints, None where nothing
    does; `traces`: what collects traces, likewise; `live`: what somebody is shown meanwhile, likewise.

    After `run`: seconds of every step; network, of every step (seconds of exchanges, seconds of them in which nothing else was left to do,
    bytes that rank 0 sent); generations, (first step, ranks) of each; recoveries, in seconds from the news of a loss to the next step;
    ended, how each rank of the last generation has.
    """

    def __init__(
        self,
        client: Client,
        settings: Settings,
        roster: Callable[[set[str]], list[Member]],
        graph: GraphConfig,
        flags: dict[str, Any],
        report: Console,
        stop: StopRequest,
    ):
        self.client, self.settings, self.graph, self.flags = client, settings, graph, flags
        self.report, self.stop = report, stop
        self.run_id = uuid.uuid4().hex[:12]
        self.micro_batches = graph.batch.accumulate
        self.seconds: list[float] = []
        self.network: list[tuple[float, float, int]] = []
        self.native_workers: tuple[int, ...] = ()
        self.generations: list[tuple[int, int]] = []
        self.recoveries: list[float] = []
        self.ended: dict[int, Ended] = {}
        self.saver: Saver | None = None
        self.traces: Traces | None = None
        self.live: Live | None = None
        self.on_data: Callable[[str, dict[str, Any]], None] = lambda description, fingerprint: None
        self.on_log: Callable[[str], None] = report.say
        self._roster = roster
        self._begin: tuple[Path, About] | None = None  # the checkpoint that the run goes on from
        self._best_val_loss = math.inf
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._steps_told = 0
        self._told: set[tuple[str, int]] = set()
        self._asked = ""
        self._pushed = False  # the state of this generation comes from a checkpoint
        self._job_now: Job | None = None
        self._number = -1  # of the generation
        self._fruitless = 0  # generations, the last ones, that have done no step
        self._heard: dict[str, tuple[float, float]] = {}  # of each worker: when the scheduler last heard of it, and when we saw that
        self._lost: dict[str, float] = {}  # workers that were lost, and what the scheduler had heard of them then
        self._lost_s = 0.0  # when a loss was noticed that is not made good yet
        self._offers: dict[int, list[tuple[int, About, dict]]] = {}  # by step

    def resume(self, checkpoint: Path, about: About, best_val_loss: float) -> None:
        """Go on from a checkpoint. Before `run`."""
        self._begin, self._best_val_loss, self._steps_told = (checkpoint, about), best_val_loss, about.step

    # The run --------------------------------------------------------------------------------------------------------------------------

    def run(self) -> Ended:
        """Train to the last step, or until a stop; return how rank 0 ended. Raises UserError for what cannot go on."""
        plan = schedule(self.settings.generations)
        step = begin = self._begin[1].step if self._begin else 0
        holders: dict[str, int] = {}  # who has which state
        self.client.subscribe_topic(f"taskgpt-{self.run_id}", lambda event: self._news.put(event[1]))
        try:
            while True:
                members = self._choose(plan, step)
                job = self._job(members, plan, step, holders)
                before = self._steps_told
                ended = self._generation(job)
                self._fruitless = self._fruitless + 1 if self._steps_told == before else 0
                first = ended.get(0)
                if first and not any(each.why for each in ended.values()) and len(ended) == job.count:
                    step, holders = first.step, dict.fromkeys(job.addresses, first.step)
                    self.ended = ended
                    first = dataclasses.replace(first, diverged=next((each.diverged for each in ended.values() if each.diverged), ""))
                    if first.diverged or first.asked == "stop" or step >= self.last_step or self.stop.is_requested:
                        self._last = job, first
                        return first
                    continue
                if self._fruitless == _MOST_FRUITLESS:
                    whys = "; ".join(dict.fromkeys(each.why for each in ended.values() if each.why)) or "all ranks were lost"
                    raise UserError(
                        f"{self.settings.where}: {_MOST_FRUITLESS} generations in a row ended without a step: {whys}{self._go_on()}"
                    )
                holders = {job.addresses[rank]: each.step for rank, each in ended.items() if each.kept}
                step = max(holders.values(), default=begin)
        finally:
            self._end_all()

    @property
    def last_step(self) -> int:
        """After how many steps the run ends."""
        most, steps = self.flags["max_tokens"], self.flags["steps"]
        rows = self.micro_batches * self.graph.batch.rows
        return steps if most is None else min(steps, -(-most // rows))

    def _choose(self, plan: Sequence[tuple[int, int]], step: int) -> list[Member]:
        """Return the members of the next generation. Raises UserError if none come."""
        planned = [self.settings.stages] if self.settings.is_staged else [count for first, count in plan if first <= step]
        most = planned[-1] if planned else min(self.settings.ranks or self.micro_batches, self.micro_batches)
        least = planned[-1] if planned else 1
        until = time.monotonic() + self.settings.wait_s
        while True:
            self._pump(_LOOK_S)
            alive = self._alive()
            members, taken = self._reserve(self._roster(alive), most)
            if len(members) >= least:
                return members
            if self.stop.is_requested or time.monotonic() > until:
                others = f" ({taken} are in use by other runs)" * (taken > 0)
                raise UserError(
                    f"{self.settings.where}: {len(members)} workers are left{others}, wanted {least} within {self.settings.wait_s:g} s; "
                    f"start workers, or wait longer (wait_s){self._go_on()}"
                )
            time.sleep(_POLL_S)

    def _reserve(self, members: Sequence[Member], most: int) -> tuple[list[Member], int]:
        """Return at most so many members that no other run has, and how many others have; one after the other, as every run does."""
        mine: list[Member] = []
        taken = 0
        for member in sorted(members, key=lambda each: each.address):
            if len(mine) < most and (answer := self._call([member.address], reserve, _RESERVE_S).get(member.address)) is True:
                mine.append(member)
            elif len(mine) < most:
                taken += answer is False
        return [member for member in members if member in mine], taken

    def _go_on(self) -> str:
        return ", then go on with --resume" if self.saver and self.saver.newest else ""

    def _job(self, members: Sequence[Member], plan: Sequence[tuple[int, int]], step: int, holders: dict[str, int]) -> Job:
        """Return the next generation, which begins after `step` steps or later; have one of its members hold a state."""
        addresses = tuple(member.address for member in members)
        newest = max((held for address, held in holders.items() if address in addresses), default=-1)
        saved = self.saver.newest if self.saver else self._begin and self._begin[0]
        self._pushed = False
        saved_step = resumable.read_about(saved).step if saved else -1
        is_kept = newest >= 0 and newest >= saved_step
        if not is_kept and (saved is not None or self.flags["init"] is not None):
            newest, is_kept = self._push(addresses, saved), True
        step = max(newest, 0)
        self._number += 1
        self.native_workers = tuple(native_workers(member, members, self.settings) for member in members)
        until = min([first for first, _ in plan if first > step], default=self.last_step)
        self.generations.append((step, len(members)))
        if self.live:
            self.live.begin_ranks(self._rank_of(rank, members, step) for rank in range(len(members)))
        if self._number:
            where = "from memory" if step and not self._pushed else ("from the last checkpoint" if step else "from the beginning")
            self.report.tell("generation", f"{self._number}: {len(members)} ranks go on after {step} steps, {where}")
        return Job(
            run=self.run_id, generation=self._number, addresses=addresses,
            flags=self.flags, graph=self.graph, micro_batches=self.micro_batches, until=until, kept=is_kept, workers=self.native_workers,
            bucket_bytes=int(self.settings.bucket_mib * 2**20), as_bf16=self.settings.wire == "bf16", is_sharded=self.settings.zero,
            is_staged=self.settings.is_staged, is_watched=self.live is not None,
            timeout_s=self.settings.timeout_s, lease_s=self.settings.wait_s + _LEASE_S, mpi=self._mpi_ranks(members),
            record=self.settings.record,
            best_val_loss=self._best_val_loss,
        )  # fmt: skip

    def _rank_of(self, rank: int, members: Sequence[Member], step: int) -> Rank:
        """Return what is known of a rank before it says anything."""
        mine = self.micro_batches if self.settings.is_staged else len(share(self.micro_batches, rank, len(members)))
        return Rank(rank, members[rank].address, members[rank].host, self._number, mine * self.graph.batch.rows, step)

    def _mpi_ranks(self, members: Sequence[Member]) -> tuple[int, ...]:
        """Return the members' numbers in MPI, if MPI is to carry their messages. Raises UserError if it is asked for, and cannot."""
        asked, without = self.settings.collectives, [member.address for member in members if member.mpi_rank is None]
        if asked == "mpi" and without:
            raise UserError(f"{self.settings.where}: collectives=mpi: mpiexec did not start {', '.join(without)}; take collectives=dask")
        return () if asked == "dask" or without else tuple(member.mpi_rank for member in members)  # type: ignore[misc]

    def _push(self, addresses: Sequence[str], checkpoint: Path | None) -> int:
        """Put the state of a checkpoint, or of --init, into the first worker, or into each its stage; return after how many steps it is."""
        of = self.graph.model, self.graph.batch, self.graph.tiles, self.graph.options
        holder, about = GPT2(*of), None
        if checkpoint is not None:
            about = resumable.read_about(checkpoint)
            resumable.load_state(checkpoint, holder.state)
        else:
            checkpoints.load(self.flags["init"], self.graph.model, holder.parameters)
        arrays = holder.state if about else holder.parameters
        for rank, address in enumerate(addresses if self.settings.is_staged else addresses[:1]):
            ranges = {name: at for name, at in self._elements_of(rank).items() if name in arrays}
            if isinstance(failed := self._call([address], make_room, of, about).get(address), Exception):
                raise UserError(f"{address}: cannot take the state of the run: {failed}")
            self.client.sync(put, self.client.rpc, address, self.run_id, arrays, ranges)
        self._pushed = about is not None
        return about.step if about else 0

    def _elements_of(self, rank: int) -> dict[str, list[tuple[int, int]]]:
        """Return which elements of the state a rank has, of which the memory is not touched."""
        of, count = (self.graph.model, self.graph.batch, self.graph.tiles, self.graph.options), self.settings.stages
        stage = Stage(rank, count, self.graph.model, self.micro_batches, GPT2.SLOTS, None) if self.settings.is_staged else None
        return GPT2(*of, stage=stage).elements_here()

    # A generation -----------------------------------------------------------------------------------------------------------------------

    def _generation(self, job: Job) -> dict[int, Ended]:
        """Run a generation; return how each rank ended that has come back. Raises what is wrong at a rank."""
        futures = [
            self.client.submit(
                train_rank, job, rank, key=f"taskgpt-rank-{job.run}-{job.generation}-{rank}",
                workers=[address], allow_other_workers=False, pure=False, retries=0,
            )
            for rank, address in enumerate(job.addresses)
        ]  # fmt: skip
        self._asked, self._job_now, noticed, looked = "", job, 0.0, 0.0
        self._offers.clear()
        try:
            while not all(each.done() for each in futures):
                self._pump(_LOOK_S)
                self._ask(job)
                if time.monotonic() - looked > _POLL_S:
                    looked = time.monotonic()
                    alive = self._alive()
                    gone = [rank for rank, address in enumerate(job.addresses) if address not in alive and not futures[rank].done()]
                    self._regroup(job, alive)
                    if not noticed and (gone or any(_is_early(each) for each in futures)):
                        noticed = self._lost_s = time.monotonic()
                    left = [rank for rank, each in enumerate(futures) if not each.done()]
                    if noticed and (left == gone or time.monotonic() - noticed > self.settings.timeout_s + _GRACE_S):
                        break
            self._pump(0)
            return self._collect(job, futures)
        finally:
            with suppress(Exception):
                self.client.cancel(futures, force=True)

    def _collect(self, job: Job, futures: Sequence[Future]) -> dict[int, Ended]:
        """Return how the ranks ended that have come back; note which are lost."""
        ended: dict[int, Ended] = {}
        for rank, (future, address) in enumerate(zip(futures, job.addresses, strict=True)):
            error = future.exception(timeout=_RESULT_S) if future.status == "error" else None
            if isinstance(error, UserError):
                raise UserError(f"rank {rank} ({address}): {error}")
            if error is not None and not isinstance(error, KilledWorker | CancelledError | OSError):
                raise error
            if future.status == "finished":
                with suppress(Exception):  # it may be gone since
                    ended[rank] = future.result(timeout=_RESULT_S)
            if rank not in ended:
                self._lost[address] = self._heard.get(address, (0.0, 0.0))[0]
                self.report.tell("lost", f"rank {rank} ({address}), after {self._steps_told} steps")
            if self.live and rank not in ended:
                self.live.lose_rank(rank)
            elif self.live and (seconds := ended[rank].seconds):  # it may have said nothing of its last steps
                self.live.rank(rank, ended[rank].step, seconds[-1], ended[rank].exposed_s[-1] if ended[rank].exposed_s else None)
        if self.traces:
            self.traces.collect(job, ended)
        return ended

    def _alive(self) -> set[str]:
        """Return the addresses of workers of which the scheduler has heard of late, without those that were lost and not heard of since."""
        now, alive = time.monotonic(), set()
        for address, about in self.client.scheduler_info(n_workers=-1)["workers"].items():
            seen = about["last_seen"]
            if address not in self._heard or self._heard[address][0] != seen:
                self._heard[address] = seen, now
            if address in self._lost and seen > self._lost[address] + 1:
                del self._lost[address]
            if now - self._heard[address][1] < self.settings.timeout_s and address not in self._lost:
                alive.add(address)
        return alive

    # News and wishes --------------------------------------------------------------------------------------------------------------------

    def _pump(self, seconds: float) -> None:
        """Take news of ranks, waiting for the first so long."""
        with suppress(queue.Empty):
            self._take(self._news.get(timeout=seconds) if seconds else self._news.get_nowait())
            while True:
                self._take(self._news.get_nowait())
        if self.saver:
            self.saver.poll()

    def _take(self, news: dict[str, Any]) -> None:
        what, found = news["what"], news["found"]
        if news["generation"] != self._number:
            return
        if what == "offer":
            self._take_offer(*found)
        elif what == "data":
            self.on_data(found[0], json.loads(found[1]))
            if self.traces and self._job_now:
                self.traces.begin(self._job_now)
        elif what == "say":
            self.report.say(found[0])
        elif what == "log":
            self.on_log(found[0])
        elif what == "rank":
            if self.live:
                self.live.rank(*found)
        elif what == "network":
            self.network.append(tuple(found[1:]))
            self._log_network(*found)
        elif (what, found[0]) not in self._told:  # a generation that goes on from an earlier step tells some things again
            self._told.add((what, found[0]))
            if what == "step":
                self._take_step(*found)
            elif what == "validation":
                self._best_val_loss = min(self._best_val_loss, found[1])
                self.report.validation(*found)
            elif what == "sample":
                self.report.sample(*found)

    def _take_step(self, step: int, loss: float, norm: float, skipped: str, rate: float, seconds: float) -> None:
        if self._lost_s:
            self.recoveries.append(time.monotonic() - self._lost_s)
            self.report.tell("recovered", f"{self.recoveries[-1]:.1f} s after the loss was noticed")
            self._lost_s = 0.0
        self._steps_told = step + 1
        self.seconds.append(seconds)
        self.report.step(step, loss, norm, skipped, rate, seconds)

    def _log_network(self, step: int, network_s: float, exposed_s: float, payload_bytes: int) -> None:
        ranks = self.generations[-1][1]
        of_step = {"network_ms": network_s * 1e3, "exposed_ms": exposed_s * 1e3, "sent_bytes": payload_bytes, "ranks": ranks}
        self.report.logs.write({"step": step} | of_step)

    def _take_offer(self, rank: int, about: dict[str, Any], ranges: dict) -> None:
        """Fetch and write a checkpoint, when all ranks that have a part of it offer it."""
        said = fill(About, about, "offer: ")
        offers = self._offers.setdefault(said.step, [])
        offers.append((rank, said, ranges))
        job = self._job_now
        if job is None or not self.saver or len(offers) < (job.count if job.is_in_parts else 1):
            return
        del self._offers[said.step]

        def state() -> dict[str, np.ndarray]:
            holder = GPT2(self.graph.model, self.graph.batch, self.graph.tiles, self.graph.options)
            for each, _, parts in offers:
                self.client.sync(fetch, self.client.rpc, job.addresses[each], self.run_id, holder.state, parts)
            self._call([job.addresses[each] for each, *_ in reversed(offers)], want, "taken")
            return holder.state

        self.saver.wait()
        self.saver.write_state(dataclasses.replace(said, run=self.saver.run), state)

    def _ask(self, job: Job) -> None:
        """Tell rank 0 what the person wants, once."""
        wanted = "stop" if self.stop.is_requested else "save" if self.stop.wants_save else ""
        if wanted and self._asked != "stop" and (wanted != self._asked or wanted == "save"):
            self._asked, self.stop.wants_save = wanted, False
            self._tell(job, wanted)

    def _regroup(self, job: Job, alive: set[str]) -> None:
        """Have the generation end after a step if somebody could take part who does not."""
        most = min(self.settings.ranks or self.micro_batches, self.micro_batches)
        if not self.settings.generations and not self._asked and job.count < most and len(alive) > job.count and self._steps_told:
            others = [member for member in self._roster(alive) if member.address not in job.addresses]
            if others:
                self._asked = "regroup"
                self._tell(job, "regroup")

    def _tell(self, job: Job, what: str) -> None:
        self._call([job.addresses[0]], want, what)  # which may be gone; that is noticed otherwise

    def _call(self, addresses: Sequence[str], function: Callable, *arguments: object) -> dict[str, Any]:
        """Call a function of kept.py in workers; return what they answer. One that does not, or is gone, is no reason to wait for long."""
        return ask(self.client, addresses, function, self.run_id, *arguments, timeout_s=self.settings.timeout_s)

    # The end ----------------------------------------------------------------------------------------------------------------------------

    def fetch_parameters(self) -> dict[str, np.ndarray]:
        """Return the parameters that rank 0 has at the end, or all stages together."""
        holder = GPT2(self.graph.model, self.graph.batch, self.graph.tiles, self.graph.options)
        job, _ = self._last
        for rank, address in enumerate(job.addresses if job.is_staged else job.addresses[:1]):
            ranges = {name: at for name, at in self._elements_of(rank).items() if name in holder.parameters}
            self.client.sync(fetch, self.client.rpc, address, self.run_id, holder.parameters, ranges)
        return holder.parameters

    def close(self) -> None:
        """Have the workers let go of the run."""
        with suppress(Exception):
            alive = sorted(self._alive())
            self._call(alive, reserve, 0.0)
            self._call(alive, forget)

    def _end_all(self) -> None:
        self.client.unsubscribe_topic(f"taskgpt-{self.run_id}")
        if self.saver:
            self.saver.wait()


def _is_early(future: Future) -> bool:
    """Return True if a rank has ended otherwise than as agreed."""
    if not future.done():
        return False
    if future.status != "finished":
        return True
    try:
        return bool(future.result(timeout=_RESULT_S).why)
    except Exception:  # its worker is gone since
        return True


@contextmanager
def driving(driver: Driver) -> Iterator[Driver]:
    """Have the workers let go of the run at the end."""
    try:
        yield driver
    finally:
        driver.close()
