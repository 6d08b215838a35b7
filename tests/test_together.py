"""Two programs on one simulated machine: by hand, in every way to come to cores, and by the share's own code."""

import json

import numpy as np
import pytest
from test_simulate import graph_of, machine

from taskgpt.config import load_scheduler
from taskgpt.gpt2.program import training_graph
from taskgpt.lab.named import make
from taskgpt.lab.simulator import task_costs
from taskgpt.lab.simulator.core_ways import TimeSlices
from taskgpt.lab.simulator.simulated import Costs, ms_a_step, simulated
from taskgpt.lab.simulator.task_costs import Scale
from taskgpt.lab.simulator.together import SetUp, run
from taskgpt.programs.simulate import main as simulate
from taskgpt.tasks import Graph

MS = 1e-3


def set_up(graph: Graph, seconds: float | list[float], scheduler: str = "native") -> SetUp:
    return SetUp(scheduler, graph, Costs(np.broadcast_to(seconds, len(graph.tasks)).astype(float), np.zeros(len(graph.tasks))), 1)


def chain(tasks: int) -> Graph:
    """Return tasks each of which waits for the one before."""
    return graph_of([[], *([n] for n in range(tasks - 1))])


def free(tasks: int) -> Graph:
    """Return tasks that wait for nothing."""
    return graph_of([[] for _ in range(tasks)])


def ends(pair: list[SetUp], way: str, cores: int = 2, **overheads: float) -> list[float]:
    """Return when each program is over that runs once, in seconds."""
    return run(pair, way, machine(cores, **overheads), cores)


@pytest.mark.parametrize("way", ["split", "oversubscribed", "shared"])
def test_two_chains_fill_two_cores(way):
    """A second each at once, and two one after the other."""
    assert ends([set_up(chain(100), 0.01)] * 2, way) == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("way", "wanted"),
    [("split", (2.0, 1.0)), ("oversubscribed", (4 / 3, 5 / 3)), ("shared", (1.5, 1.0))],
)
def test_a_chain_beside_free_tasks(way, wanted):
    """200 free tasks of 10 ms and a chain of 100, on two cores, 3 s of work.

    split: each has a core. In time slices three workers have two cores, of which the chain has half of one as long as there are others. In
    a share each has a core, and the free tasks have both when the chain is over.
    """
    found = ends([set_up(free(200), 0.01), set_up(chain(100), 0.01)], way)
    assert found == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(("weights", "first"), [((1, 1), 1.0), ((3, 1), 2 / 3)])
def test_weights(weights, first):
    """Of two programs of 2 s each on two cores, the one of three times the weight has three quarters of them until it is over."""
    pair = [set_up(free(2000), MS, f"native:share_weight={weight},quantum_ms=5") for weight in weights]
    assert ends(pair, "shared") == pytest.approx([2 * first, 2], rel=0.03)


def test_an_urgent_program_goes_first():
    """It has both cores as long as it has tasks for them: each from the next end of a task on that it asks at, one after the other."""
    pair = [set_up(free(200), 0.01), set_up(free(200), 0.01, "native:share_priority=1")]
    assert ends(pair, "shared") == pytest.approx([2, 1.02])


@pytest.mark.parametrize("scheduler", ["native", "native-longest-path", "loops", "loops-dynamic"])
@pytest.mark.parametrize("way", ["exclusive", "oversubscribed", "shared"])
def test_a_program_alone_takes_what_it_takes_without(scheduler, way):
    """Its own simulation says how long, steps that overlap, bandwidth and overheads included."""
    graph = graph_of([[], [], [0], [0, 1], [1], [], [3], [2, 4], [], [8]])
    costs = Costs(np.linspace(1, 3, 10) * MS, np.linspace(5, 1, 10) * 1e6)
    where = machine(3, bandwidth_gbs=3, busy_gflops=0.5, task_us=10, call_us=10, barrier_us=10, wake_us=100, slice_us=1000, switch_us=100)
    with simulated(load_scheduler(scheduler, {"workers": 3}), where, lambda _: costs) as alone:
        wanted = 4 * ms_a_step(alone, graph, 4) * MS
    assert run([SetUp(scheduler, graph, costs, 4)], way, where, 3) == pytest.approx([wanted])


def test_a_switch_takes_its_part_of_every_slice():
    """Four workers on two cores, of whose slices of 3 ms each is followed by a switch of 1 ms: 4 s become 4 / 3 times as long."""
    assert ends([set_up(free(200), 0.01)] * 2, "oversubscribed", slice_us=3000, switch_us=1000) == pytest.approx([2 * 4 / 3] * 2)


def test_a_core_that_falls_idle_takes_a_worker_over():
    """From the one that has two; both have a core each then."""
    shares = np.ones(4)
    cores = TimeSlices(2, shares, 1.0, 0.0)
    for worker in ((0, 0), (0, 1), (1, 0)):
        cores.take(*worker)
    assert shares.tolist() == [0.5, 0.5, 1, 1]
    cores.leave(0, 1)
    assert cores.moves == [(1, 2)]
    assert (cores.place(0, 0), cores.place(1, 0)) == (0, 2)
    assert shares.tolist() == [1, 1, 1, 1]


def test_a_core_is_handed_over_between_tasks_and_costs_a_wake():
    """One core, two tasks of 30 ms each. The second program gets it after the first task, which is longer than the quantum; then both have
    had as much, so that it keeps it; then the first has it again. Both times who gets it is asleep, and takes 1 ms to wake.
    """
    assert ends([set_up(free(2), 0.03)] * 2, "shared", cores=1, wake_us=1000) == pytest.approx([0.122, 0.091])


def test_products_alone_are_scaled():
    """All to one speed, such that the first graph takes as long as was said; other kernels take what they took."""
    scale = Scale(1.0, 10.0, only_products=True)
    speeds = set()
    for word, total in (("tiny", pytest.approx(10.0)), ("tiny:tiles.rows=32", None)):
        graph = training_graph(make(word))
        before = np.full(len(graph.tasks), MS)
        after = scale.of(graph, before)
        assert total is None or after.sum() == total
        for task, seconds in zip(graph.tasks, after, strict=True):
            if any("gemm" in call.kernel.tags for call in task.calls):
                speeds.add(round(task.flops / seconds, 3))
            else:
                assert seconds == MS
    assert len(speeds) == 1


def test_the_program(tmp_path, capsys, monkeypatch):
    """A row for every two programs, in which no way is below its bounds; mistakes in a line."""
    monkeypatch.setattr(task_costs, "measured", lambda prepared: np.full(len(prepared.graphs[0].tasks), MS / 100))
    argv = ["--machine", "2x56:sockets=1,cores_per_socket=4", "--t1", "100", "--scale", "products", "--steps", "3"]
    pairs = ["--pairs", "tiny:times=6@loops", "tiny", "--pairs", "tiny", "tiny"]
    assert simulate([*argv, *pairs, "--json", str(tmp_path / "p.json")]) == 0
    rows = json.loads((tmp_path / "p.json").read_text())["pairs"]
    assert [row["programs"] for row in rows] == ["1 + 2", "2 + 2"]
    for row, steps in zip(rows, (6 + 3, 3 + 3), strict=True):
        for way, found in row["ends_ms"].items():
            assert max(found) == row[f"{way}_ms"] >= steps * 100 / 4
        assert row["efficiency"] == pytest.approx(steps * 100 / 4 / row["shared_ms"])
    capsys.readouterr()
    for wrong, message in {
        ("--pairs", "tiny"): "--pairs tiny: wanted two programs or more, got 1",
        ("--pairs", "tiny", "chain"): "--pairs chain: no times of its tasks are known; name a graph",
        ("--pairs", "tiny", "tiny@threads"): "no model of threads beside other programs; those with one: native, loops",
        ("--workers", "1"): "--workers: wanted at least 2, got 1",
        ("--workers", "2,3"): "wanted one number of cores for --pairs, got 2",
        ("--set", "policy=newest_first"): "--set: says nothing about --pairs",
        ("--graph", "tiny"): "--pairs: names the graph and the scheduler of each program",
        ("--t1", "0.001"): "all but matrix products takes",
    }.items():
        assert simulate([*argv, *pairs, *wrong]) == 2
        assert message in capsys.readouterr().err
    assert simulate(["--graph", "tiny", "--scale", "products"]) == 2
    assert "give --t1 MS" in capsys.readouterr().err
