"""`taskgpt train` on a cluster: what the command says, turned into a driver and its ranks; and what a person sees of them."""

import argparse
import dataclasses
import shlex
import statistics
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from distributed import Client

from taskgpt.cluster.checks import Member, ready
from taskgpt.cluster.driver import Driver, driving
from taskgpt.cluster.job import Ended
from taskgpt.cluster.membership import Roster
from taskgpt.cluster.opening import opened
from taskgpt.cluster.settings import Settings, schedule
from taskgpt.cluster.traces import Traces
from taskgpt.config import GraphConfig, SchedulerConfig
from taskgpt.errors import UserError, shorten
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.replicas import Replica
from taskgpt.gpt2.stages import Stage
from taskgpt.gpt2.steps import Steps
from taskgpt.lab import machine
from taskgpt.lab.disturbance import Disturbance
from taskgpt.lab.traces.formats import save, verify_can_save
from taskgpt.lab.traces.process import this_process
from taskgpt.lab.traces.trace import RECORD
from taskgpt.runs.console import Console, StopRequest
from taskgpt.runs.folder import now
from taskgpt.runs.saving import Every
from taskgpt.runs.start import Start, as_argv
from taskgpt.runs.summary import summarize

if TYPE_CHECKING:
    from taskgpt.lab.dashboard.dashboard import Dashboard

_HERE_ONLY = ("check", "report")  # flags that look into this process
WORKERS_LOG = "workers.log"  # in a run's folder
_TOLD_FLAGS = (
    "data", "steps", "lr", "lr_schedule", "warmup", "final_lr", "weight_decay", "val_every", "val_batches", "sample_every", "seed", "init",
    "save_every", "max_tokens",
)  # fmt: skip  # what ranks are told of a command


class ClusterTraining:
    """A run on a cluster, from its command to its summary. `default`: the flags of a command that says nothing."""

    def __init__(
        self,
        start: Start,
        command: str,
        default: argparse.Namespace,
        configs: tuple[GraphConfig, SchedulerConfig],
        report: Console,
        stop: StopRequest,
    ):
        self.start, self.flags, self.command, self.default = start, start.flags, command, default
        self.graph, self.scheduler = configs
        self.settings: Settings = self.scheduler.settings
        self.report, self.stop = report, stop
        self._description = ""
        self._disturbance = Disturbance()
        self._dashboard: Dashboard | None = None

    def run(self, client: Client | None = None) -> int:
        """Train; return the exit code. `client`: of a cluster that is open already. Raises UserError."""
        flags = self.flags
        for name in _HERE_ONLY:
            if getattr(flags, name):
                raise UserError(f"--{name}: is not for a run on a cluster; take a scheduler of this machine for that")
        if flags.save is not None:
            checkpoints.verify_can_save(flags.save, self.graph.model, 4 * self.graph.model.parameter_count())
        Every.of("--save-every", flags.save_every)
        record = (self.settings.record or RECORD) if flags.trace is not None else 0
        self.settings = dataclasses.replace(self.settings, record=record)
        if flags.trace is not None:
            verify_can_save(flags.trace)
        if flags.dashboard is not None:
            from taskgpt.lab.dashboard.dashboard import Dashboard  # here, as it takes half a second, and needs bokeh

            live = self.report.open_live(0)
            live.begin_ranks(())
            self._dashboard = Dashboard(live, flags.dashboard)
        if self.settings.stages > self.graph.model.layers:
            wanted = f"stages: wanted at most {self.graph.model.layers}, one for each layer of the model, got {self.settings.stages}"
            raise UserError(f"{wanted}; take fewer")
        with nullcontext(client) if client else opened(self.settings, self.report.say) as cluster:
            members = ready(cluster, self.settings, self._bytes_needed(), self.report.say)
            if not self.settings.is_staged and self.graph.batch.accumulate == 1 and self.start.about is None and flags.total_batch is None:
                batch = dataclasses.replace(self.graph.batch, accumulate=len(members))
                self.graph = dataclasses.replace(self.graph, batch=batch)
            self._verify_generations()
            return self._train(cluster, members)

    def _verify_generations(self) -> None:
        """Raises UserError for a plan of generations that this run cannot have."""
        planned, micro_batches = schedule(self.settings.generations), self.graph.batch.accumulate
        if planned and (most := max(count for _, count in planned)) > micro_batches:
            wanted = f"wanted at most {micro_batches} ranks, one for each micro-batch of a step, got {most}"
            raise UserError(f"generations: {wanted}; take fewer, or a larger --total-batch")
        if self.settings.zero and len(planned) > 1 and self.start.folder is None:
            raise UserError("generations: with zero, no rank has the whole state to go on from; give the run a folder for it, --out DIR")

    def _bytes_needed(self) -> int:
        """Return the bytes of a rank's tensors, and of the copy of its state that a checkpoint is made from; of stages the largest."""
        graph, replica, count = self.graph, Replica(0, 2, 2, None, 1), self.settings.stages  # type: ignore[arg-type]
        if self.settings.is_staged:
            stages = [Stage(rank, count, graph.model, graph.batch.accumulate, GPT2.SLOTS, None) for rank in range(count)]
            return max(GPT2.bytes_needed(graph.model, graph.batch, graph.tiles, graph.options, stage=stage) for stage in stages)
        needed = GPT2.bytes_needed(graph.model, graph.batch, graph.tiles, graph.options, replica)
        return needed + (12 * graph.model.parameter_count() if self.flags.save_every else 0)

    def _train(self, client: Client, members: list[Member]) -> int:
        graph, flags, start, report, stop = self.graph, self.flags, self.start, self.report, self.stop
        told = {name: getattr(flags, name) for name in _TOLD_FLAGS} | {"has_folder": start.folder is not None}
        if self.settings.is_staged and flags.sample_every:
            told["sample_every"] = 0
            report.say("stages write no samples on the way; `taskgpt sample --init RUN` does, from a checkpoint")
        driver = Driver(client, self.settings, Roster(client, members, self._bytes_needed()).members, graph, told, report, stop)
        driver.on_log = self._log_of_worker
        driver.folder = start.folder.path if start.folder else None
        driver.traces = Traces(client, self.settings.timeout_s) if flags.trace is not None else None
        driver.live = self._dashboard.live if self._dashboard else None
        if start.about is not None:
            driver.resume(start.checkpoint, start.about, start.best_val_loss)
        holder = GPT2(graph.model, graph.batch, graph.tiles, graph.options)  # says how large things are; nobody writes into it
        steps = Steps(holder)
        report.open_logs(start.logs())
        driver.on_data = lambda description, fingerprint: self._begin(driver, holder, steps, members, description, fingerprint)
        stop.can_wait = True
        with self._dashboard.serve() if self._dashboard else nullcontext(), driving(driver):
            if flags.max_minutes is not None:
                stop.end_after(60 * flags.max_minutes)
            with report.progress(driver.last_step):
                ended = driver.run()
            failures = []
            if ended.diverged:
                failures.append(
                    f"after {ended.step} steps the {ended.diverged}, and nothing was saved; try a smaller --lr, or another --init"
                )
            elif driver.offers.saver and driver.offers.saver.error:
                failures.append(str(driver.offers.saver.error))
            if flags.save is not None and not failures and driver.seconds:
                checkpoints.save(flags.save, graph.model, driver.fetch_parameters())
                report.say(f"saved {flags.save}")
        stop.can_wait = False
        self._summary(driver, ended, holder, steps, members)
        self._save_trace(driver)
        if driver.offers.saver and driver.offers.saver.newest and ended.step < flags.steps:
            report.tell("go on with", f"taskgpt train --resume {shlex.quote(str(start.folder.path))}")
        if failures:
            raise UserError("; ".join(failures))
        return stop.exit_code or (2 if report.has_lost_log or report.has_lost_output else 0)

    def _log_of_worker(self, line: str) -> None:
        """Show what a worker has logged, and add it to the folder's log of workers."""
        self.report.notes([line])
        if self.start.folder is not None:
            try:
                with open(self.start.folder.path / WORKERS_LOG, "a", encoding="utf-8") as file:
                    file.write(f"{now()} {line}\n")
            except OSError as error:  # the training is worth more
                self.report.notes([f"{WORKERS_LOG}: cannot write: {error.strerror}"])

    def _save_trace(self, driver: Driver) -> None:
        """Write the trace of all ranks. Raises UserError."""
        if driver.traces is None:
            return
        self.report.notes(driver.traces.notes)
        trace = driver.traces.merged(
            {"command": self.command, "machine": machine.describe(), "process": dataclasses.asdict(this_process(""))}
        )
        if trace is None or not driver.seconds:
            self.report.tell("trace", f"no step ran; {self.flags.trace} stays as it was")
        else:
            self.report.tell("trace", save(trace, self.flags.trace))

    def _begin(self, driver: Driver, m: GPT2, steps: Steps, members: list[Member], description: str, fingerprint: dict[str, Any]) -> None:
        """Say what runs, when rank 0 has told what its data is; from then on the folder is the run's own."""
        if self._description:
            return  # a later generation
        self._description, start, report = description, self.start, self.report
        changes = start.verify(self.graph, fingerprint) if start.about else []
        if start.folder:
            argv = as_argv(self.flags, self.default)
            driver.offers.saver = start.saver(m, Every(), argv, self.graph, fingerprint, report, self.stop)
        report.begin(self.graph, described(self.settings, members, driver.micro_batches), description, m, steps, driver.last_step)
        if start.checkpoint:
            report.tell("resumed", f"from {shorten(start.checkpoint)}, after {start.about.step:,} steps")
        if self._dashboard:
            report.tell("dashboard", self._dashboard.url)
        report.notes(changes)

    def _summary(self, driver: Driver, ended: Ended, m: GPT2, steps: Steps, members: list[Member]) -> None:
        report, found = self.report, self._disturbance.found(machine.usable_cores())
        ranks = driver.generations[-1][1]
        setup = self.flags, self.graph, self.scheduler, sum(driver.native_workers), self._description, report
        summary = summarize(*setup, m, steps, driver.seconds, ended.memory_bytes, found, ended.sha256)
        summary["cluster"] = {
            "ranks": ranks,
            "generations": " ".join(f"{step}x{count}" for step, count in driver.generations),
            "recoveries_s": driver.recoveries,
            "payload_bytes_per_step": driver.network[-1][2] if driver.network else 0,
        }
        if self.settings.is_staged:
            summary["cluster"] |= self._stages_found(driver)
        elif driver.network:
            steady = driver.network[1:] or driver.network
            network_s, exposed_s = (sum(each[at] for each in steady) for at in (0, 1))
            hidden = 1 - exposed_s / network_s if network_s else 1.0
            summary["cluster"] |= {"network_s_per_step": network_s / len(steady), "hidden_share": hidden}
            sent = f"{driver.network[-1][2] / 1e6:,.1f} MB sent by each rank a step"
            report.tell("network", f"{sent}, {network_s / len(steady) * 1e3:.1f} ms, {hidden:.0%} of it behind the backward pass")
        if len(driver.generations) > 1 and not self.settings.is_staged:  # of stages, they change no bit
            told = summary["cluster"]["generations"]
            report.tell("generations", told + " (repeat this run's bits with --set generations='...')" * (not driver.generations[0][0]))
        if driver.recoveries:
            report.tell("recoveries", f"{len(driver.recoveries)}, median {statistics.median(driver.recoveries):.1f} s")
        report.summary(summary, is_wanted=bool(driver.seconds))

    def _stages_found(self, driver: Driver) -> dict[str, Any]:
        """Say what each stage had to do, and return it: seconds without a task are a bubble, whether of the schedule or of the network."""
        count, micro_batches = self.settings.stages, driver.micro_batches
        ranks = [driver.ended[rank] for rank in range(count)] if len(driver.ended) == count else []
        needed = [round(each.memory_bytes / 2**30, 2) for each in ranks]
        found: dict[str, Any] = {"stages": count, "memory_gib": needed, "bubble_of_schedule": (count - 1) / (micro_batches + count - 1)}
        steps = len(ranks[0].busy_s) if ranks else 0
        if steps > 1:  # of the first, which warms up, nothing is said
            wall_s = sum(ranks[0].seconds[-steps + 1 :])
            shares = [sum(each.busy_s[1:]) / (wall_s * workers) for each, workers in zip(ranks, driver.native_workers, strict=True)]
            found |= {"busy_shares": shares, "bubble": 1 - statistics.fmean(shares)}
            said = f"{found['bubble']:.0%} of the workers' time without a task, {found['bubble_of_schedule']:.0%} by the schedule"
            self.report.tell("bubble", f"{said} of {count} stages and {micro_batches} micro-batch{'es' * (micro_batches > 1)}")
        self.report.tell("stages", f"{', '.join(f'{each:.2f}' for each in needed)} GiB at most")
        return found


def described(settings: Settings, members: list[Member], micro_batches: int) -> str:
    """Return a line for people: how many ranks of which cluster."""
    count = settings.stages if settings.is_staged else min(len(members), micro_batches)
    hosts = len({member.host for member in members[:count]})
    parts = [
        f"cluster: {count} {'stage' if settings.is_staged else 'rank'}{'s' * (count > 1)} on {hosts} machine{'s' * (hosts > 1)}",
        shorten(settings.where),
    ]
    parts += [f"{settings.wire} on the wire"] if settings.wire != "fp32" else []
    return ", ".join([*parts, "moments in shards"] if settings.zero else parts)
