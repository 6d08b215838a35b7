"""What each task of a graph costs, alone on a core: seconds, measured or from rates, and the bytes that it moves through memory.

seconds = measured(prepare("gpt2-124m"))                   # its steps run on one worker, a median for each task
seconds = traced(Trace.load(folder), folder, graph)        # the same, from the trace of a run
rates = Rates.of(graph, seconds, Speeds())                 # so much a kernel, for tilings that were not measured
seconds = rates.estimate(other_graph)
times = Times("rates")                                     # whichever `--times` says, for one graph after the other
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Self

import numpy as np

from taskgpt.errors import UserError
from taskgpt.gpt2.program import training_graph
from taskgpt.lab import machine
from taskgpt.lab.named import Prepared, make, prepare, record
from taskgpt.lab.roofline import Product, product_of, way_of
from taskgpt.lab.traces.trace import Trace
from taskgpt.lab.traces.traced_graph import TracedGraph
from taskgpt.tasks import Graph, Task

COLD = 2  # runs, the first ones, whose times do not count: memory and caches are cold


def measured(prepared: Prepared, steps: int = 6) -> np.ndarray:
    """Return the median seconds of each task, of so many steps on one native worker."""
    return _medians(record(prepared, "native:workers=1,idle=busy", steps + COLD), len(prepared.graphs[0].tasks))


def traced(trace: Trace, where: str, graph: Graph) -> np.ndarray:
    """Return the same from the trace of a training run. Raises UserError unless it ran this graph, on one worker, for three steps."""
    steps, expected = trace.select(graph.name), TracedGraph.of(graph)
    do = f"record it: taskgpt train --graph NAME --scheduler native --workers 1 --steps 8 --trace {where}"
    if trace.workers != 1:
        raise UserError(f"--times {where}: wanted a trace of one worker, got one of {trace.workers}, which slow each other down; {do}")
    if len(steps.runs) <= COLD or len(steps.records) < len(steps.runs) * len(steps.graphs[steps.runs["graph"][0]]):
        raise UserError(f"--times {where}: wanted {COLD + 1} whole steps of training or more, got {len(steps.runs)}; {do}")
    for found in (steps.graphs[at] for at in sorted(set(steps.runs["graph"]))):
        is_same = found.kernels == expected.kernels and all(
            np.array_equal(getattr(found, name), getattr(expected, name)) for name in ("kernel", "bytes", "predecessors")
        )
        if not is_same:
            raise UserError(
                f"--times {where}: a trace of another graph, of {len(found)} tasks, {found.flops.sum() / 1e9:.1f} GFLOP; this one has "
                f"{len(expected)}, {expected.flops.sum() / 1e9:.1f} GFLOP; give the same --graph with its changes, or {do}"
            )
    return _medians(steps, len(graph.tasks))


def _medians(trace: Trace, tasks: int) -> np.ndarray:
    """Return the median seconds of each task, of all runs but the first, which meet cold memory."""
    runs = list(trace.without_first(COLD).by_run())
    seconds = np.empty((len(runs), tasks))
    for run, rows in runs:
        seconds[run, rows["task"]] = (rows["stop_ns"] - rows["start_ns"]) / 1e9
    return np.median(seconds, axis=0)


def traffic(graph: Graph, cache_bytes: float) -> np.ndarray:
    """Return the bytes that each task moves between memory and last-level cache, when the graph runs again and again in program order.

    What a tile was touched for the last time more than a cache ago comes from memory, and goes back there if it is written. As long ago as
    that is counted in all bytes touched since, the same ones twice: a little more than what a cache would see.
    """
    last: dict[tuple, float] = {}
    touched, moved = 0.0, np.zeros(len(graph.tasks))
    for _ in range(2):  # the second time, the first touch of a tile is that of a step before
        moved[:] = 0
        for task in graph.tasks:
            for call in task.calls:
                for name, tile in call.tiles():
                    cells = list(tile.cells())
                    share = tile.array.nbytes / len(cells)
                    ways = 2 if call.kernel.accesses[name].is_written else 1
                    for cell in cells:
                        place = id(tile.tensor), cell
                        if touched - last.get(place, -np.inf) > cache_bytes:
                            moved[task.number] += ways * share
                        touched += share
                        last[place] = touched
    return moved


class Times:
    """Where the times of tasks come from, as `--times` says.

    measured: every graph's own, here, on one worker. rates: those of the first graph so, then the others' at its rates. A folder: those of
    the first graph from a trace that is there, then the others' at its rates. Only what is measured needs memory.
    """

    def __init__(self, source: str):
        self._source = source
        self._first: tuple[Graph, np.ndarray] | None = None
        self._trace = None if source in ("measured", "rates") else Trace.load(source)

    @property
    def measures_all(self) -> bool:
        """Return True if every graph's tasks are measured: else other kernels than the first graph's have no rate."""
        return self._source == "measured"

    @cached_property
    def _rates(self) -> "Rates":
        return Rates.of(*self._first, Speeds())

    @property
    def sgemm_gflops(self) -> float:
        """How fast one core was where times were taken. Raises UserError for a trace that does not know."""
        if self._trace is None:
            return machine.sgemm_gflops(1)
        if "limits" not in self._trace.about:
            raise UserError(f"--times {self._source}: the trace does not say how fast its machine was; give --t1, the ms of a step")
        return float(self._trace.about["limits"]["sgemm_gflops"])

    def of(self, word: str) -> tuple[Graph, np.ndarray]:
        """Return the graph `NAME[:KEY=VALUE,...]`, and the seconds of its tasks. Raises UserError."""
        if self._source == "measured" or (self._trace is None and self._first is None):
            prepared = prepare(word)
            graph, seconds = prepared.graphs[0], measured(prepared)
        else:
            graph = training_graph(make(word))
            seconds = self._estimate(word, graph) if self._first else traced(self._trace, self._source, graph)
        if self._source != "measured" and self._first is None:
            self._first = graph, seconds
        return graph, seconds

    def _estimate(self, word: str, graph: Graph) -> np.ndarray:
        try:
            return self._rates.estimate(graph)
        except KeyError as error:
            raise UserError(
                f"{word}: no rate for {error}, which the first graph does not call; choose --times measured, or another first graph"
            ) from None


class Scale:
    """Makes times of another machine's, so many times as long, or such that the first graph's tasks take `t1_s` seconds together.

    With `only_products`, by matrix products alone, all of which then run at one speed whatever their tiles, as those of plain loops do.
    """

    def __init__(self, factor: float, t1_s: float | None = None, only_products: bool = False):
        self.factor, self._t1_s, self._only_products = factor, t1_s, only_products
        self._flops_a_second: float | None = None

    def of(self, graph: Graph, seconds: np.ndarray) -> np.ndarray:
        """Return the seconds of a graph's tasks there. Raises UserError if all but products takes longer than all is to take."""
        if not self._only_products or self._t1_s is None:
            if self._t1_s is not None:
                self.factor, self._t1_s = self._t1_s / seconds.sum(), None
            return seconds * self.factor
        products = np.array([any("gemm" in call.kernel.tags for call in task.calls) for task in graph.tasks])
        flops = np.array([task.flops for task in graph.tasks], float)
        if self._flops_a_second is None:
            rest_s = seconds[~products].sum()
            if rest_s >= self._t1_s:
                raise UserError(f"--t1 {self._t1_s * 1e3:g}: all but matrix products takes {rest_s * 1e3:.1f} ms here; choose more")
            self._flops_a_second = flops[products].sum() / (self._t1_s - rest_s)
        return np.where(products, flops / self._flops_a_second, seconds)


class Speeds:
    """GFLOP/s of a product alone on one thread of this machine, by its shape and way; each is measured once, when it is asked for."""

    def __init__(self, seconds: float = 0.05):
        self._seconds = seconds
        self._known: dict[tuple[Product, int], float] = {}

    def __call__(self, product: Product, way: int) -> float:
        if (product, way) not in self._known:
            self._known[product, way] = machine.product_gflops(way, 1, **asdict(product), seconds=self._seconds)
        return self._known[product, way]


@dataclass(frozen=True)
class Rates:
    """How long tasks take by kernel, so that times measured with some tiles, or on fewer layers, say those with others.

    Of matrix products: a multiple of the time that the product alone takes, at this shape and in this way. Of all other kernels: seconds
    a byte.
    """

    by_kernel: dict[str, float]
    speed: Callable[[Product, int], float]  # GFLOP/s of a product by its way

    @classmethod
    def of(cls, graph: Graph, seconds: Sequence[float], speed: Callable[[Product, int], float]) -> Self:
        """Return the rates at which these tasks ran."""
        work, took = defaultdict(float), defaultdict(float)
        for task, each in zip(graph.tasks, seconds, strict=True):
            work[task.name] += _work(task, speed)
            took[task.name] += each
        return cls({name: took[name] / work[name] for name in work}, speed)

    def estimate(self, graph: Graph) -> np.ndarray:
        """Return the seconds of each task. Raises KeyError for a kernel without a rate."""
        return np.array([self.by_kernel[task.name] * _work(task, self.speed) for task in graph.tasks])


def _work(task: Task, speed: Callable[[Product, int], float]) -> float:
    """Return the seconds that the task's products take alone, or, if it has none, its bytes."""
    products = [(product_of(call), way_of(call)) for call in task.calls if "gemm" in call.kernel.tags]
    return sum(product.flops / speed(product, way) / 1e9 for product, way in products) or float(task.bytes) or 1.0
