"""Training on several ranks, predicted: each computes its part of a batch, and gradients are added up in buckets behind backward.

    timeline = timeline_of("gpt2-124m", Times("measured"), config, machine, 8 << 20)  # of one rank, as if the others were infinitely near
    step(timeline, Network(gbits=10, latency_us=30), machine, ranks=64).seconds  # with what is exchanged
    rows(timeline, [Network(1, 30), Network(10, 30)], machine, [2, 4, 8])        # weak and strong scaling

A bucket of n bytes goes around a ring of N ranks in 2 (N - 1) messages of n / N bytes; of the first half, each is added to what is there.
Buckets take the link one after the other, in the order in which backward hands them in. What sending, receiving and adding take of a core
is taken from the tasks. The norm waits for all buckets, and the updates for the norm. docs/why/scaling.md has the formulas.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taskgpt.collectives import GATHER
from taskgpt.config import GraphConfig, SchedulerConfig
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.gpt2.replicas import Replica
from taskgpt.lab.named import make_config, with_changes
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.lab.simulator.simulated import Costs, simulated
from taskgpt.lab.simulator.task_costs import Times, traffic
from taskgpt.tasks import Graph, Task

STORED = (("options.update", "separate"), ("options.clip_norm", "1"))  # the same kernels without other ranks, so that they can be measured


@dataclass(frozen=True)
class Network:
    """A link's rate each way, in 10^9 bits a second, and how long a message is on its way besides, while others may be, too."""

    gbits: float
    latency_us: float


@dataclass(frozen=True)
class Bucket:
    """nbytes: of a rank. ready_s: when all of it is handed in, since the step began. is_gathered: not added up, but put side by side."""

    nbytes: float
    ready_s: float
    is_gathered: bool = False

    def exchange(self, ranks: int, network: Network, machine: Machine) -> tuple[float, float, float]:
        """Return the seconds that it takes the link, those that it takes a core, and those until its last message is there besides."""
        times = ranks - 1
        messages, nbytes = (times, self.nbytes * times) if self.is_gathered else (2 * times, 2 * self.nbytes * times / ranks)
        added = 0 if self.is_gathered else nbytes / 2
        each_s, copy_s, add_s = (
            number * us * 1e-6
            for number, us in ((messages, machine.message_us), (nbytes / 2**20, machine.copy_mib_us), (added / 2**20, machine.add_mib_us))
        )
        wire_s = nbytes * 8 / (network.gbits * 1e9)
        return each_s + max(wire_s, copy_s) + add_s, each_s + copy_s + add_s, messages * network.latency_us * 1e-6


@dataclass(frozen=True)
class Timeline:
    """A step of one rank, undisturbed. backward_s: when the last bucket is handed in; update_s: from the last bucket's end to the step's.

    alone_s: a step of the same graph on one machine, which need not store gradients. tokens: of a rank's micro-batch.
    """

    buckets: tuple[Bucket, ...]
    backward_s: float
    update_s: float
    alone_s: float
    cores: int
    tokens: int


@dataclass(frozen=True)
class Step:
    """seconds: all of it. exchange_s: during which buckets are exchanged; exposed_s: of these, when backward is over."""

    seconds: float
    exchange_s: float
    exposed_s: float

    @property
    def hidden(self) -> float:
        """Which part of the exchange is behind backward."""
        return 1 - self.exposed_s / self.exchange_s if self.exchange_s else 1.0


def step(timeline: Timeline, network: Network, machine: Machine, ranks: int) -> Step:
    """Return a step of so many ranks: a clock, and how far backward has come by it."""
    now = done = exchange_s = arrived = 0.0
    over = None if timeline.backward_s else 0.0  # when backward is
    for bucket in sorted(timeline.buckets, key=lambda bucket: bucket.ready_s):
        if done < bucket.ready_s:  # nothing to exchange yet
            now, done = now + bucket.ready_s - done, bucket.ready_s
        link_s, core_s, latency_s = bucket.exchange(ranks, network, machine)
        speed = 1 - core_s / link_s / timeline.cores if link_s else 1.0
        if over is None and done + link_s * speed >= timeline.backward_s:
            over = now + ((timeline.backward_s - done) / speed if speed else 0.0)
        now, done = now + link_s, min(done + link_s * speed, timeline.backward_s)
        exchange_s, arrived = exchange_s + link_s, max(arrived, now + latency_s)
    if over is None:
        over = now = now + timeline.backward_s - done
    end = max(now, arrived)
    return Step(end + timeline.update_s, exchange_s + max(0.0, arrived - now), end - over)


def rows(timeline: Timeline, networks: Iterable[Network], machine: Machine, ranks: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row for each network and number of ranks.

    Weak scaling: each rank has a micro-batch, whatever their number. Strong scaling: a step has as many micro-batches as the most ranks,
    which are dealt out; a rank with several exchanges gradients behind the last one.
    """
    most, found = max(ranks), []
    all_s = most * timeline.backward_s + timeline.update_s  # of one machine, which stores gradients of micro-batches, too
    for network in networks:
        for count in ranks:
            weak, each = step(timeline, network, machine, count), -(-most // count)
            strong_s = (each - 1) * timeline.backward_s + weak.seconds
            weak = weak if count > 1 else Step(timeline.alone_s, 0.0, 0.0)
            found.append(
                {
                    "gbits": network.gbits,
                    "ranks": count,
                    "step_ms": weak.seconds * 1e3,
                    "exchange_ms": weak.exchange_s * 1e3,
                    "exposed_ms": weak.exposed_s * 1e3,
                    "hidden": weak.hidden,
                    "tokens_per_s": count * timeline.tokens / weak.seconds,
                    "efficiency": timeline.alone_s / weak.seconds,
                    "strong_ms": strong_s * 1e3,
                    "strong_speedup": all_s / strong_s,
                    "strong_efficiency": all_s / strong_s / count,
                }
            )
    return found


# The timeline of a graph ----------------------------------------------------------------------------------------------------------------


class _Exchange:
    """Stands for a communicator while a graph is recorded, and keeps what each bucket is."""

    number = 0

    def __init__(self):
        self.kinds: list[str] = []

    def new_bucket(self, what: str, parts: int, owners: Iterable[int] = ()) -> int:
        self.kinds.append(what)
        return len(self.kinds) - 1


def timeline_of(
    word: str, times: Times, config: SchedulerConfig, machine: Machine, bucket_bytes: int, scale: float = 1.0, t1_ms: float | None = None
) -> Timeline:
    """Simulate one rank's step of the graph `NAME[:KEY=VALUE,...]`, and that of one machine. Raises UserError as `times` does.

    `scale`: how many times as long tasks take as `times` says; or `t1_ms`: how long all of the one machine's do. Where `times` does not
    measure all graphs, one machine stores gradients, too.
    """
    stored, stored_s = times.of(with_changes(word, STORED))
    alone, alone_s = times.of(word) if times.measures_all else (stored, stored_s)
    scale = t1_ms / 1e3 / alone_s.sum() if t1_ms else scale
    graph_config = make_config(word)
    graph, kinds = _replica_graph(graph_config, bucket_bytes)
    ended, starts = _simulate(graph, _seconds_like(graph, stored, stored_s) * scale, config, machine)
    buckets: dict[int, list[Task]] = defaultdict(list)
    for task in graph.tasks:
        if "network" in task.calls[0].kernel.tags:
            buckets[task.calls[0].args[-2]].append(task)
    found = [
        Bucket(sum(map(_part_bytes, tasks)), max(starts[task.number] for task in tasks), kinds[number] == GATHER)
        for number, tasks in buckets.items()
    ]
    backward_s = max(bucket.ready_s for bucket in found)
    alone_ended, _ = _simulate(alone, alone_s * scale, config, machine)
    batch = graph_config.batch
    return Timeline(tuple(found), backward_s, ended - backward_s, alone_ended, config.settings.workers, batch.batch_size * batch.seq_len)


def _replica_graph(config: GraphConfig, bucket_bytes: int) -> tuple[Graph, list[str]]:
    """Return the graph of a step of one of two ranks, which differs from that of one of many in what is gathered; and what buckets are."""
    exchange = _Exchange()
    gpt = GPT2(config.model, config.batch, config.tiles, config.options, replica=Replica(0, 2, 2, exchange, bucket_bytes))
    return training_graph(gpt), exchange.kinds


def _seconds_like(graph: Graph, other: Graph, seconds: Sequence[float]) -> np.ndarray:
    """Return the seconds of the tasks of one graph by those of another: of the same calls theirs, else the mean of the kernel's, else 0."""

    def what(task: Task) -> tuple:
        return tuple((call.kernel.name, *((name, tile.tensor.name, tile.spans) for name, tile in call.tiles())) for call in task.calls)

    same = {what(task): each for task, each in zip(other.tasks, seconds, strict=True)}
    of_kernel = defaultdict(list)
    for task, each in zip(other.tasks, seconds, strict=True):
        of_kernel[task.name].append(each)
    means = {name: float(np.mean(each)) for name, each in of_kernel.items()}
    return np.array([same.get(what(task), means.get(task.name, 0.0)) for task in graph.tasks])


def _part_bytes(task: Task) -> int:
    """Return the bytes that a rank hands in with a task: of a gather, its own rows."""
    tiles = dict(task.calls[0].tiles())
    return (tiles["inp"] if "inp" in tiles else tiles["part"]).array.nbytes


def _simulate(graph: Graph, seconds: np.ndarray, config: SchedulerConfig, machine: Machine) -> tuple[float, np.ndarray]:
    """Return how long a step takes after others, and when each task starts."""
    moved = traffic(graph, machine.cache_mib * 2**20 * machine.sockets)
    costs = Costs(seconds, np.where(seconds > 0, moved, 0.0))  # what hands tiles to a network does not touch them
    with simulated(config, machine, lambda _: costs) as scheduler:
        for _ in range(2):
            begun = float(scheduler.clock[0])
            scheduler.take_records()
            scheduler.run(graph)
        records, _ = scheduler.take_records()
        starts = np.empty(len(graph.tasks))
        starts[records["task"]] = records["start_ns"] / 1e9 - begun
        return float(scheduler.clock[0]) - begun, starts
