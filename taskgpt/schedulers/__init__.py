"""Room 2: ways to run a graph. One file or folder per value of `--scheduler`; a new one is that and its TOML in scheduler_configs/.

    native/            compiled workers without the GIL, with policies; runs overlap. The default
    sequential.py      program order, in the calling thread
    loops.py           fork-join: parallel loops with a barrier after each, what OpenMP does to llm.c
    threads.py         dask.threaded, on threads of this process
    local_cluster.py   dask.distributed on this machine, with its dashboard: worker threads or worker processes
    cores.py           which cores there are to use: how many, which are free to bind to, which are near
    repetition.py      whole steps until something is so
    prepare.py         what they share: the number of workers, one run at a time, plans that are made once per graph
    records.py         when and where each task ran, on request
    dynamic/           programs whose tasks start as they are spawned
    dask_get/          taskgpt.get, for any Dask graph

A scheduler may change the time that a graph takes, and nothing else. Each is a module with a frozen dataclass `Settings`, whose fields are
the keys of its TOML file, and a class `Scheduler(settings)` that keeps the contract below; tests/test_schedulers.py checks it.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, Self

import numpy as np

from taskgpt.tasks import Graph, Spawn, Tile


class WorkerError(RuntimeError):
    """A worker was lost in the middle of a run, and with it what the tensors held. The message says which one, and what to do."""


class Scheduler(Protocol):
    """The contract. A scheduler works inside its `with` block, which starts the workers and limits BLAS to one thread, and undoes both.

    It does one thing at a time: while it runs a graph, a task of that graph, or another thread, that asks it for a run gets RuntimeError,
    for the task would wait for itself. A task may open a scheduler of its own, whose workers then share the cores with those outside, and
    may call `taskgpt.get`. RuntimeError is also for a scheduler outside its `with` block, and for a second `with` inside the first.
    """

    workers: int  # how many tasks can run at a time
    needs_shared_memory: bool  # True: the tensors must live in Arena(shared=True)
    is_fork_join: bool  # True: it runs loops with a barrier after each
    serves_dashboard: bool  # True: it has a Dask scheduler, `dask_scheduler`, whose dashboard shows its tasks

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def describe(self) -> str:
        """Return a line for people: what runs the tasks, on how many workers."""

    def run(self, graph: Graph) -> None:
        """Run every task of the graph once, each after its predecessors; return when all are done.

        Called again for every step: what can be prepared once per graph, is. The first exception ends the run: no further task starts,
        those that run are waited for, then it is raised: TaskError, which names the task, WorkerError, or KeyboardInterrupt. TwinError,
        before any task starts, is for a kernel that was compiled from what has changed since. A second
        KeyboardInterrupt may end that wait; the next run makes up for it. It starts afresh. Until the run ends, the graph cannot grow.
        """

    def run_each(self, graphs: Iterable[Graph]) -> Iterator[Graph]:
        """Run graphs one after another, with the same results as `run` for each; yield each when it is done.

        A scheduler may begin the next graph while one is under way, as far as dependencies allow, never the one after that: the next graph
        is asked for before the one under way is yielded. Who calls `run` in between, while asked for a graph or given one, waits for what
        is under way first.

        Left early, by close(), `break` or an exception in the loop's body or from `graphs`, the iterator finishes what has begun: the
        tensors are then those after one run of every graph that was taken from `graphs`, yielded or not. close() raises what a task of the
        last run raised; after `break` alone Python can only print it, so where it matters, use contextlib.closing. An iterator that nobody
        closes is finished by the next run, or by the end of the `with` block. Only a failed task, a lost worker or KeyboardInterrupt leave
        tensors in the middle of a run. Inside a task, where it cannot wait, close() leaves what has begun to the next run.
        """

    def run_while(self, step: Graph | Callable, until: Callable[[], bool], reads: Sequence[Tile] = ()) -> int:
        """Run a step again and again until `until()` is true after it; return how often it ran, always to its end.

        `step`: a graph, or a function that spawns the tasks of one, with what it is given. `reads`: the tiles whose arrays `until` reads.
        With them, of a function's step, a task asks it, so that steps overlap as in `run_each`: one more than it took may have run.
        """

    def program(self, patience_s: float = 60.0, check: bool = False) -> AbstractContextManager[Spawn]:
        """Give a `with` block what it spawns tasks with that start as they are spawned, and may spawn others (tasks/spawn.py).

        Results are those of `sequential`, which runs each task where it is spawned. The end of the block waits for all tasks, and raises
        what the first that failed has raised: TaskError, which names the task, its tiles, and the line that spawned it. If all tasks wait
        for each other, or for events, for `patience_s`, ProgramError says who waits for what. `check` enforces declarations, as
        tasks/check.py does for graphs, and that what a task spawns touches only what that task declares: else a task fails with
        AccessError. NotImplementedError: it runs graphs alone.
        """

    def ahead(self) -> float:
        """Return which part of the next run is done, of its FLOPs, while `run_each` waits for its caller: 0 where runs do not overlap."""

    def as_run(self, graph: Graph) -> Graph:
        """Return the graph whose tasks run for this one: itself, or a coarsened one."""

    def take_records(self) -> tuple[np.ndarray, int]:
        """Return (records, how many found no room) since the last call, of records.RECORD_TYPE, by start time.

        Between runs, or while `run_each` waits for its caller: then also of those tasks of the run under way that are done. Empty unless
        settings.record, the number of tasks that each worker can keep, says otherwise.
        """


def open_scheduler(scheduler: str, settings: Any) -> Scheduler:
    """Return the scheduler of that name (`local-cluster` is in local_cluster.py), to be used in a `with` block."""
    module = importlib.import_module(f"taskgpt.schedulers.{scheduler.replace('-', '_')}")
    return module.Scheduler(settings)
