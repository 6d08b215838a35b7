"""A trace as tables: a row a task, for spreadsheets, pandas and DuckDB; and a row for each time that a worker ran none.

A folder: tasks.csv and idle.csv, or tasks.parquet and idle.parquet (needs pyarrow). Times are ns since the first task was ready.
"""

import csv
import importlib.util
import io
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from taskgpt.errors import UserError, shorten
from taskgpt.files import replacing
from taskgpt.lab.traces.idle import CAUSES, gaps
from taskgpt.lab.traces.rules import RuleError, reading
from taskgpt.lab.traces.trace import Trace

_WORDS = ("process", "graph", "kernel", "phase", "call")  # columns of text
_NUMBERS = ("run", "step", "task", "layer", "worker", "ready_ns", "start_ns", "stop_ns", "flops", "bytes")
_WAITS = ("begin_ns", "end_ns", *(f"{cause}_ns" for cause in CAUSES))
_ROWS = 20_000  # in memory as text at a time
_INTEGER = re.compile(r"-?[0-9]{1,18}")
Columns = dict[str, np.ndarray]


def _tables(trace: Trace) -> dict[str, Columns]:
    """Return the columns of both tables."""
    r = trace.records
    idle = gaps(trace) if len(r) else gaps(trace)[:0]  # gaps are beside tasks
    graph = trace.runs["graph"][r["run"]]
    process = np.array([rank.name for rank in trace.ranks], object)[trace.rank_of_worker]
    tasks = {"process": process[r["worker"]], "run": r["run"], "graph": np.array([g.name for g in trace.graphs], object)[graph]}
    tasks |= {"step": trace.runs["step"][r["run"]], "task": r["task"]}
    tasks |= {name: np.array(trace.names(name), object)[trace.column(name)] for name in ("kernel", "phase")}
    tasks |= {"layer": trace.column("layer"), "worker": r["worker"]}
    tasks |= {name: r[name] - trace.begin_ns for name in ("ready_ns", "start_ns", "stop_ns")}
    tasks |= {name: trace.column(name) for name in ("flops", "bytes")}
    first = np.cumsum([0, *(len(g) for g in trace.graphs)])[:-1]
    tasks["call"] = np.array([call for g in trace.graphs for call in g.calls], object)[first[graph] + r["task"]]
    waits = {"process": process[idle["worker"]], "worker": idle["worker"]} | {
        name: idle[name] - trace.begin_ns for name in ("begin_ns", "end_ns")
    }
    return {"tasks": tasks, "idle": waits | {f"{cause}_ns": np.rint(idle[cause]).astype(np.int64) for cause in CAUSES}}


def _write(put: Callable[[Columns, BinaryIO], None], ending: str, trace: Trace, path: str | Path) -> None:
    """Write both files into the folder, both whole or neither; those that were there are replaced. Raises OSError."""
    Path(path).mkdir(parents=True, exist_ok=True)
    with ExitStack() as until_both_are_whole:
        for name, columns in _tables(trace).items():
            put(columns, until_both_are_whole.enter_context(replacing(Path(path) / f"{name}.{ending}")))


def _put_csv(columns: Columns, file: BinaryIO) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    for start in range(0, len(next(iter(columns.values()))), _ROWS):
        writer.writerows(zip(*(column[start : start + _ROWS].tolist() for column in columns.values()), strict=True))
    text.detach()  # written out, and the file is left open


def _put_parquet(columns: Columns, file: BinaryIO) -> None:
    pyarrow, parquet = _pyarrow()
    parquet.write_table(pyarrow.table({name: pyarrow.array(column) for name, column in columns.items()}), file)


def _pyarrow() -> tuple[Any, Any]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("parquet: needs pyarrow; install it with: pip install 'taskgpt[parquet]'")
    import pyarrow
    import pyarrow.parquet

    return pyarrow, pyarrow.parquet


def _check(read: Callable[[Path], Iterator[Any]], ending: str, path: str | Path) -> dict[str, int]:
    """Return how many rows there are. Raises RuleError for a row that cannot be: the columns, their order in time, and idle time's sum."""
    counts = {"tasks": 0, "gaps": 0}
    tasks, idle = Path(path) / f"tasks.{ending}", Path(path) / f"idle.{ending}"
    free: dict[int, int] = {}  # until when a worker is busy
    with reading(tasks):
        for number, row in _rows(read, tasks, (*_NUMBERS, *_WORDS), _NUMBERS):
            counts["tasks"] += 1
            ready, start, stop, worker = (int(row[name]) for name in ("ready_ns", "start_ns", "stop_ns", "worker"))
            if not (0 <= ready <= start <= stop and free.get(worker, 0) <= start):
                raise RuleError(f"{tasks}:{number}: wanted ready <= start <= stop, after the worker's last task, got {shorten(row)}")
            free[worker] = stop
    with reading(idle):
        for number, row in _rows(read, idle, ("process", "worker", *_WAITS), ("worker", *_WAITS)):
            counts["gaps"] += 1
            begin, end, *causes = (int(row[name]) for name in _WAITS)
            if end <= begin or abs(end - begin - sum(causes)) > len(CAUSES):
                raise RuleError(f"{idle}:{number}: wanted causes that add up to the time from begin to end, got {shorten(row)}")
    if counts["gaps"] and not counts["tasks"]:
        raise RuleError(f"{tasks}: wanted tasks, as {idle.name} has gaps between them, got none")
    return counts


def _rows(
    read: Callable[[Path], Iterator[Any]], path: Path, columns: Iterable[str], numbers: Iterable[str]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number of the line in a text, row) for each row. Raises RuleError for a missing column or field, and what is no integer."""
    rows = read(path)
    if missing := set(columns) - set(next(rows)):
        raise RuleError(f"{path}: wanted columns {', '.join(sorted(missing))}, got none")
    for number, row in enumerate(rows, start=2):
        if None in row or None in row.values():
            raise RuleError(f"{path}:{number}: wanted a field for each column, got {shorten(list(row.values()))}")
        for name in numbers:
            if not _INTEGER.fullmatch(str(row[name])):
                raise RuleError(f"{path}:{number}: {name}: wanted an integer of 64 bits, got {shorten(row[name])}")
        yield number, row


def _read_csv(path: Path) -> Iterator[Any]:
    """Yield the names of the columns, then the rows; a row that is too long has a key None, one that is too short a value None."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        yield rows.fieldnames or ()
        yield from rows


def _read_parquet(path: Path) -> Iterator[Any]:
    """Yield the names of the columns, then the rows."""
    _, parquet = _pyarrow()
    with parquet.ParquetFile(path) as file:
        yield file.schema_arrow.names
        for batch in file.iter_batches(_ROWS):
            yield from batch.to_pylist()


write_csv, check_csv = partial(_write, _put_csv, "csv"), partial(_check, _read_csv, "csv")
write_parquet, check_parquet = partial(_write, _put_parquet, "parquet"), partial(_check, _read_parquet, "parquet")
