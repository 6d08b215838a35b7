"""How far a job is, and how long it still takes: on standard error, the same for downloads, measurements and training.

with Progress("measuring", len(cells)) as progress:
    for done, cell in enumerate(cells):
        progress.show(done, str(cell))

On a terminal it is one line, written over: a bar of fixed width, how much is done, the time left, and what goes on, cut where the terminal
ends. No thread draws it: while something is measured, nothing wakes up. Elsewhere it is a line now and then, none for a short job.
"""

import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Self

BAR = 12  # characters
LINE_S = 10.0  # between lines where there is no terminal
DRAW_S = 0.1  # between two looks of the line on a terminal


def count(done: float, total: float) -> str:
    """Return `3/40`."""
    return f"{done:.0f}/{total:.0f}"


def megabytes(done: float, total: float) -> str:
    """Return `1.2/3.0 MB`, of bytes."""
    return f"{done / 1e6:,.1f}/{total / 1e6:,.1f} MB"


def minutes(seconds: float) -> str:
    """Return `0:12`, or `1:00:00`."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole}:{rest:02}" if whole < 60 else f"{whole // 60}:{whole % 60:02}:{rest:02}"


class Progress:
    """What `show` was told last, of `total`. `amount`: in words, None where the time left says it. `done`: what an earlier run did.

    `has_lines`: also where there is no terminal.
    """

    def __init__(
        self,
        label: str,
        total: float,
        amount: Callable[[float, float], str] | None = count,
        done: float = 0.0,
        has_lines: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._label, self._total, self._amount, self._first, self._clock = label, total, amount, done, clock
        self._done, self._words, self._left_s = done, "", None
        self._stream = sys.stderr
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._pause_s = DRAW_S if self._is_terminal else LINE_S if has_lines else math.inf
        self._is_drawn = False

    def __enter__(self) -> Self:
        self._begin = self._clock()
        self._shown_at = -math.inf if self._is_terminal else self._begin
        return self

    def __exit__(self, *exception: object) -> None:
        self._erase()

    @property
    def passed_s(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._begin

    def show(self, done: float, words: str = "", total: float | None = None, left_s: float | None = None) -> None:
        """Say how much is done, and what goes on; of another total, or with another time left, if those are known better."""
        self._done, self._words, self._left_s = done, words, left_s
        self._total = self._total if total is None else total
        if (now := self._clock()) - self._shown_at < self._pause_s:
            return
        self._shown_at = now
        if self._is_terminal:
            self._draw()
        else:
            self._write(f"{self._label}: {self._state()}{': ' * bool(words)}{words}\n")

    def show_time(self, words: str, total_s: float | None = None) -> None:
        """Say what goes on, where the seconds that passed are what is done."""
        total_s = self._total if total_s is None else total_s
        self.show(self.passed_s, words, total_s, max(0.0, total_s - self.passed_s))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the line away while something else is printed, and put it back below."""
        was_drawn = self._is_drawn
        self._erase()
        yield
        if was_drawn:
            self._draw()

    def _state(self) -> str:
        left_s = self._left_s
        if left_s is None and self._done > self._first:
            left_s = self.passed_s / (self._done - self._first) * max(0.0, self._total - self._done)
        words = [self._amount(self._done, self._total)] if self._amount else []
        return ", ".join(words + [f"{minutes(left_s or 0)} left"] * (left_s is not None))

    def _draw(self) -> None:
        filled = round(BAR * min(1.0, self._done / self._total)) if self._total else BAR
        line = f"{self._label} [{'#' * filled}{'-' * (BAR - filled)}] {self._state()}  {self._words}"
        self._write(f"\r{line[: self._columns() - 1].rstrip()}\x1b[K")  # the last one would begin a new line
        self._is_drawn = True

    def _columns(self) -> int:
        """Return the width of the terminal: standard output, which `shutil` asks, may go into a file."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError):
            size = os.terminal_size((80, 24))
        return shutil.get_terminal_size(size).columns

    def _erase(self) -> None:
        if self._is_drawn:
            self._write("\r\x1b[K")
            self._is_drawn = False

    def _write(self, text: str) -> None:
        with suppress(OSError):  # whoever read it has left; the job goes on
            self._stream.write(text)
            self._stream.flush()
