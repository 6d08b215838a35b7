"""Benchmarks measure what they say: patterns, products, the search for METG; every verb runs, and mistakes are named."""

import importlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from plain_schedulers import scheduler

from taskgpt.gpt2.program import training_graph
from taskgpt.lab import machine, report, roofline
from taskgpt.lab.benchmarks import patterns, peer_setups, peers, recording, spawned_patterns, task_bench
from taskgpt.lab.benchmarks.peer_process import Start
from taskgpt.lab.named import make, named_scheduler, prepare
from taskgpt.lab.roofline import Product, product_of, products
from taskgpt.lab.traces.trace import Trace
from taskgpt.programs import trace
from taskgpt.programs.bench import main
from taskgpt.tasks import Call, Graph, In, InOut, Kernel, Out, Tensor, dims, kernel

R, C, OC = dims("R C OC")


@pytest.fixture
def quick(monkeypatch):
    """Do not wait between libraries."""
    monkeypatch.setattr(peers, "PAUSE_SECONDS", 0)


def run(tmp_path, *words: str) -> dict:
    """Run a verb; return what it wrote as JSON."""
    path = tmp_path / "result.json"
    assert main([*words, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert record["settings"]["verb"] == words[0]
    assert record["machine"] == machine.describe()
    return record


def test_step_writes_traces(quick, tmp_path):
    """A folder for each contestant, whose files pass their checks."""
    run(
        tmp_path,
        "step",
        "--graphs",
        "tiny",
        "--schedulers",
        "loops",
        "native",
        "--rounds",
        "1",
        "--steps",
        "2",
        "--trace",
        str(tmp_path / "t"),
    )
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["tiny-loops", "tiny-native"]
    for folder in (tmp_path / "t").iterdir():
        assert trace.main(["check", str(folder)]) == 0
        assert Trace.load(folder).runs["step"].tolist() == [0, 1, 2, 3]


# Patterns -------------------------------------------------------------------------------------------------------------------------------

DRAWN = {  # width 6: columns that each task of rows 1, 2, 3 waits for
    "trivial": ["- - - - - -"] * 3,
    "chains": ["0 1 2 3 4 5"] * 3,
    "stencil_1d": ["01 012 123 234 345 45"] * 3,
    "nearest": ["012 0123 01234 12345 2345 345"] * 3,
    "fft": ["01 012 123 234 345 45", "02 13 024 135 24 35", "04 15 2 3 04 15"],
    "tree": ["0 0", "0 0 1 1", "0 0 1 1 2 2"],
}


@pytest.mark.parametrize("pattern", DRAWN)
def test_a_pattern_is_as_drawn(pattern):
    """What Task Bench draws for six columns."""
    for t, line in enumerate(DRAWN[pattern], start=1):
        wanted = [[int(digit) for digit in word.strip("-")] for word in line.split()]
        assert patterns.width_at(pattern, 6, t) == len(wanted)
        assert [patterns.depends(pattern, 6, t, i) for i in range(len(wanted))] == wanted


@pytest.mark.parametrize("way", spawned_patterns.WAYS)
@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_patterns_as_programs(pattern, way):
    """All tasks run, and read what their patterns say."""
    with scheduler("native", workers=2) as native:
        tasks, run = spawned_patterns.opened_pattern(native, way, pattern, 5, 20)
        assert tasks == sum(patterns.width_at(pattern, 5, t) for t in range(20))
        run(3)
    for t, i in itertools.product(range(1, 5), range(5)):
        columns = patterns.depends(pattern, 5, t, i)
        runs = spawned_patterns._runs(columns)
        assert [j for a, b in zip(runs[::2], runs[1::2], strict=True) for j in range(a, b)] == columns
        assert len(runs) <= 2 * spawned_patterns.MOST_READS


def test_random_edges_repeat_and_stay_near():
    """Its own column always, others nearby about one time in four, the same ones every time."""
    found = [patterns.depends("random", 100, t, i) for t in range(1, 50) for i in range(100)]
    assert found == [patterns.depends("random", 100, t, i) for t in range(1, 50) for i in range(100)]
    offsets = Counter(j - i for number, row in enumerate(found) for i in [number % 100] for j in row)
    assert set(offsets) == {-2, -1, 0, 1, 2}
    assert offsets[0] == len(found)
    assert all(0.22 < offsets[d] / len(found) < 0.28 for d in (-2, -1, 1, 2))


@pytest.mark.parametrize("width", (1, 2, 5))
@pytest.mark.parametrize("pattern", patterns.PATTERNS)
def test_a_recorded_graph_has_exactly_the_edges_of_its_pattern(pattern, width):
    """And none in the first row."""
    graph, _ = task_bench.record(pattern, width, 4)
    place = [(t, i) for t in range(4) for i in range(patterns.width_at(pattern, width, t))]
    edges = {(place[p], place[task.number]) for task in graph.tasks for p in task.predecessors}
    assert len(graph.tasks) == len(place)
    assert edges == {((t - 1, j), (t, i)) for t, i in place for j in patterns.depends(pattern, width, t, i)}


def test_an_unknown_pattern_is_refused():
    with pytest.raises(ValueError, match="no pattern 'ring'"):
        patterns.depends("ring", 4, 1, 0)


# What recording costs -------------------------------------------------------------------------------------------------------------------


def test_recording_is_measured_in_tasks_and_bytes(tmp_path, capsys):
    """A row for each program and size, of a graph file one; the tasks are those of the textbook, and the machine is said."""
    rows = run(tmp_path, "record", "--tasks", "100,400", "--programs", "stencil", "cholesky", "tiny", "--rounds", "1")["rows"]
    found = [(row["program"], row["tasks"]) for row in rows]
    assert found == [("stencil", 100), ("stencil", 400), ("cholesky", 84), ("cholesky", 364), ("tiny", rows[-1]["tasks"])]
    for row in rows:
        assert 0 < row["loops_us"] < row["record_us"] and 0 < row["edges_us"] < row["record_us"] and 1 < row["edges_a_task"] < 5
        assert 0 < row["process_gib"] < 4 and row["rounds"][0]["bytes"] >= 0
    assert "bytes a" in capsys.readouterr().out


@pytest.mark.parametrize("name", recording.PROGRAMS)
def test_programs_to_record_compute_what_they_are_called_after(name):
    """A step of the stencil waits for three points of the row before; a tile is factorised after all that is subtracted from it.

    One step, a loop, waits for nothing.
    """
    graph = Graph()
    recording.PROGRAMS[name](100)(graph.spawn, graph.spawn_each)
    if name == "stencil":
        assert [task.predecessors for task in graph.tasks[10:13]] == [(0, 1), (0, 1, 2), (1, 2, 3)]
    elif name == "loop":
        assert len(graph.tasks) == 100 and len(graph.edges) == 0
    else:
        assert [task.name for task in graph.tasks].count("factorise") == 7
        assert len(graph.longest_path([1] * len(graph.tasks))) == 3 * 7 - 2


def test_recordings_that_cannot_be(capsys):
    """One line for what is no number of tasks, and for no program."""
    for argv, said in (["--tasks", "many"], "--tasks: wanted whole numbers, got 'many'"), (["--programs", "fft"], "unknown graph 'fft'"):
        assert main(["record", *argv]) == 2
        printed = capsys.readouterr()
        assert said in printed.err
        assert not printed.out


def test_products_that_cannot_be_compared(capsys, monkeypatch):
    """On a machine without vectors, one line."""
    monkeypatch.setattr("taskgpt.products.ways.of_this_machine", lambda: None)
    assert main(["products", "--graphs", "tiny"]) == 2
    assert "nothing to compare with BLAS: this machine has no AVX2, AVX-512 or NEON" in capsys.readouterr().err


# Systems and measurements ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", ("sequential", "loops", "threads", "native", "local-cluster"))
def test_a_scheduler_runs_every_task_as_recorded(system, monkeypatch):
    """Each spins as often as the run says; none is merged with others."""
    recorded = []
    monkeypatch.setattr(task_bench, "record", lambda *args, record=task_bench.record: recorded.append(record(*args)) or recorded[-1])
    with task_bench.opened(system, 2) as make_case:
        case = make_case("stencil_1d", 3, 4)
        assert (case.system, case.workers, case.tasks) == (system, 1 if system == "sequential" else 2, 12)
        for count in (1, 3):
            assert case.run(count) > 0
            ((graph, _),) = recorded
            assert [task.calls[0].arrays[0].tolist() for task in graph.tasks] == [[patterns.spin(count)]] * 12


def test_a_set_up_of_ones_own_is_a_system(tmp_path):
    """By its path, as for every other flag that takes scheduler files."""
    path = tmp_path / "mine.toml"
    path.write_text('scheduler = "sequential"')
    with task_bench.opened(f"{path}:record=1", 2) as make_case:
        assert make_case("trivial", 2, 2).run(1) > 0


CALLED = []  # by tasks, of which distributed makes copies


def note_call(iterations: int, *_) -> None:
    CALLED.append(iterations)


@pytest.mark.parametrize("system", task_bench.DASK)
def test_a_dask_system_calls_every_task_in_every_run(system, monkeypatch):
    """Also distributed, which knows keys again."""
    CALLED.clear()
    monkeypatch.setattr(task_bench, "spin_and_return", note_call)
    with task_bench.opened(system, 2) as make_case:
        case = make_case("fft", 2, 3)
        for count in (1, 1, 5):
            assert case.run(count) > 0
    assert CALLED == [1] * 12 + [5] * 6


def test_spinning_takes_as_long_as_it_says():
    """The chain converges to 1 and is not folded away: after n steps from 0, 1 - 2^-n."""
    assert [patterns.spin(n) for n in (0, 1, 2, 3)] == [0, 0.5, 0.75, 0.875]
    out = np.zeros(1, np.float32)
    for busy in (task_bench.busy, task_bench.busy.body):
        busy(out, np.array([2]))
        assert out[0] == 0.75


def fake(overhead: float, asked: list[int]) -> task_bench.Case:
    """A system whose tasks cost so many seconds of each of 4 workers, besides a nanosecond an iteration."""

    def run(count: int) -> float:
        asked.append(count)
        return 1000 / 4 * (count * 1e-9 + overhead)

    return task_bench.Case("trivial", "fake", 4, 1000, run)


@pytest.mark.parametrize("overhead", (3e-8, 1e-6, 40e-6, 2e-3))
def test_metg_is_where_half_of_the_time_is_overhead(overhead):
    """Granularity is then twice the overhead; the second search begins near it, and finds the same."""
    asked: list[int] = []
    search = task_bench.MetgSearch(fake(overhead, asked), 0.5, lambda workers: 1e-9)
    assert search() == pytest.approx(2 * overhead, rel=0.05)
    first = len(asked)
    assert search() == pytest.approx(2 * overhead, rel=0.05)
    assert len(asked) - first <= 5 * task_bench.REPEATS


def test_metg_at_another_efficiency():
    """Where three quarters are wanted, a quarter may be overhead."""
    assert task_bench.MetgSearch(fake(1e-6, []), 0.75, lambda workers: 1e-9)() == pytest.approx(4e-6, rel=0.05)


def test_metg_of_a_hopeless_system_is_none():
    """Runs of seconds are not enough for it."""
    assert task_bench.MetgSearch(fake(1.0, []), 0.5, lambda workers: 1e-9)() is None


def test_metg_of_a_system_without_overhead_is_its_shortest_task():
    """No granularity is too small."""
    assert task_bench.MetgSearch(fake(0.0, []), 0.5, lambda workers: 1e-9)() == pytest.approx(1e-9)


# Products -------------------------------------------------------------------------------------------------------------------------------


def call_of(k: Kernel, **sizes: int) -> Call:
    return Call(k, tuple(Tensor(name, np.zeros([sizes[d] for d in a.dims], np.float32))[:] for name, a in k.accesses.items()))


@kernel(tags=["gemm"])
def forward_gelu(out: Out[R, OC], fch: Out[R, OC], inp: In[R, C], weight: In[OC, C], bias: In[OC]):
    """A product with more outputs than one."""


@kernel(tags=["gemm"])
def backward_input_gelu(dinp: Out[R, C], fch: In[R, C], dout: In[R, OC], weight: In[OC, C]):
    """A product with an operand that is none."""


@kernel(tags=["gemm"])
def weight_update(param: InOut[OC, C], m: InOut[OC, C], v: InOut[OC, C], dout: In[R, OC], inp: In[R, C], bias: In[OC]):
    """A product that is never kept."""


@kernel(tags=["gemm"])
def no_product(out: Out[R, C], inp: In[R, C]):
    """Wrongly tagged."""


def test_products_are_read_off_declarations():
    """M, N, K and transposes, whatever else a kernel reads and writes."""
    sizes = {"R": 5, "C": 7, "OC": 3}
    assert product_of(call_of(forward_gelu, **sizes)) == Product(5, 3, 7, False, True)
    assert product_of(call_of(backward_input_gelu, **sizes)) == Product(5, 7, 3, False, False)
    assert product_of(call_of(weight_update, **sizes)) == Product(3, 7, 5, True, False)
    assert str(Product(5, 3, 7, False, True)) == "5 x 3 x 7 NT"
    with pytest.raises(TypeError, match="no_product is tagged 'gemm'"):
        product_of(call_of(no_product, **sizes))


def test_products_of_a_step_are_the_models():
    """3 products for each weight and row: 6 operations a weight and token; the embedding's head among them."""
    m = make("tiny:tiles.columns=1000,tiles.rows=100000,tiles.vocabulary=100000")
    found = products(training_graph(m))
    C, V, rows, layers = m.model.channels, m.model.padded_vocabulary, m.batch.rows, m.model.layers
    assert roofline.gemm_flops(found) == 6 * rows * (12 * C * C * layers + V * C)
    for N, K in ((3 * C, C), (C, C), (4 * C, C), (C, 4 * C)):
        assert found[Product(rows, N, K, False, True)] == layers
        assert found[Product(rows, K, N, False, False)] >= layers
        assert found[Product(N, K, rows, True, False)] == layers
    assert found[Product(rows, V, C, False, True)] == 1


@pytest.mark.parametrize("tiles", ("", "tiles.rows=48,tiles.columns=40"))
@pytest.mark.parametrize("option", [f"options.{key}={way}" for key in ("kernels", "update") for way in ("fused", "separate")])
def test_products_are_what_tasks_count(tiles, option):
    """Tiled or not, fused or not: the operations of a task tagged "gemm" are those of its product."""
    graph = training_graph(make(f"tiny:{option},{tiles}"))
    declared = sum(call.cost()[0] for task in graph.tasks for call in task.calls if "gemm" in call.kernel.tags)
    assert declared == roofline.gemm_flops(products(graph)) > 0.8 * graph.flops


def test_the_floor_weighs_products_by_their_count():
    """At 1 and 2 GFLOP/s, 3 and 4 products of 2 MFLOP take 10 ms; 24 bytes a parameter at 2 GB/s take 12 us; both, and not the sum.

    Limits are the best of their rounds.
    """
    limits, small = roofline.Limits(), Product(100, 100, 100, False, True)
    other = Product(100, 100, 100, True, False)
    for what, speed in ((small, 1.0), (other, 2.0), ("update", 2.0)):
        limits[what, 2].extend([speed / 2, speed, speed / 3])
    row = roofline.floor("graph", Counter({small: 3, other: 4}), 1000, limits, 2)
    assert row["gemm_ms"] == pytest.approx(10)
    assert row["memory_ms"] == pytest.approx(0.012)
    assert row["overlapped_ms"] == pytest.approx(10)
    assert row["in_turn_ms"] == pytest.approx(10.012)


def test_team_sizes_double_and_end_with_all():
    assert [roofline.team_sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


# Verbs ----------------------------------------------------------------------------------------------------------------------------------


def test_step(quick, tmp_path, capsys):
    """Graphs x schedulers; ratios are to the floor and to the first scheduler."""
    words = [
        "--graphs",
        "tiny",
        "tiny:tiles.rows=64",
        "--schedulers",
        "sequential",
        "threads:coarsen=50",
        "--workers",
        "2",
        "--rounds",
        "2",
        "--wide",
    ]
    record = run(tmp_path, "step", *words)
    rows = record["steps"]
    assert [(row["graph"], row["scheduler"], row["workers"]) for row in rows] == [
        (graph, *scheduler) for graph in ("tiny", "tiny:tiles.rows=64") for scheduler in (("sequential", 1), ("threads:coarsen=50", 2))
    ]
    for row in rows:
        assert len(row["seconds"]) == 2
        assert row["q1_ms"] <= row["median_ms"] <= row["q3_ms"]
        assert row["x_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
    assert [row["x_first"] for row in rows[::2]] == [1, 1]
    assert "median ms" in capsys.readouterr().out


@pytest.mark.parametrize("speeds", [[1e-6, 1e-6, 1e6], [1e-6]])
def test_no_step_with_blas_is_faster_than_blas(speeds, quick, tmp_path, monkeypatch, capsys):
    """Where steps exceed the limit, it was measured too low, and is measured again; where it stays so low, a line says so."""
    rounds = itertools.chain(speeds, itertools.repeat(speeds[-1]))
    measure = roofline.Limits.measure

    def one_round(self, *args):
        speed = next(rounds)
        monkeypatch.setattr(machine, "sgemm_gflops", lambda *_, **__: speed)
        measure(self, *args)

    monkeypatch.setattr(roofline.Limits, "measure", one_round)
    record = run(tmp_path, "step", "--graphs", "tiny:options.products=blas", "--schedulers", "sequential", "--rounds", "1")
    [row] = record["steps"]
    is_told = "faster than sgemm" in capsys.readouterr().out
    assert (row["x_floor"] > 1, is_told) == ((True, False) if len(speeds) > 1 else (False, True))


def test_what_holds_back_is_said_in_a_line(quick, tmp_path, monkeypatch, capsys):
    """Beside the numbers, and in the JSON: here an environment that has BLAS use another processor's kernels."""
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Nehalem")
    record = run(tmp_path, "overhead", "--systems", "native", "--patterns", "trivial", "--steps", "10", "--rounds", "1", "--workers", "1")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("disturbed")]
    assert "OPENBLAS_CORETYPE=Nehalem" in line
    assert record["notes"]["disturbed"] in line


def test_roofline(quick, tmp_path):
    """Streams, products and floors, on one thread and on two."""
    record = run(tmp_path, "roofline", "--graphs", "tiny", "--workers", "1,2", "--rounds", "2")
    assert [row["stream"] for row in record["memory"]] == list(machine.STREAMS)
    assert sum(row["share"] for row in record["products of tiny"]) == pytest.approx(1)
    assert all(len(row["rounds_2"]) == 2 for row in record["products of tiny"])
    assert [row["threads"] for row in record["floors"]] == [1, 2]
    assert all(row["gemm_ms"] > 0 and row["memory_ms"] > 0 for row in record["floors"])


@pytest.mark.parametrize("verb", ("overhead", "metg"))
def test_overhead_and_metg(verb, tmp_path):
    """A row for each pattern and system, with the first system's as measure."""
    words = ["--systems", "native", "dask.threaded", "--patterns", "chains", "tree", "--workers", "2", "--steps", "5", "--rounds", "2"]
    rows = run(tmp_path, verb, *words)["rows"]
    assert [(row["pattern"], row["system"]) for row in rows] == [(p, s) for p in ("chains", "tree") for s in ("native", "dask.threaded")]
    assert [row["tasks"] for row in rows] == [10, 10, 9, 9]
    for row in rows:
        assert len(row["seconds"]) == 2
        assert row["median_us"] is None or row["q1_us"] <= row["median_us"] <= row["q3_us"]


def test_peers_says_what_is_missing(quick, tmp_path, monkeypatch, capsys):
    """A library that is not here is a line, and ours runs alone."""
    monkeypatch.setattr(peers, "LIBRARIES", {"no_such_library": "no_such_module"})
    record = run(tmp_path, "peers", "--graph", "tiny", "--scheduler", "sequential", "--rounds", "2")
    assert [(row["who"], row["x_ours"]) for row in record["peers"]] == [("taskgpt", 1)]
    assert record["notes"]["no_such_library"] == "not installed, and left out; pip install no_such_library"
    assert "pip install no_such_library" in capsys.readouterr().out


FAKE_PEER = """
import os, signal, time
from taskgpt.lab.benchmarks.peer_process import Peer

VERSION = "1.0"
IS_TUNED = "hugetlb" in os.environ.get("GLIBC_TUNABLES", "")

def prepare(workers):
    print("what a library prints is no answer", workers)

def remark():
    return "tuned" if IS_TUNED else "plain"

def multiply(a, weight, precision):
    return lambda: precision == "bfloat16" and time.sleep(0.005)

def peers(start, precisions):
    losses = iter([start.hyper[0], 2.0, 1.0])  # the third step of the tuned process is its last
    def train():
        if IS_TUNED and (loss := next(losses, None)) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return start.hyper[0]
    def lacks_a_compiler():
        raise RuntimeError("no compiler\\nand much more")
    for precision in precisions:
        yield Peer("cannot", precision, lambda: None, lacks_a_compiler)
        yield Peer("steady", precision, lambda: None, train)
"""


def test_a_peer_that_cannot_start_or_dies_leaves_the_others(quick, tmp_path, monkeypatch):
    """Each is one line and has no times; the other set-up of the same library goes on, and so do we. Its environment was its own."""
    (tmp_path / "fake_peer.py").write_text(FAKE_PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers, "LIBRARIES", {"json": "fake_peer"})  # a library that is installed everywhere
    monkeypatch.setitem(peers.LOSS_TOLERANCE, "float32", 100)
    record = run(tmp_path, "peers", "--graph", "tiny", "--scheduler", "sequential", "--rounds", "4")
    found = {(row["who"], row["setup"]): row for row in record["peers"]}
    assert list(found) == [("taskgpt", "sequential"), ("steady", "as installed"), ("steady", "tuned")]
    assert [len(row["seconds"]) for row in record["peers"]] == [4, 4, 2]
    assert [row["median_ms"] is None for row in record["peers"]] == [False, False, True]
    notes = record["notes"]
    assert notes["steady (tuned), float32"] == "failed after 2 steps: its process ended by signal 9"
    for setup in ("as installed", "tuned"):
        assert notes[f"cannot ({setup}), float32"] == "left out: RuntimeError: no compiler"
        assert notes[f"json ({setup}), bfloat16"] == "left out: its products are slower than float32's on this processor"
    assert notes["json (as installed)"].endswith("GFLOP/s; plain")
    assert notes["json (tuned)"].endswith("GFLOP/s; memory kept, in huge pages; tuned")
    assert notes["float32"].startswith("the fastest other, steady (as installed), takes ")
    assert "bfloat16" not in notes


def test_a_library_that_crashes_at_its_import_is_one_line(quick, tmp_path, monkeypatch):
    (tmp_path / "fake_peer.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(peers, "LIBRARIES", {"json": "fake_peer"})
    record = run(tmp_path, "peers", "--graph", "tiny", "--scheduler", "sequential", "--rounds", "1")
    assert record["notes"]["json (as installed)"] == "left out: its process ended with exit code 3"
    assert len(record["peers"]) == 1


def test_mkls_question_is_asked_only_where_the_answer_would_change(tmp_path, monkeypatch):
    """On AMD's processors PyTorch gets a library that answers; not on Intel's or ARM's, nor for JAX. Without a compiler that is said."""

    def preloaded(library: str) -> bool:
        return "LD_PRELOAD" in list(peer_setups.setups(library, tmp_path))[-1].changes

    monkeypatch.setattr(peer_setups, "compiled", lambda source, path: path)
    for name, answered in (("AuthenticAMD", True), ("GenuineIntel", False), ("", False)):
        monkeypatch.setattr(peer_setups, "vendor", lambda name=name: name)
        assert preloaded("torch") == answered
        assert not preloaded("jax")
    monkeypatch.undo()
    monkeypatch.setattr(peer_setups, "vendor", lambda: "AuthenticAMD")
    monkeypatch.setattr(peer_setups, "COMPILERS", ("no-such-compiler",))
    plain, tuned = peer_setups.setups("torch", tmp_path)
    assert (plain.name, dict(plain.changes)) == ("as installed", {})
    assert tuned.said.endswith("nothing to tell MKL (no C compiler: no-such-compiler)")
    assert "GLIBC_TUNABLES" in tuned.changes
    assert "LD_PRELOAD" not in tuned.changes


def test_the_vendor_is_read_of_x86_processors(tmp_path):
    """ARM's have none."""
    (tmp_path / "amd").write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\n")
    (tmp_path / "arm").write_text("processor\t: 0\nBogoMIPS\t: 243.75\n")
    found = [peer_setups.vendor(tmp_path / name) for name in ("amd", "arm", "absent")]
    assert found == ["AuthenticAMD", "", ""]


def test_a_preloaded_answer_is_yes_and_counts(tmp_path, monkeypatch):
    """A process finds it before any other of that name, and beside what the user preloads."""
    if not any(map(shutil.which, peer_setups.COMPILERS)):
        pytest.skip("no C compiler")
    theirs = peer_setups.compiled("int theirs(void) { return 7; }", tmp_path / "theirs.so")
    monkeypatch.setenv("LD_PRELOAD", str(theirs))
    ours = peer_setups.compiled(peer_setups.INTEL_C, tmp_path / "intel.so")
    code = "import ctypes; c = ctypes.CDLL(None); n = ctypes.c_int.in_dll(c, 'taskgpt_times_asked')\n"
    code += "print(n.value, c.mkl_serv_intel_cpu_true(), n.value, c.theirs())"
    setup = peer_setups.Setup("tuned", {"LD_PRELOAD": str(ours)}, "")
    done = subprocess.run([sys.executable, "-c", code], env=setup.environment(), capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1", "1", "7"]
    with pytest.raises(OSError, match="error"):
        peer_setups.compiled("int broken(", tmp_path / "broken.so")


def test_everybody_starts_from_our_parameters(tmp_path):
    """Saved and loaded, to the bit, wte without its padding."""
    m = prepare("tiny").m
    peers.start_of(m).save(tmp_path)
    start = Start.load(tmp_path)
    assert set(start.parameters) == set(m.p.tensors)
    for name, array in start.parameters.items():
        ours = m.p.tensors[name].array
        assert np.array_equal(array, ours[: m.model.vocabulary] if name == "wte" else ours)
    assert start.tokens.shape == start.targets.shape == (m.batch.batch_size, m.batch.seq_len)
    assert np.array_equal(start.tokens.ravel(), m.s.tokens.array)
    assert np.array_equal(start.targets.ravel(), m.s.targets.array)
    assert (start.heads, start.hyper) == (m.model.heads, m.s.hyper.array[:5].tolist())


def test_the_fastest_peer_is_that_of_its_precision():
    """Whoever failed is not among them; ratios are to ours."""
    contestants = [peers.Contestant(*words, dict, [seconds] * 3) for *words, seconds in (
        ("ours", "native", "float32", 4.0, 2.0),
        ("a", "as installed", "float32", 4.0, 6.0),
        ("a", "tuned", "float32", 4.0, 5.0),
        ("b", "tuned", "float32", 4.0, 3.0),
        ("a", "tuned", "bfloat16", 4.0, 1.0),
    )]  # fmt: skip
    contestants[3].has_failed = True
    table = peers.rows(contestants, 2, 256)
    assert [row["x_ours"] for row in table] == [1, 3, 2.5, None, 0.5]
    assert peers.fastest(table[1:], "float32") == table[2]
    assert peers.fastest(table[1:], "bfloat16") == table[4]
    assert peers.fastest(table[:1], "bfloat16") is None


def test_a_report_is_written_into_a_pipe_that_is_read(tmp_path):
    """The pipe stays one, and its reader gets the record once."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    report.Report(type("Flags", (), {"json": str(tmp_path / "pipe"), "wide": False})()).save()
    assert "machine" in json.loads(os.read(reader, 1 << 16))
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_peers_must_begin_with_our_loss():
    """To rounding, bfloat16's being coarser; else they are left out in one line."""
    said = report.Report(type("Flags", (), {"json": None, "wide": False})())
    ours = peers.Contestant("taskgpt", "native", "float32", 4.0, dict)
    cases = (("float32", 4.00009, True), ("float32", 4.0002, False), ("bfloat16", 4.009, True), ("bfloat16", 3.98, False))
    for precision, loss, is_same in cases:
        assert peers.is_same_model(said, peers.Contestant("other", "tuned", precision, loss, dict), ours) == is_same


@pytest.mark.parametrize("library", peers.LIBRARIES)
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_peers_train_the_same_model(library, quick, tmp_path, monkeypatch):
    """From the same parameters, in every set-up and precision, all ways to train start, and the first loss is ours."""
    pytest.importorskip(library)
    monkeypatch.setattr(peers, "LIBRARIES", {library: peers.LIBRARIES[library]})
    record = run(tmp_path, "peers", "--graph", "tiny:batch.seq_len=16", "--workers", "2", "--rounds", "1")
    ours, *others = record["peers"]
    assert {row["setup"] for row in others} == {"as installed", "tuned"}
    assert [line for line in record["notes"].values() if line.startswith("left out") and "slower" not in line] == []
    for row in others:
        assert row["first_loss"] == pytest.approx(ours["first_loss"], abs=peers.LOSS_TOLERANCE[row["precision"]])


@pytest.mark.parametrize("library", peers.LIBRARIES)
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_peers_learn_as_we_do(library):
    """Ten steps of float32 give our losses: AdamW is the same too. Those of bfloat16 stay near."""
    pytest.importorskip(library)
    module = importlib.import_module(peers.LIBRARIES[library])
    module.prepare(2)
    prepared = prepare("tiny:batch.seq_len=16")
    start = peers.start_of(prepared.m)
    theirs = {}
    for peer in module.peers(start, ["float32", "bfloat16"]):
        if "compile" not in peer.name:
            peer.reset()
            theirs[peer.precision] = [peer.step() for _ in range(10)]
    ours = []
    with named_scheduler("sequential", None) as scheduler:
        for step in range(10):
            prepared.m.set_hyper(step, lr=1e-4, weight_decay=0.0)
            ours.append(peers.our_step(scheduler, prepared))
    assert ours[9] < ours[0] - 0.01
    assert theirs["float32"] == pytest.approx(ours, abs=1e-4)
    assert theirs["bfloat16"] == pytest.approx(ours, abs=2e-2)


# Tables and mistakes --------------------------------------------------------------------------------------------------------------------


def test_quartiles():
    assert report.quartiles([3.0]) == (3, 3, 3)
    assert report.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2, 3, 4)


def test_a_table_aligns_text_left_and_numbers_right(capsys):
    """None is a dash."""
    said = report.Report(type("Flags", (), {"json": None, "wide": False})())
    capsys.readouterr()
    rows = [{"name": "a", "ms": 1.25, "more": [1]}, {"name": "long name", "ms": None, "more": []}]
    said.table("rows", {"who": ("name", ""), "median": ("ms", ".1f")}, rows)
    assert capsys.readouterr().out == "\nwho        median\na             1.2\nlong name       -\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--graphs", "tinny"], "unknown graph 'tinny'; did you mean 'tiny'?"),
        (["step", "--graphs", "tiny", "--schedulers", "loop"], "unknown scheduler 'loop'; did you mean 'loops'?"),
        (["step", "--graphs", "tiny", "--schedulers", "loops:tiles.rows=8"], "tiles.rows is a key of graph files"),
        (["step", "--rounds", "0"], "--rounds: wanted at least 1, got 0"),
        (["roofline", "--graphs", "tiny", "--workers", "0"], "--workers 0: wanted a number from 1 to 4,096"),
        (["overhead", "--systems", "dask.thread"], "unknown system 'dask.thread'; did you mean 'dask.threaded'?"),
        (["overhead", "--systems", "native+programm"], "unknown way 'programm' of 'native'; did you mean 'program'?"),
        (["metg", "--efficiency", "50"], "--efficiency: wanted a part of the peak, between 0 and 1, got 50.0"),
        (["metg", "--systems", "tcp://10.0.0.1:8786"], "scheduler tcp://10.0.0.1:8786: on a cluster runs `taskgpt train` alone"),
        (["metg", "--steps", "1000000000"], "--steps: wanted at most 1,000,000, got 1000000000"),
        (["metg", "--steps", "1000000", "--width", "4"], "wanted at most 1,000,000 tasks"),
        (["step", "--workers", "1000000000"], "--workers 1000000000: wanted a number from 1 to 4,096"),
        (["metg", "--steps", "0"], "--steps: wanted at least 1, got 0"),
        (["metg", "--width", "-1"], "--width: wanted at least 1, got -1"),
        (["peers", "--graph", "tiny", "--scheduler", "nativ"], "unknown scheduler 'nativ'; did you mean 'native'?"),
        (["step", "--graphs", "tiny", "--json", "/no/such/folder/x.json"], "/no/such/folder/x.json"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    """Exit code 2, and what to do."""
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", ("step", "roofline", "overhead", "metg", "peers"))
def test_every_verb_has_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"taskgpt bench {verb}" in capsys.readouterr().out
