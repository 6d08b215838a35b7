"""A program of a pair in its process: it prepares once, and then, in each turn, opens its scheduler, waits for go, works, and closes it."""

import gc
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

from taskgpt.lab.named import named_scheduler
from taskgpt.lab.pairs.words import Word
from taskgpt.lab.pairs.works import Work
from taskgpt.products import verify_callers
from taskgpt.schedulers import Scheduler
from taskgpt.tasks import Graph


@dataclass(frozen=True)
class Place:
    """Where a program runs in a turn: the cores that its threads may use, a worker for each; a share, "" for none, with its weight."""

    cores: tuple[int, ...]
    share: str = ""
    weight: int = 1


class Partner:
    """The program. Methods are called in this order: `prepare`; then again and again `open`, one that works, `close`."""

    def __init__(self, word: Word):
        self._word = word
        self._work: Work
        self._scheduler: Scheduler
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """End the workers that an error has left at work: a share is to lose nobody who does not leave it."""
        self._open.close()

    def prepare(self) -> bool:
        """Compile and record; return True if the result does not depend on the order of tasks."""
        self._work = self._word.work()
        gc.collect()
        gc.freeze()  # what is recorded is no work of the garbage collector in a turn
        return self._work.is_exact

    def open(self, place: Place) -> None:
        """Start the workers in a place, let every graph run once, and set the memory to the start."""
        os.sched_setaffinity(0, place.cores)  # of this thread, and of those that it starts
        settings = {"share": place.share, "share_weight": place.weight}
        self._scheduler = self._open.enter_context(named_scheduler(self._word.scheduler, len(place.cores), **settings))
        verify_callers(self._work.products, self._scheduler.workers)
        self._repeat(len(self._work.graphs))
        self._work.begin()

    def calibrate(self, seconds: float) -> int:
        """Return how often the work runs in so many seconds, once at least."""
        times, took = 1, self._seconds_of(1)
        while took < seconds / 4:
            times = math.ceil(times * min(10.0, seconds / 2 / max(took, 1e-6)))
            took = self._seconds_of(times)
        return max(1, round(times * seconds / took))

    def run(self, at: float, times: int) -> float:
        """Do the work so often, from a moment of the clock that all processes share, monotonic; return the seconds to its end."""
        time.sleep(max(0.0, at - time.monotonic()))
        self._repeat(times)
        return time.monotonic() - at

    def run_until(self, at: float, until: float) -> int:
        """Do the work again and again from one moment to another; return how often it was begun."""
        time.sleep(max(0.0, at - time.monotonic()))
        return sum(1 for _ in self._scheduler.run_each(self._graphs_until(until)))

    def close(self) -> str:
        """End the workers; return the hash of the result."""
        self._open.close()
        return self._work.sha256()

    def _repeat(self, times: int) -> None:
        graphs = self._work.graphs
        for _ in self._scheduler.run_each(graphs[number % len(graphs)] for number in range(times)):
            pass

    def _graphs_until(self, until: float) -> Iterator[Graph]:
        number = 0
        while time.monotonic() < until:
            yield self._work.graphs[number % len(self._work.graphs)]
            number += 1

    def _seconds_of(self, times: int) -> float:
        return self.run(time.monotonic(), times)
