"""The driver: the process that a person has started. It keeps who takes part, and leads a run through its generations.

A generation is a fixed set of ranks, a long Dask task in a worker each. It ends as agreed, after its last step; or because a rank is lost:
then the others, who hear it from each other, keep their state, which is that after a whole number of steps. The next generation begins with
the workers that are there, from the newest state that one of them has, or else from the newest checkpoint. A worker that has come meanwhile
takes part as soon as a step ends.

Nothing of the cluster's own settings is relied on: every generation has keys of its own, is pinned to its workers and is never run twice.
What a generation has left behind is not inferred from how it ended: each worker is asked.
"""

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

from taskgpt.cluster import on_disk
from taskgpt.cluster.checks import Member, native_workers
from taskgpt.cluster.job import END, Ended, Job
from taskgpt.cluster.kept import NO_STATE, Held, ending, fetch, forget, keep_room, make_room, put, reserve, want
from taskgpt.cluster.membership import Membership
from taskgpt.cluster.offers import Offers
from taskgpt.cluster.rank import train_rank
from taskgpt.cluster.settings import Settings, schedule
from taskgpt.cluster.traces import Traces
from taskgpt.config import GraphConfig
from taskgpt.errors import UserError
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.checkpoints import resumable
from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.replicas import share
from taskgpt.gpt2.stages import Stage
from taskgpt.lab.dashboard.live import Live, Rank
from taskgpt.runs.console import Console, StopRequest

_LOOK_S, _POLL_S = 0.1, 0.5  # between looks for news of ranks, and for workers that have come or gone
_LEASE_S = 120.0  # what a driver may be silent beside `wait_s`
_MOST_FRUITLESS = 5
_RESULT_S = 10.0  # for a result that a worker has
_GRACE_S = 5.0  # beyond the time after which a silent rank is lost: until then the others have noticed


class _Gone(Exception):
    """A worker that does not take what it is given."""

    def __init__(self, address: str, why: BaseException):
        super().__init__(str(why) or type(why).__name__)
        self.address = address


class Driver:
    """Leads a run. `roster`: which of some addresses are fit to be ranks; `on_data(description, fingerprint)`: called when rank 0 has
    opened its data, before it trains; `on_log(line)`: called for what a worker logs; `offers`: of checkpoints, which needs a saver where
    they are to be written; `folder`: the run's, None if it has none; `traces`: what collects traces, None where nothing does; `live`: what
    somebody is shown meanwhile, likewise.

    After `run`: seconds of every step; network, of every step (seconds of exchanges, seconds of them in which nothing else was left to do,
    bytes that rank 0 sent); generations, (first step, ranks) of each that the result comes from; recoveries, in seconds from the news of a
    loss to the next step; ended, how each rank of the last generation has.
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
        self.offers = Offers(client, settings.timeout_s, self._new_state)
        self.folder: Path | None = None
        self.traces: Traces | None = None
        self.live: Live | None = None
        self.on_data: Callable[[str, dict[str, Any]], None] = lambda description, fingerprint: None
        self.on_log: Callable[[str], None] = report.say
        self._membership = Membership(client, settings, self.run_id, roster)
        self._begin: tuple[Path, About] | None = None  # the checkpoint that the run goes on from
        self._best_val_loss = math.inf
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._steps_told = 0
        self._told: set[tuple[str, int]] = set()
        self._hung: dict[int, str] = {}  # ranks of this generation, and why
        self._asked = ""
        self._pushed = False  # the state of this generation comes from a checkpoint
        self._job_now: Job | None = None
        self._number = -1  # of the generation
        self._fruitless = 0  # generations, the last ones, that have done no step
        self._lines: dict[int, list[tuple[int, int]]] = {}  # `generations` of each
        self._whys: list[str] = []  # what was wrong at ranks in the last generation
        self._lost_s = 0.0  # when a loss was noticed that is not made good yet

    def resume(self, checkpoint: Path, about: About, best_val_loss: float) -> None:
        """Go on from a checkpoint. Before `run`."""
        self._begin, self._best_val_loss, self._steps_told = (checkpoint, about), best_val_loss, about.step
        self.offers.saved_step = about.step

    # The run --------------------------------------------------------------------------------------------------------------------------

    def run(self) -> Ended:
        """Train to the last step, or until a stop; return how rank 0 ended. Raises UserError for what cannot go on."""
        plan = schedule(self.settings.generations)
        try:
            while True:
                self.client.subscribe_topic(f"taskgpt-{self.run_id}", lambda event: self._news.put(event[1]))  # it may have connected anew
                members, held = self._choose(plan)
                try:
                    job = self._job(members, plan, held)
                except _Gone as gone:
                    self._lose("a worker", gone.address, str(gone))
                    continue
                before = self._steps_told
                ended = self._generation(job)
                self._fruitless = self._fruitless + 1 if self._steps_told == before else 0
                whys = list(dict.fromkeys([*(each.why for each in ended.values() if each.why), *self._whys]))
                first = next((each for each in ended.values() if each.diverged), ended.get(0))  # which one of them finds, all do
                if first and (first.diverged or not first.why):
                    self.ended = ended
                    if first.diverged or first.asked == "stop" or first.step >= self.last_step or self.stop.is_requested:
                        self._last = job, first
                        return first
                if self._fruitless == _MOST_FRUITLESS:
                    whys += [str(self.offers.saver.error)] if self.offers.saver and self.offers.saver.error else []
                    raise UserError(
                        f"{self.settings.where}: {_MOST_FRUITLESS} generations in a row ended without a step: "
                        f"{'; '.join(whys) or 'all ranks were lost'}{self._go_on()}"
                    )
        finally:
            self._end_all()

    @property
    def last_step(self) -> int:
        """After how many steps the run ends."""
        most, steps = self.flags["max_tokens"], self.flags["steps"]
        rows = self.micro_batches * self.graph.batch.rows
        return steps if most is None else min(steps, -(-most // rows))

    def _choose(self, plan: Sequence[tuple[int, int]]) -> tuple[list[Member], dict[str, Held]]:
        """Return the members of the next generation, and what workers have, by address. Raises UserError if too few come."""
        until = time.monotonic() + self.settings.wait_s
        while True:
            self._pump(_LOOK_S)
            held = self._membership.holding()
            step = max([0, self._saved()[1], *(each.step for each in held.values())])
            planned = [self.settings.stages] if self.settings.is_staged else [count for first, count in plan if first <= step]
            most = planned[-1] if planned else min(self.settings.ranks or self.micro_batches, self.micro_batches)
            least = planned[-1] if planned else 1
            members, taken = self._membership.reserve(held, least, most)
            if members:
                return members, {member.address: each for member, each in held.items()}
            if self.stop.is_requested or time.monotonic() > until:
                others = f" ({taken} are in use by other runs)" * (taken > 0)
                raise UserError(
                    f"{self.settings.where}: {len(held) - taken} workers are left{others}, "
                    f"wanted {least} within {self.settings.wait_s:g} s; start workers, or wait longer (wait_s){self._go_on()}"
                )
            time.sleep(_POLL_S)

    def _saved(self) -> tuple[Path | None, int]:
        """Return the newest checkpoint, and after how many steps it is; None and -1 if there is none."""
        saved = self.offers.saver.newest if self.offers.saver else self._begin and self._begin[0]
        return saved, resumable.read_about(saved).step if saved else -1

    def _go_on(self) -> str:
        return ", then go on with --resume" if self.offers.saver and self.offers.saver.newest else ""

    def _job(self, members: Sequence[Member], plan: Sequence[tuple[int, int]], held: dict[str, Held]) -> Job:
        """Return the next generation, which begins with the newest state there is; have one of its members hold it. Raises _Gone."""
        addresses = tuple(member.address for member in members)
        newest = max(held[address] for address in addresses)
        if self.settings.is_staged or newest == NO_STATE:  # what is being written is the newest
            newest = NO_STATE
            while self.offers.is_writing:
                self._pump(_LOOK_S)
        saved, saved_step = self._saved()
        self._number += 1
        self._pushed = newest.step < saved_step or (newest == NO_STATE and self.flags["init"] is not None)
        step, line = max(0, newest.step, saved_step), newest.generation
        if self._pushed:
            newest, line = Held(step, self._number), self.offers.generations.get(saved_step, -1)
        self.native_workers = tuple(native_workers(member, members, self.settings) for member in members)
        until = min([first for first, _ in plan if first > step], default=self.last_step)
        self.generations = [(first, count) for first, count in self._lines.get(line, []) if first < step] + [(step, len(members))]
        self._lines[self._number] = self.generations
        if self._pushed:
            self._push(addresses, saved)
        if self.live:
            self.live.begin_ranks(self._rank_of(rank, members, step) for rank in range(len(members)))
        if self._number:
            where = "from memory" if step and not self._pushed else ("from the last checkpoint" if step else "from the beginning")
            self.report.tell("generation", f"{self._number}: {len(members)} ranks go on after {step} steps, {where}")
        return Job(
            run=self.run_id, generation=self._number, addresses=addresses,
            flags=self.flags, graph=self.graph, micro_batches=self.micro_batches, until=until, kept=None if newest == NO_STATE else newest,
            workers=self.native_workers,
            bucket_bytes=int(self.settings.bucket_mib * 2**20), as_bf16=self.settings.wire == "bf16", is_sharded=self.settings.zero,
            is_staged=self.settings.is_staged, is_watched=self.live is not None,
            timeout_s=self.settings.timeout_s, hang_s=self.settings.hang_s, lease_s=self.settings.wait_s + _LEASE_S,
            mpi=self._mpi_ranks(members), record=self.settings.record,
            best_val_loss=self._best_val_loss,
            saved_step=min(self.offers.saved_step, step), unsaved_s=time.monotonic() - self.offers.saved_s,
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

    def _push(self, addresses: Sequence[str], checkpoint: Path | None) -> None:
        """Put the state of a checkpoint, or of --init, into the first worker, or into each its stage. Raises _Gone."""
        about, arrays = None, self._new_state(parameters_alone=checkpoint is None)
        if checkpoint is not None:
            about = resumable.read_about(checkpoint)
            resumable.load_state(checkpoint, arrays)
        else:
            checkpoints.load(self.flags["init"], self.graph.model, arrays)
        of, lease_s = (self.graph.model, self.graph.batch, self.graph.tiles, self.graph.options), self.settings.wait_s + _LEASE_S
        for rank, address in enumerate(addresses if self.settings.is_staged else addresses[:1]):
            ranges = {name: at for name, at in self._elements_of(rank).items() if name in arrays}
            self._place(address, make_room, of, lease_s)
            try:
                self.client.sync(put, self.client.rpc, address, self.run_id, arrays, ranges, self.settings.timeout_s)
            except (OSError, LookupError) as error:
                raise _Gone(address, error) from None
            self._place(address, keep_room, about, self._number)

    def _place(self, address: str, function: Callable, *arguments: object) -> None:
        """Call what gives a worker a state. Raises _Gone, or UserError if it cannot take one."""
        failed = self._membership.call([address], function, *arguments)[address]
        if isinstance(failed, OSError):
            raise _Gone(address, failed)
        if isinstance(failed, Exception):
            raise UserError(f"{address}: cannot take the state of the run: {failed}")

    def _new_state(self, parameters_alone: bool = False) -> dict[str, np.ndarray]:
        """Return arrays for the whole of a state: on the disk of the run's folder, as this machine may be a small one.

        Where there is none, or no room on it, in memory, which is taken as it is written.
        """
        m = GPT2(self.graph.model, self.graph.batch, self.graph.tiles, self.graph.options)
        state = m.parameters if parameters_alone else m.state
        with suppress(OSError):
            return on_disk.empty_like(state, self.folder) if self.folder else state
        return state

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
        self._asked, self._job_now, self._hung, noticed, looked = "", job, {}, 0.0, 0.0
        ended: dict[int, Ended | None] = {}
        self.offers.begin(job)
        try:
            while len(ended) < job.count:
                self._pump(_LOOK_S)
                self._ask(job)
                for rank, future in enumerate(futures):
                    if future.done() and rank not in ended:
                        ended[rank] = self._ended(job, rank, future)
                if time.monotonic() - looked > _POLL_S:
                    looked = time.monotonic()
                    alive = self._membership.alive()
                    gone = [rank for rank, at in enumerate(job.addresses) if (at not in alive or rank in self._hung) and rank not in ended]
                    self._regroup(job, alive)
                    if not noticed and (gone or any(each is None or each.why for each in ended.values())):
                        noticed = self._lost_s = time.monotonic()
                    left = [rank for rank in range(job.count) if rank not in ended]
                    is_late = time.monotonic() - noticed > self.settings.timeout_s + _GRACE_S
                    if noticed and (left == gone or (is_late and not self.offers.is_fetching)):
                        break
            self._pump(0)
            return self._collect(job, futures, ended)
        finally:
            self.stop.wants_save |= self._asked == "save"  # for which nothing was offered
            with suppress(Exception):
                self.client.cancel(futures, force=True)

    def _ended(self, job: Job, rank: int, future: Future) -> Ended | None:
        """Return how a rank has ended, None if it does not say."""
        address = job.addresses[rank]
        answer = self._membership.call([address], ending, job.generation)[address] if future.status == "finished" else None
        return answer if isinstance(answer, Ended) else None

    def _collect(self, job: Job, futures: Sequence[Future], found: dict[int, Ended | None]) -> dict[int, Ended]:
        """Return how the ranks ended that have come back; note which are lost. Raises what is wrong at a rank."""
        ended = {rank: each for rank, each in sorted(found.items()) if each is not None}
        self._whys = []
        for rank, (future, address) in enumerate(zip(futures, job.addresses, strict=True)):
            error = future.exception(timeout=_RESULT_S) if future.status == "error" else None
            if isinstance(error, UserError):
                raise UserError(f"rank {rank} ({address}): {error}")
            if error is not None and not isinstance(error, KilledWorker | CancelledError | OSError):
                raise error
            if rank not in ended:
                self._lose(f"rank {rank}", address, str(error) if isinstance(error, OSError) else self._hung.get(rank, ""))
            if self.live and rank not in ended:
                self.live.lose_rank(rank)
            elif self.live and (seconds := ended[rank].seconds):  # it may have said nothing of its last steps
                self.live.rank(rank, ended[rank].step, seconds[-1], ended[rank].exposed_s[-1] if ended[rank].exposed_s else None)
        if self.traces:
            self.traces.collect(job, ended)
        return ended

    def _lose(self, who: str, address: str, why: str) -> None:
        """Count a worker as lost, and say so, and why if it has said that."""
        self._membership.lose(address)
        self._whys += [f"{who} ({address}): {why}"] if why else []
        self.report.tell("lost", f"{who} ({address}), after {self._steps_told} steps" + (why and f": {why}"))

    # News and wishes --------------------------------------------------------------------------------------------------------------------

    def _pump(self, seconds: float) -> None:
        """Take news of ranks, waiting for the first so long."""
        with suppress(queue.Empty):
            self._take(self._news.get(timeout=seconds) if seconds else self._news.get_nowait())
            while True:
                self._take(self._news.get_nowait())
        self.offers.poll()

    def _take(self, news: dict[str, Any]) -> None:
        what, found = news["what"], news["found"]
        if news["generation"] != self._number:
            return
        if what == "offer":
            self._asked = "" if self._asked == "save" else self._asked
            self.offers.take(*found)
        elif what == "data":
            self.on_data(found[0], json.loads(found[1]))
            if self.traces and self._job_now:
                self.traces.begin(self._job_now)
        elif what == "say":
            self.report.say(found[0])
        elif what == "hung":
            self._hung[found[0]] = f"{found[1]}; restart this worker, or the job that it is of, to have it take part again"
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

    def _ask(self, job: Job) -> None:
        """Tell rank 0 what the person wants, until it has answered."""
        wanted = "stop" if self.stop.is_requested else "save" if self.stop.wants_save and self.offers.saver else ""
        if wanted and self._asked != "stop" and (wanted != self._asked or wanted == "save") and self._tell(job, wanted):
            self._asked, self.stop.wants_save = wanted, False

    def _regroup(self, job: Job, alive: set[str]) -> None:
        """Have the generation end after a step if somebody takes part who does not yet, and its state outlives it."""
        most = min(self.settings.ranks or self.micro_batches, self.micro_batches)
        is_free = not self.settings.generations and not self._asked and (self.offers.saver is not None or not job.is_in_parts)
        if is_free and job.count < most and self._steps_told and self._membership.has_newcomer(job.addresses, alive):
            self._asked = "regroup" if self._tell(job, "regroup") else ""

    def _tell(self, job: Job, what: str) -> bool:
        """Ask rank 0 for something; return False if it does not answer: it may be gone, which is noticed otherwise."""
        return self._membership.call(job.addresses[:1], want, job.generation, what)[job.addresses[0]] is True

    # The end ----------------------------------------------------------------------------------------------------------------------------

    def fetch_parameters(self) -> dict[str, np.ndarray]:
        """Return the parameters that rank 0 has at the end, or all stages together. Raises UserError if a worker is gone."""
        parameters = self._new_state(parameters_alone=True)
        job, _ = self._last
        for rank, address in enumerate(job.addresses if job.is_staged else job.addresses[:1]):
            ranges = {name: at for name, at in self._elements_of(rank).items() if name in parameters}
            where = self.client.rpc, address, self.run_id, job.offer_of(END)
            try:
                self.client.sync(fetch, *where, parameters, ranges, self.settings.timeout_s)
            except (OSError, LookupError) as error:
                raise UserError(f"{address}: the parameters were lost on the way: {error}{self._go_on()}") from None
        return parameters

    def close(self) -> None:
        """Have the workers let go of the run."""
        with suppress(Exception):
            alive = sorted(self._membership.alive())
            self._membership.call(alive, reserve, 0.0)
            self._membership.call(alive, forget)

    def _end_all(self) -> None:
        with suppress(Exception):  # the scheduler may be gone
            self.client.unsubscribe_topic(f"taskgpt-{self.run_id}")
        self.offers.wait()


@contextmanager
def driving(driver: Driver) -> Iterator[Driver]:
    """Have the workers let go of the run at the end."""
    try:
        yield driver
    finally:
        driver.close()
