"""Which tilings are worth a try on a machine, and how long they would take there: where `taskgpt tune` begins.

A size of a tile is a trade. Small tiles give every worker something to do; large ones let products reach their speed and read operands less
often, until they no longer fit into a core's share of the caches. Between these ends each key has a ladder, sizes that cut what they cut
into 1, 2, 3, 4, 6, 8, ... nearly equal parts; a tiling is a rung of each.
"""

import dataclasses
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

from taskgpt.config import GraphConfig
from taskgpt.gpt2.program import training_graph
from taskgpt.gpt2.shape import Batch, Model, Tiles
from taskgpt.lab import machine
from taskgpt.lab.contests.cells import Cell
from taskgpt.lab.named import make, make_config, named_config, prepare
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.lab.simulator.simulated import Costs, ms_a_step, simulated
from taskgpt.lab.simulator.task_costs import Rates, Speeds, measured, traffic
from taskgpt.products import BLAS, register_tile, way_for
from taskgpt.products.packed import GRAIN
from taskgpt.tasks import Graph

KEYS = ("rows", "columns", "vocabulary", "heads", "pointwise_rows")  # those that matter most first; logits_rows is about memory
PARTS = sorted({n << power for n in (2, 3) for power in range(12)} | {1})
MEASURED_LAYERS = 2  # whose tasks' times make the rates of all: layers are alike
MEASURED_STEPS = 3  # the fewest whose median is a step that was measured, and not the slowest
TAKES, TAKE_SECONDS = 3, 0.02  # of a product at each shape; the best counts, as other programs can only slow it down
SIMULATED_STEPS = 8  # so that one step more or less at either end, which overlaps with no other, weighs little


@dataclass(frozen=True)
class Space:
    """The tilings of a shape that make sense for so many workers, each with so much cache for itself."""

    model: Model
    batch: Batch
    shipped: Tiles
    workers: int
    l2_bytes: float = 1 << 20
    l3_bytes: float = 16 << 20
    way: int = BLAS  # of products

    @classmethod
    def here(cls, config: GraphConfig, workers: int) -> Self:
        """Return the space for this machine, whose caches its cores share evenly; where they are unknown, for usual ones."""
        caches = {f"l{level}_bytes": machine.cache_bytes(level=level) / (os.cpu_count() or 1) for level in (2, 3)}
        known = {name: size for name, size in caches.items() if size}
        way = way_for(config.options.products, config.options.precision)
        return cls(config.model, config.batch, config.tiles, workers, **known, way=way)

    def ladders(self) -> dict[str, list[int]]:
        """Return the sizes of each key, ascending: multiples of what products and vectors take at a time; the shipped one among them."""
        R, C, NH, Vp = self.batch.rows, self.model.channels, self.model.heads, self.model.padded_vocabulary
        height, width = register_tile(self.way) or (16, 64)
        # Of our own products, rows are whole register tiles. Columns are whole vectors, which a product cuts evenly: with 48, 64, 256, 288
        # or 384 of them, 256 rows and K = 768, it is as fast in float32, within 1 %.
        return {
            "rows": _ladder(R, height, 32, self.shipped.rows),
            "columns": _ladder(4 * C, GRAIN, max(width, 3 * GRAIN), self.shipped.columns),
            "vocabulary": _ladder(Vp, 128, 256, self.shipped.vocabulary),
            "heads": sorted({NH // n for n in range(1, NH + 1) if NH % n == 0} | {self.shipped.heads}),
            "pointwise_rows": _ladder(R, 8, 16, self.shipped.pointwise_rows),
        }

    def makes_sense(self, tiles: Tiles) -> bool:
        """Return True if every worker has a task in the widest product and in the head's, if what those read and write fits into a core's
        share of the last cache, and if tiles are not smaller than parallelism asks for: once all fits into L2, smaller is only more."""
        R, C, Vp = self.batch.rows, self.model.channels, self.model.padded_vocabulary
        rows, columns, words = min(tiles.rows, R), min(tiles.columns, 4 * C), min(tiles.vocabulary, Vp)
        by_rows = -(-R // rows)
        wide, narrow = (by_rows * -(-outputs // columns) for outputs in (4 * C, C))
        product_bytes = 4 * (rows * C + columns * C + rows * columns)
        head_bytes = 4 * words * (C + min(R, tiles.logits_rows or R))
        return (
            min(wide, -(-Vp // words) * by_rows) >= self.workers
            and max(product_bytes, head_bytes) <= self.l3_bytes
            and (product_bytes >= self.l2_bytes / 4 or narrow <= 4 * self.workers)
        )

    def along(self, tiles: Tiles, key: str) -> list[Tiles]:
        """Return the tilings that differ in one key, and make sense."""
        others = [dataclasses.replace(tiles, **{key: size}) for size in self.ladders()[key] if size != getattr(tiles, key)]
        return [other for other in others if self.makes_sense(other)]

    def neighbours(self, tiles: Tiles) -> list[Tiles]:
        """Return the tilings one rung up or down in one key, and make sense."""
        found = []
        for key, sizes in self.ladders().items():
            here = getattr(tiles, key)
            steps = [b if a == here else a for a, b in pairwise(sorted({*sizes, here})) if here in (a, b)]
            found += [dataclasses.replace(tiles, **{key: size}) for size in steps]
        return [other for other in found if self.makes_sense(other)]


def _ladder(extent: int, multiple: int, smallest: int, shipped: int) -> list[int]:
    """Return sizes that cut an extent into nearly equal parts. One that is not shorter does not cut it: of those one is enough."""
    sizes = {-(-extent // (parts * multiple)) * multiple for parts in PARTS}
    cutting = {size for size in {*sizes, shipped} if size < extent and (size >= smallest or size == shipped)}
    return sorted(cutting | {max(shipped, extent)})


class Forecast:
    """Says how long a step of a cell takes, without running it: its tasks at measured rates, on simulated workers.

    Rates are those of some layers with the shipped tiles on one worker. What is simulated is the scheduler's own code; see simulated.py.
    """

    def __init__(self, word: str):
        layers = min(MEASURED_LAYERS, make_config(word).model.layers)
        some = prepare(f"{word}{',' if ':' in word else ':'}model.layers={layers}")
        takes = [Speeds(TAKE_SECONDS) for _ in range(TAKES)]
        self._rates = Rates.of(some.graphs[0], measured(some, MEASURED_STEPS), lambda *product: max(take(*product) for take in takes))
        self._machine = Machine.here()
        self._last: tuple[str, Graph, Costs] | None = None  # policies are many for one graph

    def __call__(self, cell: Cell) -> float | None:
        """Return ms a step, or None if the graph has a kernel that the shipped tiling has not."""
        if self._last is None or self._last[0] != cell.graph_word:
            graph = training_graph(make(cell.graph_word))
            try:
                seconds = self._rates.estimate(graph)
            except KeyError:
                return None
            self._last = cell.graph_word, graph, Costs(seconds, traffic(graph, self._machine.cache_mib * 2**20))
        _, graph, costs = self._last
        with simulated(named_config(cell.scheduler_word, cell.workers), self._machine, lambda _: costs) as scheduler:
            return ms_a_step(scheduler, graph, SIMULATED_STEPS)
