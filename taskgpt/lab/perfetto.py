"""A trace as Chrome JSON, for ui.perfetto.dev: a track a worker, a slice a task, a counter of ready tasks.

The format is Google's "Trace Event Format": times in microseconds, `X` a slice, `C` a counter, `M` a name, `s` and `f` ends of an arrow.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt.lab.rules import RuleError, reading
from taskgpt.lab.trace import Trace

PROCESS = 1
_CHUNK = 10_000  # events in memory at a time


def write(trace: Trace, path: str | Path, arrows: bool = False) -> None:
    """Write the file, whole or not at all; with `arrows`, a flow along every dependency inside a run. Raises OSError."""
    part = Path(f"{path}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write('{"displayTimeUnit": "ns", "otherData": ' + json.dumps(trace.about) + ', "traceEvents": [\n')
            lines: list[str] = []
            comma = ""
            for event in _events(trace, arrows):
                lines.append(json.dumps(event, separators=(",", ":")))
                if len(lines) == _CHUNK:
                    file.write(comma + ",\n".join(lines))
                    lines, comma = [], ",\n"
            if lines:
                file.write(comma + ",\n".join(lines))
            file.write("\n]}\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _events(trace: Trace, arrows: bool) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": PROCESS, "name": "process_name", "args": {"name": trace.about["scheduler"]}}
    for worker in range(trace.workers):
        yield {"ph": "M", "pid": PROCESS, "tid": worker, "name": "thread_name", "args": {"name": f"worker {worker}"}}
        yield {"ph": "M", "pid": PROCESS, "tid": worker, "name": "thread_sort_index", "args": {"sort_index": worker}}
    yield from _slices(trace)
    yield from _ready_tasks(trace)
    if arrows:
        yield from _arrows(trace)


def _slices(trace: Trace) -> Iterator[dict[str, Any]]:
    for record in trace.records:
        run, task, ready, start, stop, worker = record.tolist()
        graph, step, *_ = trace.runs[run].tolist()
        of = trace.graphs[graph]
        yield {
            "ph": "X",
            "pid": PROCESS,
            "tid": worker,
            "ts": (start - trace.begin_ns) / 1e3,
            "dur": (stop - start) / 1e3,
            "name": of.kernels[of.kernel[task]],
            "cat": of.phases[of.phase[task]] or "task",
            "args": {
                "graph": of.name,
                "step": step,
                "task": task,
                "call": of.calls[task],
                "layer": int(of.layer[task]),
                "ready_us": (ready - trace.begin_ns) / 1e3,
                "flops": int(of.flops[task]),
                "bytes": int(of.bytes[task]),
            },
        }


def _ready_tasks(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield the number of tasks that are ready and wait, whenever it changes."""
    times = np.concatenate([trace.records["ready_ns"], trace.records["start_ns"]])
    change = np.repeat([1, -1], len(trace.records))
    moments, at = np.unique(times, return_inverse=True)
    counts = np.cumsum(np.bincount(at, change, len(moments))).astype(int)
    for moment, count in zip(moments.tolist(), counts.tolist(), strict=True):
        yield {"ph": "C", "pid": PROCESS, "name": "ready tasks", "ts": (moment - trace.begin_ns) / 1e3, "args": {"ready": count}}


def _arrows(trace: Trace) -> Iterator[dict[str, Any]]:
    number = 0
    for run, records in trace.by_run():
        graph = trace.graphs[trace.runs["graph"][run]]
        by_task = {record["task"]: record for record in records}
        for task, record in by_task.items():
            for p in graph.predecessors[graph.first[task] : graph.first[task + 1]]:
                if p in by_task:
                    number += 1
                    before = by_task[p]
                    ends = (("s", before["worker"], before["stop_ns"] - 1), ("f", record["worker"], record["start_ns"]))
                    for kind, worker, moment in ends:
                        yield {
                            "ph": kind,
                            "bp": "e",
                            "pid": PROCESS,
                            "tid": int(worker),
                            "ts": (int(moment) - trace.begin_ns) / 1e3,
                            "id": number,
                            "name": "dependency",
                            "cat": "dependency",
                        }


def check(path: str | Path) -> dict[str, int]:
    """Return how many tasks (slices), counters and arrows the file has. Raises RuleError for what a viewer would drop or show wrongly."""
    try:
        events = json.loads(Path(path).read_text(encoding="utf-8"))["traceEvents"]
    except (ValueError, KeyError, TypeError) as error:
        raise RuleError(f"{path}: wanted JSON with traceEvents, got {error!r}") from None
    with reading(path):
        return _check(path, events)


def _check(path: str | Path, events: list[dict[str, Any]]) -> dict[str, int]:
    counts = {"tasks": 0, "counters": 0, "arrows": 0}
    named: set[int] = set()
    last_end: dict[int, tuple[float, int]] = {}
    open_arrows: dict[int, float] = {}

    def wrong(at: int, wanted: str) -> RuleError:
        return RuleError(f"{path}: event {at}: wanted {wanted}, got {json.dumps(events[at])[:200]}")

    slices = []
    for at, event in enumerate(events):
        kind = event.get("ph") if isinstance(event, dict) else None
        if kind not in ("M", "X", "C", "s", "f"):
            raise wrong(at, "ph M, X, C, s or f")
        if kind != "M" and not (isinstance(event.get("ts"), (int, float)) and event["ts"] >= 0):
            raise wrong(at, "a time of 0 or more")
        if kind == "M" and event.get("name") == "thread_name":
            named.add(event.get("tid"))
        elif kind == "X":
            counts["tasks"] += 1
            if event.get("tid") not in named:
                raise wrong(at, "a track with a name")
            if not event.get("name") or not event.get("dur", -1) >= 0:
                raise wrong(at, "a name and a duration of 0 or more")
            slices.append((event["ts"], at))
        elif kind == "C":
            counts["counters"] += 1
            if not min(event["args"].values()) >= 0:
                raise wrong(at, "a count of 0 or more")
        elif kind == "s":
            open_arrows[event["id"]] = event["ts"]
        elif kind == "f":
            counts["arrows"] += 1
            if event["id"] not in open_arrows or open_arrows.pop(event["id"]) > event["ts"]:
                raise wrong(at, "an arrow that began, and not later")
    for moment, at in sorted(slices):
        track = events[at]["tid"]
        if track in last_end and moment < last_end[track][0] - 1e-3:
            raise wrong(at, f"no slice before event {last_end[track][1]} of the same track ends")
        last_end[track] = moment + events[at]["dur"], at
    if open_arrows:
        raise RuleError(f"{path}: wanted an end for every arrow, got none for {len(open_arrows)}")
    return counts
