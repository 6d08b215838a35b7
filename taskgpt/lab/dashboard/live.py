"""The numbers of a run while it goes on: what the thread that trains notes, and the pages of a dashboard show.

live = Live(workers=2)
scheduler = Traced(scheduler, on_run=live.look)     # after every run: which tasks ran when
live.step(step, loss, tokens_per_s)                 # after every step of training; of other programs nothing but runs is known
live.begin_ranks(ranks)                             # of a run on a cluster: who takes part from now on
live.rank(number, step, seconds, wait_s)            # and how one of them is
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from taskgpt.lab.traces.trace import Trace

POINTS = 240  # at which the number of ready tasks is counted, along a run
LOST = 8  # ranks of earlier generations that are shown


@dataclass
class Run:
    """What a run showed. efficiency: time in tasks / (workers x time). kernel_ms: all workers' time, the longest first.

    ready: the number of tasks that were ready and not begun, at `ready_at_ms` since the beginning; of the run before, as only the next one
    tells which tasks were ready, but not begun, at its end.
    """

    efficiency: float = 0.0
    kernel_ms: dict[str, float] = field(default_factory=dict)
    ready_at_ms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    ready: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))


@dataclass(frozen=True)
class Rank:
    """A rank as it last said. address, machine: of its worker. tokens: its part of a step's. step: how many are done.

    seconds: of the last step, 0 before one is known; wait_s: those of them in which nothing but the network was left to wait for, None
    where no such time is known: of one rank alone, and of stages.
    """

    number: int
    address: str
    machine: str
    generation: int
    tokens: int
    step: int
    seconds: float = 0.0
    wait_s: float | None = None
    is_lost: bool = False


@dataclass
class Live:
    """What there is to show. Written by one thread; others may read at any time, for nothing that is there ever changes.

    total: steps that there will be. steps: (step, loss, tokens a second, efficiency). validations: (step, loss). samples: (step, text).
    kernel_ms: of all steps together. last_run: whatever ran last; last_step: the last step of training, as validations and samples are
    other programs. left_s: until the last step is done. end: how the run ended, "" while it goes on.
    trains: False for a program that is no training; runs: its runs, as (number, graph, ms, efficiency).
    share: the name of the share whose cores the workers take, "" if they share none.
    ranks: on a cluster, those of this generation by their numbers, and behind them the last ones that were lost; None on one machine.
    """

    workers: int
    title: str = ""
    total: int = 0
    left_s: float = 0.0
    end: str = ""
    trains: bool = True
    share: str = ""
    runs: list[tuple[int, str, float, float]] = field(default_factory=list)
    steps: list[tuple[int, float, float, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    samples: list[tuple[int, str]] = field(default_factory=list)
    ranks: tuple[Rank, ...] | None = None
    kernel_ms: Counter[str] = field(default_factory=Counter)
    last_run: Run = field(default_factory=Run)
    last_step: Run = field(default_factory=Run)
    _seen_ns: int = 0
    _window: tuple[int, int] = (0, 0)
    _waits: np.ndarray = field(default_factory=lambda: np.zeros((2, 0), np.int64))  # when tasks were ready, and when they began

    def look(self, part: Trace) -> None:
        """Take note of what ran since the last look."""
        r = part.records
        if not len(r):
            return
        begin, end = max(self._seen_ns, part.begin_ns), int(r["stop_ns"].max())  # not part.end_ns: another run may have been submitted
        took = r["stop_ns"] - r["start_ns"]
        kernel, names = part.column("kernel"), part.names("kernel")
        by_kernel = sorted(zip(np.bincount(kernel, took, len(names)).tolist(), names, strict=True), reverse=True)
        waits = np.stack([r["ready_ns"], r["start_ns"]])
        at, ready = self._ready(np.concatenate([self._waits, waits], axis=1))
        self.last_run = Run(
            efficiency=float((r["stop_ns"] - np.maximum(r["start_ns"], begin)).sum()) / (self.workers * max(1, end - begin)),
            kernel_ms={name: ns / 1e6 for ns, name in by_kernel if ns},
            ready_at_ms=at,
            ready=ready,
        )
        self._seen_ns, self._window, self._waits = end, (begin, end), waits
        if not self.trains:
            self.runs.append((len(self.runs), part.graphs[part.runs["graph"][0]].name, (end - begin) / 1e6, self.last_run.efficiency))

    def _ready(self, waits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (ms, how many tasks were ready then) along the run before."""
        begin, end = self._window
        at = np.linspace(begin, end, POINTS)
        were_ready, began = (np.searchsorted(np.sort(each), at, side="right") for each in waits)
        return (at - begin) / 1e6, were_ready - began

    def step(self, step: int, loss: float, tokens_per_s: float, left_s: float = 0.0) -> None:
        """Take note of a step of training, whose run was the last one."""
        self.last_step, self.left_s = self.last_run, left_s
        self.kernel_ms.update(self.last_step.kernel_ms)
        self.steps.append((step, loss, tokens_per_s, self.last_step.efficiency))

    @property
    def done(self) -> int:
        """How many steps are done, also those of earlier parts of the run."""
        return self.steps[-1][0] + 1 if self.steps else 0

    def begin_ranks(self, generation: Iterable[Rank]) -> None:
        """Take note of who takes part from now on. A worker that was lost is not shown as such when it is back."""
        ranks = tuple(generation)
        here = {each.address for each in ranks}
        lost = [each for each in self.ranks or () if each.is_lost and each.address not in here]
        self.ranks = ranks + tuple(lost[:LOST])

    def rank(self, number: int, step: int, seconds: float, wait_s: float | None) -> None:
        """Take note of what a rank of this generation says."""
        self._change(number, step=step, seconds=seconds, wait_s=wait_s)

    def lose_rank(self, number: int) -> None:
        """Take note that a rank of this generation is lost."""
        self._change(number, is_lost=True)

    def _change(self, number: int, **changes: Any) -> None:
        ranks = list(self.ranks or ())
        ranks[number] = replace(ranks[number], **changes)
        self.ranks = tuple(ranks)

    def validation(self, step: int, loss: float) -> None:
        """Take note of a validation before a step."""
        self.validations.append((step, loss))
