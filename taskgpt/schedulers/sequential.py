"""Program order, in the calling thread: what every other scheduler must agree with to the bit, and where a debugger works."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from taskgpt.schedulers.dynamic import Recording, run_program
from taskgpt.schedulers.prepare import InTurn
from taskgpt.schedulers.records import Recorder
from taskgpt.sharing.member import Cores, Terms
from taskgpt.tasks import Graph, one_blas_thread
from taskgpt.tasks.spawn import Spawn


@dataclass(frozen=True)
class Settings(Terms):
    """The keys of scheduler_configs/sequential.toml."""

    workers: int
    record: int = field(metadata={"at_least": 0, "at_most": 10**8})

    def __post_init__(self):
        if self.workers != 1:
            raise ValueError(f"sequential has one worker, got --workers {self.workers}; choose another scheduler for more, loops say")


class Scheduler(InTurn):
    """Runs the tasks one after another, as they were recorded."""

    workers = 1

    def __init__(self, settings: Settings):
        super().__init__()
        self.settings = settings
        self.recorder = Recorder(settings.record)
        self._cores = Cores(settings, 1)

    def _start(self) -> None:
        self._cores.__enter__()
        one_blas_thread.acquire()

    def _stop(self) -> None:
        one_blas_thread.release()
        self._cores.__exit__()

    @contextmanager
    def program(self, patience_s: float = 60.0, check: bool = False) -> Iterator[Spawn]:
        recording = Recording(lambda: 0) if self.settings.record else None
        with self._turn():
            number, begin_ns = self.recorder.number(), time.monotonic_ns()
            try:
                with run_program(None, patience_s, check, recording) as spawn:
                    yield spawn
            finally:
                if recording is not None:
                    graph = recording.graph()
                    rows = [(number, recording.numbers[stretch], start, stop) for stretch, start, stop, _ in recording.rows]
                    self.recorder.note(number, graph, begin_ns)
                    self.recorder.add(threading.get_ident(), rows, 0)

    def describe(self) -> str:
        return "sequential: program order, in the calling thread"

    def _run(self, graph: Graph) -> None:
        run_task = self.recorder.begin(graph)
        try:
            for task in graph.tasks:
                self._cores.hold(0)
                run_task(task)
        finally:
            self._cores.let_go(0)
