"""Tasks of graphs that are held: their body has run, and the events that they wait for have not happened. No worker waits with them."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from taskgpt.schedulers.native import table as r
from taskgpt.schedulers.native import worker
from taskgpt.schedulers.native.crew import ThisWorker
from taskgpt.schedulers.records import RECORD_TYPE
from taskgpt.tasks.events import Awaited
from taskgpt.tasks.native_entry import give_exception


class HeldTasks:
    """The held tasks of a scheduler's runs. `runs`: those under way; `records`: where rows go of when tasks ran, None for nowhere.

    `lock` keeps apart who lets tasks go, who submits runs and who abandons them: they push as the same, the submitting thread.
    """

    def __init__(self, runs: Sequence[Any], this: ThisWorker, records: list[np.ndarray] | None):
        self.lock = threading.Lock()
        self.address = 0  # of the table
        self._runs, self._this, self._records = runs, this, records

    def is_held(self, instance: int, awaited: Awaited, start_ns: int) -> bool:
        """Return True for a task that waits for events after its body, and have who fulfils the last one let it go."""
        number, slot = divmod(instance, 2)
        under_way = list(self._runs)  # in one go: the submitting thread may take one out at any moment
        run, me, stop_ns = next(run for run in under_way if run.slot == slot), self._this.me, time.monotonic_ns()

        def let_go(error: BaseException | None) -> None:
            with self.lock:
                if run not in self._runs:
                    return  # abandoned
                if error is not None:
                    last_call = int(run.plan.call_first[number + 1]) - 1
                    worker.fail_held(self.address, instance, last_call, give_exception(error))
                    return
                if self._records is not None:
                    row = run.number, number, run.arrays[r.READY_AT][number], start_ns, stop_ns, me
                    self._records.append(np.array([row], RECORD_TYPE))
                worker.release_held(self.address, instance)

        return not awaited.end_body(let_go)
