"""Fork-join, as OpenMP does to llm.c: the tasks in program order, cut into loops; a loop runs in parallel and ends with a barrier.

A loop is as long a run of consecutive tasks as has one kernel and no dependency inside:

    matmul r0   matmul r1   matmul r2 | gelu r0   gelu r1   gelu r2 | matmul r0   ...
    '-------- a loop, shared out ----' '-------- the next ---------'
                                     barriers

gelu r0 needs only matmul r0, but waits for the slowest of the loop before: that is the price of this way, and what it is here to show.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Self

from taskgpt.schedulers.prepare import InTurn, OncePerGraph, worker_count
from taskgpt.schedulers.records import Recorder
from taskgpt.sharing.member import Cores, Terms
from taskgpt.tasks import Graph, Task, one_blas_thread

_GRACE_S = 0.0005  # for which a worker that waits at a barrier keeps its core of a share: most loops come sooner, and its cache is warm


@dataclass(frozen=True)
class Settings(Terms):
    """The keys of scheduler_configs/loops.toml."""

    workers: int = field(metadata={"at_least": 0, "at_most": 4096})
    chunks: str = field(metadata={"choices": ("static", "dynamic")})
    chunk_size: int = field(metadata={"at_least": 1})
    coverage: str
    record: int = field(metadata={"at_least": 0, "at_most": 10**8})


class Scheduler(InTurn):
    """Runs loops on a fixed team: the calling thread and workers - 1 helpers, who sleep between loops.

    A fork and its barrier cost 12 to 45 us with one helper on a 2-core machine: two threads woken up, each with the GIL. threading.Barrier
    costs twice that. Spinning on a flag in compiled code costs 2 to 30 us, and 400 us with more workers than free cores.
    """

    is_fork_join = True

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        self.workers = worker_count(settings.workers)
        self.recorder = Recorder(settings.record)
        self._cores = Cores(settings, self.workers)
        self._run_task: Callable[[Task], None] = Task.run_calls
        self._loops = OncePerGraph(self._cut_and_deal)
        self._helpers: list[_Helper] = []
        self._failures: list[BaseException] = []

    def _start(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(one_blas_thread)
            stack.enter_context(self._cores)
            cores = self._cores
            helpers = [_Helper(partial(self._work, me), partial(cores.let_go, me), self._grace) for me in range(1, self.workers)]
            self._helpers = [stack.enter_context(helper) for helper in helpers]
            self._close = stack.pop_all().close

    def _stop(self) -> None:
        self._close()

    def describe(self) -> str:
        covered = "all kernels" if self.settings.coverage == "all" else f"kernels tagged '{self.settings.coverage}'"
        return f"loops: {self.workers} workers, {self.settings.chunks} chunks, {covered} in parallel"

    def _run(self, graph: Graph) -> None:
        self._failures = []
        loops = self._loops(graph)
        self._run_task = self.recorder.begin(graph)
        try:
            for parts in loops:
                self._fork_and_join(parts)
        finally:
            self._cores.let_go(0)

    def _settle(self) -> None:
        """Let the helpers finish the task they are at, and take no other."""
        self._failures.append(RuntimeError("the run was cut short"))
        for done in [helper.start(()) for helper in self._helpers]:
            done.acquire()

    def _cut_and_deal(self, graph: Graph) -> list[list[list[Task]]]:
        """Return, for each loop, its parts: with static chunks one for each worker at most, with dynamic chunks one for each chunk."""
        return [self._deal(loop) if self._is_parallel(loop[0]) else [loop] for loop in cut(graph)]

    def _is_parallel(self, task: Task) -> bool:
        return self.settings.coverage == "all" or all(self.settings.coverage in call.kernel.tags for call in task.calls)

    def _deal(self, loop: list[Task]) -> list[list[Task]]:
        count = min(self.workers, len(loop))
        if self.settings.chunks == "static":
            bounds = [len(loop) * part // count for part in range(count + 1)]
        else:
            bounds = [*range(0, len(loop), self.settings.chunk_size), len(loop)]
        return [loop[start:stop] for start, stop in itertools.pairwise(bounds)]

    def _fork_and_join(self, parts: list[list[Task]]) -> None:
        mine, *theirs = self._shares(parts)
        barrier = [helper.start(share) for helper, share in zip(self._helpers, theirs, strict=False)]
        self._work(0, mine)
        for done in barrier:
            if not done.acquire(timeout=self._grace()):
                self._cores.let_go(0)  # they may wait for it
                done.acquire()
        if self._failures:
            raise self._failures[0]

    def _grace(self) -> float:
        """Return for how many seconds a worker with nothing to do keeps its core: not at all if another of the team waits for one."""
        return 0.0 if self._cores.are_awaited() else _GRACE_S

    def _shares(self, parts: list[list[Task]]) -> list[Iterable[Task]]:
        """Return what each of the team is to run, the calling thread first."""
        if self.settings.chunks == "static":
            return parts
        queue = deque(parts)
        return [_take(queue) for _ in range(min(self.workers, len(parts)))]

    def _work(self, me: int, tasks: Iterable[Task]) -> None:
        failures, run_task, cores = self._failures, self._run_task, self._cores
        try:
            for task in tasks:
                if failures:
                    break
                cores.hold(me)
                run_task(task)
        except BaseException as error:
            failures.append(error)


def cut(graph: Graph) -> Iterator[list[Task]]:
    """Yield the loops of a graph: as long as possible, consecutive tasks of one kernel that do not depend on each other."""
    loop: list[Task] = []
    for task in graph.tasks:
        # The tasks of a loop are consecutive, so a path from one of them to this task would end in an edge from the loop.
        if loop and (task.name != loop[0].name or any(p >= loop[0].number for p in task.predecessors)):
            yield loop
            loop = []
        loop.append(task)
    if loop:
        yield loop


def _take(queue: deque[list[Task]]) -> Iterator[Task]:
    """Yield the tasks of the chunks in a queue, which several threads may be emptying."""
    while True:
        try:
            chunk = queue.popleft()
        except IndexError:
            return
        yield from chunk


class _Helper:
    """A thread that works on what it is given, for as long as the `with` block lasts. `rest`: called when nothing has come for a while."""

    def __init__(self, work: Callable[[Iterable[Task]], None], rest: Callable[[], None], grace: Callable[[], float]):
        self._inbox: SimpleQueue[tuple[Iterable[Task], threading.Lock] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, args=(work, rest, grace), name="taskgpt-loops", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._inbox.put(None)
        self._thread.join()

    def start(self, share: Iterable[Task]) -> threading.Lock:
        """Have the share worked on; return a lock that can be acquired when that is done."""
        done = threading.Lock()
        done.acquire()
        self._inbox.put((share, done))
        return done

    def _serve(self, work: Callable[[Iterable[Task]], None], rest: Callable[[], None], grace: Callable[[], float]) -> None:
        while (order := self._next(rest, grace)) is not None:
            share, done = order
            work(share)
            done.release()

    def _next(self, rest: Callable[[], None], grace: Callable[[], float]) -> tuple[Iterable[Task], threading.Lock] | None:
        try:
            return self._inbox.get(timeout=grace())
        except Empty:
            rest()
            return self._inbox.get()
