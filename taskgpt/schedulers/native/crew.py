"""The crew: the threads that are workers. Each worker is one thread at a time, and not always the same.

A task that waits for something else than its own children's turn keeps its thread, but not its worker: another thread is that one
meanwhile, so that no core is idle because of it (nOS-V's idea). When the wait is over, the thread asks for its worker back, gets it when
who has it comes to the end of a task, and goes on.
"""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence

from taskgpt.schedulers.native import worker

_MOST_THREADS = 1000


class ThisWorker(threading.local):
    """`me`: which worker this thread is; -1 for none."""

    me = -1


class Crew:
    """Threads for the workers of a table; `bound_to`, the core of each worker, or nothing. `this`: of this scheduler, tasks open others."""

    def __init__(self, address: int, workers: int, bound_to: Sequence[int], this: ThisWorker):
        self._address, self._bound_to = address, bound_to
        self._left = [threading.Semaphore(0) for _ in range(workers)]  # how often a thread has left this worker to others
        self._lock = threading.Lock()
        self._parked: list[queue.SimpleQueue[int | None]] = []  # threads that are told which worker to be next, None for the end
        self._threads: list[threading.Thread] = []
        self._is_over = False
        self.this = this
        for me in range(workers):
            self._start(me)

    def _start(self, me: int) -> None:
        name = f"taskgpt-native-{len(self._threads)}"
        thread = threading.Thread(target=self._serve, args=(me,), name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _serve(self, me: int | None) -> None:
        told: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        while me is not None:
            if self._bound_to:
                os.sched_setaffinity(0, {self._bound_to[me]})  # this thread, not the process
            self.this.me = me
            worker.work(self._address, me)
            self.this.me = -1
            with self._lock:
                if self._is_over:
                    return
                self._parked.append(told)
            self._left[me].release()
            me = told.get()

    @contextlib.contextmanager
    def blocking(self) -> Iterator[None]:
        """Within the `with` block, let another thread be the worker that this one is. RuntimeError: there are too many."""
        me = self.this.me
        if me < 0:
            yield
            return
        with self._lock:
            told = self._parked.pop() if self._parked else None
            if told is None:
                if len(self._threads) == _MOST_THREADS:
                    raise RuntimeError(f"{_MOST_THREADS} tasks wait at once, each in a thread; spawn less deeply")
                self._start(me)
        if told is not None:
            told.put(me)
        self.this.me = -1
        try:
            yield
        finally:
            worker.want_back(self._address, me)
            self._left[me].acquire()
            self.this.me = me
            worker.get_core_back(self._address, me)

    def join(self) -> None:
        """Have the workers return, and wait for them, even if Ctrl-C is pressed: their code must not vanish while they run."""
        with self._lock:
            self._is_over = True
            parked, self._parked = self._parked, []
        worker.close(self._address)
        for told in parked:
            told.put(None)
        interrupt = None
        while self._threads:
            try:
                self._threads[-1].join()
                self._threads.pop()
            except KeyboardInterrupt as pressed:
                interrupt = pressed
        if interrupt:
            raise interrupt
