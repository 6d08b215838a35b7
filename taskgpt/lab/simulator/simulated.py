"""Schedulers whose workers are simulated: the same plans, policies, queues and overlap of runs, with as many workers as one likes.

    costs = Costs(seconds, bytes)                              # of each task alone on the machine; see task_costs.py
    scheduler = simulated(config, machine, lambda graph: costs)
    trace = ...                                                # Traced(scheduler) records as for any other

Each is the scheduler itself, whose choices it makes: native's policies and queues, the loops as they are cut and dealt, the coarsened graph
in Dask's order. Only time is another: the clock of events.py. No task is run.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskgpt.config import SchedulerConfig
from taskgpt.errors import UserError
from taskgpt.lab.simulator import events
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.schedulers import loops, native, sequential, threads
from taskgpt.schedulers.native import worker
from taskgpt.schedulers.native.table import NOTHING
from taskgpt.schedulers.prepare import OncePerGraph
from taskgpt.schedulers.records import RECORD_TYPE
from taskgpt.tasks import Graph, Task
from taskgpt.tasks.cache import compile_function
from taskgpt.tasks.lowered import firsts


@dataclass(frozen=True, eq=False)
class Costs:
    """seconds: of each task alone on the machine. bytes: what each moves through memory, caches apart."""

    seconds: np.ndarray
    bytes: np.ndarray

    def coarsened(self, graph: Graph, coarse: Graph) -> "Costs":
        """Return the costs of the tasks that those of `graph` were merged into."""
        number = {id(call): task.number for task in coarse.tasks for call in task.calls}
        into = np.array([number[id(task.calls[0])] for task in graph.tasks], np.int64)
        return Costs(*(np.bincount(into, each, len(coarse.tasks)) for each in (self.seconds, self.bytes)))


def socket_of(machine: Machine, room: int = 1) -> tuple[int, int, float, float]:
    """Return what events.py is told of a socket, each of whose cores has room for so many workers."""
    return machine.cores_per_socket, room, machine.bandwidth_gbs * 1e9, machine.busy_speed


class Clocked:
    """What simulated schedulers share: the machine, the clock, the costs of graphs, and records."""

    _signatures = events.FORK_JOIN  # of what is to be compiled

    def __init__(self, settings: Any, machine: Machine, costs_of: Callable[[Graph], Costs]):
        super().__init__(settings)
        self.machine, self._costs_of = machine, costs_of
        self.clock = np.ones(1)  # not 0: some formats begin a little before the first task
        self._state, self._running = np.ones((4, self.workers)), np.full(self.workers, NOTHING, np.int64)
        self._times, self._costs = np.zeros((2, 3, 0)), np.zeros((2, 2, 0))
        self._successors_of = OncePerGraph(lambda graph: successors(graph.tasks))
        self._kept: list[np.ndarray] = []
        self._begun: dict[int, float] = {}  # when the runs under way were submitted, by number
        self._numbers = itertools.count()  # of runs, for those that run one at a time

    def _start(self) -> None:
        for function, signature in self._signatures.items():
            compile_function(function, signature)

    def _stop(self) -> None:
        """Nothing was started."""

    def describe(self) -> str:
        return f"simulated {super().describe()}"

    @property
    def _shared(self) -> tuple[np.ndarray, ...]:
        return self.clock, self._state, self._running, self._times, self._costs

    @property
    def _socket(self) -> tuple[int, int, float, float]:
        return socket_of(self.machine)

    def _lay_out(self, slot: int, graph: Graph, costs: Costs) -> None:
        """Put the costs of a graph's tasks where the events find them."""
        count = len(graph.tasks)
        if count > self._times.shape[2]:
            wider = count - self._times.shape[2]
            self._times, self._costs = (np.pad(each, ((0, 0), (0, 0), (0, wider))) for each in (self._times, self._costs))
        self._costs[slot, :, :count] = costs.seconds, costs.bytes

    def _lay_out_calls(self, graph: Graph, costs: Costs) -> None:
        """The same, of tasks that Python calls."""
        calls = np.array([len(task.calls) for task in graph.tasks])
        self._lay_out(0, graph, Costs(costs.seconds + calls * self.machine.call_us * 1e-6, costs.bytes))

    def _fork_join(self, graph: Graph, parts: Sequence[Sequence[Sequence[Task]]], is_static: bool) -> None:
        """Simulate loops, each of parts, one after the other."""
        self._lay_out_calls(graph, self._costs_of(graph))
        since = float(self.clock[0])
        loop_first, part_first = firsts(map(len, parts)), firsts(len(part) for loop in parts for part in loop)
        tasks = np.array([task.number for loop in parts for part in loop for task in part], np.int64)
        events.fork_join(*self._shared, loop_first, part_first, tasks, is_static, self._socket, self.machine.barrier_us * 1e-6)
        self._keep(next(self._numbers), 0, graph, self._ready(graph, 0, since))

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
        ready = np.full(len(graph.tasks), since)
        _let_wait(ready, self._times[slot, 1, : len(graph.tasks)], *self._successors_of(graph))
        return ready

    def take_records(self) -> tuple[np.ndarray, int]:
        kept, self._kept = self._kept, []
        records = np.concatenate([np.empty(0, RECORD_TYPE), *kept])
        return records[np.argsort(records["start_ns"], kind="stable")], 0


def successors(tasks: Sequence[Task], rank: Callable[[int], int] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return (first, successor): those of task t are successor[first[t]:first[t + 1]], of the highest rank first."""
    found = [sorted(task.successors, key=rank, reverse=rank is not None) for task in tasks]
    return firsts(map(len, found)), np.array(list(itertools.chain.from_iterable(found)), np.int64)


def _let_wait(ready: np.ndarray, stops: np.ndarray, first: np.ndarray, successor: np.ndarray) -> None:
    """Have each successor be ready no earlier than the tasks that it waits for stop."""
    np.maximum.at(ready, successor, np.repeat(stops, np.diff(first)))


class Simulated(Clocked, native.Scheduler):
    """The native scheduler: `_finish`, which waits for its workers, is replaced by the clock."""

    _signatures = events.UNTIL_OVER | worker.SIGNATURES
    _before: tuple[Any, np.ndarray] | None = None  # the run that was over last, and when its tasks ended

    def _start(self) -> None:
        super()._start()
        self._make_table()

    def _submit(self, graph: Graph, before: Any, owner: object | None = None) -> Any:
        self._lay_out(self._count % 2, graph, self._costs_of(graph))
        self._plans(graph).seconds = self._costs[self._count % 2, 0, : len(graph.tasks)].copy()  # known, not to be measured
        self._begun[self._count] = float(self.clock[0])
        return super()._submit(graph, before, owner)

    def _finish(self, run: Any) -> Graph:
        while not run.is_over:
            over = events.until_over(self._address, run.slot, *self._shared, self._socket, self.machine.task_us * 1e-6)
            assert over, f"{run.graph.name}: tasks wait for each other"
            self._end(run)
            ready = self._ready(run.graph, run.slot, self._begun.pop(run.number))
            if self._before and self._before[0].number == run.number - 1 and self._before[0].edges:
                _let_wait(ready, self._before[1], *self._before[0].edges)
            self._before = run, self._times[run.slot, 1, : run.plan.tasks].copy()
            self._keep(run.number, run.slot, run.graph, ready)
        return run.graph

    def _end(self, run: Any) -> None:
        run.is_over = True
        run.graph.runs.discard(run)
        self._runs.remove(run)

    def _abandon(self) -> None:
        """Forget all runs; there is no worker to wait for."""
        worker.drop_all(self._address)
        self._forget_all()


class SimulatedSequential(Clocked, sequential.Scheduler):
    """Program order: one loop of one part."""

    def _run(self, graph: Graph) -> None:
        self._fork_join(graph, [[graph.tasks]], is_static=True)


class SimulatedLoops(Clocked, loops.Scheduler):
    """Fork-join."""

    def _run(self, graph: Graph) -> None:
        self._fork_join(graph, self._loops(graph), self.settings.chunks == "static")


class SimulatedThreads(Clocked, threads.Scheduler):
    """dask.threaded on the coarsened graph: the ready task that became ready last is next, of several the first in `dask.order.order`."""

    _signatures = events.CENTRAL
    is_newest_first = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._orders = OncePerGraph(self._order)

    @property
    def _overheads_us(self) -> tuple[float, float, float]:
        """Before a run begins, of each of its tasks; of each task that ended; between two messages to workers."""
        return self.machine.dask_begin_us, self.machine.dask_task_us, 0.0

    def _run(self, graph: Graph) -> None:
        coarse, costs = self.as_run(graph), self._costs_of(graph)
        self._lay_out_calls(coarse, costs if coarse is graph else costs.coarsened(graph, coarse))
        since = float(self.clock[0])
        begin, service, batch = (us * 1e-6 for us in self._overheads_us)
        self.clock[0] += begin * len(coarse.tasks)
        order = *self._orders(graph), self.is_newest_first
        over = events.central(*self._shared, *order, self._socket, (self.machine.cores, service, batch))
        assert over, f"{graph.name}: tasks wait for each other"
        self._keep(next(self._numbers), 0, coarse, self._ready(coarse, 0, since))

    def _order(self, graph: Graph) -> tuple[np.ndarray, ...]:
        """Return (first, successor, pending, order) for events.central."""
        from dask.order import order  # loads slowly

        tasks, coarse = self._dask_graph(graph)[0], self.as_run(graph).tasks
        place = {number: rank for (_, number), rank in order(tasks).items()}
        ranks = [place[task.number] for task in coarse]
        pending = np.array([len(task.predecessors) for task in coarse], np.int64)
        return *successors(coarse, ranks.__getitem__), pending, np.array(ranks, np.int64)


class SimulatedCluster(SimulatedThreads):
    """distributed on the coarsened graph: of the ready tasks the first in `dask.order.order` is next."""

    is_newest_first = False

    def describe(self) -> str:
        return f"simulated local-cluster: dask.distributed on {self.workers} workers, at most {self.settings.coarsen} tasks a step"

    @property
    def _overheads_us(self) -> tuple[float, float, float]:
        return self.machine.distributed_begin_us, self.machine.distributed_task_us, self.machine.distributed_batch_us


KINDS = {
    "native": Simulated,
    "sequential": SimulatedSequential,
    "loops": SimulatedLoops,
    "threads": SimulatedThreads,
    "local-cluster": SimulatedCluster,
}


def ms_a_step(scheduler: Clocked, graph: Graph, steps: int, overlap: bool = True) -> float:
    """Simulate so many steps; return all their time, shared out. `overlap`: the next may begin before one is over, where it can."""
    since = float(scheduler.clock[0])
    for graphs in [[graph] * steps] if overlap else [[graph]] * steps:
        for _ in scheduler.run_each(graphs):
            pass
    return (float(scheduler.clock[0]) - since) / steps * 1e3


def simulated(config: SchedulerConfig, machine: Machine, costs_of: Callable[[Graph], Costs]) -> Clocked:
    """Return that scheduler with simulated workers. Raises UserError for one that has no model, or too many workers."""
    if config.scheduler not in KINDS:
        raise UserError(f"--schedulers {config.name}: no model of {config.scheduler} to simulate; those with one: {', '.join(KINDS)}")
    found = KINDS[config.scheduler](config.settings, machine, costs_of)
    if found.workers > machine.cores:
        sockets = -(-found.workers // machine.cores_per_socket)
        raise UserError(
            f"--workers {found.workers}: the machine has {machine.sockets} x {machine.cores_per_socket} cores; choose fewer workers, "
            f"another --machine, or one of more sockets, --machine NAME:sockets={sockets}"
        )
    return found
