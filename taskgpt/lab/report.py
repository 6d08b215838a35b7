"""How every measurement is told: the machine, medians and quartiles, a table for people, JSON for programs."""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from taskgpt.errors import UserError, shorten
from taskgpt.files import as_written, verify_can_write, write_whole
from taskgpt.lab import layout, machine
from taskgpt.lab.disturbance import Disturbance
from taskgpt.progress import Progress
from taskgpt.tasks import Kernel, compile_kernels

MOST_SECONDS = 1e8  # three years
LEAST_TURNS = 6  # with fewer, no interval of the median holds 95 %
NOT_YET = "not known yet"


class Report:
    """What a benchmark prints, line by line, and at the end writes to its `--json` file.

    `columns` of a table map a heading to (key of the row, format): rows are dictionaries, and may hold more than is printed. None is
    shown as a dash. Raises UserError at once, rather than after all rounds, if the file cannot be written.
    """

    def __init__(self, flags: argparse.Namespace):
        self._file, self._disturbance, self._width = flags.json, Disturbance(), layout.terminal_width(flags)
        settings = {key: value for key, value in vars(flags).items() if not callable(value)}
        self._record: dict[str, Any] = {"settings": settings, "machine": machine.describe(), "notes": {}}
        if self._file is not None:
            verify_can_write(self._file)
        for key, value in self._record["machine"].items():
            print(layout.field(key, value))

    def line(self, key: str, text: str) -> None:
        """Print a heading and what there is to say under it; keep both among the notes."""
        self._record["notes"][key] = text
        print(layout.field(key, text))

    def keep(self, key: str, value: Any) -> None:
        """Keep under `key` what is too long to be printed."""
        self._record[key] = value

    def table(self, key: str, columns: dict[str, tuple[str, str]], rows: Sequence[dict[str, Any]], details: Collection[str] = ()) -> None:
        """Print the rows, if there are any, and keep them whole under `key`. `details`: heads of columns that only `--wide` shows."""
        self.keep(key, list(rows))
        table = table_of("", columns, rows)
        if rows:
            print(f"\n{layout.to_text(table if self._width is None else layout.without(table, details), self._width)}")

    def save(self) -> None:
        """Say in one line what disturbed the measurements, if anything did, and write the JSON file, if one was asked for."""
        if notes := self._disturbance.found(machine.usable_cores()).notes():
            self.line("disturbed", "; ".join(notes))
        if self._file is not None:
            write_whole(self._file, json.dumps(self._record, indent=1) + "\n")


def table_of(caption: str, columns: dict[str, tuple[str, str]], rows: Sequence[dict[str, Any]]) -> layout.Table:
    """Return the rows as words; `columns` as of `Report`."""
    words = [["-" if row[name] is None else format(row[name], form) for name, form in columns.values()] for row in rows]
    return {"caption": caption, "head": list(columns), "rows": words}


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Return (first quartile, median, third quartile)."""
    values = list(values)
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return q1, statistics.median(values), q3


def median_interval(values: Iterable[float]) -> tuple[float, float] | None:
    """Return a confidence interval of the median, of 95 % or more, whatever the distribution: two of the values, by rank.

    The median lies below the k-th smallest of n values with the chance that fewer than k of n coins show heads. Fewer than LEAST_TURNS
    values cannot give 95 %, wherever they lie: None, as it is not known yet.
    """
    ordered = sorted(values)
    n, cut, chance = len(ordered), 0, 0.5 ** len(ordered)
    while chance <= 0.025:
        cut += 1
        chance += math.comb(n, cut) * 0.5**n
    return (ordered[cut - 1], ordered[n - cut]) if cut else None


def interval_words(interval: tuple[float, float] | None, form: str = ".2f") -> str:
    """Return `1.00-1.20`, or that the interval is not known yet."""
    return NOT_YET if interval is None else f"{interval[0]:{form}}-{interval[1]:{form}}"


def seconds_in(flag: str, text: str) -> float:
    """Return the seconds of `90s`, `20m`, `1.5h`, or a bare number of seconds. Raises UserError."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    try:
        seconds = float(number) * units[unit]
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= MOST_SECONDS:
        raise UserError(f"{flag} {shorten(text)}: wanted a time, for example 90s, 20m or 1.5h")
    return seconds


def in_range(flag: str, number: float | None, smallest: float = 1, largest: float = 10**6) -> None:
    """Raise UserError for a number below the smallest that makes sense, or above the largest that comes to an end; None passes."""
    if number is None or smallest <= number <= largest:
        return
    bound, limit, do = ("at most", largest, "less") if number > largest else ("at least", smallest, "more")  # NaN wants to be more
    raise UserError(f"{flag}: wanted {bound} {limit:,}, got {as_written(number)}; choose {flag} {limit} or {do}")


def compile_with_progress(kernels: Sequence[Kernel]) -> str:
    """Compile the kernels; return in words how many were compiled, "" if all came from the cache."""
    compiled, begin = 0, time.perf_counter()

    def tell(done: int, total: int, kernel: Kernel, _: float, was_cached: bool) -> None:
        nonlocal compiled
        compiled += not was_cached
        if compiled:
            progress.show(done, kernel.name, total)

    with Progress("compiling kernels, once for this machine", len(kernels)) as progress:
        compile_kernels(kernels, tell)
    return f"{compiled} kernel{'s' * (compiled > 1)} in {time.perf_counter() - begin:.0f} s, once for this machine" if compiled else ""


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
