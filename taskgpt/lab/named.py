"""What the command line of a benchmark names: `NAME[:KEY=VALUE,...]`, a graph file or a scheduler file with changes.

small = prepare("gpt2-124m:model.layers=3")
trace = record(small, "loops:workers=2", steps=4)
"""

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from taskgpt.config import (
    GraphConfig,
    SchedulerConfig,
    graph_keys,
    is_address,
    load_graph,
    load_scheduler,
    parse_graph_settings,
    parse_settings,
)
from taskgpt.errors import UserError, did_you_mean, shorten
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.gpt2.shape import Tiles
from taskgpt.lab import machine
from taskgpt.lab.report import compile_with_progress
from taskgpt.lab.traces.trace import RECORD, Trace, Traced
from taskgpt.products import verify_callers
from taskgpt.schedulers import Scheduler, open_scheduler
from taskgpt.tasks import Graph

MOST_WORKERS = 4096
Changes = tuple[tuple[str, str], ...]  # (key, value) as on the command line


@dataclass
class Prepared:
    """A graph by its name on the command line, with its memory: random parameters and tokens."""

    name: str
    m: GPT2
    graphs: list[Graph]  # one for each slot of the inputs, which steps take in turns

    def run(self, scheduler: Scheduler, steps: int) -> None:
        """Run so many steps as training does: where the scheduler can, one begins while the one before still runs.

        Raises UserError for more workers than BLAS can bear, if it multiplies.
        """
        verify_callers(self.m.products, scheduler.workers)
        for _ in scheduler.run_each(self.graphs[step % len(self.graphs)] for step in range(steps)):
            pass


def prepare(word: str, shared: bool = False) -> Prepared:
    """Return the training step of `NAME[:KEY=VALUE,...]`, compiled, with random parameters and tokens."""
    m = make(word, shared)
    m.initialize(seed=42)
    for number, slot in enumerate(m.slots):
        m.set_hyper(0, lr=1e-4, weight_decay=0.0, slot=number)
        draw = np.random.default_rng(1)
        for tensor in (slot.tokens, slot.targets):
            tensor.array[:] = draw.integers(0, m.model.vocabulary, m.batch.rows)
    graphs = [training_graph(m, number) for number in range(len(m.slots))]
    compile_with_progress(graphs[0].kernels)
    return Prepared(word, m, graphs)


def record(prepared: Prepared, scheduler: str, steps: int = 4) -> Trace:
    """Run so many steps under the scheduler of that name; return their trace, which knows this machine's limits."""
    with Traced(named_scheduler(scheduler, None, record=RECORD)) as traced:
        prepared.run(traced, steps)
        about = {"command": f"record {prepared.name} {scheduler}", "machine": machine.describe(), "limits": machine.limits(traced.workers)}
        return traced.trace(about)


def make(word: str, shared: bool = False) -> GPT2:
    """Return the memory of `NAME[:KEY=VALUE,...]`, untouched: enough to record its graph.

    Raises UserError for a step of several micro-batches, which is several graphs.
    """
    config = make_config(word)
    if config.batch.accumulate > 1:
        what = f"a step of {config.batch.accumulate} micro-batches is no single graph to measure"
        raise UserError(f"{shorten(word)}: batch.accumulate: {what}; leave it at 1, and measure one of them")
    return GPT2(config.model, config.batch, config.tiles, config.options, shared=shared)


def make_config(word: str) -> GraphConfig:
    """Return the configuration `NAME[:KEY=VALUE,...]` of a graph."""
    return load_graph(*graph_of(word))


def named_scheduler(word: str, workers: int | None, **defaults: object) -> Scheduler:
    """Return the scheduler that `named_config` describes."""
    config = named_config(word, workers, **defaults)
    return open_scheduler(config.scheduler, config.settings)


def named_config(word: str, workers: int | None, **defaults: object) -> SchedulerConfig:
    """Return the configuration `NAME[:KEY=VALUE,...]`, with so many workers unless it has one by its file.

    `defaults` stand in for its own where it has such keys.
    """
    name, overrides = scheduler_of(word)
    settings = load_scheduler(name, overrides).settings
    if workers is not None and settings.workers != 1:
        defaults["workers"] = workers
    return load_scheduler(name, {**{key: value for key, value in defaults.items() if hasattr(settings, key)}, **overrides})


# Words ----------------------------------------------------------------------------------------------------------------------------------


def overridden(
    graph: str, scheduler: str, tiles: Sequence[str], settings: Sequence[str], workers: int | None
) -> tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]:
    """Return (name, overrides of the file) of a graph and of a scheduler: what their words, --tiles, --set, --workers say."""
    (graph_name, of_graph), (scheduler_name, of_scheduler) = graph_of(graph), scheduler_of(scheduler)
    words = [f"{key}={value}" for each in by_file(tiles, settings) for key, (value,) in each.items()]
    for overrides, more in zip((of_graph, of_scheduler), parse_settings(words), strict=True):
        overrides |= more
    if workers is not None:
        of_scheduler["workers"] = workers
    return (graph_name, of_graph), (scheduler_name, of_scheduler)


def graph_of(word: str) -> tuple[str, dict[str, Any]]:
    """Return (name, overrides of the file) of a graph's word."""
    name, changes = split_changes(word)
    return name, parse_graph_settings(changes)


def scheduler_of(word: str) -> tuple[str, dict[str, Any]]:
    """Return (name, overrides of the file) of a scheduler's word."""
    name, changes = split_changes(word)
    foreign, overrides = parse_settings(changes)
    for key in foreign:
        raise UserError(f"{word}: {key} is a key of graph files; give it with the graph, --graph NAME:{key}=VALUE")
    return name, overrides


def split_changes(word: str) -> tuple[str, list[str]]:
    """Return (name, its changes) of `NAME[:KEY=VALUE,...]`; an address, with its colons, is a name, and so is a file that is there."""
    if is_address(word) or os.path.isfile(word):
        return word, []
    name, _, changes = word.partition(":")
    return name, [change for change in changes.split(",") if change]


def with_changes(word: str, changes: Iterable[tuple[str, str]]) -> str:
    """Return `NAME[:KEY=VALUE,...]` with more changes, which count if a key is there already. Raises UserError for an unknown key."""
    words = [f"{key}={value}" for key, value in changes]
    parse_settings(words)
    name, known = split_changes(word)
    return f"{name}:{','.join([*known, *words])}" if words else word


def listed(words: Iterable[str]) -> list[str]:
    """Return the names of a flag that takes several: `a,b c` is three. A part with `=` belongs to the name before: `a:x=1,y=2,b` is two."""
    names: list[str] = []
    for word in words:
        if os.path.isfile(word):
            names.append(word)
            continue
        first = len(names)
        for part in filter(None, word.split(",")):
            key, equals, _ = part.partition("=")
            if equals and ":" not in key and len(names) > first and ":" in names[-1]:
                names[-1] += f",{part}"
            else:
                names.append(part)
    return names


def choices(flag: str, words: Iterable[str]) -> dict[str, list[str]]:
    """Return the values of each key, of words KEY=VALUE,VALUE or KEY=VALUE,KEY=VALUE; a key's last word counts. Raises UserError."""
    found: dict[str, list[str]] = {}
    for word in words:
        values = None
        for part in word.split(","):
            key, equals, value = (each.strip() for each in part.partition("="))
            if equals:
                values = found[key] = []
            if values is None or not key or not (value if equals else key):
                example = "rows=64" if flag.startswith("--tile") else "policy=oldest_first"
                raise UserError(f"{flag} {shorten(word)}: wanted KEY=VALUE, for example {flag} {example}")
            values.append(value if equals else key)
    return found


def by_file(tiles: Sequence[str], settings: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the values of each key that `--tiles` and `--set` give, of the graph file's keys and of the scheduler file's."""
    sizes, keys = choices("--tiles", tiles), [field.name for field in fields(Tiles)]
    for key in sizes:
        if key not in keys:
            raise UserError(f"--tiles {shorten(key)}: no size of a tile{did_you_mean(key, keys)}")
    of_graph, of_scheduler = {f"tiles.{key}": values for key, values in sizes.items()}, {}
    for key, values in choices("--set", settings).items():
        (of_graph if "." in key else of_scheduler)[key] = values
    return of_graph, of_scheduler


def combinations(values: Mapping[str, Sequence[str]]) -> list[Changes]:
    """Return every combination of the keys' values; of no keys, the one that changes nothing."""
    return list(itertools.product(*([(key, value) for value in each] for key, each in values.items())))


def graph_words(graphs: Sequence[str], tiles: Sequence[str], settings: Sequence[str]) -> list[str]:
    """Return each graph with every combination of tiles and settings, for programs without a scheduler. Raises UserError for its keys."""
    of_graph, others = by_file(tiles, settings)
    for key in others:
        raise UserError(f"--set {shorten(key)}: no key of a graph file{did_you_mean(key, graph_keys())}")
    return [with_changes(graph, changes) for graph in graphs for changes in combinations(of_graph)]


def worker_counts(flag: str, words: Iterable[str]) -> list[int]:
    """Return the numbers of `--workers`. Raises UserError."""
    found = listed(words)
    for word in found:
        if not (word.isascii() and word.isdecimal() and len(word) < 10 and 1 <= int(word) <= MOST_WORKERS):
            raise UserError(f"{flag} {shorten(word)}: wanted a number from 1 to {MOST_WORKERS:,}, for example --workers 2")
    return [int(word) for word in found]
