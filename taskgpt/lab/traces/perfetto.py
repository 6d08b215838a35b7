"""A trace as Chrome JSON, for ui.perfetto.dev: a track a worker, a slice a task, a counter of ready tasks.

Each rank is a process. Those of a program of several have, below their workers, tracks of their exchanges with the others, and of the
messages that they send and receive, as many as are under way at a time; a flow leads from where a message is sent to where it comes.

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
from taskgpt.lab.traces.network import WHATS, lanes
from taskgpt.lab.traces.process import process_of
from taskgpt.lab.traces.rules import RuleError, reading
from taskgpt.lab.traces.trace import Trace

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


class _Tracks:
    """Where tasks are drawn: process and thread of each worker, by its number."""

    def __init__(self, trace: Trace):
        self.rank = trace.rank_of_worker.tolist()
        first = np.searchsorted(self.rank, self.rank)
        self.thread = (np.arange(trace.workers) - first + 1).tolist()

    def of(self, worker: int) -> dict[str, int]:
        return {"pid": self.rank[worker] + 1, "tid": self.thread[worker]}


def _events(trace: Trace, arrows: bool) -> Iterator[dict[str, Any]]:
    tracks, ranks = _Tracks(trace), trace.ranks
    for number, rank in enumerate(ranks):
        process = {"ph": "M", "pid": number + 1}
        about, is_alone = trace.programs[rank.program], sum(each.program == rank.program for each in ranks) == 1
        words = [rank.name, about["scheduler"]] if is_alone else [rank.name]
        yield {**process, "name": "process_name", "args": {"name": ", ".join(filter(None, words))}}
        if (of := process_of(about)) and of.share:
            yield {**process, "name": "process_labels", "args": {"labels": f"share {of.share}"}}
        for worker in range(rank.workers):
            yield from _named({**process, "tid": worker + 1}, f"worker {worker}", worker)
    yield from _slices(trace, tracks)
    yield from _ready_tasks(trace)
    if len(ranks) > len(trace.programs):
        yield from _network(trace)
    if arrows:
        yield from _arrows(trace, tracks)


def _named(thread: dict[str, Any], name: str, place: int) -> Iterator[dict[str, Any]]:
    yield {**thread, "name": "thread_name", "args": {"name": name}}
    yield {**thread, "name": "thread_sort_index", "args": {"sort_index": place}}


def _slices(trace: Trace, tracks: _Tracks) -> Iterator[dict[str, Any]]:
    for record in trace.records:
        run, task, ready, start, stop, worker = record.tolist()
        graph, step, *_ = trace.runs[run].tolist()
        of = trace.graphs[graph]
        yield {
            "ph": "X",
            **tracks.of(worker),
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
    """Yield the number of each rank's tasks that are ready and wait, whenever it changes."""
    rank_of = trace.rank_of_worker[trace.records["worker"]]
    for rank in range(len(trace.ranks)):
        records = trace.records[rank_of == rank]
        times = np.concatenate([records["ready_ns"], records["start_ns"]])
        change = np.repeat([1, -1], len(records))
        moments, at = np.unique(times, return_inverse=True)
        counts = np.cumsum(np.bincount(at, change, len(moments))).astype(int)
        for moment, count in zip(moments.tolist(), counts.tolist(), strict=True):
            yield {"ph": "C", "pid": rank + 1, "name": "ready tasks", "ts": (moment - trace.begin_ns) / 1e3, "args": {"ready": count}}


def _network(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield slices of exchanges and of messages, and a flow along each message that takes time; those within the trace."""
    x, m, begin, names = trace.exchanges, trace.messages, trace.begin_ns, [rank.name for rank in trace.ranks]
    x, m = x[x["begin_ns"] >= begin], m[np.minimum(m["send_ns"], m["asked_ns"]) >= begin]
    x, m = x[x["end_ns"] > x["begin_ns"]], m[(m["sent_ns"] > m["send_ns"]) & (m["received_ns"] > m["asked_ns"])]
    tids: dict[tuple[int, str, int], int] = {}
    track: dict[tuple[str, int], dict[str, int]] = {}  # of a side of a message, by its number
    sides = (
        ("exchange", x, "rank", "begin_ns", "end_ns"),
        ("send", m, "source", "send_ns", "sent_ns"),
        ("receive", m, "target", "asked_ns", "received_ns"),
    )
    for what, rows, whose, since, until in sides:
        for rank in range(len(names)):
            mine = np.flatnonzero(rows[whose] == rank)
            lane = lanes(rows[since][mine], rows[until][mine])
            for at, number in zip(mine.tolist(), lane.tolist(), strict=True):
                key = rank, what, number
                if key not in tids:
                    tids[key] = trace.ranks[rank].workers + 1 + sum(each[0] == rank for each in tids)
                    yield from _named({"ph": "M", "pid": rank + 1, "tid": tids[key]}, f"{what} {number}", tids[key])
                row = rows[at]
                thread = track[what, at] = {"pid": rank + 1, "tid": tids[key]}
                peer = {} if what == "exchange" else {"to": names[row["target"]], "from": names[row["source"]]}
                yield {
                    "ph": "X",
                    **thread,
                    "ts": (int(row[since]) - begin) / 1e3,
                    "dur": int(row[until] - row[since]) / 1e3,
                    "name": f"{WHATS[row['what']] if what == 'exchange' else what} {row['bucket']}",
                    "cat": what,
                    "args": {"bucket": int(row["bucket"]), "bytes": int(row["bytes"]), **peer},
                }
    for at, row in enumerate(m):
        for kind, what, moment in (("s", "send", row["send_ns"]), ("f", "receive", row["received_ns"] - 1)):
            if row["send_ns"] < row["received_ns"]:
                ends = {"ts": (int(moment) - begin) / 1e3, "id": at + 1, "name": "message", "cat": "message"}
                yield {"ph": kind, "bp": "e", **track[what, at], **ends}


def _arrows(trace: Trace, tracks: _Tracks) -> Iterator[dict[str, Any]]:
    """Yield both ends of each, inside the slices: Perfetto finds them by time. Tasks that took no time have no inside, and no arrows."""
    r, number = trace.records, len(trace.messages)
    for before, after in trace.dependencies():
        takes_time = (r["start_ns"] < r["stop_ns"])[[before, after]].all(axis=0)
        for a, b in zip(r[before[takes_time]], r[after[takes_time]], strict=True):
            number += 1
            for kind, worker, moment in (("s", a["worker"], a["stop_ns"] - 1), ("f", b["worker"], b["start_ns"])):
                yield {
                    "ph": kind,
                    "bp": "e",
                    **tracks.of(worker),
                    "ts": (int(moment) - trace.begin_ns) / 1e3,
                    "id": number,
                    "name": "dependency",
                    "cat": "dependency",
                }


# The checker reads what is there, and knows nothing of how it was written -----------------------------------------------------------------


def check(path: str | Path) -> dict[str, int]:
    """Return how many tasks, other slices, counters and arrows there are. Raises RuleError for what a viewer would drop or show wrongly."""
    with reading(path):
        return _check(path, _read(Path(path).read_text(encoding="utf-8")))


def _check(path: str | Path, events: Iterator[Any]) -> dict[str, int]:
    counts = {"tasks": 0, "other slices": 0, "counters": 0, "arrows": 0}
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
            counts["other slices" if event.get("cat") in ("exchange", "send", "receive") else "tasks"] += 1
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
