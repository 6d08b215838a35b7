"""Schedulers whose workers are simulated: the same plans, policies, queues and overlap of runs, with as many workers as one likes.

    costs = Costs(seconds, bytes)                              # of each task alone on the machine; see task_costs.py
    scheduler = Simulated(settings, machine, lambda graph: costs)
    trace = ...                                                # Traced(scheduler) records as for any other

`Simulated` is the native scheduler itself; only `_finish`, which waits for workers, is replaced by the clock of events.py. No task is run.
"""

import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np

from taskgpt.config import SchedulerConfig, fill
from taskgpt.errors import UserError, did_you_mean
from taskgpt.lab import events
from taskgpt.lab import machine as this
from taskgpt.schedulers import _ready as r
from taskgpt.schedulers import _worker, loops, native
from taskgpt.schedulers._record import RECORD_TYPE
from taskgpt.tasks import Graph
from taskgpt.tasks.kernel import compile_function

MACHINES = Path(__file__).with_name("machines")


@dataclass(frozen=True)
class Machine:
    """A machine file: what the simulation has to know. Bandwidth and cache are a socket's."""

    sockets: int = field(metadata={"at_least": 1})
    cores_per_socket: int = field(metadata={"at_least": 1})
    sgemm_gflops: float  # of one core, in fp32: task times measured elsewhere are scaled by it
    bandwidth_gbs: float  # of one socket, all its cores streaming
    cache_mib: float  # last-level cache of one socket
    task_us: float  # what the native scheduler adds to a task
    barrier_us: float  # what a fork and its barrier add to a parallel loop

    @classmethod
    def here(cls) -> Self:
        """Measure this machine, taken for one socket. The two overheads are those measured on the author's."""
        cores = this.usable_cores()
        bandwidth = this.bandwidth_gbs("update", cores)
        return cls(1, cores, this.sgemm_gflops(1), bandwidth, this.cache_bytes() / 2**20 or 32.0, task_us=0.3, barrier_us=30.0)

    @classmethod
    def load(cls, name: str) -> Self:
        """Read machines/NAME.toml, or the file that `name` is a path of; `here` is this machine. Raises UserError."""
        if name == "here":
            return cls.here()
        path = Path(name) if name.endswith(".toml") else MACHINES / f"{name}.toml"
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            known = ["here", *sorted(path.stem for path in MACHINES.glob("*.toml"))]
            raise UserError(f"--machine {name}: no such machine{did_you_mean(name, known)}; or give a path that ends in .toml") from None
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"--machine {path}: cannot be read: {error}") from None
        return fill(cls, table, f"{path.name}: ")


@dataclass(frozen=True, eq=False)
class Costs:
    """seconds: of each task alone on the machine. bytes: what each moves through memory, caches apart."""

    seconds: np.ndarray
    bytes: np.ndarray


class _Clock:
    """What both simulated schedulers share: the machine, the clock, the costs of graphs, and records."""

    def __init__(self, settings: Any, machine: Machine, costs_of: Callable[[Graph], Costs]):
        super().__init__(settings)
        self.machine, self._costs_of = machine, costs_of
        self.clock = np.ones(1)  # not 0: some formats begin a little before the first task
        self._state, self._entries = np.ones((3, self.workers)), np.full(self.workers, r.NOTHING, np.int64)
        self._times, self._costs = np.zeros((2, 3, 0)), np.zeros((2, 2, 0))
        self._kept: list[np.ndarray] = []
        self._begun: dict[int, float] = {}  # when the runs under way were submitted, by number

    @property
    def _shared(self) -> tuple[np.ndarray, ...]:
        return self.clock, self._state, self._entries, self._times, self._costs

    @property
    def _socket(self) -> tuple[int, float]:
        return self.machine.cores_per_socket, self.machine.bandwidth_gbs * 1e9

    def _lay_out(self, slot: int, graph: Graph) -> None:
        """Put the costs of a graph's tasks where the events find them."""
        count = len(graph.tasks)
        if count > self._times.shape[2]:
            wider = count - self._times.shape[2]
            self._times, self._costs = (np.pad(each, ((0, 0), (0, 0), (0, wider))) for each in (self._times, self._costs))
        costs = self._costs_of(graph)
        self._costs[slot, :, :count] = costs.seconds, costs.bytes

    def _keep(self, number: int, slot: int, graph: Graph, ready_s: np.ndarray) -> None:
        if self.settings.record:
            count = len(graph.tasks)
            rows = np.empty(count, RECORD_TYPE)
            start, stop, worker = self._times[slot, :, :count]
            rows["run"], rows["task"], rows["worker"] = number, np.arange(count), worker
            for name, seconds in (("ready_ns", ready_s), ("start_ns", start), ("stop_ns", stop)):
                rows[name] = np.rint(seconds * 1e9)
            rows["ready_ns"] = np.minimum(rows["ready_ns"], rows["start_ns"])
            self._kept.append(rows)

    def _ready(self, graph: Graph, slot: int, since: float) -> np.ndarray:
        """Return when each task's last predecessor of the same run was done, or the time given."""
        stop = self._times[slot, 1]
        return np.array([max((stop[p] for p in task.predecessors), default=since) for task in graph.tasks])

    def take_records(self) -> tuple[np.ndarray, int]:
        kept, self._kept = self._kept, []
        records = np.concatenate([np.empty(0, RECORD_TYPE), *kept])
        return records[np.argsort(records["start_ns"], kind="stable")], 0


class Simulated(_Clock, native.Scheduler):
    """The native scheduler with simulated workers."""

    _before: tuple[Any, np.ndarray] | None = None  # the run that was over last, and when its tasks ended

    def __enter__(self) -> Self:
        for function, signature in _worker.SIGNATURES.items():
            compile_function(function, signature)
        self._make_table()
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing was started."""

    def describe(self) -> str:
        return f"simulated {super().describe()}"

    def _submit(self, graph: Graph, before: Any, owner: object | None = None) -> Any:
        self._lay_out(self._count % 2, graph)
        self._plans(graph).seconds = self._costs[self._count % 2, 0, : len(graph.tasks)].copy()  # known, not to be measured
        self._begun[self._count] = float(self.clock[0])
        return super()._submit(graph, before, owner)

    def _finish(self, run: Any) -> Graph:
        while not run.is_over:
            over = events.until_over(self._address, run.slot, *self._shared, *self._socket, self.machine.task_us * 1e-6)
            assert over, f"{run.graph.name}: tasks wait for each other"
            run.is_over = True
            self._runs.remove(run)
            ready = self._ready(run.graph, run.slot, self._begun.pop(run.number))
            if self._before and self._before[0].number == run.number - 1 and self._before[0].edges:
                (first, successors), stops = self._before[0].edges, self._before[1]
                np.maximum.at(ready, successors, np.repeat(stops, np.diff(first)))
            self._before = run, self._times[run.slot, 1, : run.plan.tasks].copy()
            self._keep(run.number, run.slot, run.graph, ready)
        return run.graph


class SimulatedLoops(_Clock, loops.Scheduler):
    """Fork-join with simulated workers."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing was started."""

    def describe(self) -> str:
        return f"simulated {super().describe()}"

    def run(self, graph: Graph) -> None:
        self._lay_out(0, graph)
        since, number = float(self.clock[0]), self.recorder.count(graph)
        parts = self._loops(graph)
        loop_first = np.cumsum([0, *map(len, parts)])
        part_first = np.cumsum([0, *(len(part) for loop in parts for part in loop)])
        tasks = np.array([task.number for loop in parts for part in loop for task in part], np.int64)
        is_static = self.settings.chunks == "static"
        events.fork_join(*self._shared, loop_first, part_first, tasks, is_static, *self._socket, 0.0, self.machine.barrier_us * 1e-6)
        self._keep(number, 0, graph, self._ready(graph, 0, since))

    def take_records(self) -> tuple[np.ndarray, int]:
        self.recorder.take()  # which has counted the runs
        return _Clock.take_records(self)


def simulated(config: SchedulerConfig, machine: Machine, costs_of: Callable[[Graph], Costs]) -> Simulated | SimulatedLoops:
    """Return that scheduler with simulated workers. Raises UserError for one that cannot be simulated, or that has too many workers."""
    kinds = {"native": Simulated, "loops": SimulatedLoops}
    if config.scheduler not in kinds:
        raise UserError(f"{config.name}: cannot be simulated; known: {', '.join(kinds)} and their variants")
    found = kinds[config.scheduler](config.settings, machine, costs_of)
    if found.workers > machine.sockets * machine.cores_per_socket:
        raise UserError(
            f"--workers {found.workers}: the machine has {machine.sockets} x {machine.cores_per_socket} cores; "
            "choose fewer workers, or another --machine"
        )
    return found
