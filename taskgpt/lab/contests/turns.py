"""Turns: a cell's graph run for some steps, in a process that all cells share, and that may die without taking their results along.

with Turns() as turns:
    first = turns.first(cell, steps)       # from fresh parameters: loss, hash, efficiencies
    ms = turns.timed(cell, steps)          # again and again, cells in turns

One process for all: the same memory, caches and libraries for each, and only one at work. A graph keeps its memory from turn to turn as
long as there is room for the others. A cell that fails, or with which the process dies, raises CellFailed; the next one gets a new process.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Self

from taskgpt.errors import UserError
from taskgpt.gpt2.model import GPT2
from taskgpt.lab import machine
from taskgpt.lab.contests.baselines import CHANGES, WholeTensor
from taskgpt.lab.contests.cells import WHOLE_TENSOR, Cell
from taskgpt.lab.contests.served import LIMIT_S, AskingFailed, Served
from taskgpt.lab.named import Prepared, make_config, named_scheduler, prepare, with_changes
from taskgpt.lab.report import seconds_of
from taskgpt.lab.traces.efficiency import analyse
from taskgpt.lab.traces.idle import CAUSES
from taskgpt.lab.traces.trace import RECORD, Traced
from taskgpt.schedulers import Scheduler

WARM_UP = 2  # steps before the clock starts, in every turn: threads, plans, caches
FACTORS = ("parallel efficiency", "load balance", "dependency efficiency", "scheduling efficiency")
MOST_MS = 1e9  # eleven days: no time that a turn can take


@dataclass
class Watched:
    """Steps of a cell with every task on record, as `efficiency.analyse` tells them: all times in ms, idle time by cause over all steps."""

    step_ms: float
    efficiency: dict[str, float | None]
    idle_ms: dict[str, float]
    useful_ms: float
    steps: int = field(metadata={"at_least": 1})
    t1_ms: float
    tinf_ms: float

    def __post_init__(self):
        factors, idle = ([found.get(name) for name in wanted] for found, wanted in ((self.efficiency, FACTORS), (self.idle_ms, CAUSES)))
        if None in factors or None in idle:
            raise ValueError(f"wanted {', '.join(FACTORS)}, and idle time of {', '.join(CAUSES)}, got less")
        if not all(-1 < each < MOST_MS for each in (self.step_ms, self.t1_ms, self.tinf_ms, *factors, *idle)) or self.useful_ms <= 0:
            raise ValueError("wanted times and efficiencies that can be")


@dataclass
class First:
    """What a cell's first run tells. `loss`: of its last step; None if it is no number. `trace`: None where there are no tasks to watch."""

    loss: float | None
    sha256: str
    tasks: int = field(metadata={"at_least": 0})
    trace: Watched | None = None


class CellFailed(RuntimeError):
    """A cell could not be run; the message says why."""


class Turns:
    """The process that runs cells, started when it is needed, and again after it has died."""

    def __init__(self, limit_s: float = LIMIT_S):
        self._limit_s = limit_s
        self._bench: Served | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if self._bench is not None:
            if kind is not None:
                self._bench.interrupt()
            self._bench.end()

    def first(self, cell: Cell, steps: int) -> First:
        """Run a cell for the first time; see `_Bench.first`. Raises CellFailed."""
        return self._ask("first", cell, steps)

    def timed(self, cell: Cell, steps: int) -> float:
        """Return ms a step. Raises CellFailed."""
        return self._ask("timed", cell, steps)

    def _ask(self, verb: str, cell: Cell, steps: int) -> Any:
        if self._bench is None:
            self._bench = Served(_Bench, limit_s=self._limit_s)
        try:
            return self._bench.ask(verb, cell, steps)
        except AskingFailed as error:
            if not self._bench.is_alive:
                self._bench = None
            raise CellFailed(str(error)) from None


class _Bench:
    """Runs cells, and keeps the memory of their graphs, of the least recently used only as long as there is room."""

    def __init__(self):
        self._prepared: dict[tuple[str, bool], Prepared] = {}

    def first(self, cell: Cell, steps: int) -> First:
        """Run so many steps after warm-up from fresh parameters; return loss, parameters' hash, tasks, and efficiencies of those steps."""
        with self._opened(cell, record=RECORD) as scheduler:
            prepared = self._prepare(cell, scheduler)
            m = prepared.m
            m.initialize(seed=42)
            for tensor in (*m.m.tensors.values(), *m.v.tensors.values()):
                tensor.array[...] = 0
            traced = Traced(scheduler) if cell.scheduler != WHOLE_TENSOR else scheduler
            prepared.run(traced, WARM_UP + steps)
            loss = m.loss_of((WARM_UP + steps - 1) % len(m.slots))
            found = First(loss if math.isfinite(loss) else None, m.parameters_sha256(), len(prepared.graphs[0].tasks))
            if traced is not scheduler:
                numbers = analyse(traced.trace({}).without_first(WARM_UP))
                path = numbers.pop("longest_path")
                kept = {name: numbers[name] for name in ("step_ms", "efficiency", "idle_ms", "useful_ms", "steps")}
                found.trace = Watched(**kept, t1_ms=path["t1_ms"], tinf_ms=path["tinf_ms"])
            return found

    def timed(self, cell: Cell, steps: int) -> float:
        """Return ms a step, warmed up."""
        with self._opened(cell) as scheduler:
            prepared = self._prepare(cell, scheduler)
            prepared.run(scheduler, WARM_UP)
            return seconds_of(lambda: prepared.run(scheduler, steps)) / steps * 1e3

    def _opened(self, cell: Cell, **defaults: object) -> Scheduler:
        if cell.scheduler == WHOLE_TENSOR:
            return WholeTensor(cell.workers)
        return named_scheduler(cell.scheduler_word, cell.workers, **defaults)

    def _prepare(self, cell: Cell, scheduler: Scheduler) -> Prepared:
        """Return the cell's graph, from the last time or made anew. Raises UserError if there is no room even alone."""
        word = with_changes(cell.graph_word, CHANGES if cell.scheduler == WHOLE_TENSOR else ())
        key = word, scheduler.needs_shared_memory
        prepared = self._prepared.pop(key, None)
        if prepared is None:
            config = make_config(word)
            needed = GPT2.bytes_needed(config.model, config.batch, config.tiles, config.options) * 1.1 + 2**28
            while needed > machine.free_memory_bytes():
                if not self._prepared:
                    raise UserError(
                        f"{word}: needs {needed / 2**30:.1f} GiB, {machine.free_memory_bytes() / 2**30:.1f} GiB are free; "
                        "choose a smaller graph or batch"
                    )
                del self._prepared[next(iter(self._prepared))]
            prepared = prepare(*key)
        self._prepared[key] = prepared  # now the most recently used
        return prepared
