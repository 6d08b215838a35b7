"""Simulated schedulers: by hand, never below their bounds, the same every time, and with the native scheduler's own choices."""

import dataclasses
import json
import random
import re

import kernels_for_tests as k
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgpt.config import find_file, load_scheduler
from taskgpt.errors import UserError
from taskgpt.gpt2.program import training_graph
from taskgpt.lab import machine as this
from taskgpt.lab.named import make
from taskgpt.lab.simulator import validation
from taskgpt.lab.simulator.machine_file import Machine
from taskgpt.lab.simulator.simulated import Costs, ms_a_step, simulated
from taskgpt.lab.simulator.task_costs import Rates, Speeds, traffic
from taskgpt.lab.traces.trace import Trace, Traced
from taskgpt.products import BLAS, way_for
from taskgpt.programs import trace as trace_program
from taskgpt.programs.simulate import main as simulate
from taskgpt.schedulers import open_scheduler
from taskgpt.schedulers.native.policies import POLICIES
from taskgpt.tasks import Graph, InOut, Tensor, dims, kernel
from taskgpt.train import main as train

(N,) = dims("N")


@kernel
def work(a: InOut[N]):
    """Something to be spawned; its costs are given."""
    a += 1


OVERHEADS = [name for name in Machine.__dataclass_fields__ if name.endswith("_us")]


def machine(cores: int, sockets: int = 1, bandwidth_gbs: float = 1e6, busy_gflops: float = 1.0, **overheads: float) -> Machine:
    """Return a machine without overheads but these."""
    return Machine(sockets, cores, 1.0, busy_gflops, bandwidth_gbs, 1.0, **{**dict.fromkeys(OVERHEADS, 0.0), **overheads})


def graph_of(edges: list[list[int]]) -> Graph:
    """Return a graph whose task n works on cell n and those of the tasks that it waits for, which so come before it."""
    x = Tensor("x", np.zeros(len(edges), np.float32), (1,))
    graph = Graph()
    for number, before in enumerate(edges):
        first = min([number, *before])
        graph.spawn(work, x[first : number + 1])
    return graph


def run(name: str, graph: Graph, where: Machine, seconds, moved=None, times: int = 1, **keys) -> Trace:
    costs = Costs(np.array(seconds, float), np.zeros(len(seconds)) if moved is None else np.array(moved, float))
    config = load_scheduler(name, {"workers": where.cores_per_socket * where.sockets, "record": 1000, **keys})
    with Traced(simulated(config, where, lambda _: costs)) as traced:
        for _ in traced.run_each([graph] * times):
            pass
        trace = traced.trace({})
    trace.verify()
    return trace


def spans(trace: Trace) -> list[tuple]:
    """Return (task, worker, start, stop) in seconds since the beginning."""
    return [
        (int(r["task"]), int(r["worker"]), *((int(r[n]) - trace.begin_ns) / 1e9 for n in ("start_ns", "stop_ns"))) for r in trace.records
    ]


def test_a_chain_and_a_free_task_by_hand():
    """0 then 1, and 2 beside them: worker 0 goes on with 1, which it made ready; worker 1 takes 2.

    w0 |0--|1----|
    w1 |2-|
    """
    x = Tensor("x", np.zeros(3, np.float32), (1,))
    graph = Graph()
    for cell in (0, 0, 2):
        graph.spawn(work, x[cell : cell + 1])
    trace = run("native", graph, machine(2), [2, 3, 1])
    assert sorted(spans(trace)) == [(0, 0, 0, 2), (1, 0, 2, 5), (2, 1, 0, 1)]


def test_an_urgent_task_goes_first_whosever_queue_it_is_in():
    """0 makes 1 ready, which is urgent, on the worker that ran it: he takes it before 3 and 4, which wait in the submitter's queue."""
    graph = graph_of([[], [0], [], [], []])
    graph.tasks[0].priority, graph.tasks[1].priority = 10, 5
    starts = {row[0]: row[2] for row in spans(run("native", graph, machine(2), [1, 1, 3, 3, 3], work_stealing=True))}
    assert starts == {0: 0, 2: 0, 1: 1, 3: 2, 4: 3}


def test_bandwidth_is_shared_by_hand():
    """Two tasks of 2 s that move 8 GB each, on a socket of 4 GB/s: each wants 4, gets 2, and takes 4 s. On two sockets, 2 s."""
    x = Tensor("x", np.zeros(2, np.float32), (1,))
    graph = Graph()
    for cell in range(2):
        graph.spawn(work, x[cell : cell + 1])
    for where, lasts in ((machine(2, bandwidth_gbs=4), 4), (machine(1, sockets=2, bandwidth_gbs=4), 2)):
        assert [row[3] for row in spans(run("native", graph, where, [2, 2], [8e9, 8e9]))] == pytest.approx([lasts, lasts])
    # Who wants 1 GB/s gets it; the other has 3 of the 4 that it wants, for 2 s: 6 of 8 GB, then the rest alone.
    ends = [row[3] for row in spans(run("native", graph, machine(2, bandwidth_gbs=4), [2, 2], [2e9, 8e9]))]
    assert ends == pytest.approx([2, 2.5])


def test_loops_by_hand():
    """Three tasks of a loop on two workers, then one that waits for the first: 1 + 2 beside 3, a barrier of half a second, then 1.

    Static chunks of three tasks for two workers are {0} and {1, 2}.
    """
    x = Tensor("x", np.zeros(3, np.float32), (1,))
    graph = Graph()
    for cell in (0, 1, 2, 0):
        graph.spawn(work, x[cell : cell + 1])
    trace = run("loops", graph, machine(2, barrier_us=0.5e6), [3, 1, 2, 1])
    assert sorted(spans(trace)) == [(0, 0, 0, 3), (1, 1, 0, 1), (2, 1, 1, 3), (3, 0, 3.5, 4.5)]
    assert trace.about["is_fork_join"]


def test_overheads_by_hand():
    """A chain of ten tasks of 1 ms: what a scheduler adds to each; Dask's, before the first and between any two.

    distributed's first end, at 1.1 ms, is told at once; then every 2 ms a message lets the next task begin, the last of ten at 17.1.
    """
    chain = graph_of([[], *([n] for n in range(9))])
    for name, overheads, adds_ms in (
        ("native", {"task_us": 100}, 1.0),
        ("sequential", {"call_us": 100}, 1.0),
        ("threads", {"dask_begin_us": 10, "dask_task_us": 100}, 0.1 + 0.9),
        ("local-cluster", {"distributed_begin_us": 10, "distributed_task_us": 100, "distributed_batch_us": 2000}, 0.1 + 0.1 + 8.0),
    ):
        trace = run(name, chain, machine(1, **overheads), [1e-3] * 10)
        assert trace.end_ns - trace.begin_ns == pytest.approx(10e6 + adds_ms * 1e6, abs=30), name


def test_a_busy_socket_is_slower_by_hand():
    """Two tasks of 1 s on two cores that do half as much when both are busy take 2 s; on three cores of that kind, 4 / 3 s."""
    x = Tensor("x", np.zeros(2, np.float32), (1,))
    graph = Graph()
    for cell in range(2):
        graph.spawn(work, x[cell : cell + 1])
    for cores, lasts in ((2, 2.0), (3, 4 / 3)):
        assert [row[3] for row in spans(run("native", graph, machine(cores, busy_gflops=0.5), [1, 1]))] == pytest.approx([lasts] * 2)


def test_dask_hands_out_one_after_the_other_by_hand():
    """Three free tasks of 1 s, then of two workers the first is free again when the end of its task was served: after 0.1 s, the other 0.2.

    Two threads of work and one that serves need three cores; on two they take turns, so that 0.1 s of serving beside one task last 0.1 s.
    """
    x = Tensor("x", np.zeros(4, np.float32), (1,))
    graph = Graph()
    for cell in range(4):
        graph.spawn(work, x[cell : cell + 1])
    starts = sorted(row[2] for row in spans(run("threads", graph, machine(3, dask_task_us=1e5), [1] * 4, workers=2)))
    assert starts == pytest.approx([0, 0, 1.1, 1.2])
    crowded = sorted(row[2] for row in spans(run("threads", graph, machine(2, dask_task_us=1e5), [1, 1.05, 1, 1])))
    assert crowded == pytest.approx([0, 0, 1.1, 1.2])


def test_dask_takes_tasks_in_its_own_order():
    """With one worker simulated and real runs of dask.threaded take the tasks in the same order."""
    for seed in range(5):
        graph = k.random_graph(k.arena(False), seed)
        config = load_scheduler("threads", {"workers": 1, "record": 1000, "coarsen": 0})
        costs = Costs(np.ones(len(graph.tasks)), np.zeros(len(graph.tasks)))
        orders = []
        for scheduler in (open_scheduler(config.scheduler, config.settings), simulated(config, machine(1), lambda _, costs=costs: costs)):
            with scheduler:
                scheduler.run(graph)
                orders.append(scheduler.take_records()[0]["task"].tolist())
        assert orders[0] == orders[1]


def test_coarsened_tasks_cost_what_their_parts_do():
    """The trace shows the coarsened graph, whose tasks take as long as all of the others."""
    chain = graph_of([[], *([n] for n in range(9))])
    trace = run("threads", chain, machine(1), [1e-3] * 10, coarsen=2)
    assert len(trace.graphs[0]) == 2
    assert trace.end_ns - trace.begin_ns == pytest.approx(10e6, abs=20)


def test_steps_overlap_by_hand():
    """Three free tasks of a second on two workers: 1.5 s a step if the next one may begin, 2 s with a barrier between steps.

    Oldest first, and no worker goes on with the same task of the next step: else the third of a step waits for both.
    """
    x = Tensor("x", np.zeros(3, np.float32), (1,))
    graph = Graph()
    for cell in range(3):
        graph.spawn(work, x[cell : cell + 1])
    costs = Costs(np.ones(3), np.zeros(3))
    for overlap, ms in ((True, 1500), (False, 2000)):
        with simulated(load_scheduler("native", {"workers": 2, "immediate_successor": False}), machine(2), lambda _: costs) as scheduler:
            assert ms_a_step(scheduler, graph, 4, overlap) == pytest.approx(ms)


@st.composite
def programs(draw):
    """Return (graph, seconds, bytes) of random intervals of cells."""
    count = draw(st.integers(1, 30))
    x = Tensor("x", np.zeros(8, np.float32), (1,))
    graph = Graph()
    for _ in range(count):
        first = draw(st.integers(0, 7))
        graph.spawn(work, x[first : draw(st.integers(first + 1, 8))])
    seconds = draw(st.lists(st.floats(1e-6, 1.0), min_size=count, max_size=count))
    return graph, seconds, draw(st.lists(st.floats(0, 1e9), min_size=count, max_size=count))


OTHERS = ["sequential", "loops", "loops-dynamic", "threads", "local-cluster"]


@given(
    programs(),
    st.sampled_from([*OTHERS, *POLICIES]),
    st.integers(1, 5),
    st.sampled_from([0.1, 1, 1e6]),
    st.sampled_from([0.3, 1.0]),
    st.sampled_from([0.0, 100.0]),
)
@settings(max_examples=300, deadline=None)
def test_no_time_is_below_its_bounds(program, how, workers, bandwidth_gbs, busy_gflops, overhead_us):
    """T1 / p, T-infinity, and bytes over bandwidth, of one run and of several that overlap; and the same every time."""
    graph, seconds, moved = program
    if how in POLICIES:
        name, keys = "native", {"policy": how, "work_stealing": workers % 2 == 0}
    else:
        name, keys = how, {"coarsen": 1 + workers} if how in ("threads", "local-cluster") else {}
    workers = 1 if how == "sequential" else workers
    where = machine(workers, 1, bandwidth_gbs, busy_gflops, **dict.fromkeys(OVERHEADS, overhead_us))
    trace = run(name, graph, where, seconds, moved, times=3, **keys)
    took = (trace.end_ns - trace.begin_ns) / 1e9 + 1e-7
    longest = sum(seconds[n] for n in graph.longest_path(seconds))
    assert took >= 3 * sum(seconds) / workers
    assert took >= longest
    assert took >= 3 * sum(moved) / (bandwidth_gbs * 1e9) * (1 - 1e-9) - 1e-6
    for _, rows in trace.by_run():
        assert (rows["stop_ns"].max() - rows["start_ns"].min()) / 1e9 + 1e-7 >= longest
    again = run(name, graph, where, seconds, moved, times=3, **keys)
    assert (again.records == trace.records).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_one_worker_takes_tasks_in_the_native_schedulers_order(policy):
    """With one worker the order is all there is, and it is the same."""
    draw, x, graph = random.Random(5), Tensor("x", np.zeros(8, np.float32), (1,)), Graph()
    graph.spawn(work, x[:])  # all others wait for it: a real worker would start while they still come in
    for _ in range(60):
        first = draw.randrange(8)
        graph.spawn(work, x[first : draw.randint(first + 1, min(first + 3, 8))])
    keys = {"policy": policy, "workers": 1, "record": 1000}
    config = load_scheduler("native", keys)
    costs = Costs(np.array([task.estimated_seconds + 1e-6 for task in graph.tasks]), np.zeros(len(graph.tasks)))
    orders = []
    for scheduler in (open_scheduler(config.scheduler, config.settings), simulated(config, machine(1), lambda _: costs)):
        with scheduler:
            scheduler.run(graph)
            orders.append(scheduler.take_records()[0]["task"].tolist())
    assert orders[0] == orders[1]


def test_same_core_first():
    """Four chains on two workers: each stays with the worker that began it; else a chain goes to whoever is free."""
    draw, x, graph = random.Random(3), Tensor("x", np.zeros(4, np.float32), (1,)), Graph()
    for number in range(60):
        graph.spawn(work, x[number % 4 : number % 4 + 1])
    seconds = [draw.uniform(1, 3) for _ in graph.tasks]

    def homes(policy: str) -> list[int]:
        """Return how many workers ran each chain."""
        records = run("native", graph, machine(2), seconds, policy=policy, immediate_successor=False).records
        return [len(set(records["worker"][records["task"] % 4 == chain])) for chain in range(4)]

    assert homes("same_core_first") == [1] * 4
    assert homes("oldest_first") == [2] * 4


def test_traffic_by_hand():
    """A cache of 100 bytes: what was touched 40 bytes ago is there, what was touched longer ago is read, and written back if it changes."""
    x = Tensor("x", np.zeros(40, np.float32), (10,))  # four cells of 40 bytes, which tasks write
    graph = Graph()
    for cell in (0, 0, 1, 2, 3):
        graph.spawn(work, x[10 * cell : 10 * cell + 10])
    assert traffic(graph, 100).tolist() == [80, 0, 80, 80, 80]
    assert traffic(graph, 1000).tolist() == [0] * 5  # all of it stays


def test_rates_give_back_what_they_were_made_of():
    """By kernel: the sum of its tasks' times; twice the bytes take twice as long."""
    x = Tensor("x", np.zeros(6, np.float32), (1,))
    graph = Graph()
    for first, last in ((0, 2), (2, 6)):
        graph.spawn(work, x[first:last])
    estimate = Rates.of(graph, [1.0, 5.0], lambda *_: 1.0).estimate(graph)
    assert estimate.sum() == pytest.approx(6)
    assert estimate[1] == pytest.approx(2 * estimate[0])


def test_rates_of_products_are_those_of_their_own_way(monkeypatch):
    """BLAS is slower at some shapes than at others, our own at other ones: each is measured as the graph's tasks multiply, once."""
    asked = []
    monkeypatch.setattr(this, "product_gflops", lambda way, *_, **shape: asked.append((way, *shape.values())) or 1.0 + way)
    found = {}
    for products in ("own", "blas"):
        graph = training_graph(make(f"tiny:options.products={products}"))
        found[products] = Rates.of(graph, np.ones(len(graph.tasks)), Speeds(0.01)).by_kernel["matmul_gelu_forward"]
    assert {way for way, *_ in asked} == {BLAS, way_for("own", "fp32")}
    assert len(asked) == len(set(asked))
    assert found["own"] == pytest.approx((1 + way_for("own", "fp32")) * found["blas"])


def test_the_program(tmp_path, capsys):
    """A table, JSON, and traces that pass their checks; other machines by name; mistakes in a line."""
    argv = ["--graph", "tiny", "--workers", "1,112", "--steps", "4", "--machine", "2x56", "--schedulers", "loops", "native"]
    assert simulate([*argv, "--t1", "100", "--json", str(tmp_path / "s.json"), "--trace", str(tmp_path / "t")]) == 0
    rows = json.loads((tmp_path / "s.json").read_text())["steps"]
    assert [(row["scheduler"], row["workers"]) for row in rows] == [
        (name, n) for name in ("loops coverage=all", "native") for n in (1, 112)
    ]
    for row in rows:
        # Steps of native overlap: one may end sooner after the one before than its longest path takes.
        least = row["area_ms"] if row["scheduler"] == "native" else max(row["area_ms"], row["tinf_ms"])
        assert row["step_ms"] >= least * (1 - 1e-6)
    assert rows[2]["step_ms"] == pytest.approx(100, rel=0.01)
    assert trace_program.main(["check", str(tmp_path / "t" / "tiny" / "native-112"), str(tmp_path / "t" / "tiny" / "loops-1")]) == 0
    capsys.readouterr()
    for wrong, message in {
        ("--schedulers", "thread"): "did you mean 'threads'",
        ("--machine", "2x57"): "did you mean '2x56'",
        ("--workers", "113"): "2 x 56 cores; choose fewer workers, another --machine, or one of more sockets, --machine NAME:sockets=3",
        ("--machine", "2x56:cores=5"): "unknown key",
        ("--machine", "2x56:sgemm_busy_gflops=151"): "wanted at most sgemm_gflops",
        ("--workers", "0"): "wanted a number from 1",
    }.items():
        assert simulate([*argv, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_traces_of_files_stay_in_their_folder(tmp_path):
    """Graph and set-up named by absolute paths: nothing is written beside these files."""
    files = {kind: tmp_path / f"{kind}.toml" for kind in ("graphs", "scheduler_configs")}
    for kind, name in (("graphs", "tiny"), ("scheduler_configs", "loops")):
        text = find_file(kind, name).read_text(encoding="utf-8")
        files[kind].write_text(f'scheduler = "loops"\n{text}' if name == "loops" else text)
    graph, scheduler = map(str, files.values())
    flags = ["--graph", graph, "--schedulers", scheduler, "--workers", "2", "--steps", "3", "--times", "rates", "--machine", "2x56"]
    assert simulate([*flags, "--trace", str(tmp_path / "t")]) == 0
    assert len(list((tmp_path / "t").rglob("trace.npz"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["graphs.toml", "scheduler_configs.toml", "t"]


ONE_WORKER = ["--graph", "tiny", "--scheduler", "native", "--workers", "1", "--val-every", "0", "--sample-every", "0", "--data", __file__]


def test_times_from_a_trace_give_the_same_output_every_time(tmp_path, capsys):
    """Of tilings too, every scheduler, and policy; a trace of another graph or of few steps is refused in a line."""
    assert train([*ONE_WORKER, "--steps", "4", "--trace", str(tmp_path / "t")]) == 0
    base = ["--graph", "tiny", "--machine", "2x56:sockets=5", "--steps", "4", "--times", str(tmp_path / "t")]
    argv = [*base, "--schedulers", "sequential,loops,threads,local-cluster", "native", "--workers", "1,256"]
    rows = []
    for name in ("a", "b"):
        assert simulate([*argv, "--policy", "oldest_first,newest_first", "--json", str(tmp_path / name)]) == 0
        rows.append(json.loads((tmp_path / name).read_text())["steps"])
        for row in rows[-1]:
            row.pop("simulation_s")
            assert row["step_ms"] >= max(row["area_ms"], row["bandwidth_ms"]) * (1 - 1e-6)
    assert len(rows[0]) == 1 + 2 * 5
    assert rows[0] == rows[1]
    assert simulate([*base, "--tiles", "rows=64,128", "--workers", "2"]) == 2  # neither is tiny's own
    assert "a trace of another graph" in capsys.readouterr().err
    assert train([*ONE_WORKER, "--steps", "2", "--trace", str(tmp_path / "short")]) == 0
    assert simulate([*base[:-1], str(tmp_path / "short")]) == 2
    assert "wanted 3 whole steps" in capsys.readouterr().err
    assert simulate([*base[:-1], str(tmp_path / "none")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_tilings_are_estimated_from_the_first_graphs_tasks(tmp_path, capsys):
    """One table of several; a kernel that the first does not call has no rate, and the message says so."""
    argv = ["--machine", "2x56", "--workers", "4", "--steps", "3", "--times", "rates"]
    assert simulate([*argv, "--graph", "tiny", "--tiles", "rows=64,128", "columns=32,64", "--json", str(tmp_path / "s")]) == 0
    rows = json.loads((tmp_path / "s").read_text())["steps"]
    assert len({row["graph"] for row in rows}) == 4
    capsys.readouterr()
    assert simulate([*argv, "--graph", "tiny", "tiny:options.kernels=separate"]) == 2
    assert "no rate for" in capsys.readouterr().err


def test_how_right_predictions_are():
    """Half of the errors are smaller than the median; pairs rank if their quartiles do not overlap, and wrongly if predicted otherwise."""

    def row(scheduler: str, step_ms: float, measured: tuple, graph: str = "g") -> dict:
        q1, middle, q3 = measured
        found = {"step_ms": step_ms, "measured_ms": middle, "q1_ms": q1, "q3_ms": q3, "ratio": middle and step_ms / middle}
        return {"graph": graph, "workers": 2, "scheduler": scheduler, **found}

    rows = [
        row("a", 9, (9, 10, 11)),
        row("b", 20, (19, 20, 21)),
        row("c", 30, (20, 21, 22)),  # overlaps b
        row("d", 8, (39, 40, 41)),  # the slowest, predicted to be the fastest
        row("e", 1, (99, 100, 101), graph="h"),
        row("f", 1, (None, None, None)),
    ]
    assert validation.median_error(rows) == pytest.approx(0.43, abs=0.01)  # of 0.1, 0, 0.43, 0.8, 0.99
    count, wrong = validation.ranks(rows)
    assert (count, len(wrong)) == (5, 3)
    assert wrong[0].startswith("a before d")


def test_the_program_measures_beside_what_it_predicts(tmp_path):
    """A row that this machine has the cores for is measured, and an error comes of it; the other is not."""
    more = this.usable_cores() + 1
    argv = ["--graph", "tiny", "--workers", f"1,{more}", "--schedulers", "native", "--steps", "3", "--measure", "--rounds", "2"]
    assert simulate([*argv, "--json", str(tmp_path / "s.json")]) == 0
    found = json.loads((tmp_path / "s.json").read_text())
    one, other = found["steps"]
    assert one["q1_ms"] <= one["measured_ms"] <= one["q3_ms"]
    assert one["ratio"] == pytest.approx(one["step_ms"] / one["measured_ms"])
    assert other["ratio"] is None
    assert "%" in found["notes"]["median error"]


def test_a_scheduler_without_a_model_is_told():
    """With those that have one: not every scheduler that can be opened can be simulated."""
    config = dataclasses.replace(load_scheduler("threads"), scheduler="somewhere-else")
    with pytest.raises(UserError, match="no model of somewhere-else to simulate; those with one: native, sequential, loops, threads"):
        simulated(config, machine(2), lambda _: None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--schedulers", "whole-tensor"], "whole-tensor: has no tasks to simulate"),
        (["--schedulers", "tcp://10.0.0.1:8786"], "on a cluster runs `taskgpt train` alone; choose a scheduler of this machine"),
        (["--t1", "nan"], "--t1: wanted at least 0.001, got nan"),
        (["--t1", "inf"], "--t1: wanted at most 1,000,000,000, got inf"),
        (["--steps", "1000000000"], "--steps: wanted at most 1,000,000, got 1000000000"),
        (["--steps", "1000000", "--t1", "1"], "tasks each are too many to keep; choose --steps 5"),
        (["--workers", "1000000000"], "--workers 1000000000: wanted a number from 1 to 4,096"),
        (["--workers", "9" * 5000], "--workers 999"),
        (["--workers", "\u0661"], "wanted a number from 1 to 4,096"),
        (["--graph", "tiny:model.layers=1000000000"], "tasks a step, wanted at most 1,000,000"),
        (["--machine", "2x56:bandwidth_gbs=nan"], "--machine 2x56: bandwidth_gbs: wanted a finite number, got nan"),
        (["--times", "/dev/zero"], "/dev/zero"),
    ],
)
def test_numbers_that_cannot_be_are_refused(flags, message, capsys):
    """In a line, before anything runs for ever."""
    assert simulate(["--graph", "tiny", "--machine", "2x56", "--workers", "2", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert len(line) < 500


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sockets = 1\ncores_per_socket = 0\n", "cores_per_socket: wanted at least 1, got 0"),
        ("sockets = ", "not a TOML file: Invalid value"),
        ("sgemm_gflops = nan", "sgemm_gflops: wanted a finite number, got nan"),
        ("bandwidth_gbs = -1", "bandwidth_gbs: wanted at least 0.001, got -1.0"),
        ("bandwidth_gbs = inf", "bandwidth_gbs: wanted a finite number, got inf"),
        ("bandwidth_gbs = 0", "bandwidth_gbs: wanted at least 0.001, got 0.0"),
        ("task_us = -0.1", "task_us: wanted at least 0, got -0.1"),
        ("barrier_us = 1e300", "barrier_us: wanted at most 1,000,000,000, got 1e+300"),
        (f"cache_mib = 1{'0' * 500}", "cache_mib: wanted a finite number, got 1"),
        (f"cache_mib = 0x{'f' * 900}", "cache_mib: wanted a finite number, got "),
        ("sockets = 1000000000", "sockets: wanted at most 4,096, got 1000000000"),
        ("sockets = true", "sockets: wanted int, got True"),
        ("[sockets]", "sockets: wanted int, got {}"),
        ("a = " + "[" * 900, "nested too deeply"),
    ],
)
def test_a_machine_file_is_read_with_care(tmp_path, text, message):
    """Its keys, their types, and numbers that a machine can have; told with the file and the key."""
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as told:
        Machine.load(str(path))
    assert str(path) in str(told.value)
    assert len(str(told.value)) < 500
