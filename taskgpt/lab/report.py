"""How every measurement is told: the machine, medians and quartiles, a table for people, JSON for programs."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from taskgpt.errors import UserError
from taskgpt.lab import machine


class Report:
    """What a benchmark prints, line by line, and at the end writes to its `--json` file.

    `columns` of a table map a heading to (key of the row, format): rows are dictionaries, and may hold more than is printed. Text stands
    left, numbers right; None is shown as a dash. Raises OSError at once, rather than after all rounds, if the file cannot be written.
    """

    def __init__(self, flags: argparse.Namespace):
        self._file = flags.json
        settings = {key: value for key, value in vars(flags).items() if not callable(value)}
        self._record: dict[str, Any] = {"settings": settings, "machine": machine.describe(), "notes": {}}
        if self._file is not None:
            open(self._file, "ab").close()
        for key, value in self._record["machine"].items():
            print(f"{key:10} {value}")

    def line(self, key: str, text: str) -> None:
        """Print a heading and what there is to say under it; keep both among the notes."""
        self._record["notes"][key] = text
        print(f"{key:10} {text}")

    def table(self, key: str, columns: dict[str, tuple[str, str]], rows: Sequence[dict[str, Any]]) -> None:
        """Print the rows, and keep them whole under `key`."""
        self._record[key] = list(rows)
        lines = [[_cell(row[name], form) for name, form in columns.values()] for row in rows]
        is_text = [all(isinstance(row[name], str) for row in rows) for name, _ in columns.values()]
        widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
        print()
        for line in [list(columns), *lines]:
            cells = (f"{cell:<{width}}" if left else f"{cell:>{width}}" for cell, width, left in zip(line, widths, is_text, strict=True))
            print("  ".join(cells).rstrip())

    def save(self) -> None:
        """Write the JSON file, if one was asked for."""
        if self._file is not None:
            Path(self._file).write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Return (first quartile, median, third quartile)."""
    values = list(values)
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return q1, statistics.median(values), q3


def at_least(flag: str, number: int | None, smallest: int = 1) -> None:
    """Raise UserError for a number below the smallest that makes sense; None passes."""
    if number is not None and number < smallest:
        raise UserError(f"{flag}: wanted at least {smallest}, got {number}; choose {flag} {smallest} or more")


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
