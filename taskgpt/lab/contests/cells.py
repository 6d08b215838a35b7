"""What `taskgpt compare` compares: cells, each a graph with a tiling, a scheduler with settings, and a number of workers.

cells = product_of(["gpt2-124m"], ["rows=64,128"], ["sequential", "loops", "native"], [1, 2], ["policy=oldest_first,longest_path_first"])
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from taskgpt.config import graph_keys
from taskgpt.errors import UserError, did_you_mean, shorten
from taskgpt.lab import machine
from taskgpt.lab.named import MOST_WORKERS, Changes, by_file, combinations, make_config, named_config, with_changes, worker_counts

WHOLE_TENSOR = "whole-tensor"  # no scheduler of the house: see baselines.py


@dataclass(frozen=True)
class Cell:
    """`graph` and `scheduler` are words of the command line; `tiles` and `settings` what the lists of `--tiles` and `--set` add to them."""

    graph: str
    tiles: Changes
    scheduler: str
    settings: Changes
    workers: int = field(metadata={"at_least": 1, "at_most": MOST_WORKERS})

    @property
    def graph_word(self) -> str:
        return with_changes(self.graph, [(f"tiles.{key}", value) for key, value in self.tiles])

    @property
    def scheduler_word(self) -> str:
        return with_changes(self.scheduler, self.settings)

    @property
    def is_sequential(self) -> bool:
        return self.scheduler != WHOLE_TENSOR and named_config(self.scheduler_word, self.workers).scheduler == "sequential"

    @property
    def label(self) -> str:
        """Return what tables call the scheduler: baselines by what they are."""
        if self.scheduler == WHOLE_TENSOR:
            return "whole-tensor NumPy, threaded BLAS"
        config = named_config(self.scheduler_word, self.workers)
        baseline = f" coverage={config.settings.coverage}" if config.scheduler == "loops" else ""
        return f"{config.scheduler if baseline else self.scheduler}{baseline}" + "".join(f" {key}={value}" for key, value in self.settings)

    def __str__(self) -> str:
        return f"{self.graph_word} {self.label}, {self.workers} worker{'s' if self.workers > 1 else ''}"


def product_of(
    graphs: Sequence[str], tiles: Sequence[str], schedulers: Sequence[str], workers: Sequence[int | None], settings: Sequence[str]
) -> list[Cell]:
    """Return every combination once. `tiles` and `settings` are words KEY=VALUE,VALUE,...; `workers` None: as the scheduler's file says.

    A setting that a scheduler does not have leaves it as it is; one worker is all that sequential has. Raises UserError for names, keys and
    values that do not exist, before anything is run, and for a setting that no scheduler has.
    """
    of_graph, of_scheduler = by_file(tiles, settings)
    tilings = combinations({key.removeprefix("tiles."): values for key, values in of_graph.items() if key.startswith("tiles.")})
    shapes = combinations({key: values for key, values in of_graph.items() if not key.startswith("tiles.")})
    if "workers" in of_scheduler:
        workers = worker_counts("--set workers", of_scheduler.pop("workers"))
    has = {name: _keys_of(name) for name in schedulers}
    for key in of_scheduler:
        if not any(key in known for known in has.values()):
            known = sorted(set().union(*has.values()))
            raise UserError(f"--set {shorten(key)}: no setting of these schedulers{did_you_mean(key, [*known, *graph_keys()])}")
    found: dict[Cell, None] = {}
    for graph, shape, tiling, scheduler, choice, count in itertools.product(
        graphs, shapes, tilings, schedulers, combinations(of_scheduler), workers
    ):
        is_whole = scheduler == WHOLE_TENSOR
        changes = tuple(change for change in choice if change[0] in has[scheduler])
        cell = Cell(with_changes(graph, shape), () if is_whole else tiling, scheduler, changes, count or machine.usable_cores())
        make_config(cell.graph_word)
        if not is_whole:
            actual = named_config(cell.scheduler_word, count).settings.workers
            cell = dataclasses.replace(cell, workers=actual or cell.workers)
        found[cell] = None
    return list(found)


def _keys_of(scheduler: str) -> set[str]:
    if scheduler == WHOLE_TENSOR:
        return set()
    return {field.name for field in dataclasses.fields(named_config(scheduler, None).settings)} - {"workers", "record"}
