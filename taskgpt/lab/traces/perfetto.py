"""A trace as Chrome JSON, for ui.perfetto.dev: a track a worker, a slice a task, a counter of ready tasks.

The format is Google's "Trace Event Format": times in microseconds, `X` a slice, `C` a counter, `M` a name, `s` and `f` ends of an arrow.
Processes and threads count from 1: Perfetto reads a tid of 0 as none, puts its slices on thread `pid`, and drops those that overlap there.
"""

import bisect
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from taskgpt.errors import shorten
from taskgpt.files import JSON, replacing
from taskgpt.lab.traces.rules import RuleError, reading
from taskgpt.lab.traces.trace import Trace

PROCESS = 1
_CHUNK = 10_000  # events in memory at a time
_SPACE = re.compile(r"[ \t\r\n]*")


def write(trace: Trace, path: str | Path, arrows: bool = False) -> None:
    """Write the file, whole or not at all; with `arrows`, a flow along every dependency. Raises OSError."""
    with replacing(path) as file:
        file.write(f'{{"displayTimeUnit": "ns", "otherData": {json.dumps(trace.about)}, "traceEvents": [\n'.encode())
        lines: list[str] = []
        comma = ""
        for event in _events(trace, arrows):
            lines.append(json.dumps(event, separators=(",", ":")))
            if len(lines) == _CHUNK:
                file.write((comma + ",\n".join(lines)).encode())
                lines, comma = [], ",\n"
        if lines:
            file.write((comma + ",\n".join(lines)).encode())
        file.write(b"\n]}\n")


def _events(trace: Trace, arrows: bool) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": PROCESS, "name": "process_name", "args": {"name": trace.about["scheduler"]}}
    for worker in range(trace.workers):
        thread = {"ph": "M", "pid": PROCESS, "tid": worker + 1}
        yield {**thread, "name": "thread_name", "args": {"name": f"worker {worker}"}}
        yield {**thread, "name": "thread_sort_index", "args": {"sort_index": worker}}
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
            "tid": worker + 1,
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
    """Yield both ends of each, inside the slices: Perfetto finds them by time. Tasks that took no time have no inside, and no arrows."""
    r, number = trace.records, 0
    for before, after in trace.dependencies():
        takes_time = (r["start_ns"] < r["stop_ns"])[[before, after]].all(axis=0)
        for a, b in zip(r[before[takes_time]], r[after[takes_time]], strict=True):
            number += 1
            for kind, worker, moment in (("s", a["worker"], a["stop_ns"] - 1), ("f", b["worker"], b["start_ns"])):
                yield {
                    "ph": kind,
                    "bp": "e",
                    "pid": PROCESS,
                    "tid": int(worker) + 1,
                    "ts": (int(moment) - trace.begin_ns) / 1e3,
                    "id": number,
                    "name": "dependency",
                    "cat": "dependency",
                }


# The checker reads what is there, and knows nothing of how it was written -----------------------------------------------------------------


def check(path: str | Path) -> dict[str, int]:
    """Return how many tasks (slices), counters and arrows the file has. Raises RuleError for what a viewer would drop or show wrongly."""
    with reading(path):
        return _check(path, _read(Path(path).read_text(encoding="utf-8")))


def _check(path: str | Path, events: Iterator[Any]) -> dict[str, int]:
    counts = {"tasks": 0, "counters": 0, "arrows": 0}
    named: set[tuple[int, int]] = set()  # pid and tid of a track
    tracks: dict[tuple[int, int], list[tuple[float, float, int]]] = {}  # (begin, end, number of the event) of each slice
    ends: list[tuple[tuple[int, int], float, int]] = []  # (track, time, number) of each arrow's
    open_arrows: dict[int, float] = {}
    for at, event in enumerate(events):

        def wrong(wanted: str, at: int = at, event: Any = event) -> RuleError:
            return RuleError(f"{path}: event {at}: wanted {wanted}, got {shorten(event)}")

        kind = event.get("ph") if isinstance(event, dict) else None
        if kind not in ("M", "X", "C", "s", "f"):
            raise wrong("ph M, X, C, s or f")
        track, moment = (event.get("pid"), event.get("tid", 0 if kind in "Xsf" else 1)), event.get("ts", 0 if kind == "M" else None)
        if not all(type(number) is int and number >= 1 for number in track):
            raise wrong("integers for pid and tid from 1 on: Perfetto takes 0 for none")
        if type(moment) not in (int, float) or not 0 <= moment < 2**53:
            raise wrong("a time of 0 or more")
        if kind == "M" and event.get("name") == "thread_name":
            named.add(track)
        elif kind == "X":
            counts["tasks"] += 1
            if track not in named:
                raise wrong("a track with a name")
            if not event.get("name") or not 0 <= event.get("dur", -1) < 2**53:
                raise wrong("a name and a duration of 0 or more")
            tracks.setdefault(track, []).append((moment, moment + event["dur"], at))
        elif kind == "C":
            counts["counters"] += 1
            if not min(event["args"].values()) >= 0:
                raise wrong("a count of 0 or more")
        elif kind == "s":
            open_arrows[event["id"]] = moment
            ends.append((track, moment, at))
        elif kind == "f":
            counts["arrows"] += 1
            if event["id"] not in open_arrows or open_arrows.pop(event["id"]) > moment:
                raise wrong("an arrow that began, and not later")
            ends.append((track, moment, at))
    for slices in tracks.values():
        slices.sort()
        for (_, end, before), (begin, _, at) in itertools.pairwise(slices):
            if begin < end - 1e-3:
                raise RuleError(f"{path}: event {at}: wanted no slice before event {before} of the same track ends, at {end}, got {begin}")
    if open_arrows:
        raise RuleError(f"{path}: wanted an end for every arrow, got none for {len(open_arrows)}")
    for track, moment, at in ends:
        slices = tracks.get(track, [])
        place = bisect.bisect_right(slices, moment, key=lambda each: each[0]) - 1
        if place < 0 or moment >= slices[place][1]:
            raise RuleError(f"{path}: event {at}: wanted the end of an arrow inside a slice of its track, got {moment}")
    return counts


def _read(text: str) -> Iterator[Any]:
    """Yield the events of a text in JSON, one after the other: all at once would take twenty times the text's memory."""
    decode = JSON.raw_decode

    def mark(at: int, wanted: str) -> tuple[str, int]:
        at = _SPACE.match(text, at).end()
        if text[at : at + 1] not in tuple(wanted):
            raise ValueError(f"character {at}: wanted {' or '.join(wanted)}, got {shorten(text[at : at + 40])}")
        return text[at], at + 1

    has_events, (sign, at) = False, mark(0, "{")
    while sign != "}":
        key, at = decode(text, _SPACE.match(text, at).end())
        _, at = mark(at, ":")
        if key == "traceEvents":
            has_events, (sign, at) = True, mark(at, "[")
            while sign != "]":
                event, at = decode(text, _SPACE.match(text, at).end())
                yield event
                sign, at = mark(at, ",]")
        else:
            _, at = decode(text, _SPACE.match(text, at).end())
        sign, at = mark(at, ",}")
    if (at := _SPACE.match(text, at).end()) < len(text):
        raise ValueError(f"character {at}: wanted the end, got {shorten(text[at : at + 40])}")
    if not has_events:
        raise ValueError("wanted traceEvents, got none")
