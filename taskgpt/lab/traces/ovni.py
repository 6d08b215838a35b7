"""A trace for ovni, BSC's emulator of runtimes: `ovniemu -l -b DIR` makes Paraver traces of it. Trace format version 3.

A folder `loom.taskgpt/proc.1/thread.N` a thread, with stream.json (what it is) and stream.obs (its events, by time). Thread 1 creates types
and tasks, on a virtual CPU; thread 2 is worker 0, on CPU 0, and so on. Each further rank is a process, numbered as its first thread is, on
CPUs of its own: ovni wants one running thread on each. Ranks of a program have its app_id. Tasks speak of the nosv model: a task executes
(VTx, VTe) or its worker is hungry (VSh, VSf) and rests (VPr, VPp). Fork-join speaks of openmp: a worker shares a loop (PQx, PQe), of which
each task is a chunk (PWs, PWS), and stands at the barrier (PBj, PBJ). Marks 0, 1 and 2 are layer, phase and step.

Traces of tasks need ovni 1.10 or newer, for nosv 2.3; those of fork-join need 1.12, for openmp 1.2.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from taskgpt.files import replacing_folder
from taskgpt.lab.layout import label
from taskgpt.lab.traces.ranks import split
from taskgpt.lab.traces.trace import Trace

_HEADER = struct.Struct("<4sI")
_EVENT = struct.Struct("<BBBBQ")
_LOOM = "taskgpt"
_BEFORE_NS = 1000  # threads begin so long before the first task, and end so long after the last
_MARKS = ("layer", "phase", "step")
_FORMS = (  # a name and its payload in struct's letters; * is a number and a text of any length
    "OHx:iiQ OHe: OM[:qi OM]:qi VYc:* VTc:II VTx:II VTe:II VHw: VHW: VSh: VSf: VPp: VPr: POc:* PQx:I PQe:I PWs: PWS: PBj: PBJ:"
)
_PAYLOAD = dict(form.split(":") for form in _FORMS.split())


def write(trace: Trace, path: str | Path) -> None:
    """Write the folder, whole or not at all; a trace that was there is replaced, and nothing else. Raises OSError."""
    if trace.begin_ns < _BEFORE_NS:
        trace = _later(trace)
    with replacing_folder(Path(path) / f"loom.{_LOOM}") as loom:
        marks = {str(at): {"title": name, "chan_type": "stack", "labels": _labels(trace, name)} for at, name in enumerate(_MARKS)}
        span = max(0, trace.begin_ns - _BEFORE_NS), trace.end_ns + _BEFORE_NS  # a trace without runs is at time 0, and clocks have no sign
        main, cpus = 1, iter(range(trace.workers))
        for rank, part in zip(trace.ranks, split(trace), strict=True):
            process = _Process(loom, main, rank.program + 1, part.about["is_fork_join"], marks, trace.workers)
            process.put(main, _create(part, main, *span))
            for worker in range(part.workers):
                process.put(main + 1 + worker, _work(part, worker, next(cpus), main, *span))
            main += 1 + part.workers


@dataclass(frozen=True)
class _Process:
    """What the threads of a process have in common. main: its first thread, whose number is the process' too. workers: of all processes."""

    loom: Path
    main: int
    app_id: int
    is_fork_join: bool
    marks: dict[str, dict]
    workers: int

    def put(self, tid: int, events: Iterator[tuple]) -> None:
        """Write a thread's two files. An event is (its letters, when in ns, payload ...)."""
        folder = self.loom / f"proc.{self.main}" / f"thread.{tid}"
        folder.mkdir(parents=True)
        (folder / "stream.json").write_text(json.dumps(self._about(tid), indent=1) + "\n", encoding="utf-8")
        with open(folder / "stream.obs", "wb") as file:
            file.write(_HEADER.pack(b"ovni", 1))
            for event in events:
                _put_event(file, *event)

    def _about(self, tid: int) -> dict[str, Any]:
        model = {"openmp": "1.2.0"} if self.is_fork_join else {"nosv": "2.3.0"}  # the oldest that know our events and keys
        ovni = {
            "lib": {"version": "1.14.0", "commit": "taskgpt"},
            "part": "thread",
            "tid": tid,
            "pid": self.main,
            "loom": _LOOM,
            "app_id": self.app_id,
            "require": {"ovni": "1.1.0"} | model,
            "mark": self.marks,
            "finished": 1,
        }
        if tid == 1:  # once a loom: older emulators refuse to hear it again
            ovni["loom_cpus"] = [{"index": cpu, "phyid": cpu} for cpu in range(self.workers)]
        return {"version": 3, "ovni": ovni} | ({"nosv": {"can_breakdown": True}} if "nosv" in model else {})


def _put_event(file: BinaryIO, name: str, clock_ns: int, *payload: int | str) -> None:
    form = _PAYLOAD[name]
    if form == "*":
        number, text = payload
        data = struct.pack("<I", number) + str(text).encode() + b"\0"
        flags, data = 0x13, struct.pack("<I", len(data)) + data
    else:
        data = struct.pack("<" + form, *payload)
        flags = len(data) - 1 if data else 0
    file.write(_EVENT.pack(flags, *name.encode(), clock_ns) + data)


def _labels(trace: Trace, mark: str) -> dict[str, str]:
    """Return what the values of a mark mean; none is 0, which ovni keeps for nothing."""
    if mark == "layer":
        return {"1": "no layer"} | {str(n + 2): f"layer {n}" for n in np.unique(trace.column("layer")).tolist() if n >= 0}
    if mark == "phase":
        return {str(n): label(name or "no phase") for n, name in enumerate(trace.names("phase"), start=1)}
    return {str(n + 1): f"step {n}" for n in np.unique(trace.runs["step"]).tolist()}


def _later(trace: Trace) -> Trace:
    """Return a trace that began when its clock did, all of it so much later that there is a time before it."""
    records, others, runs = (rows.copy() for rows in (trace.records, trace.others, trace.runs))
    for rows in (records, others, runs):
        for name in rows.dtype.names:
            if name.endswith("_ns"):
                rows[name] += _BEFORE_NS
    return replace(trace, records=records, others=others, runs=runs)


def _create(trace: Trace, main: int, begin: int, end: int) -> Iterator[tuple]:
    """Yield what a first thread does: a type a kernel; tasks, before their run begins. A task has the number of its record, from 1."""
    is_fork_join = trace.about["is_fork_join"]
    yield "OHx", begin, -1, main, 0
    for number, name in enumerate(trace.names("kernel"), start=1):
        yield "POc" if is_fork_join else "VYc", begin, number, label(name)
    if not is_fork_join:
        kernel, runs = trace.column("kernel") + 1, trace.records["run"]
        begins = trace.runs["begin_ns"] - 1  # strictly before they run: ovni orders threads by time alone
        for record in np.argsort(begins[runs], kind="stable").tolist():
            yield "VTc", int(begins[runs[record]]), record + 1, int(kernel[record])
    yield "OHe", end


def _work(trace: Trace, worker: int, cpu: int, main: int, begin: int, end: int) -> Iterator[tuple]:
    yield "OHx", begin, cpu, main, 0
    yield from (_loops if trace.about["is_fork_join"] else _tasks)(trace, worker, begin, end)
    yield "OHe", end


def _tasks(trace: Trace, worker: int, begin: int, end: int) -> Iterator[tuple]:
    yield "VHw", begin  # and progresses: the emulator takes that for granted, and refuses to hear it twice
    free_since = begin
    for record, start, stop, _, marks in _of(trace, worker):
        yield from _hungry(free_since, start)
        yield "VTx", start, record + 1, 0
        yield from _marked(marks, start, stop)
        yield "VTe", stop, record + 1, 0
        free_since = stop
    yield from _hungry(free_since, end)
    yield "VHW", end


def _hungry(begin: int, end: int) -> list[tuple]:
    return [("VSh", begin), ("VPr", begin), ("VPp", end), ("VSf", end)] if begin < end else []


def _loops(trace: Trace, worker: int, begin: int, end: int) -> Iterator[tuple]:
    kernel, loop, runs = trace.column("kernel") + 1, trace.column("loop"), trace.records["run"]
    at, shared, free_since = None, 0, begin
    for record, start, stop, is_last, marks in _of(trace, worker):
        here = runs[record], loop[record]
        if here != at:
            if at is not None:
                yield "PQe", free_since, shared
            yield "PBj", free_since
            yield "PBJ", start
            at, shared = here, int(kernel[record])
            yield "PQx", start, shared
        yield "PWs", start
        yield from _marked(marks, start, stop)
        yield "PWS", stop
        free_since = stop
        if is_last:
            yield "PQe", stop, shared
            yield "PBj", stop
            yield "PBJ", end


def _of(trace: Trace, worker: int) -> Iterator[tuple]:
    """Yield (record, start, stop, whether it is the last, values of the marks) of a worker, by time."""
    r = trace.records
    mine = np.flatnonzero(r["worker"] == worker)
    columns = trace.column("layer")[mine] + 2, trace.column("phase")[mine] + 1, trace.runs["step"][r["run"][mine]] + 1
    marks = zip(*(column.tolist() for column in columns), strict=True)
    times = zip(mine.tolist(), r["start_ns"][mine].tolist(), r["stop_ns"][mine].tolist(), marks, strict=True)
    for number, (record, start, stop, values) in enumerate(times, start=1):
        yield record, start, stop, number == len(mine), values


def _marked(values: tuple[int, ...], start: int, stop: int) -> Iterator[tuple]:
    yield from (("OM[", start, value, mark) for mark, value in enumerate(values))
    yield from (("OM]", stop, value, mark) for mark, value in enumerate(values))
