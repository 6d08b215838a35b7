"""What each task of a graph costs, alone on a core: seconds, measured or from rates, and the bytes that it moves through memory.

costs = measured(prepare("gpt2-124m"))                     # its steps run on one worker, a median for each task
rates = Rates.of(graph, costs.seconds)                     # so much a kernel, for tilings that were not measured
costs = rates.estimate(other_graph)
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from taskgpt.lab.named import Prepared, record
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


@dataclass(frozen=True)
class Rates:
    """Seconds a unit of work, by kernel: of an operation for matrix products, of a byte for all others."""

    by_kernel: dict[str, float]

    @classmethod
    def of(cls, graph: Graph, seconds: Sequence[float]) -> Self:
        """Return the rates at which these tasks ran."""
        work, took = defaultdict(float), defaultdict(float)
        for task, each in zip(graph.tasks, seconds, strict=True):
            work[task.name] += _work(task)
            took[task.name] += each
        return cls({name: took[name] / work[name] for name in work})

    def estimate(self, graph: Graph) -> np.ndarray:
        """Return the seconds of each task. Raises KeyError for a kernel without a rate."""
        return np.array([self.by_kernel[task.name] * _work(task) for task in graph.tasks])


def _work(task: Task) -> float:
    is_product = any("gemm" in call.kernel.tags for call in task.calls)
    return float(task.flops if is_product else task.bytes) or 1.0
