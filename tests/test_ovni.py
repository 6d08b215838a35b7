"""ovni's streams: every task read back with a reader of the test's own; broken rules of the emulator are found."""

import json
import os
import re
import shutil
import struct
from pathlib import Path

import pytest
from test_trace import NAMES, traced

from taskgpt.lab.traces import ovni, ovni_check
from taskgpt.lab.traces.rules import RuleError


def stream(folder: Path) -> list[list]:
    """Return [letters, clock, payload] of each event, as ovni's specification of its format says."""
    data, at, events = (folder / "stream.obs").read_bytes(), 8, []
    assert data[:8] == b"ovni\x01\x00\x00\x00"
    while at < len(data):
        flags, letters, clock = struct.unpack_from("<B3sQ", data, at)
        at += 12
        if flags & 0x10:
            size = struct.unpack_from("<I", data, at)[0]
            at += 4
        else:
            size = (flags & 15) + 1 if flags else 0
        events.append([letters.decode(), clock, data[at : at + size]])
        at += size
    return events


def put(folder: Path, events: list[list]) -> None:
    """Write a stream anew."""
    data = b"ovni\x01\x00\x00\x00"
    for letters, clock, payload in events:
        is_text = letters in ("VYc", "POc")
        flags = 0x13 if is_text else max(0, len(payload) - 1)
        size = struct.pack("<I", len(payload)) if is_text else b""
        data += struct.pack("<B3sQ", flags, letters.encode(), clock) + size + payload
    (folder / "stream.obs").write_bytes(data)


@pytest.mark.parametrize("name", NAMES)
def test_every_task_reads_back(name, tmp_path):
    """Worker, times, kernel, layer, phase and step of each task; types and tasks by number; CPUs."""
    trace = traced(name)
    ovni.write(trace, tmp_path / "ovni")
    ovni.write(trace, tmp_path / "ovni")  # what was there is replaced
    assert [p.name for p in tmp_path.iterdir()] == ["ovni"]
    counts = ovni_check.check(tmp_path / "ovni")
    process = tmp_path / "ovni" / "loom.taskgpt" / "proc.1"
    create, open_, close = ("POc", "PWs", "PWS") if name == "loops" else ("VYc", "VTx", "VTe")
    types, kinds = {}, {}
    for letters, _, payload in stream(process / "thread.1"):
        if letters == create:
            types[struct.unpack_from("<I", payload)[0]] = payload[4:-1].decode()
        elif letters == "VTc":
            number, kind = struct.unpack("<II", payload)
            kinds[number] = types[kind]
    marks = json.loads((process / "thread.2" / "stream.json").read_text())["ovni"]["mark"]
    found = []
    for worker in range(trace.workers):
        start = kernel = None
        values: dict[str, str] = {}
        for letters, clock, payload in stream(process / f"thread.{worker + 2}"):
            if letters == "OHx":
                assert struct.unpack("<iiQ", payload) == (worker, 1, 0)
            elif letters == "PQx":
                kernel = types[struct.unpack("<I", payload)[0]]
            elif letters == "OM[":
                value, mark = struct.unpack("<qi", payload)
                values[marks[str(mark)]["title"]] = marks[str(mark)]["labels"][str(value)]
            elif letters == open_:
                start = clock
                kernel = kinds[struct.unpack("<II", payload)[0]] if payload else kernel
            elif letters == close:
                found.append((worker, start, clock, kernel, values["layer"], values["phase"], values["step"]))
    expected = []
    for r in trace.records:
        run = trace.runs[r["run"]]
        graph, t = trace.graphs[run["graph"]], r["task"]
        layer = f"layer {graph.layer[t]}" if graph.layer[t] >= 0 else "no layer"
        kernel, phase = graph.kernels[graph.kernel[t]], graph.phases[graph.phase[t]] or "no phase"
        expected.append((r["worker"], r["start_ns"], r["stop_ns"], kernel, layer, phase, f"step {run['step']}"))
    assert sorted(found) == sorted(expected)
    assert counts["threads"] == trace.workers + 1
    assert counts["tasks"] == len(expected)


def first(events: list[list], letters: str) -> int:
    return next(at for at, event in enumerate(events) if event[0] == letters)


def change(letters: str, *, clock: int | None = None, payload: bytes | None = None):
    """Return what gives the first event of these letters another clock or payload."""

    def apply(events: list[list]) -> None:
        event = events[first(events, letters)]
        event[1:] = [event[1] if clock is None else clock, event[2] if payload is None else payload]

    return apply


def later(events: list[list]) -> None:
    """Shift all clocks by two hours."""
    for event in events:
        event[1] += 2 * 3600 * 10**9


BREAKS = {  # what the checker says: the scheduler, the thread (2: of the first worker that ran a task), what is done to its events
    "a time from": ("native", 2, change("VTx", clock=1)),
    "one beginning, on CPU": ("native", 2, change("OHx", payload=struct.pack("<iiQ", 7, 1, 0))),
    "one running thread on a CPU": ("native", 3, change("OHx", payload=struct.pack("<iiQ", 0, 1, 0))),
    "events between OHx and OHe": ("native", 2, lambda e: e.pop(0)),
    "an end with everything left": ("native", 2, lambda e: e.pop(first(e, "VHW"))),
    "a type number that is not 0": ("native", 1, change("VYc", payload=struct.pack("<I", 0) + b"x\0")),
    "a label of 1 to 511 bytes": ("native", 1, change("VYc", payload=struct.pack("<I", 1) + b"x" * 600 + b"\0")),
    "a task number that is not 0": ("native", 1, lambda e: e.insert(first(e, "VTc"), e[first(e, "VTc")])),
    "a type created before": ("native", 1, change("VTc", payload=struct.pack("<II", 1, 999))),
    "a task created strictly before": ("native", 2, change("VTx", payload=struct.pack("<II", 1 << 30, 0))),
    "rest and progress in turn": ("native", 2, lambda e: e.pop(first(e, "VPr"))),
    "rest and progress in turn, got VPp": ("native", 2, lambda e: e.insert(first(e, "VHw") + 1, ["VPp", e[0][1], b""])),
    "to leave what was entered last": ("loops", 2, lambda e: e.pop(first(e, "PWs"))),
    "a mark that is not 0": ("loops", 2, change("OM[", payload=struct.pack("<qi", 0, 0))),
    "a thread that is running": ("loops", 2, lambda e: e.pop()),
    "within an hour": ("native", 2, later),
    "of a model that stream.json requires": ("loops", 1, lambda e: e.insert(1, ["VYc", e[0][1], struct.pack("<I", 1) + b"x\0"])),
    "an event that taskgpt writes": ("loops", 2, lambda e: e.insert(1, ["VXX", e[0][1], b""])),
    "bytes of payload for": ("loops", 2, lambda e: e.insert(1, ["PBj", e[0][1], b"12"])),
}


@pytest.mark.parametrize("message", BREAKS)
def test_broken_rules_are_found(message, tmp_path):
    """The checker that ships names the file, the byte, and what it wanted."""
    name, tid, apply = BREAKS[message]
    ovni.write(traced(name), tmp_path)
    threads = [tmp_path / "loom.taskgpt" / "proc.1" / f"thread.{number}" for number in range(1, 4)]
    busy = [thread for thread in threads[1:] if any(letters in ("VTx", "PWs") for letters, _, _ in stream(thread))]
    thread = busy[0] if tid == 2 else threads[tid - 1]
    events = stream(thread)
    apply(events)
    put(thread, events)
    with pytest.raises(RuleError, match=re.escape(message)) as error:
        ovni_check.check(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_cut_stream_and_missing_words_are_found(tmp_path):
    """CPUs named twice; a file cut short; stream.json without a key that the emulator asks for; no streams at all."""
    ovni.write(traced("native"), tmp_path)
    first, thread = (tmp_path / "loom.taskgpt" / "proc.1" / f"thread.{tid}" for tid in (1, 2))
    about = json.loads((thread / "stream.json").read_text())
    about["ovni"]["loom_cpus"] = json.loads((first / "stream.json").read_text())["ovni"]["loom_cpus"]
    (thread / "stream.json").write_text(json.dumps(about))
    with pytest.raises(RuleError, match="got them in 2"):
        ovni_check.check(tmp_path)
    del about["ovni"]["loom_cpus"]
    (thread / "stream.json").write_text(json.dumps(about))
    whole = (thread / "stream.obs").read_bytes()
    (thread / "stream.obs").write_bytes(whole[:-5])
    with pytest.raises(RuleError, match="cut short"):
        ovni_check.check(tmp_path)
    del about["ovni"]["lib"]
    (thread / "stream.json").write_text(json.dumps(about))
    with pytest.raises(RuleError, match=r"ovni\.lib\.version"):
        ovni_check.check(tmp_path)
    shutil.rmtree(tmp_path / "loom.taskgpt")
    with pytest.raises(RuleError, match=r"stream\.json, got none"):
        ovni_check.check(tmp_path)


def test_a_pipe_in_place_of_a_stream_is_refused(tmp_path):
    """Instead of waiting for who might write into it."""
    ovni.write(traced("native"), tmp_path)
    file = tmp_path / "loom.taskgpt" / "proc.1" / "thread.2" / "stream.obs"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(RuleError, match=rf"{file}: wanted a file, got a pipe"):
        ovni_check.check(tmp_path)
