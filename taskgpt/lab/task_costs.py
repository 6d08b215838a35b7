"""What each task of a graph costs, alone on a core: seconds, measured or from rates, and the bytes that it moves through memory.

seconds = measured(prepare("gpt2-124m"))                   # its steps run on one worker, a median for each task
rates = Rates.of(graph, seconds, Sgemm())                  # so much a kernel, for tilings that were not measured
seconds = rates.estimate(other_graph)
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np

from taskgpt.lab import machine
from taskgpt.lab.named import Prepared, record
from taskgpt.lab.roofline import Product, product_of
from taskgpt.tasks import Graph, Task


def measured(prepared: Prepared, steps: int = 6) -> np.ndarray:
    """Return the median seconds of each task, of steps on one native worker; the first two, which meet cold memory, are left out."""
    trace = record(prepared, "native:workers=1,idle=busy", steps + 2).without_first(2)
    seconds = np.empty((steps, len(prepared.graphs[0].tasks)))
    for run, rows in trace.by_run():
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


class Sgemm:
    """GFLOP/s of this machine's sgemm on one thread, by the shape of the product; each shape is measured once, when it is asked for."""

    def __init__(self, seconds: float = 0.05):
        self._seconds = seconds
        self._known: dict[Product, float] = {}

    def __call__(self, product: Product) -> float:
        if product not in self._known:
            self._known[product] = machine.sgemm_gflops(1, **asdict(product), seconds=self._seconds)
        return self._known[product]


@dataclass(frozen=True)
class Rates:
    """How long tasks take by kernel, so that times measured with some tiles, or on fewer layers, say those with others.

    Of matrix products: a multiple of the time that sgemm alone takes for these shapes. Of all other kernels: seconds a byte.
    """

    by_kernel: dict[str, float]
    sgemm: Callable[[Product], float]  # GFLOP/s

    @classmethod
    def of(cls, graph: Graph, seconds: Sequence[float], sgemm: Callable[[Product], float]) -> Self:
        """Return the rates at which these tasks ran."""
        work, took = defaultdict(float), defaultdict(float)
        for task, each in zip(graph.tasks, seconds, strict=True):
            work[task.name] += _work(task, sgemm)
            took[task.name] += each
        return cls({name: took[name] / work[name] for name in work}, sgemm)

    def estimate(self, graph: Graph) -> np.ndarray:
        """Return the seconds of each task. Raises KeyError for a kernel without a rate."""
        return np.array([self.by_kernel[task.name] * _work(task, self.sgemm) for task in graph.tasks])


def _work(task: Task, sgemm: Callable[[Product], float]) -> float:
    """Return seconds that sgemm takes for the task's products, or, if it has none, its bytes."""
    products = [product_of(call) for call in task.calls if "gemm" in call.kernel.tags]
    return sum(product.flops / sgemm(product) / 1e9 for product in products) or float(task.bytes) or 1.0
