"""Edges are exactly RAW, WAR and WAW; any topological order of a recorded program gives the bits of program order, coarsened or not.

Drawings: time runs to the right, `a-->b` means b waits for a, and tasks are numbered in program order.
"""

import pickle
import random
import sys
import threading
import tracemalloc
from itertools import pairwise

import dask
import dask.threaded
import numpy as np
import pytest
from dask.highlevelgraph import HighLevelGraph
from dask.utils import key_split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plain_kernels import change, make, read, tensor

from taskgpt.tasks import (
    AccessError,
    Arena,
    Commutative,
    Graph,
    GridError,
    In,
    InOut,
    Out,
    Reduction,
    TaskError,
    Tensor,
    TensorSpec,
    check,
    coarsen,
    dims,
    kernel,
    run_now,
)

N, M, R, C, S, D, U, V = dims("N M R C S D U V")

UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no bug


@kernel
def copy(out: Out[N], inp: In[M]):
    out[:] = inp.sum()


@kernel
def add(total: Commutative[N], inp: In[M]):
    total += inp.sum()


@kernel
def fail(x: InOut[N]):
    raise ZeroDivisionError("no such luck")


def edges(graph: Graph) -> str:
    """Return the edges as text: "0>1 0>2"."""
    return " ".join(f"{p}>{task.number}" for task in graph.tasks for p in task.predecessors)


# --- which edges there are


def test_read_after_write():
    """Readers wait for the writer (RAW), not for each other.

    0 make x --> 1 read x
            `--> 2 read x
    """
    graph, x = Graph(), tensor()
    graph.spawn(make, x[:])
    graph.spawn(read, x[:])
    graph.spawn(read, x[:])
    assert edges(graph) == "0>1 0>2"
    assert graph.tasks[0].successors == [1, 2]


def test_write_after_read():
    """A writer waits for the readers since the last write (WAR); what they waited for is implied.

    0 make x --> 1 read x --> 3 change x
            `--> 2 read x --'
    """
    graph, x = Graph(), tensor()
    graph.spawn(make, x[:])
    graph.spawn(read, x[:])
    graph.spawn(read, x[:])
    graph.spawn(change, x[:])
    assert edges(graph) == "0>1 0>2 1>3 2>3"


def test_write_after_write():
    """A writer waits for the writer before it (WAW), also an Out that reads nothing of it.

    0 make x --> 1 make x --> 2 change x --> 3 make x
    """
    graph, x = Graph(), tensor()
    for write in make, make, change, make:
        graph.spawn(write, x[:])
    assert edges(graph) == "0>1 1>2 2>3"


def test_read_after_read_is_no_edge():
    """Reading changes nothing: tasks that only read are independent, and memory that nobody wrote can be read at once.

    0 read x    1 read x    2 read x
    """
    graph, x = Graph(), tensor()
    for _ in range(3):
        graph.spawn(read, x[:])
    assert edges(graph) == ""


def test_edges_that_others_imply_are_left_out():
    """3 reads what 0 wrote and what 2 wrote; as 2 waits for 1 and 1 for 0, the edge 0>3 would only cost.

    0 make x --> 1 copy y, x --> 2 copy z, y --> 3 change z, and read x through a copy
         `................................'
    """
    graph, x, y, z = Graph(), tensor(), tensor(), tensor()
    graph.spawn(make, x[:])
    graph.spawn(copy, y[:], x[:])
    graph.spawn(copy, z[:], y[:])
    graph.spawn(add, z[:], x[:])
    assert edges(graph) == "0>1 1>2 2>3"


def test_one_edge_for_many_reasons():
    """A task that needs three tiles of the same predecessor waits for it once.

    0 make x (cells 0 1 2) ==> 1 read x (cells 0 1 2)
    """
    graph, x = Graph(), tensor(9, 3)
    graph.spawn(make, x[:])
    graph.spawn(read, x[:])
    assert graph.tasks[1].predecessors == (0,) and graph.tasks[0].successors == [1]


def test_different_cells_are_independent():
    """Tasks on tiles of different cells do not meet; one on all of them meets each.

    x:   |0 0 0|1 1 1|2 2 2|        0 make x[0:3] --.
                                    1 make x[3:6] ---+--> 3 read x[0:9]
                                    2 make x[6:9] --'
    """
    graph, x = Graph(), tensor(9, 3)
    for start in 0, 3, 6:
        graph.spawn(make, x[start : start + 3])
    graph.spawn(read, x[:])
    assert edges(graph) == "0>3 1>3 2>3"


def test_partial_overlaps_across_cells_are_found():
    """Tiles that follow no grid conflict where they touch a common cell. (OmpSs-2's default compares start addresses, and misses 0>1.)

    x:   |. . .|. . .|. . .|
    0         0 0 0 0             touches cells 0, 1, 2      0 --> 1 --> 2
    1    1 1 1                    touches cell 0                 `-> 3
    2      2 2                    touches cell 0
    3                 3 3         touches cell 2
    """
    graph, x = Graph(), tensor(9, 3)
    for start, stop in (2, 7), (0, 3), (1, 3), (7, 9):
        graph.spawn(change, x[start:stop])
    assert edges(graph) == "0>1 1>2 0>3"


def test_neighbours_in_one_cell_wait_for_each_other():
    """Disjoint tiles of one cell are taken to conflict: safe, and merely less parallel. A finer grid sets them free.

    cut 4:  |0 0 1 1|    0 --> 1             cut 2:  |0 0|1 1|    0    1
    """
    for cut, wanted in (4, "0>1"), (2, ""):
        graph, x = Graph(), tensor(4, cut)
        graph.spawn(change, x[0:2])
        graph.spawn(change, x[2:4])
        assert edges(graph) == wanted


def test_a_call_does_not_wait_for_itself():
    """Two tiles of one call may lie in one cell, in any order of accesses; the next call still waits for it.

    x: |a a b b|      0 copy a, b --> 1 copy b, a --> 2 read a
    """
    graph, x = Graph(), tensor(4)
    a, b = x[0:2], x[2:4]
    graph.spawn(copy, a, b)
    graph.spawn(copy, b, a)
    graph.spawn(read, a)
    assert edges(graph) == "0>1 1>2"


def test_rectangles_meet_where_rows_and_columns_meet():
    """In two dimensions a band of rows and a band of columns share the cells of their crossing.

    |0 0 0 0|            0 writes the upper rows, 1 the lower, 2 the left columns: it waits for both.
    |2 . . .|            3 writes the right columns of the upper rows: it waits for 0 only.
    |1 1 1 1|
    """

    @kernel
    def change(x: InOut[R, C]):
        x += 1

    graph, x = Graph(), Tensor("x", np.zeros((4, 4), np.float32), (2, 2))
    for rectangle in (slice(0, 2), slice(0, 4)), (slice(2, 4), slice(0, 4)), (slice(0, 4), slice(0, 2)), (slice(0, 2), slice(2, 4)):
        graph.spawn(change, x[rectangle])
    assert edges(graph) == "0>2 1>2 0>3"


@st.composite
def programs(draw) -> tuple:
    """A program of random kernels on random rectangles of two tensors with random grids; `program(spawn)` runs it on given tensors."""
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    cuts = st.tuples(*[st.none() | st.integers(1, 4) | st.tuples(st.integers(1, 4), st.integers(1, 4))] * 2)
    specs = {name: TensorSpec(shape, draw(cuts), np.dtype(np.uint64)) for name in "xy"}

    def span(length: int):
        return st.tuples(st.integers(0, length - 1), st.integers(1, length)).map(lambda ends: slice(min(ends), max(min(ends) + 1, ends[1])))

    tile = st.tuples(st.sampled_from("xy"), span(shape[0]), span(shape[1]))
    length = draw(st.integers(1, 25))
    calls = draw(st.lists(st.tuples(st.sampled_from(KERNELS), tile, tile, tile), min_size=length, max_size=length))
    return specs, calls


def run_program(program: tuple, spawn=None, allow_commutative: bool = False) -> tuple[Graph, Arena]:
    """Record a program on new, deterministic tensors; with another `spawn`, give it the calls that a graph accepts."""
    specs, calls = program
    arena, graph = Arena(specs), Graph("random", allow_commutative)
    for seed, each in enumerate(arena.tensors.values()):
        each.array[...] = np.random.default_rng(seed).integers(0, 2**63, each.array.shape, np.uint64)
    for each, *places in calls:
        tiles = [arena.tensors[name][rows, columns] for name, rows, columns in places[: len(each.parameters)]]
        try:
            graph.spawn(each, *tiles)
        except AccessError:  # overlapping tiles of one call: not a program
            continue
        if spawn:
            spawn(each, *tiles)
    return graph, arena


def bits(arena: Arena) -> list[bytes]:
    return [each.array.tobytes() for each in arena.tensors.values()]


# Kernels whose results depend on every bit of what they read, and on the order of their calls; integers, so that no rounding hides it.


def digest(*arrays: np.ndarray) -> np.uint64:
    total = np.zeros(1, np.uint64)
    for array in arrays:
        weights = np.arange(1, array.size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        total = total * np.uint64(31) + (array.ravel() * weights).sum()
    return total[0]


@kernel
def stir(out: Out[R, C, np.uint64], inp: In[S, D, np.uint64]):
    out[...] = digest(inp)


@kernel
def fold(total: InOut[R, C, np.uint64], inp: In[S, D, np.uint64]):
    total *= np.uint64(31)
    total += digest(inp)


@kernel
def square(x: InOut[R, C, np.uint64]):
    x[...] = x * x + np.uint64(1)


@kernel
def merge(out: Out[R, C, np.uint64], a: In[S, D, np.uint64], b: In[U, V, np.uint64]):
    out[...] = digest(a, b)


@kernel
def exchange(a: InOut[R, C, np.uint64], b: InOut[S, D, np.uint64], inp: In[U, V, np.uint64]):
    first, second = digest(a, inp), digest(b)
    a += second
    b ^= first


@kernel
def pour(total: Commutative[R, C, np.uint64], inp: In[S, D, np.uint64]):
    total += digest(inp)


@kernel
def gather(total: Reduction["+", R, C, np.uint64], inp: In[S, D, np.uint64]):
    total += digest(inp)


@kernel
def mask(total: Reduction["or", R, C, np.uint64], inp: In[S, D, np.uint64]):
    total |= digest(inp)


KERNELS = [stir, fold, square, merge, exchange, pour, gather, gather, mask]


def conflicts(earlier, later) -> bool:
    """RAW, WAR or WAW, from the definition: a common cell, written by one of the two."""
    return any(
        a.tensor is b.tensor
        and set(a.cells()) & set(b.cells())
        and (one.kernel.accesses[n].is_written or other.kernel.accesses[m].is_written)
        for one in earlier.calls
        for other in later.calls
        for n, a in one.tiles()
        for m, b in other.tiles()
    )


@given(programs())
@settings(UNHURRIED)
def test_edges_are_the_transitive_reduction_of_all_conflicts(program):
    """No edge too few, none too many: the recorded edges are the smallest set with the same paths as all RAW, WAR and WAW conflicts.

    Computed here by brute force: all pairs, all paths, and of those the ones that no task lies between.
    """
    graph, _ = run_program(program)
    before: list[set[int]] = []
    for task in graph.tasks:
        direct = {other.number for other in graph.tasks[: task.number] if conflicts(other, task)}
        before.append(direct.union(*(before[p] for p in direct)))
        needed = {p for p in before[-1] if not any(p in before[between] for between in before[-1])}
        assert task.predecessors == tuple(sorted(needed))
    for task in graph.tasks:
        assert task.successors == [other.number for other in graph.tasks if task.number in other.predecessors]


@pytest.mark.parametrize("allow_commutative", [False, True])
def test_recording_takes_memory_in_proportion_to_tasks(allow_commutative):
    """A task takes as much in a large graph as in a small one, and less than 300 bytes: its call, its edges and its cells' histories too.

    Two rows of 50 cells are written in turns, each cell from three of the other row.
    """
    x, y = tensor(50, 1), tensor(50, 1)

    def bytes_a_task(steps: int) -> float:
        graph = Graph(allow_commutative=allow_commutative)
        tracemalloc.start()
        for step in range(steps):
            out, inp = (x, y) if step % 2 else (y, x)
            for i in range(1, 49):
                graph.spawn(average, out[i : i + 1], inp[i - 1 : i], inp[i : i + 1], inp[i + 1 : i + 2])
        assert len(graph.edges) > len(graph.tasks)
        taken = tracemalloc.get_traced_memory()[0] / len(graph.tasks)
        tracemalloc.stop()
        return taken

    bytes_a_task(2)  # compiles
    assert bytes_a_task(200) < 300 and bytes_a_task(800) < 1.1 * bytes_a_task(100)  # lists grow in steps


@kernel
def average(out: Out[N], left: In[N], middle: In[N], right: In[N]):
    pass


# --- what recording refuses


def test_two_grids_over_one_buffer_are_an_error():
    """Cells of different tensors are never compared, so memory with two grids would hide dependencies; however the two overlap.

    buffer  0 1 2 3 4 5 6 7
    x       x x x x x
    y             y y y y y
    """
    buffer = np.zeros(8, np.float32)
    graph = Graph()
    graph.spawn(make, Tensor("x", buffer[:5], (2,))[:])
    with pytest.raises(
        GridError, match=r"'y' \(y\[5\] cut 1\) and 'x' \(x\[5\] cut 3\) share memory: two grids over one buffer would hide"
    ):
        graph.spawn(make, Tensor("y", buffer[3:])[:])
    with pytest.raises(GridError):
        graph.spawn(copy, tensor()[:], Tensor("y", buffer[4:5])[:])
    graph.spawn(make, Tensor("z", buffer[5:])[:])
    backwards = Graph()
    backwards.spawn(read_rows, Tensor("upside down", np.zeros((4, 2), np.float32)[::-1])[:])
    rows = next(iter(backwards.tasks[0].calls[0].tiles()))[1].tensor.array
    with pytest.raises(GridError):
        backwards.spawn(make, Tensor("row", rows[0])[:])


@kernel
def read_rows(inp: In[R, C]):
    pass


def test_overlapping_tiles_of_one_call_are_an_error():
    """A kernel may assume that what it writes is nothing else that it was given; reading one place twice is harmless.

    x  0 1 2 3 4 5 6 7
    a  a a a a a
    b        b b b b b
    """
    graph, x = Graph(), tensor(8, 2)
    for each in copy, add:
        with pytest.raises(AccessError, match=f"{each.name}: '.*' and 'inp' overlap in x; declare one InOut instead"):
            graph.spawn(each, x[0:5], x[3:8])

    @kernel
    def compare(a: In[N], b: In[N]):
        pass

    graph.spawn(compare, x[0:5], x[3:8])
    assert len(graph.tasks) == 1  # what was refused left no trace
    graph.spawn(make, x[:])
    assert edges(graph) == "0>1"


@pytest.mark.parametrize("derive", [check, lambda graph: coarsen(graph, 1), lambda graph: pickle.loads(pickle.dumps(graph))])
def test_only_a_graph_that_was_recorded_records_on(derive):
    """Checked, coarsened and sent graphs know their edges, not their cells: a further task would get no edges, so they refuse it."""
    arena, graph = Arena({"x": TensorSpec((4,))}, shared=True), Graph()
    graph.spawn(make, arena.x[:])
    graph.spawn(change, arena.x[:])
    with pytest.raises(RuntimeError, match="was not recorded here"):
        derive(graph).spawn(read, arena.x[:])


# --- commutative


def test_commutative_is_ordered_by_default():
    """Unless the graph allows otherwise, Commutative is InOut: sums are added in program order and bits repeat.

    0 make --> 1 add --> 2 add --> 3 read
    """
    graph, x, y = Graph(), tensor(), tensor()
    graph.spawn(make, x[:])
    graph.spawn(add, x[:], y[:])
    graph.spawn(add, x[:], y[:])
    graph.spawn(read, x[:])
    assert edges(graph) == "0>1 1>2 2>3"
    assert not graph.is_commutative


def test_commutative_is_free_where_the_graph_allows_it():
    """Neighbours that declare Commutative do not wait for each other, only for what was before; what follows waits for all of them.

    0 make x --> 1 add x --> 3 read x --> 5 add x --> 7 make x
            `--> 2 add x --'  `--------> 6 add x --'
             4 read y (nothing to do with x)
    """
    graph, x, y = Graph(allow_commutative=True), tensor(), tensor()
    graph.spawn(make, x[:])
    graph.spawn(add, x[:], y[:])
    graph.spawn(add, x[:], y[:])
    graph.spawn(read, x[:])
    graph.spawn(read, y[:])
    graph.spawn(add, x[:], y[:])
    graph.spawn(add, x[:], y[:])
    graph.spawn(make, x[:])
    assert edges(graph) == "0>1 0>2 1>3 2>3 3>5 3>6 5>7 6>7"
    assert graph.is_commutative


def test_commutative_tasks_share_the_lock_of_every_common_cell():
    """Free of order is not at once: tasks that add to a common cell hold its lock, all in one order, so nobody waits for ever.

    x: |. . .|. . .|. . .|       0 adds to cells 0 1, 1 to cells 1 2, 2 to cells 0 1 2
    """
    graph, x, y = Graph(allow_commutative=True), tensor(9, 3), tensor()
    for start, stop in (0, 6), (3, 9), (0, 9):
        graph.spawn(add, x[start:stop], y[:])
    first, second, both = (task.locks for task in graph.tasks)
    assert len(set(first) & set(second)) == 1 and set(both) == set(first) | set(second)
    for locks in first, second, both:
        assert list(locks) == sorted(locks, key=lambda numbered: numbered[0])
    merged = coarsen(graph, 1).tasks[0]
    assert merged.locks == both


GATE = threading.Lock()


@kernel
def add_alone(total: Commutative[N], inp: In[N]):
    if not GATE.acquire(blocking=False):
        raise RuntimeError("two at once")
    was = total.copy()
    for _ in range(20):  # room for another thread to come in
        was += inp / 20
    total[:] = was
    GATE.release()


@pytest.fixture
def _many_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_many_switches")
@pytest.mark.parametrize("is_sent", [False, True], ids=["recorded", "sent"])
def test_commutative_tasks_exclude_each_other(is_sent):
    """Four threads run 200 tasks that add to one tile, in any order: never two at once, nothing lost. A graph that was sent, too.

    0 make x --> 1 add   2 add   3 add ... 200 add     (each under the lock of x)
    """
    arena = Arena({"x": TensorSpec((4,)), "y": TensorSpec((4,))}, shared=True)
    arena.y.array[:] = 1
    graph = Graph(allow_commutative=True)
    for _ in range(200):
        graph.spawn(add_alone, arena.x[:], arena.y[:])
    if is_sent:
        graph = pickle.loads(pickle.dumps(graph))
    assert edges(graph) == ""
    start, errors = threading.Barrier(4), []

    def worker(number: int):
        start.wait()
        try:
            for task in graph.tasks[number::4]:
                task.run()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=worker, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    np.testing.assert_allclose(arena.x.array, 200, rtol=1e-4)


def test_a_task_that_fails_frees_its_locks():
    """An exception in a kernel does not leave the tile locked for the others."""

    @kernel
    def fail(total: Commutative[N]):
        raise ZeroDivisionError

    graph, x = Graph(allow_commutative=True), tensor()
    task = graph.spawn(fail, x[:])
    for _ in range(2):
        with pytest.raises(TaskError):
            task.run()
    assert not any(lock.locked() for _, lock in task.locks)


# --- any order gives the same bits


def run_in_any_order(graph: Graph, choices: random.Random) -> None:
    """Run the tasks in a random order that the edges allow."""
    missing = [len(task.predecessors) for task in graph.tasks]
    ready = [task.number for task in graph.tasks if not task.predecessors]
    done = 0
    while ready:
        task = graph.tasks[ready.pop(choices.randrange(len(ready)))]
        task.run()
        done += 1
        for successor in task.successors:
            missing[successor] -= 1
            if not missing[successor]:
                ready.append(successor)
    assert done == len(graph.tasks), "a cycle"


@given(programs(), st.randoms(use_true_random=False))
@settings(UNHURRIED, max_examples=200)
def test_any_topological_order_gives_the_bits_of_program_order(program, choices):
    """Whatever a scheduler does, as long as it keeps to the edges: the same bits as the program without any graph."""
    _, wanted = run_program(program, run_now)
    graph, got = run_program(program)
    run_in_any_order(graph, choices)
    assert bits(got) == bits(wanted)


@given(programs(), st.randoms(use_true_random=False))
@settings(UNHURRIED, max_examples=50)
def test_commutative_tasks_in_any_order_give_an_exact_sum(program, choices):
    """Integers add up the same in any order, so even order-free tasks give the bits of program order if the edges around them are right."""
    _, wanted = run_program(program, run_now)
    graph, got = run_program(program, allow_commutative=True)
    run_in_any_order(graph, choices)
    assert bits(got) == bits(wanted)


@given(programs(), st.integers(1, 12), st.integers(1, 9), st.randoms(use_true_random=False))
@settings(UNHURRIED, max_examples=200)
def test_coarsened_graphs_run_the_same_calls_with_the_same_bits(program, max_tasks, width, choices):
    """At most as many tasks as asked for, every call once and in program order, every edge kept or implied, no cycle: the same bits."""
    _, wanted = run_program(program, run_now)
    graph, got = run_program(program)
    merged = coarsen(graph, max_tasks, width)
    assert len(merged.tasks) <= max_tasks
    number_of = {id(call): task.number for task in graph.tasks for call in task.calls}
    groups = [list(dict.fromkeys(number_of.pop(id(call)) for call in task.calls)) for task in merged.tasks]
    assert not number_of
    group_of = {number: at for at, group in enumerate(groups) for number in group}
    waited_for: list[set[int]] = []
    for at, (task, group) in enumerate(zip(merged.tasks, groups, strict=True)):
        assert task.number == at and group == sorted(group)
        needed = {group_of[p] for number in group for p in graph.tasks[number].predecessors} - {at}
        implied = set().union(*(waited_for[p] for p in task.predecessors))
        waited_for.append(implied | set(task.predecessors))
        assert set(task.predecessors) == needed - implied
        assert needed <= waited_for[at]
        assert all(p < at for p in task.predecessors)
    assert (merged.flops, sum(t.bytes for t in merged.tasks)) == (graph.flops, sum(t.bytes for t in graph.tasks))
    run_in_any_order(merged, choices)
    assert bits(got) == bits(wanted)


# --- coarsening


def three_rows(length: int = 6) -> Graph:
    graph = Graph()
    x = Tensor("x", np.zeros((3, 4), np.float32), (1, None))
    for _ in range(length):
        for r in range(3):
            graph.spawn(change, x[r])
    return graph


def test_coarsening_keeps_independent_rows_apart():
    """Three rows of six tasks in at most six tasks: two bands, and in each the three rows side by side, not six tasks in a chain.

    row 0   0--3--6--9--12-15        [0 3 6]--[9 12 15]
    row 1   1--4--7-10--13-16   -->  [1 4 7]--[10 13 16]
    row 2   2--5--8-11--14-17        [2 5 8]--[11 14 17]
    """
    merged = coarsen(three_rows(), 6)
    rows = [{str(call.args[0]) for call in task.calls} for task in merged.tasks]
    assert [len(task.calls) for task in merged.tasks] == [3] * 6
    assert all(len(row) == 1 for row in rows)
    assert edges(merged) == "0>3 1>4 2>5"


@pytest.mark.parametrize("max_tasks", range(1, 19))
def test_coarsening_keeps_parallelism_at_every_limit(max_tasks):
    """However many tasks are asked for, the longest path of three equal rows is no longer than it has to be.

    One task: everything in a chain; two: one with two rows, one with one row; three and more: a row each.
    """
    merged = coarsen(three_rows(), max_tasks)
    finish: list[int] = []
    for task in merged.tasks:
        finish.append(len(task.calls) + max((finish[p] for p in task.predecessors), default=0))
    assert max(finish) == {1: 18, 2: 12}.get(max_tasks, 6)


def test_coarsening_keeps_a_fork_join_parallel():
    """Where every level waits for the whole level before, only tasks of one level can be merged without losing their parallelism.

    0 .--> 1 2 3 4 --.--> 5 .--> 6 7 8 9 --.--> 10   in 8 tasks: [0] [1 2] [3 4] [5] [6 7] [8 9] [10]
    """
    graph, x, y = Graph(), tensor(4, 1), tensor(1)
    for _ in range(2):
        graph.spawn(copy, y[:], x[:])
        for at in range(4):
            graph.spawn(copy, x[at : at + 1], y[:])
    graph.spawn(copy, y[:], x[:])
    merged = coarsen(graph, 8)
    assert sorted(len(task.calls) for task in merged.tasks) == [1, 1, 1, 2, 2, 2, 2]
    assert edges(merged) == "0>1 0>2 1>3 2>3 3>4 3>5 4>6 5>6"


def test_coarsening_balances_by_cost():
    """Independent tasks are dealt out so that every merged task costs about the same: the large one stands alone.

    sizes 4 1 1 1 1   in two tasks:  [4]  [1 1 1 1]
    """
    graph, x = Graph(), tensor(8, 1)
    for start, stop in (0, 4), (4, 5), (5, 6), (6, 7), (7, 8):
        graph.spawn(make, x[start:stop])
    assert sorted([call.args[0].shape[0] for call in task.calls] for task in coarsen(graph, 2).tasks) == [[1, 1, 1, 1], [4]]


def test_a_small_graph_is_not_coarsened():
    """A graph within the limit comes back as it is; limits below one are refused."""
    graph = three_rows(1)
    assert coarsen(graph, 3) is graph
    for wrong in {"max_tasks": 0}, {"max_tasks": 2, "width": 0}:
        with pytest.raises(ValueError, match="must be at least 1, got 0"):
            coarsen(graph, **wrong)


def test_a_merged_task_is_named_after_its_costliest_call():
    """Name and section of a merged task are those of the call that costs most: in a trace it stands for what it mostly does.

    change x[0:1] | add x[0:8]   -->   one task, an `add` of section ("second", 2)
    """
    graph, x, y = Graph(), tensor(8), tensor(8)
    graph.spawn(change, x[0:1], section=("first", 1))
    graph.spawn(add, x[0:8], y[:], section=("second", 2))
    [task] = coarsen(graph, 1).tasks
    assert (task.name, task.section, task.number) == ("add", ("second", 2), 0)
    assert str(task) == "0 change inout(x[0:1]); add commutative(x[:]) in(x[:])"


# --- as text, and failing


def test_listing_is_a_task_a_line():
    """Number, kernel, tiles by access, constants, predecessors: what the golden files hold and what a reviewer reads in a diff.

    0 make x[0:4] --> 2 shift y[0:4], x[0:4]
    1 make x[4:8]
    """

    @kernel
    def shift(out: Out[N], inp: In[N], by: float, times: int):
        out[:] = inp + by * times

    graph, x, y = Graph("drawn"), tensor(8, 4, "x"), tensor(8, 4, "y")
    graph.spawn(make, x[0:4])
    graph.spawn(make, x[4:8])
    graph.spawn(shift, y[0:4], x[0:4], 0.5, np.int64(3))
    assert graph.listing() == (
        "0 make out(x[0:4])\n"
        "1 make out(x[4:8])\n"
        "2 shift out(y[0:4]) in(x[0:4]) by=0.5 times=3 <- 0\n"
    )  # fmt: skip
    assert repr(graph) == "drawn: 3 tasks of 2 kernels, 1 edges, 1.2e-08 GFLOP"
    assert graph.kernels == [make, shift]


def test_a_failing_task_is_named():
    """The error of a run says which task, on which tiles, spawned where, and what the kernel raised; the original is its cause."""
    graph, x = Graph(), tensor(8, 4)
    graph.spawn(make, x[:])
    task = graph.spawn(fail, x[2:4])
    with pytest.raises(TaskError) as error:
        task.run()
    line = test_a_failing_task_is_named.__code__.co_firstlineno + 4
    assert str(error.value) == f"task 1, fail inout(x[2:4]), spawned in {__file__}, line {line}: ZeroDivisionError: no such luck"
    assert isinstance(error.value.__cause__, ZeroDivisionError)


# --- as a Dask graph


def pipeline() -> tuple[Graph, Tensor]:
    """0 make --> 1 change ("forward", 0) --> 2 change ("forward", 1) --> 3 change ("backward", 1)"""
    graph, x = Graph(), tensor(8, 4)
    for each, section in (make, ("", -1)), (change, ("forward", 0)), (change, ("forward", 1)), (change, ("backward", 1)):
        for start in 0, 4:
            graph.spawn(each, x[start : start + 4], section=section)
    return graph, x


def without_token(name: str) -> str:
    """Return the name of a layer, or the first item of a key, as it was before to_dask made it unique."""
    name, token = name.rsplit("-", 1)
    assert len(token) == 32
    return name


def test_dask_keys():
    """Kernel first, by which the dashboard groups; a token that every call draws anew; the number makes it unique."""
    graph, _ = pipeline()
    runs = [graph.to_dask() for _ in range(2)] + [pipeline()[0].to_dask()]
    for tasks, last in runs:
        assert [(without_token(name), number) for name, number in tasks] == [(task.name, task.number) for task in graph.tasks]
        assert [key_split(key) for key in tasks] == [task.name for task in graph.tasks]
        assert [number for _, number in last] == [6, 7]
    assert len({key for tasks, _ in runs for key in tasks}) == 3 * len(graph.tasks)
    assert len({layer for tasks, _ in runs for layer in tasks.layers}) == 3 * 4


def test_dask_layers_are_phases():
    """A layer for each section, in Dask's own drawings a node, with the dependencies between them.

    tasks --> forward_00 --> forward_01 --> backward_01
    """
    tasks, _ = pipeline()[0].to_dask()
    tasks.validate()
    assert {without_token(name): [number for _, number in layer] for name, layer in tasks.layers.items()} == {
        "tasks": [0, 1],
        "forward_00": [2, 3],
        "forward_01": [4, 5],
        "backward_01": [6, 7],
    }
    assert needs_of(tasks) == {"tasks": set(), "forward_00": {"tasks"}, "forward_01": {"forward_00"}, "backward_01": {"forward_01"}}


def needs_of(tasks: HighLevelGraph) -> dict[str, set[str]]:
    return {without_token(name): set(map(without_token, needs)) for name, needs in tasks.dependencies.items()}


def test_dask_layers_have_no_cycle():
    """A section that is entered again after another one that needed it is a second layer: of layers in a cycle Dask would cull every task.

    0 ("a") --> 1 ("b") --> 2 ("a") --> 3 ("b")      layers: a --> b --> a.2 --> b.2
    """
    graph, x = Graph(), tensor()
    for phase in "abab":
        graph.spawn(change, x[:], section=(phase, -1))
    tasks, last = graph.to_dask()
    assert needs_of(tasks) == {"a": set(), "b": {"a"}, "a.2": {"b"}, "b.2": {"a.2"}}
    assert len(tasks.cull(last)) == 4


@given(programs())
@settings(UNHURRIED, max_examples=30)
def test_dask_dependencies_are_the_edges(program):
    """Dask sees exactly the edges of the graph, and runs every task when asked for the last ones: with the right bits."""
    _, wanted = run_program(program, run_now)
    graph, got = run_program(program)
    for number, task in enumerate(graph.tasks):
        task.section = ("abc"[number % 3], -1)
    tasks, last = graph.to_dask()
    assert isinstance(tasks, HighLevelGraph)
    tasks.validate()
    needs = {number: {p for _, p in keys} for (_, number), keys in tasks.get_all_dependencies().items()}
    assert needs == {task.number: set(task.predecessors) for task in graph.tasks}
    assert set(tasks.cull(last)) == set(tasks)
    assert all(result is None for result in dask.get(tasks, last))
    assert bits(got) == bits(wanted)


@given(programs(), st.integers(1, 30))
@settings(UNHURRIED, max_examples=20)
def test_dask_threads_give_the_same_bits(program, max_tasks):
    """dask.threaded runs a graph, coarsened or not, with the bits of program order."""
    _, wanted = run_program(program, run_now)
    graph, got = run_program(program)
    tasks, last = coarsen(graph, max_tasks).to_dask()
    dask.threaded.get(tasks, last, num_workers=3)
    assert bits(got) == bits(wanted)


def test_dask_tasks_can_run_elsewhere():
    """`call` says what a Dask task does; here it notes the order, which keeps to the edges."""
    graph, _ = pipeline()
    seen: list[int] = []
    tasks, last = graph.to_dask(call=lambda task: (lambda number, *_: seen.append(number), task.number))
    dask.get(tasks, last)
    assert sorted(seen) == list(range(8))
    assert all(seen.index(p) < seen.index(task.number) for task in graph.tasks for p in task.predecessors)
    assert all(a != b for a, b in pairwise(sorted(seen)))
