"""What workers do at this moment, seen by another thread: for who has to tell a task that does not end from one that waits."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from taskgpt.schedulers.native import table as r
from taskgpt.schedulers.native.release import FINISHED
from taskgpt.tasks import Graph


class Doing(NamedTuple):
    """finished: (number, tasks finished) of each run under way; tasks: names of those that workers are in; is_idle: they are in none.

    Of a `run`, and of a task with several calls, no more is known than that it is under way.
    """

    finished: tuple[tuple[int, int], ...]
    tasks: tuple[str, ...]
    is_idle: bool


class _Run(Protocol):
    number: int
    slot: int
    graph: Graph
    arrays: dict[int, np.ndarray | None]


def doing(runs: Sequence[_Run], table: np.ndarray, workers: np.ndarray, idle: np.ndarray) -> Doing:
    """Return what workers do; `workers`, `idle`: words of each worker, and of each group."""
    marks = {run.slot: found for run in runs if (found := run.arrays.get(r.MARKS)) is not None}
    finished = tuple((run.number, int(np.count_nonzero(marks[run.slot] & FINISHED)) if run.slot in marks else 0) for run in runs)
    bits = [int(spins | sleeps) for spins, sleeps in idle[:, [r.SPINNING, r.ASLEEP]]]
    waiting = sum(each.bit_count() for each in bits) + int(table[r.WATCH])  # nobody knows which one is on the watch
    at = [int(place) for me, place in enumerate(workers[:, r.PLACE]) if not bits[me // r.GROUP] >> me % r.GROUP & 1]
    graphs = {run.slot: run.graph for run in runs}
    names = {graphs[slot].tasks[task].name for task, slot in (divmod(place, 2) for place in at if place >= 0) if _is_in(marks, slot, task)}
    return Doing(finished, tuple(sorted(names)), waiting >= len(workers))


def _is_in(marks: dict[int, np.ndarray], slot: int, task: int) -> bool:
    """Return True if a task is one of these runs, and is not finished."""
    return slot in marks and task < len(marks[slot]) and not marks[slot][task] & FINISHED
