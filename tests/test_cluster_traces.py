"""Traces of several ranks: merged by one clock, in every format, and what a report says of them; and what a run on a cluster writes."""

import json
import logging

import numpy as np
import pytest
from distributed import Client, LocalCluster
from test_efficiency import hand_made

import taskgpt
from taskgpt.lab.traces import formats
from taskgpt.lab.traces.comparison import Comparison
from taskgpt.lab.traces.efficiency import analyse
from taskgpt.lab.traces.idle import gaps
from taskgpt.lab.traces.network import EXCHANGE_TYPE, lanes
from taskgpt.lab.traces.ranks import NOTED_TYPE, Clock, Part, merged, split
from taskgpt.lab.traces.trace import Trace

US = 1000


def part(process: int, add_ns: int, generation: int = 0, begin_ns: int = 10**9) -> Part:
    """Return what one of two ranks recorded, by its own clock: a task, an exchange of 20 us with a message each way, a task after it."""
    trace = hand_made([(0, 0, 0, 10 * US, []), (0, 30 * US, 30 * US, 40 * US, [0])], 1)
    shift = begin_ns - add_ns
    for rows in (trace.runs, trace.records):
        for name in rows.dtype.names:
            if name.endswith("_ns"):
                rows[name] += shift
    exchanges = np.array([(0, 3, 0, 0, 9 * US, 10 * US, 30 * US, 400)], EXCHANGE_TYPE)
    noted = [(1 - process, is_sent, 3, 7, 400, 10 * US, (12 if is_sent else 20) * US) for is_sent in (0, 1)]
    noted = np.array([*noted, (1 - process, 1, 4, 8, 100, 32 * US, 33 * US)], NOTED_TYPE)  # which the other never got
    for rows in (exchanges, noted):
        for name in rows.dtype.names:
            if name.endswith("_ns"):
                rows[name] += shift
    return Part(process, [0, 1], generation, trace, exchanges, noted, Clock((0,), (add_ns,), 5 * US))


@pytest.fixture
def trace():
    found = merged(["rank 0", "rank 1"], [part(0, 0), part(1, 500 * US)], {"command": "tests"})
    found.verify()
    return found


def test_ranks_have_one_clock(trace):
    """Times of both begin together, though their clocks did not; of a message both sides are known, and one without another is left out."""
    assert trace.workers == 2 and [rank.clock_error_ns for rank in trace.ranks] == [5 * US] * 2
    assert len(trace.graphs) == 1
    assert trace.rank_of_run.tolist() == [0, 1] and trace.rank_of_worker.tolist() == [0, 1]
    assert trace.begin_ns == 10**9 and trace.end_ns == 10**9 + 40 * US
    assert [(m["source"], m["target"], m["bytes"]) for m in trace.messages] == [(0, 1, 400), (1, 0, 400)]
    assert (trace.messages["received_ns"] - trace.messages["send_ns"]).tolist() == [10 * US] * 2
    first, second = split(trace)
    assert first.records.tolist() == second.records.tolist() and first.exchanges.tolist() == second.exchanges.tolist()


def test_a_process_goes_on_in_the_next_generation():
    """Its runs and steps are counted on, never right after those before; one that left no trace is no rank."""
    later = part(1, -(10**6), generation=1, begin_ns=2 * 10**9)
    found = merged(["gone", "rank 1"], [part(1, 0), later], {})
    found.verify()
    assert [rank.name for rank in found.ranks] == ["rank 1"]
    assert found.runs["step"].tolist() == [0, 1] and np.diff(found.runs["number"]) > 1
    assert len(found.messages) == 0


def test_waiting_for_the_network_is_told(trace):
    """Of 40 us, each rank works 20, and waits 20 for an exchange that is under way."""
    found = analyse(trace)
    assert (found["steps"], found["step_ms"]) == (1, 0.04)
    assert found["network_idle_ms"] == pytest.approx(0.04) and found["idle_ms"]["dependency"] == pytest.approx(0.04)
    assert gaps(trace)["network"].tolist() == [20 * US] * 2
    for row in found["by_rank"]:
        assert row["parallel_efficiency"] == pytest.approx(0.5)
        assert (row["exchange_ms"], row["network_idle_ms"]) == (pytest.approx(0.02), pytest.approx(0.02))
    assert "ranks, hand: ms and MB a step" in str(Comparison.of(trace))


def test_formats_have_ranks_and_messages(trace, tmp_path):
    """Perfetto a process a rank and a flow a message; Paraver a task a rank with its network, and a communication a message."""
    formats.save(trace, tmp_path)
    counts = formats.check(tmp_path)
    assert counts["perfetto"]["tasks"] == 4 and counts["perfetto"]["other slices"] == 6 and counts["perfetto"]["arrows"] == 2
    events = json.loads((tmp_path / "perfetto.json").read_text())["traceEvents"]
    assert {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"} == {1: "rank 0", 2: "rank 1"}
    flows = {(event["ph"], event["pid"], event["id"]): event["ts"] for event in events if event["ph"] in "sf"}
    assert {key[:2] for key in flows} == {("s", 1), ("s", 2), ("f", 1), ("f", 2)}
    assert sorted(flows.values()) == pytest.approx([10, 10, 20, 20], abs=0.01)
    lines = (tmp_path / "paraver.prv").read_text().splitlines()
    assert lines[0].endswith(":40000_ns:1(4):1:2(2:1,2:1)")
    sent = [line.split(":") for line in lines if line.startswith("3:") and line.endswith(":400:1000003")]
    assert sorted([words[3:6] + words[9:12] for words in sent]) == [
        ["1", "2", "10000", "2", "2", "20000"],
        ["2", "2", "10000", "1", "2", "20000"],
    ]
    states = [line.split(":") for line in lines if line.startswith("1:")]
    assert [words[5:] for words in states if words[3:5] == ["1", "2"]] == [
        ["0", "10000", "0"],
        ["10000", "30000", "13"],
        ["30000", "40000", "0"],
    ]
    assert [words[5:] for words in states if words[3:5] == ["2", "1"]][1] == ["10000", "30000", "13"]
    again = Trace.load(tmp_path)
    assert again.messages.tolist() == trace.messages.tolist() and again.ranks == trace.ranks


@pytest.mark.parametrize(
    ("name", "at", "what"),
    [("messages", "source", "message 0"), ("exchanges", "begin_ns", "exchange 0"), ("records", "worker", "of another")],
)
def test_a_trace_of_ranks_that_cannot_be_is_refused(trace, name, at, what):
    """A rank that there is not, times that go back, a worker of the wrong rank."""
    getattr(trace, name)[at][0] = {"source": 2, "begin_ns": 2**61, "worker": 1}[at]
    with pytest.raises(ValueError, match=what):
        trace.verify()


def test_a_clock_that_drifts_is_followed():
    """Between two measurements the difference changes evenly; before and after them it stays."""
    assert Clock((100, 200), (10, 20))(np.array([50, 100, 150, 200, 300])).tolist() == [60, 110, 165, 220, 320]


def test_what_overlaps_lies_side_by_side():
    assert lanes(np.array([0, 5, 10, 10]), np.array([10, 20, 15, 30])).tolist() == [0, 1, 0, 2]


@pytest.fixture(scope="module")
def client():
    options = {"dashboard_address": "127.0.0.1:0", "worker_dashboard_address": None, "scheduler_kwargs": {"dashboard": False}}
    options |= {"threads_per_worker": 1, "processes": True, "memory_limit": 0, "silence_logs": 50}
    with LocalCluster(n_workers=2, **options) as started, Client(started, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=60)
        yield client


def test_a_run_on_a_cluster_writes_one_trace_and_one_log(client, tmp_path, capsys):
    """Of both ranks, each step, with every message of every exchange; and what a worker warns of, with its rank, without Dask's chatter."""

    def warn_often(dask_worker):
        for name in ("distributed.worker", "mine"):
            for n in range(100):
                dask_worker.loop.call_later(n / 10, logging.getLogger(name).warning, "careful\nhere")

    (tmp_path / "hamlet.txt").write_text("To be, or not to be, that is the question:\n" * 600)
    client.run(warn_often)
    flags = {"steps": 8, "val_every": 0, "sample_every": 0, "out": tmp_path / "run", "log": tmp_path / "log.jsonl"}
    taskgpt.train(graph="tiny", data=str(tmp_path / "hamlet.txt"), client=client, trace=tmp_path / "trace", **flags)
    trace = Trace.load(tmp_path / "trace").select("training step")
    assert np.bincount(trace.rank_of_run).tolist() == [8, 8]
    assert [rank.name.split()[:2] for rank in trace.ranks] == [["rank", "0"], ["rank", "1"]]
    turns = np.unique(trace.exchanges[["rank", "bucket", "turn"]])
    assert len(turns) == len(trace.exchanges) == 2 * 8 * (trace.exchanges["bucket"].max() + 1)
    sent = [trace.messages["bytes"][(trace.messages["source"] == rank) & (trace.messages["bucket"] >= 0)].sum() for rank in (0, 1)]
    assert sent == [trace.exchanges["bytes"][trace.exchanges["rank"] == rank].sum() for rank in (0, 1)]
    assert formats.check(tmp_path / "trace")["perfetto"]["arrows"] > 0
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    network = [each for each in records if "network_ms" in each]
    assert [each["step"] for each in network] == list(range(8)) and {each["ranks"] for each in network} == {2}
    assert all(each["exposed_ms"] >= 0 and each["network_ms"] > 0 for each in network)
    lines = (tmp_path / "run" / "workers.log").read_text().splitlines()
    assert {line.split(" ", 1)[1][:8] for line in lines} == {"rank 0 (", "rank 1 ("}
    assert all("WARNING mine: careful" in line for line in lines)
    assert "WARNING mine" in capsys.readouterr().out
