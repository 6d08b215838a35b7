"""What `taskgpt compare` compares: cells, each a graph with a tiling, a scheduler with settings, and a number of workers.

cells = product_of(["gpt2-124m"], ["rows=64,128"], ["sequential", "loops", "native"], [1, 2], ["policy=oldest_first,longest_path_first"])
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from taskgpt.config import parse_settings
from taskgpt.errors import UserError, did_you_mean
from taskgpt.gpt2.model import Tiles
from taskgpt.lab.named import MOST_WORKERS, make_config, named_config

WHOLE_TENSOR = "whole-tensor"  # no scheduler of the house: see baselines.py
Changes = tuple[tuple[str, str], ...]  # (key, value) as on the command line


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
        return _with_changes(self.graph, [(f"tiles.{key}", value) for key, value in self.tiles])

    @property
    def scheduler_word(self) -> str:
        return _with_changes(self.scheduler, self.settings)

    @property
    def is_sequential(self) -> bool:
        return self.scheduler.partition(":")[0] == "sequential"

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
    graphs: Sequence[str], tiles: Sequence[str], schedulers: Sequence[str], workers: Sequence[int], settings: Sequence[str]
) -> list[Cell]:
    """Return every combination once. `tiles` and `settings` are words KEY=VALUE,VALUE,...

    A setting that a scheduler does not have leaves it as it is; one worker is all that sequential has. Raises UserError for names, keys and
    values that do not exist, before anything is run, and for a setting that no scheduler has.
    """
    tilings, choices = _choices(tiles, "--tiles"), _choices(settings, "--set")
    keys = [field.name for field in dataclasses.fields(Tiles)]
    for key, _ in itertools.chain.from_iterable(tilings):
        if key not in keys:
            raise UserError(f"--tiles {key}: no size of a tile{did_you_mean(key, keys)}")
    has = {name: _keys_of(name) for name in schedulers}
    for key in {key for choice in choices for key, _ in choice}:
        if not any(key in known for known in has.values()):
            raise UserError(f"--set {key}: no setting of these schedulers{did_you_mean(key, sorted(set().union(*has.values())))}")
    found: dict[Cell, None] = {}
    for graph, tiling, scheduler, choice, count in itertools.product(graphs, tilings, schedulers, choices, workers):
        is_whole = scheduler == WHOLE_TENSOR
        cell = Cell(graph, () if is_whole else tiling, scheduler, tuple(c for c in choice if c[0] in has[scheduler]), count)
        make_config(cell.graph_word)
        if not is_whole:
            actual = named_config(cell.scheduler_word, count).settings.workers
            cell = dataclasses.replace(cell, workers=actual or count)
        found[cell] = None
    return list(found)


def _keys_of(scheduler: str) -> set[str]:
    if scheduler == WHOLE_TENSOR:
        return set()
    return {field.name for field in dataclasses.fields(named_config(scheduler, None).settings)} - {"workers", "record"}


def _choices(words: Iterable[str], flag: str) -> list[Changes]:
    """Return every combination of the values of KEY=VALUE,VALUE,... words; of no words, the one that changes nothing."""
    lists = []
    for word in words:
        key, equals, values = word.partition("=")
        if not equals or not all(values.split(",")):
            example = "rows=64,128" if flag == "--tiles" else "policy=oldest_first,newest_first"
            raise UserError(f"{flag} {word}: wanted KEY=VALUE,VALUE,..., for example {flag} {example}")
        lists.append([(key.strip(), value.strip()) for value in values.split(",")])
    return list(itertools.product(*lists))


def _with_changes(word: str, changes: Sequence[tuple[str, str]]) -> str:
    parse_settings([f"{key}={value}" for key, value in changes])
    words = ",".join(f"{key}={value}" for key, value in changes)
    return word + ("," if ":" in word else ":") * bool(words) + words
