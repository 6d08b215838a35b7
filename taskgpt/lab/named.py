"""What the command line of a benchmark names: `NAME[:KEY=VALUE,...]`, a graph file or a scheduler file with changes.

small = prepare("gpt2-124m:model.layers=3")
trace = record(small, "loops:workers=2", steps=4)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from taskgpt.config import GraphConfig, SchedulerConfig, is_address, load_graph, load_scheduler, parse_graph_settings, parse_settings
from taskgpt.errors import UserError, shorten
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.program import training_graph
from taskgpt.lab import machine
from taskgpt.lab.traces.trace import RECORD, Trace, Traced
from taskgpt.schedulers import Scheduler, open_scheduler
from taskgpt.tasks import Graph, compile_kernels

MOST_WORKERS = 4096


@dataclass
class Prepared:
    """A graph by its name on the command line, with its memory: random parameters and tokens."""

    name: str
    m: GPT2
    graphs: list[Graph]  # one for each slot of the inputs, which steps take in turns

    def run(self, scheduler: Scheduler, steps: int) -> None:
        """Run so many steps as training does: where the scheduler can, one begins while the one before still runs."""
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
    compile_kernels(graphs[0].kernels)
    return Prepared(word, m, graphs)


def record(prepared: Prepared, scheduler: str, steps: int = 4) -> Trace:
    """Run so many steps under the scheduler of that name; return their trace, which knows this machine's limits."""
    with Traced(named_scheduler(scheduler, None, record=RECORD)) as traced:
        prepared.run(traced, steps)
        about = {"command": f"record {prepared.name} {scheduler}", "machine": machine.describe(), "limits": machine.limits(traced.workers)}
        return traced.trace(about)


def make(word: str, shared: bool = False) -> GPT2:
    """Return the memory of `NAME[:KEY=VALUE,...]`, untouched: enough to record its graph."""
    config = make_config(word)
    return GPT2(config.model, config.batch, config.tiles, config.options, shared=shared)


def make_config(word: str) -> GraphConfig:
    """Return the configuration `NAME[:KEY=VALUE,...]` of a graph."""
    name, changes = split_changes(word)
    return load_graph(name, parse_graph_settings(changes))


def named_scheduler(word: str, workers: int | None, **defaults: object) -> Scheduler:
    """Return the scheduler that `named_config` describes."""
    config = named_config(word, workers, **defaults)
    return open_scheduler(config.scheduler, config.settings)


def named_config(word: str, workers: int | None, **defaults: object) -> SchedulerConfig:
    """Return the configuration `NAME[:KEY=VALUE,...]`, with so many workers unless it has one by its file.

    `defaults` stand in for its own where it has such keys.
    """
    name, changes = split_changes(word)
    foreign, overrides = parse_settings(changes)
    for key in foreign:
        raise UserError(f"{word}: {key} is a key of graph files; give it with the graph, --graphs NAME:{key}=VALUE")
    settings = load_scheduler(name, overrides).settings
    if workers is not None and settings.workers != 1:
        defaults["workers"] = workers
    return load_scheduler(name, {**{key: value for key, value in defaults.items() if hasattr(settings, key)}, **overrides})


def listed(words: Sequence[str]) -> list[str]:
    """Return the names of a flag that takes several: `a,b c` is three. A word with a colon is `NAME:KEY=VALUE,...`, one name."""
    return [name for word in words for name in ([word] if ":" in word else word.split(",")) if name]


def worker_counts(words: Sequence[str]) -> list[int]:
    """Return the numbers of `--workers`. Raises UserError."""
    found = listed(words)
    for word in found:
        if not (word.isascii() and word.isdecimal() and len(word) < 10 and 1 <= int(word) <= MOST_WORKERS):
            raise UserError(f"--workers {shorten(word)}: wanted numbers from 1 to {MOST_WORKERS:,}, for example --workers 1,2,4")
    return [int(word) for word in found]


def split_changes(word: str) -> tuple[str, list[str]]:
    """Return (name, its changes) of `NAME[:KEY=VALUE,...]`; an address, with its colons, is a name."""
    if is_address(word):
        return word, []
    name, _, changes = word.partition(":")
    return name, [change for change in changes.split(",") if change]
