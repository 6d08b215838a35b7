"""Traces of programs beside each other: merged without a change to their times, in every format, and what a report says of the node."""

import csv
import json
from dataclasses import replace

import pytest
from test_cluster_traces import part
from test_efficiency import hand_made
from test_trace import traced

from taskgpt.errors import UserError
from taskgpt.lab.traces import formats
from taskgpt.lab.traces.idle import gaps
from taskgpt.lab.traces.node import node, tables
from taskgpt.lab.traces.process import boot_id, process_of
from taskgpt.lab.traces.ranks import merged, of_programs, programs
from taskgpt.lab.traces.timeline import to_svg
from taskgpt.lab.traces.trace import Trace
from taskgpt.programs import trace as trace_program

US = 1000


def process(pid: int, cores: tuple[int, ...] = (0, 1), **changes) -> dict:
    return {"pid": pid, "program": "taskgpt train", "share": "node", "boot": "a", "cores": list(cores), **changes}


def beside(pid: int, tasks: list[tuple], workers: int, loops: list[int] | None = None, **changes) -> Trace:
    """Return a hand-made trace of a process, in us from a second on."""
    trace = hand_made([(worker, *(10**9 + US * each for each in times), waits) for worker, *times, waits in tasks], workers, loops)
    return replace(trace, about=trace.about | {"process": process(pid, **changes)})


@pytest.fixture
def two() -> dict[str, Trace]:
    """Two cores. Process 7 has two workers, process 8, of loops, one, whose second task waits from 30 to 60 us: for a core from 30 to 40.

        0    10   20   30   40   50   60   70   80   90
    7   |0-------|1-----------|
        |2-----------------------------------|
    8                 |3--|.............|4-------|
    """
    first = [(0, 0, 0, 20, []), (0, 20, 20, 40, [0]), (1, 0, 0, 70, [])]
    second = [(0, 20, 20, 30, []), (0, 30, 60, 90, [0])]
    return {"a": beside(7, first, 2), "b": beside(8, second, 1, [0, 0])}


def test_times_and_tasks_stay_as_they_are(two):
    """What is merged is what is taken apart again, program by program, also when it was merged before, and with what is known of each."""
    both = of_programs(two)
    assert [rank.name for rank in both.ranks] == ["taskgpt train 7", "taskgpt train 8"] and not both.about["is_fork_join"]
    again = of_programs({"both": both, "c": beside(9, [(0, 5, 5, 6, [])], 1)})
    assert [rank.program for rank in again.ranks] == [0, 1, 2]
    for merged_trace in (both, again):
        for was, found in zip(two.values(), programs(merged_trace), strict=False):
            assert found.about == was.about
            assert found.records.tolist() == was.records.tolist() and found.runs["begin_ns"].tolist() == was.runs["begin_ns"].tolist()


def test_ranks_of_a_cluster_beside_a_program(two):
    """Are the tasks of one application, whose messages stay between them."""
    ranks = merged(["rank 0", "rank 1"], [part(0, 0), part(1, 0)], {"process": process(5)})
    ranks = replace(ranks, about=ranks.about | {"ranks": [rank | {"clock_error_ns": 0} for rank in ranks.about["ranks"]]})
    both = of_programs(two | {"c": ranks})
    assert [(rank.name, rank.program) for rank in both.ranks][2:] == [("rank 0", 2), ("rank 1", 2)]
    assert [(m["source"], m["target"]) for m in both.messages] == [(2, 3), (3, 2)]
    alone = programs(both)[2]
    for name in ("records", "messages", "exchanges"):
        assert getattr(alone, name).tolist() == getattr(ranks, name).tolist()


def test_every_format_has_the_processes(two, tmp_path):
    """Perfetto's names and labels, Paraver's applications, ovni's processes with models of their own, a column, a picture."""
    both = of_programs(two)
    formats.save(both, tmp_path)
    counts = formats.check(tmp_path)
    assert {name: each["tasks"] for name, each in counts.items()} == dict.fromkeys(counts, 5)
    events = json.loads((tmp_path / "perfetto.json").read_text())["traceEvents"]
    names = {(e["name"], e["pid"]): next(iter(e["args"].values())) for e in events if e["name"].startswith("process_")}
    assert names["process_name", 2] == "taskgpt train 8, hand" and names["process_labels", 1] == "share node"
    lines = (tmp_path / "paraver.prv").read_text().splitlines()
    assert lines[0].endswith(":90000_ns:1(3):2:1(2:1):1(1:1)")
    assert "1:3:2:1:1:60000:90000:1" in lines and "3:3:2:1:1:30000:30000:3:2:1:1:60000:30000:1000:20" in lines
    row = (tmp_path / "paraver.row").read_text().splitlines()
    assert row[row.index("LEVEL APPL SIZE 2") + 1 :][:2] == ["taskgpt train 7", "taskgpt train 8"] and row[-1] == "THREAD 2.1.1"
    loom = tmp_path / "ovni" / "loom.taskgpt"
    assert sorted(str(file.parent.relative_to(loom)) for file in loom.rglob("stream.json")) == [
        *(f"proc.1/thread.{tid}" for tid in (1, 2, 3)),
        *(f"proc.4/thread.{tid}" for tid in (4, 5)),
    ]
    about = json.loads((loom / "proc.4" / "thread.5" / "stream.json").read_text())["ovni"]
    assert (about["pid"], about["app_id"], "openmp" in about["require"]) == (4, 2, True)
    with open(tmp_path / "csv" / "tasks.csv", newline="") as file:
        assert [(row["process"][-1], row["worker"]) for row in csv.DictReader(file)] == [
            ("7", "0"),
            ("7", "1"),
            ("7", "0"),
            ("8", "2"),
            ("8", "2"),
        ]
    assert "taskgpt train 8</text>" in to_svg([both])


def test_the_node_by_hand(two):
    """150 us in tasks on 2 cores in 90 us, of which both are at work for 50, from 20 to 70; from 20 to 30 three tasks run at once."""
    both = of_programs(two)
    found = node(both)
    assert (found["cores"], found["span_ms"], found["useful_ms"]) == (2, 0.09, 0.15)
    assert found["efficiency"] == pytest.approx(150 / (2 * 90))
    assert found["together_ms"] == 0.05 and found["together_efficiency"] == pytest.approx((20 + 50 + 10 + 10) / (2 * 50))
    assert (found["all_taken_ms"], found["oversubscribed_ms"]) == (0.05, 0.01)
    first, second = found["processes"]
    assert (first["of_cores"], second["of_cores"]) == (pytest.approx(110 / 140), pytest.approx(40 / 140))
    assert second["parallel_efficiency"] == pytest.approx(40 / 70) and second["waited_ms"] == pytest.approx(0.01)
    assert gaps(both)["taken"].sum() == pytest.approx(10 * US)
    assert [each["caption"][:9] for each in tables(found)] == ["the node,", "processes"]


@pytest.mark.parametrize(
    ("changes", "message"), [({"boot": "b"}, "b: recorded on another machine than a"), ({"boot": ""}, "b: does not say by which machine")]
)
def test_traces_without_a_clock_in_common_are_refused(two, changes, message):
    """Of two machines, or starts of one; and where nothing tells."""
    two["b"] = replace(two["b"], about=two["b"].about | {"process": process(8, **changes)})
    with pytest.raises(UserError, match=message):
        of_programs(two)


def test_traces_by_another_clock_are_refused(two):
    """An older trace; ranks on several machines."""
    ranks = merged(["rank 0", "rank 1"], [part(0, 0), part(1, 0)], {"process": process(5)})
    with pytest.raises(UserError, match="c: has ranks on other machines"):
        of_programs(two | {"c": ranks})
    del two["a"].about["process"]
    with pytest.raises(UserError, match="a: does not say"):
        of_programs(two)


@pytest.mark.parametrize(("name", "value"), [("programs", "x"), ("programs", [{}]), ("process", {"pid": 0}), ("ranks", None)])
def test_a_merged_trace_that_cannot_be_is_refused(two, name, value, tmp_path):
    """Programs, processes and ranks that are none, or do not fit."""
    both = of_programs(two)
    replace(both, about=both.about | {name: value}).save(tmp_path / "trace.npz")
    with pytest.raises(UserError, match=r"trace\.npz: no trace, or a damaged one"):
        Trace.load(tmp_path)


def test_a_recorded_trace_names_its_process():
    """This one, on this machine."""
    found = process_of(traced("sequential").about)
    assert found.boot == boot_id() and found.share == "" and found.cores and found.program


def test_merge_and_report(two, tmp_path, capsys):
    """By the commands: a folder in all formats, the node first, then each program beside the other; what cannot be is said in a line."""
    for name, trace in two.items():
        (tmp_path / name).mkdir()
        trace.save(tmp_path / name / "trace.npz")
    a, b, both = (str(tmp_path / name) for name in ("a", "b", "both"))
    assert trace_program.main(["merge", a, b, "--output", both]) == 0
    assert formats.check(both)["trace"] == {"runs": 2, "tasks": 5, "workers": 3, "lost": 0}
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    capsys.readouterr()
    assert trace_program.main(["report", both, "--skip", "0", "--html", str(page), "--json", str(numbers)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("the node, all processes together") and "taskgpt train 7  taskgpt train 8" in text and "what differs" not in text
    (found,) = json.loads(numbers.read_text())
    assert found["cores"] == 2 and [each["workers"] for each in found["programs"]] == [2, 1]
    assert '"processes":[{"name":"taskgpt train 7","workers":2}' in page.read_text()
    assert trace_program.main(["merge", a, f"{a}/trace.npz", "--output", both]) == 2
    assert trace_program.main(["merge", a, "--output", both]) == 2
    assert trace_program.main(["report", both, a]) == 2
