"""The report's numbers: by hand for ten tasks, as defined for any trace, and shown side by side."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trace import NAMES, traced

from taskgpt.lab.traces.comparison import Comparison
from taskgpt.lab.traces.efficiency import analyse, in_words
from taskgpt.lab.traces.idle import CAUSES, gaps
from taskgpt.lab.traces.trace import RUN_TYPE, Trace
from taskgpt.lab.traces.traced_graph import TracedGraph
from taskgpt.programs import trace as trace_program
from taskgpt.schedulers.records import RECORD_TYPE


def hand_made(tasks: list[tuple], workers: int, loops: list[int] | None = None) -> Trace:
    """Return the trace of one run: for each task (worker, ready, start, stop, predecessors), in program order."""
    count = len(tasks)
    first = np.cumsum([0, *(len(task[4]) for task in tasks)])
    predecessors = np.array([p for task in tasks for p in task[4]], np.int64)
    numbers = {name: np.zeros(count, np.int64) for name in ("kernel", "phase", "layer")}
    costs = {name: np.full(count, 1000) for name in ("flops", "bytes")}
    loop = np.array(loops or [0] * count)
    graph = TracedGraph(
        "hand", ["work"], ["forward"], ["work out(x)"] * count, **numbers, **costs, loop=loop, first=first, predecessors=predecessors
    )
    records = np.array(sorted(((0, n, t[1], t[2], t[3], t[0]) for n, t in enumerate(tasks)), key=lambda row: row[3]), RECORD_TYPE)
    runs = np.array([(0, 0, records["ready_ns"].min(), records["stop_ns"].max(), 0)], RUN_TYPE)
    trace = Trace({"scheduler": "hand", "workers": workers, "is_fork_join": loops is not None}, [graph], runs, records)
    trace.verify()
    return trace


def test_ten_tasks_by_hand():
    """Two workers, 22 ns; predecessors in brackets; task 4 is ready at 2, task 7 at 10.

        0    2    4    6    8    10   12   14   16   18   20   22
    w0  |0-------|2 (0)----|4 (1)|....|6 (5)----|8 (6,7)--|....
    w1  |1---|....|3 (0)-|..|5 (2)----|7 (4)|.............|9 (8)

    Worker 0 works 18 of 22, worker 1 13. Idle: 10-12 while 7 is ready, 20-22 for nothing; 2-4 and 7-8 while 4 is ready, 14-20 for nothing.
    """
    trace = hand_made(
        [
            (0, 0, 0, 4, []),
            (1, 0, 0, 2, []),
            (0, 4, 4, 8, [0]),
            (1, 4, 4, 7, [0]),
            (0, 2, 8, 10, [1]),
            (1, 8, 8, 12, [2]),
            (0, 12, 12, 16, [5]),
            (1, 10, 12, 14, [4]),
            (0, 16, 16, 20, [6, 7]),
            (1, 20, 20, 22, [8]),
        ],
        workers=2,
    )
    waits = [(g["worker"], g["begin_ns"], g["end_ns"], g["dependency"], g["scheduling"]) for g in gaps(trace)]
    assert waits == [(0, 10, 12, 0, 2), (0, 20, 22, 2, 0), (1, 2, 4, 0, 2), (1, 7, 8, 0, 1), (1, 14, 20, 6, 0)]
    found = analyse(trace, reference=trace)
    assert found["efficiency"] == pytest.approx(
        {
            "parallel efficiency": 31 / 44,
            "load balance": 15.5 / 18,
            "dependency efficiency": 18 / 20,
            "scheduling efficiency": 20 / 22,
            "computation scaling": 1,
            "global efficiency": 31 / 44,
        }
    )
    assert found["idle_ms"] == pytest.approx({"barrier": 0, "dependency": 8e-6, "scheduling": 5e-6, "between": 0})
    assert found["useful_ms"] == pytest.approx(31e-6)
    longest = found["longest_path"]
    assert [task["task"] for task in longest["path"]] == [0, 2, 5, 6, 8, 9]
    assert (longest["t1_ms"], longest["tinf_ms"], longest["bound_ms"]) == pytest.approx((31e-6, 22e-6, 22e-6))
    assert longest["average_parallelism"] == pytest.approx(31 / 22)
    [row] = found["by_kernel"]
    assert (row["name"], row["tasks"], row["share"]) == ("work", 10, 1)
    assert (row["mean_us"], row["gflops"], row["gbs"]) == pytest.approx((3.1e-3, 10_000 / 31, 10_000 / 31))


def test_what_to_read_first():
    """A fork of three tasks of 2, 4 and 6 ms after one of 3 ms, on two workers: T1 is 15, the longest path 9, the better half 7.5."""
    ms = 1_000_000
    times = [(0, 0, 0, 3, []), (0, 3, 3, 9, [0]), (1, 3, 3, 5, [0]), (1, 3, 5, 9, [0])]
    trace = hand_made([(worker, *(n * ms for n in at), before) for worker, *at, before in times], workers=2)
    assert in_words(trace).split("\n") == [
        "4 tasks on 2 workers: 9.00 ms, parallel efficiency 0.83",
        "  T1, all tasks of a run one after the other     15.00 ms",
        "  T-infinity, its longest path: 2 tasks           9.00 ms",
        "  no schedule on 2 workers is shorter than        9.00 ms",
        "  average parallelism, T1 / T-infinity            1.67",
    ]


def test_a_barrier_by_hand():
    """Loops {0, 1} and {2, 3}, all of the second ready at 2: worker 1 waits for worker 0 at the barrier, from 2 to 4.

        0    2    4    6    8
    w0  |0-------|2 (1)|....
    w1  |1---|....|3 (1)----|
    """
    tasks = [(0, 0, 0, 4, []), (1, 0, 0, 2, []), (0, 2, 4, 6, [1]), (1, 2, 4, 8, [1])]
    idle = analyse(hand_made(tasks, workers=2, loops=[0, 0, 1, 1]))["idle_ms"]
    assert idle == pytest.approx({"barrier": 2e-6, "dependency": 2e-6, "scheduling": 0, "between": 0})
    idle = analyse(hand_made(tasks, workers=2))["idle_ms"]  # were there no barrier, somebody would be to blame
    assert idle == pytest.approx({"barrier": 0, "dependency": 2e-6, "scheduling": 2e-6, "between": 0})


def idle_in_runs(found: dict) -> float:
    return sum(ms for cause, ms in found["idle_ms"].items() if cause != "between")


def test_a_run_that_was_left_out_is_not_idleness():
    """Worker 1 still runs task 1 of the run before, which is not shown; then it idles, while task 2 is not ready.

        0    2    4    6    8
    w0  |0        |0 (of run 1)|
    w1  |1............|....|2..|    2 is ready at 8, and runs to 10; w0 idles from 8 on
    """
    both = hand_made([(0, 0, 0, 4, []), (1, 0, 0, 6, []), (1, 8, 8, 10, [])], workers=2)
    records = np.concatenate([both.records[:2], both.records[:1], both.records[2:]])
    records["run"] = [0, 0, 1, 1]
    records["ready_ns"][2:], records["start_ns"][2:], records["stop_ns"][2:] = [4, 8], [4, 8], [8, 10]
    runs = np.array([(0, 0, 0, 6, 0), (0, 1, 4, 10, 1)], RUN_TYPE)
    trace = Trace(both.about, both.graphs, runs, records).without_first(1)
    found = analyse(trace)
    assert (found["wall_ms"], found["useful_ms"], found["other_runs_ms"]) == pytest.approx((6e-6, 6e-6, 2e-6))
    assert found["idle_ms"] == pytest.approx({"barrier": 0, "dependency": 4e-6, "scheduling": 0, "between": 0})
    assert found["efficiency"]["parallel efficiency"] == pytest.approx(8 / 12)


@st.composite
def schedules(draw) -> Trace:
    """Any trace that can be: each task some time after its predecessors, on a worker that is free."""
    workers, free, tasks = draw(st.integers(1, 4)), [0] * 4, []
    for number in range(draw(st.integers(1, 25))):
        predecessors = sorted(draw(st.sets(st.integers(0, number - 1), max_size=3))) if number else []
        worker = draw(st.integers(0, workers - 1))
        ready = max((tasks[p][3] for p in predecessors), default=0)
        start = max(ready, free[worker]) + draw(st.integers(0, 5))
        free[worker] = start + draw(st.integers(1, 20))
        tasks.append((worker, ready, start, free[worker], predecessors))
    loops = np.cumsum(draw(st.lists(st.integers(0, 1), min_size=len(tasks), max_size=len(tasks)))).tolist()
    return hand_made(tasks, workers, draw(st.sampled_from([None, loops])))


@given(schedules())
@settings(max_examples=200, deadline=None)
def test_factors_multiply_and_idle_time_adds_up(trace):
    """The factors' product is the parallel efficiency; causes add up to all idle time; no bound is above the time that was needed."""
    found = analyse(trace)
    e, wall_ms = found["efficiency"], found["wall_ms"]
    product = e["load balance"] * e["dependency efficiency"] * e["scheduling efficiency"]
    assert product == pytest.approx(e["parallel efficiency"])
    assert all(0 < e[name] <= 1 + 1e-9 for name in list(e)[:4])
    assert all(ms >= -1e-12 for ms in found["idle_ms"].values())
    assert idle_in_runs(found) + found["useful_ms"] == pytest.approx(trace.workers * wall_ms)
    assert found["longest_path"]["bound_ms"] <= wall_ms * (1 + 1e-9)
    for name in ("by_kernel", "by_layer", "by_phase"):
        assert sum(row["ms"] for row in found[name]) == pytest.approx(found["useful_ms"])


@pytest.mark.parametrize("name", NAMES)
def test_a_real_run_adds_up(name):
    """Under every scheduler, with runs that may overlap."""
    trace = traced(name)
    found = analyse(trace)
    assert idle_in_runs(found) + found["useful_ms"] + found["other_runs_ms"] == pytest.approx(trace.workers * found["wall_ms"])
    assert found["wall_ms"] + found["idle_ms"]["between"] / trace.workers == pytest.approx((trace.end_ns - trace.begin_ns) / 1e6)
    assert found["other_runs_ms"] == 0
    part = analyse(trace.without_first(1))
    assert idle_in_runs(part) + part["useful_ms"] + part["other_runs_ms"] == pytest.approx(trace.workers * part["wall_ms"])
    assert set(found["idle_ms"]) == set(CAUSES)
    assert json.loads(json.dumps(found)) == found
    assert all(len(row) == len(table["head"]) for table in Comparison([found, found]).tables() for row in table["rows"])


@pytest.mark.parametrize("name", NAMES)
def test_differences_add_up(name):
    """By kernel and cause of idleness, all workers' time of a step of both; the largest difference first."""
    traces = [traced("sequential"), traced(name)]
    comparison = Comparison.of(*traces)
    rows = comparison.differences()
    for at, (trace, f) in enumerate(zip(traces, comparison.found, strict=True), start=1):
        assert sum(row[at] for row in rows) == pytest.approx(trace.workers * f["wall_ms"] / f["steps"])
    sizes = [abs(row[2] - row[1]) for row in rows]
    assert sizes == sorted(sizes, reverse=True)
    assert comparison.names == (["sequential 1", "sequential 2"] if name == "sequential" else ["sequential", name])
    assert "what differs" in str(comparison)
    assert comparison._repr_html_().count("<table>") == len(comparison.tables())


def test_shares_of_the_machine():
    """10 us for 1000 operations and bytes: 0.1 GFLOP/s and GB/s of a worker, who has half of the machine's."""
    trace = hand_made([(0, 0, 0, 10_000, [])], workers=2)
    [row] = analyse(trace)["by_kernel"]
    assert (row["of_sgemm"], row["of_memory"]) == (None, None)
    trace.about["limits"] = {"sgemm_gflops": 4.0, "memory_gbs": 0.5}
    [row] = analyse(trace)["by_kernel"]
    assert (row["of_sgemm"], row["of_memory"]) == pytest.approx((0.05, 0.4))


def test_limits_are_those_of_the_machine_and_shown():
    """The largest that traces of as many workers on one machine measured, for all of them; another machine keeps its own."""
    traces = []
    for machine, sgemm in (("here", 4.0), ("here", 2.0), ("there", 1.0), ("here", None)):
        trace = hand_made([(0, 0, 0, 10_000, [])], workers=2)
        trace.about["machine"] = {"processor": machine}
        trace.about["limits"] = sgemm and {"sgemm_gflops": sgemm, "memory_gbs": 1 / sgemm}
        traces.append(trace)
    comparison = Comparison.of(*traces)
    limits = [(found["limits"]["sgemm_gflops"], found["limits"]["memory_gbs"]) for found in comparison.found]
    assert limits == [(4, 0.5), (4, 0.5), (1, 1), (4, 0.5)]
    assert [f["by_kernel"][0]["of_sgemm"] for f in comparison.found] == pytest.approx([0.05, 0.05, 0.2, 0.05])
    [table] = [table for table in comparison.tables() if "limits" in table["caption"]]
    assert table["rows"] == [["sgemm, GFLOP/s", "4.0", "4.0", "1.0", "4.0"], ["memory, GB/s", "0.5", "0.5", "1.0", "0.5"]]
    del traces[0].about["limits"]
    assert not [table for table in Comparison.of(traces[0]).tables() if "limits" in table["caption"]]


def test_shares_above_one_are_explained():
    """In the caption of the table in which they stand, and nowhere else."""
    trace, words = hand_made([(0, 0, 0, 10_000, [])], workers=2), []
    for sgemm, memory in ((4.0, 0.5), (0.1, 0.5), (4.0, 0.1), (0.1, 0.1)):
        trace.about["limits"] = {"sgemm_gflops": sgemm, "memory_gbs": memory}
        [caption] = [table["caption"] for table in Comparison.of(trace).tables() if table["caption"].startswith("kernels")]
        words.append(("Over 100 % of sgemm" in caption, "Over 100 % of memory" in caption))
    assert words == [(False, False), (True, False), (False, True), (True, True)]


def test_a_wait_for_the_run_before_is_for_a_dependency():
    """Task 0 of the second run waits for task 1 of the first: worker 0 has nothing to do from 2 to 4, while both runs are under way.

        0    2    4    6
    w0  |0 (of run 0)  |....|0 (1 of run 0)|
    w1  |1............|1 ...
    """
    one = hand_made([(0, 0, 0, 2, []), (1, 0, 0, 4, [])], workers=2)
    records = np.concatenate([one.records, one.records])
    records["run"] = [0, 0, 1, 1]
    for name, times in {"ready_ns": (0, 0, 4, 4), "start_ns": (0, 0, 4, 4), "stop_ns": (2, 4, 6, 6)}.items():
        records[name] = times
    runs = np.array([(0, 0, 0, 4, 0), (0, 1, 4, 6, 1)], RUN_TYPE)
    trace = Trace(one.about, one.graphs, runs, records, edges={(0, 0): np.array([[1, 0], [1, 1]])})
    trace.verify()
    assert analyse(trace)["idle_ms"] == pytest.approx({"barrier": 0, "dependency": 2e-6, "scheduling": 0, "between": 0})


def test_the_report_says_that_cold_steps_are_in_it(tmp_path, capsys):
    """Where there are too few to leave them out, in text, page and JSON; where there are enough, nothing is said."""
    trace = traced("native", order=(0, 0, 0))
    trace.save(tmp_path / "trace.npz")
    argv = ["report", str(tmp_path), "--runs", trace.graphs[0].name, "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]
    for skip, cold in ((2, 0), (3, 3), (7, 3)):
        assert trace_program.main([*argv, "--skip", str(skip)]) == 0
        note = f"{tmp_path}: too few runs to leave out the first {skip}: {cold} of 3 are cold"
        assert (f"note: {note}\n" in capsys.readouterr().out) == (cold > 0)
        assert (note in (tmp_path / "r.html").read_text()) == (cold > 0)
        assert json.loads((tmp_path / "r.json").read_text())[0]["cold_runs"] == cold


def test_tasks_that_take_no_time_are_not_reported(tmp_path, capsys):
    """A clock too coarse: one line, not a division by zero."""
    hand_made([(0, 0, 0, 0, []), (0, 5, 5, 5, [])], workers=1).save(tmp_path / "trace.npz")
    assert trace_program.main(["report", str(tmp_path), "--runs", "hand"]) == 2
    assert "in which no task took any time" in capsys.readouterr().err


def test_the_report_compares_traces(tmp_path, capsys):
    """Two traces beside each other, as text, as JSON and as a page; a reference gives computation scaling."""
    for name in ("loops", "native", "sequential"):
        (tmp_path / name).mkdir()
        traced(name).save(tmp_path / name / "trace.npz")
    name = traced("sequential").graphs[0].name
    argv = ["report", str(tmp_path / "loops"), str(tmp_path / "native"), "--runs", name, "--reference", str(tmp_path / "sequential")]
    assert trace_program.main([*argv, "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")]) == 0
    text = capsys.readouterr().out
    assert "idle: barrier" in text
    assert "longest path, native" in text
    found = json.loads((tmp_path / "r.json").read_text())
    assert [each["workers"] for each in found] == [2, 2]
    assert all(each["efficiency"]["computation scaling"] > 0 for each in found)
    assert "dependency efficiency" in (tmp_path / "r.html").read_text()
    assert trace_program.main(["report", str(tmp_path / "native"), "--runs", "trainin"]) == 2
    assert trace_program.main(["report", str(tmp_path / "native"), "--runs", name, "--reference", str(tmp_path / "loops")]) == 2
