"""A trace as tables: a row a task, for spreadsheets, pandas and DuckDB; and a row for each time that a worker ran none.

A folder: tasks.csv and idle.csv, or tasks.parquet and idle.parquet (needs pyarrow). Times are ns since the first task was ready.
"""

import csv
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt.errors import UserError
from taskgpt.lab.idle import CAUSES, gaps
from taskgpt.lab.trace import Trace

_WORDS = ("graph", "kernel", "phase", "call")  # columns of text
_NUMBERS = ("run", "step", "task", "layer", "worker", "ready_ns", "start_ns", "stop_ns", "flops", "bytes")
_ROWS = 20_000  # in memory as text at a time
Columns = dict[str, np.ndarray]


def _tables(trace: Trace) -> dict[str, Columns]:
    """Return the columns of both tables."""
    r, idle = trace.records, gaps(trace)
    graph = trace.runs["graph"][r["run"]]
    tasks = {"run": r["run"], "graph": np.array([g.name for g in trace.graphs], object)[graph]}
    tasks |= {"step": trace.runs["step"][r["run"]], "task": r["task"]}
    tasks |= {name: np.array(trace.names(name), object)[trace.column(name)] for name in ("kernel", "phase")}
    tasks |= {"layer": trace.column("layer"), "worker": r["worker"]}
    tasks |= {name: r[name] - trace.begin_ns for name in ("ready_ns", "start_ns", "stop_ns")}
    tasks |= {name: trace.column(name) for name in ("flops", "bytes")}
    first = np.cumsum([0, *(len(g) for g in trace.graphs)])[:-1]
    tasks["call"] = np.array([call for g in trace.graphs for call in g.calls], object)[first[graph] + r["task"]]
    waits = {"worker": idle["worker"]} | {name: idle[name] - trace.begin_ns for name in ("begin_ns", "end_ns")}
    return {"tasks": tasks, "idle": waits | {f"{cause}_ns": np.rint(idle[cause]).astype(np.int64) for cause in CAUSES}}


def _write(put: Callable[[Columns, Path], None], ending: str, trace: Trace, path: str | Path) -> None:
    """Write the folder, whole or not at all; one that was there is replaced. Raises OSError."""
    part = Path(f"{path}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        for name, columns in _tables(trace).items():
            put(columns, part / f"{name}.{ending}")
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put_csv(columns: Columns, path: Path) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for start in range(0, len(next(iter(columns.values()))), _ROWS):
            writer.writerows(zip(*(column[start : start + _ROWS].tolist() for column in columns.values()), strict=True))


def _put_parquet(columns: Columns, path: Path) -> None:
    pyarrow, parquet = _pyarrow()
    parquet.write_table(pyarrow.table({name: pyarrow.array(column) for name, column in columns.items()}), path)


def _pyarrow() -> tuple[Any, Any]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("parquet: needs pyarrow; install it with: pip install 'taskgpt[parquet]'")
    import pyarrow
    import pyarrow.parquet

    return pyarrow, pyarrow.parquet


def _check(read: Callable[[Path], Iterator[dict[str, Any]]], ending: str, path: str | Path) -> dict[str, int]:
    """Return how many rows there are. Raises ValueError for a row that cannot be: the columns, their order in time, and idle time's sum."""
    counts = {"tasks": 0, "gaps": 0}
    free: dict[int, int] = {}  # until when a worker is busy
    for number, row in enumerate(read(Path(path) / f"tasks.{ending}"), start=2):
        counts["tasks"] += 1
        if missing := {*_NUMBERS, *_WORDS} - set(row):
            raise ValueError(f"{path}/tasks.{ending}: wanted columns {', '.join(sorted(missing))}")
        ready, start, stop = (int(row[name]) for name in ("ready_ns", "start_ns", "stop_ns"))
        worker = int(row["worker"])
        if not (0 <= ready <= start <= stop and free.get(worker, 0) <= start):
            raise ValueError(f"{path}/tasks.{ending}:{number}: wanted ready <= start <= stop, after the worker's last task, got {row}")
        free[worker] = stop
    for number, row in enumerate(read(Path(path) / f"idle.{ending}"), start=2):
        counts["gaps"] += 1
        lasts, causes = int(row["end_ns"]) - int(row["begin_ns"]), sum(int(row[f"{cause}_ns"]) for cause in CAUSES)
        if lasts <= 0 or abs(lasts - causes) > len(CAUSES):
            raise ValueError(f"{path}/idle.{ending}:{number}: wanted causes that add up to the time from begin to end, got {row}")
    return counts


def _read_csv(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def _read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    pyarrow, parquet = _pyarrow()
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: no Parquet file: {error}") from None


write_csv, check_csv = partial(_write, _put_csv, "csv"), partial(_check, _read_csv, "csv")
write_parquet, check_parquet = partial(_write, _put_parquet, "parquet"), partial(_check, _read_parquet, "parquet")
