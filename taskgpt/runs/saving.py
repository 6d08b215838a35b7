"""When a run's checkpoints are made, and how: copied by tasks, written by a thread, while training goes on."""

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from taskgpt.errors import UserError, shorten
from taskgpt.gpt2 import checkpoints
from taskgpt.gpt2.checkpoints import resumable
from taskgpt.gpt2.checkpoints.resumable import About
from taskgpt.gpt2.model import GPT2
from taskgpt.gpt2.snapshot import Snapshot
from taskgpt.lab.report import seconds_in
from taskgpt.runs.folder import RunFolder

NICE = 10  # of the thread that writes: a tenth of a core at least, all of one that idles
BEST_S = 60  # between checkpoints that a best validation alone asks for: early in a run nearly every validation is the best


@dataclass(frozen=True)
class Every:
    """How often checkpoints are made: after so many steps, or so many seconds; neither: at the end alone."""

    steps: int | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, flag: str, text: str | None) -> "Every":
        """Return what a flag says: a number of steps, or a time with its unit, 10m say. Raises UserError."""
        if text is None:
            return cls()
        if text.isdecimal():
            if len(text) < 10 and int(text) >= 1:
                return cls(steps=int(text))
        elif text[-1:] in ("s", "m", "h"):
            return cls(seconds=seconds_in(flag, text))
        raise UserError(f"{flag} {shorten(text)}: wanted a number of steps, 100 for example, or a time, 10m for example")


class Saver:
    """Makes the checkpoints of a run.

        if saver.is_due(step):
            saver.hold(about)               # what is no tensor, as it is after `step` steps
            scheduler.run(saver.graph)      # or among others, in run_each
            saver.write()                   # returns at once

    `graph` is None without a `snapshot`: then `write_now` writes from the model itself, and training stands still. A checkpoint that
    is due while the one before it is being written waits for its end. `poll` tells a line about each, in the thread that trains.
    Leave the `with` block to wait for the last one.
    """

    def __init__(
        self, folder: RunFolder, run: str, m: GPT2, snapshot: Snapshot | None, every: Every, keep: int, tell: Callable[[str], None]
    ):
        self.folder, self.run, self.every, self.keep = folder, run, every, keep
        self.graph = snapshot.graph if snapshot else None
        self.error: UserError | None = None  # of the last one that was tried
        self.newest: Path | None = None  # that is whole
        self._m, self._snapshot, self._tell = m, snapshot, tell
        self._is_owed = False
        self._last_s = time.monotonic()
        self._held: About | None = None
        self._thread: threading.Thread | None = None
        self._is_cancelled = self._is_touching = False
        self._told: list[str] = []
        self._defect: Exception | None = None

    def __enter__(self) -> "Saver":
        if self._snapshot and self.every != Every():
            self._is_touching = True
            self._start(self._touch)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._is_cancelled = kind is not None and not issubclass(kind, Exception)  # what is being written is good, whatever else failed
        self.wait()

    def owe(self) -> None:
        """Have a checkpoint made as soon as it can be."""
        self._is_owed = True

    def owe_best(self) -> None:
        """Have the best model so far kept, if checkpoints are made on the way, and the last one is not too young."""
        self._is_owed |= self.every != Every() and time.monotonic() - self._last_s >= BEST_S

    def is_due(self, step: int) -> bool:
        """Return True if a checkpoint is to be made now, after so many steps."""
        every = self.every
        by_steps = every.steps is not None and step % every.steps == 0
        by_time = every.seconds is not None and time.monotonic() - self._last_s >= every.seconds
        self._is_owed |= by_steps or by_time
        return self._is_owed and not self.is_writing

    @property
    def is_copying(self) -> bool:
        """True between `hold` and `write`."""
        return self._held is not None

    @property
    def is_writing(self) -> bool:
        """True while a thread makes a checkpoint."""
        return self._thread is not None and self._thread.is_alive()

    def hold(self, about: About) -> None:
        """Take what the next checkpoint says beside its tensors."""
        self.wait()
        self._is_owed, self._last_s, self._held = False, time.monotonic(), about

    def write(self) -> None:
        """Write what was held and copied, in a thread of its own."""
        about, self._held = self._held, None
        self._start(self._write, about, self._snapshot.state, "behind training")

    def write_state(self, about: About, state_of: Callable[[], dict]) -> None:
        """Write a state that comes from somewhere else, in a thread of its own. OSError, LookupError, MemoryError: it does not come."""

        def write() -> None:
            try:
                state = state_of()
            except (OSError, LookupError, MemoryError) as error:
                why = str(error) or type(error).__name__
                self._told.append(f"none after {about.step:,} steps, which was lost on the way: {why}; {self.left}")
            except Exception as error:  # a defect, which is not to end in this thread unseen
                self._defect = error
            else:
                self._write(about, state, "behind training")

        self._start(write)

    def _start(self, work: Callable[..., None], *arguments: object) -> None:
        """Have a thread work in the time that the workers leave, where the system knows priorities of threads: on Linux."""

        def behind_training() -> None:
            if sys.platform == "linux":
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
            work(*arguments)

        self._thread = threading.Thread(target=behind_training, name="taskgpt-checkpoint")
        self._thread.start()

    def _touch(self) -> None:
        """Take the memory of the copy from the system beforehand: the first copy would wait for it, longer than it copies."""
        for array in self._snapshot.state.values():
            if self._is_touching:
                array.fill(0)

    def write_now(self, about: About) -> None:
        """Write a checkpoint from the model itself, which must not change meanwhile."""
        self.hold(about)
        self._write(about, self._m.state, "while training stood still")
        self.poll()

    def _write(self, about: About, state: dict, how: str) -> None:
        path, begin = self.folder.checkpoint(about.step), time.perf_counter()
        try:
            if not checkpoints.is_finite({name: state[name] for name in about.model.parameter_shapes()}):
                raise UserError(f"{shorten(path)}: parameters are not finite, and nothing was saved")
            nbytes = resumable.save(path, about, state, lambda: self._is_cancelled)
            self.newest, self.error = path, None
            self.folder.prune(self.keep)
            self._told.append(f"{shorten(path)}: {nbytes / 1e6:,.1f} MB in {time.perf_counter() - begin:.1f} s, {how}")
        except resumable.Cancelled:
            pass
        except UserError as error:
            self._fail(error)
        except (MemoryError, OSError) as error:  # of what is done beside writing
            self._fail(UserError(f"{shorten(path)}: {getattr(error, 'strerror', None) or 'out of memory'}"))
        except Exception as error:  # a defect, which is not to end in this thread unseen
            self._defect = error

    def _fail(self, error: UserError) -> None:
        self.error = error
        self._told.append(f"{error}; {self.left}")

    @property
    def left(self) -> str:
        """In words, what there is to go on from."""
        return f"the last one is {shorten(self.newest)}" if self.newest else "there is none before it"

    def poll(self) -> None:
        """Tell what has been written since the last time. Raises what the thread has raised that nobody foresaw."""
        while self._told:
            self._tell(self._told.pop(0))
        if self._defect:
            defect, self._defect = self._defect, None
            raise defect

    def wait(self) -> None:
        """Wait until nothing is being written."""
        self._is_touching = False
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()
