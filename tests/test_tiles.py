"""Tiles of any kind: memory that was there, cuts anywhere, borders, single numbers, any type, several grids, lists of tiles."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_kernels import change, make, read

from taskgpt.config import load_scheduler
from taskgpt.schedulers import open_scheduler
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
    Scratch,
    Several,
    ShapeError,
    TaskError,
    Tensor,
    TensorSpec,
    check,
    dims,
    kernel,
    run_now,
    wrap,
)

N, M, R, C = dims("N M R C")
SCHEDULERS = {"sequential": {}, "loops": {"workers": 2}, "threads": {"workers": 2}, "native": {"workers": 3}}


def run_everywhere(graph: Graph, begin, result: np.ndarray) -> None:
    """Run the graph under every scheduler, from the same beginning: the result has the same bits."""
    found = set()
    for name, overrides in SCHEDULERS.items():
        begin()
        chosen = load_scheduler(name, overrides)
        with open_scheduler(chosen.scheduler, chosen.settings) as scheduler:
            scheduler.run(graph)
        found.add(result.tobytes())
    assert len(found) == 1


def edges(graph: Graph) -> str:
    return " ".join(f"{p}>{task.number}" for task in graph.tasks for p in task.predecessors)


# --- memory that was there


def test_wrap_takes_memory_as_it_is():
    """Arrays and what has Python's buffer protocol: what a task writes is there; nothing is copied."""
    array = np.arange(12, dtype=np.float32).reshape(4, 3)
    x = wrap(array, (2, None), "x")
    assert x.array is array and repr(x) == "x[4, 3] cut 2 x 1"
    for line in wrap(array[0], 2), wrap(array[0], (2,)), wrap(array[0], ((2,),)), wrap(array[0], [2]):
        assert line.bounds == ((0, 2, 3),)
    assert wrap(array).grid == (1, 1)
    memory = bytearray(16)
    run_now(make, wrap(memoryview(memory).cast("f"))[:])
    assert np.frombuffer(memory, np.float32).tolist() == [1] * 4


def test_rows_may_lie_apart():
    """Of every second row, of rows backwards; kernels rely on the elements of a row alone."""
    array = np.zeros((6, 4), np.float32)

    @kernel(compiled=True)
    def count(x: InOut[R, C]):
        for r in range(x.shape[0]):
            for c in range(x.shape[1]):
                x[r, c] += 10 * r + c

    graph = Graph()
    for rows in wrap(array[::2, 1:3], name="even"), wrap(array[::-2, 1:3], name="odd, from below"):
        graph.spawn(count, rows[:])
    run_everywhere(graph, lambda: array.fill(0), array)
    assert array[:, 1].tolist() == [0, 20, 10, 10, 20, 0] and array[:, 0].tolist() == [0] * 6


@pytest.mark.parametrize(
    ("array", "error", "message"),
    [
        ([1.0, 2.0], TypeError, r"wrap takes an array or a buffer, got a list; np.array\(\) makes one"),
        (np.zeros(6)[::2], GridError, r"must lie side by side, got strides \(16,\); take a copy, array.copy\(\)"),
        (np.zeros((3, 2)).T, GridError, r"got strides \(8, 16\); in Fortran order, take the transpose, array.T"),
        (np.array([None]), GridError, "elements must be plain memory, and these are Python objects"),
    ],
    ids=["list", "stride", "Fortran", "objects"],
)
def test_memory_that_kernels_cannot_take(array, error, message):
    """Is refused with what to do."""
    with pytest.raises(error, match=message):
        wrap(array)


def test_one_column_may_have_any_stride():
    """Rows of one element lie side by side, whatever their array says."""
    x = wrap(np.zeros((4, 6), np.float32)[:, ::7])
    run_now(make, x[2])
    assert x.array.tolist() == [[0], [0], [1], [0]]


def test_read_only_memory_is_read():
    """And never written."""
    x = wrap(b"12345678", name="x")
    with pytest.raises(AccessError, match=r"the memory of x.* is read-only"):

        @kernel
        def write(x: InOut[N, np.uint8]):
            pass

        run_now(write, x[:])


# --- cuts, cells, borders


@pytest.mark.parametrize(
    ("cut", "bounds"),
    [(range(1, 9, 3), (0, 1, 4, 7, 10)), ([6], (0, 6, 10)), ([9, 2, 2, 0, 10], (0, 2, 9, 10)), ([], (0, 10)), (np.array([5]), (0, 5, 10))],
    ids=repr,
)
def test_cuts_at_places(cut, bounds):
    """A list, a range or an array says where; the first cell may be shorter or longer than the others."""
    assert TensorSpec((10,), (cut,)).bounds() == (bounds,)


@pytest.mark.parametrize("cut", [[-1], [11], range(8, 20, 5)], ids=repr)
def test_cuts_outside_are_refused(cut):
    """A place is of the axis."""
    with pytest.raises(GridError, match="cannot cut an axis of 10 elements before element"):
        TensorSpec((10,), (cut,)).bounds()


def test_cells_are_tiles():
    """By their position in the grid; one that is not there is refused, also a negative one."""
    x = Tensor("x", np.zeros((10, 4)), (range(1, 9, 3), None))
    assert [repr(x.cell(at, 0)) for at in range(4)] == ["x[0:1, :]", "x[1:4, :]", "x[4:7, :]", "x[7:10, :]"]
    for position in (4, 0), (-1, 0), (0,), (0, 0, 0):
        with pytest.raises(IndexError, match=r"tensor 'x' has a grid of 4 x 1, got cell"):
            x.cell(*position)


def test_a_grown_tile_has_a_border_as_far_as_the_tensor_goes():
    """On all axes, or so much on each; an axis that an integer dropped has none."""
    x = Tensor("x", np.zeros((10, 4, 8)), (3, None, 4))
    assert repr(x.cell(1, 0, 1).grown(1)) == "x[2:7, :, 3:8]"
    assert repr(x[0:3, 1:2, 4:6].grown(2, 0, 1)) == "x[0:5, 1:2, 3:7]"
    assert repr(x[5, 1:2, 4:6].grown(1)) == "x[5, 0:3, 3:7]"
    assert repr(x[5, 1:2, 4:6].grown(0)) == "x[5, 1:2, 4:6]"
    for borders in (), (1, 1), (-1, 0, 0), (1, 1, 1, 1):
        with pytest.raises(ValueError, match=r"tile x\[0:3, :, :\] has 3 axes, and borders are not negative"):
            x[0:3].grown(*borders)


def test_halos_are_dependencies():
    """A task that reads a cell with its border waits for those that write the neighbours, and they for it.

    x  |0 .|1 .|2 .|        3 reads cell 1 and one element on each side
    """
    graph, x = Graph(), Tensor("x", np.zeros(6, np.float32), (2,))
    for at in range(3):
        graph.spawn(make, x.cell(at))
    graph.spawn(read, x.cell(1).grown(1))
    graph.spawn(change, x.cell(0))
    graph.spawn(change, x.cell(0))
    assert edges(graph) == "0>3 1>3 2>3 3>4 4>5"


# --- single numbers


def test_a_single_number_is_a_tile():
    """Of a tensor without axes, or an element: the array of a body has no axes, and twins index it with ()."""

    @kernel(compiled=True)
    def add_up(total: Reduction["+", ()], x: In[N], first: InOut[()]):
        total[()] += x.sum()
        first[()] += 1

    a = Arena({"total": TensorSpec(()), "x": TensorSpec((9,), (3,))}, shared=True)
    graph = Graph()
    for at in range(3):
        graph.spawn(add_up, a.total[()], a.x[3 * at + 1 : 3 * at + 3], a.x[3 * at])

    def begin():
        a.total.array[...] = 0
        a.x.array[:] = range(9)

    run_everywhere(graph, begin, a.total.array)
    assert a.total.array[()] == 1 + 2 + 4 + 5 + 7 + 8 and a.x.array.tolist() == [1, 1, 2, 4, 4, 5, 7, 7, 8]
    assert str(graph.tasks[0]) == "0 add_up inout(x[0]) reduction(+: total[]) in(x[1:3])"
    begin()
    for task in check(graph).tasks:
        task.run()
    assert a.total.array[()] == 27
    with pytest.raises(ShapeError, match=r"change: 'x' wants 1 dimensions \(N\), got shape \(\)"):
        graph.spawn(change, a.x[3])


# --- any type

RECORD = np.dtype([("key", np.int32), ("value", np.float64)], align=True)
TYPES = [np.float16, np.float32, np.float64, np.longdouble, np.complex64, np.complex128, np.bool_, np.int8, np.uint16, np.int64, np.uint64]


@pytest.mark.parametrize("dtype", [*map(np.dtype, TYPES), RECORD, np.dtype("datetime64[s]"), np.dtype("S5")], ids=str)
def test_any_type_of_element(dtype):
    """Bodies work on all of them under every scheduler, and are checked."""

    @kernel
    def turn(out: Out[N, dtype], inp: In[N, dtype], work: Scratch[N, dtype]):
        work[:] = inp[::-1]
        out[:] = work

    values = np.frombuffer(np.random.default_rng(0).bytes(6 * dtype.itemsize), dtype)
    if dtype.kind in "fcb":
        values = np.arange(6).astype(dtype)
    elif dtype is RECORD:
        values = np.array([(n, n / 3) for n in range(6)], RECORD)
    a, graph = Arena({"x": TensorSpec((6,), (3,), dtype), "y": TensorSpec((6,), (3,), dtype)}), Graph()
    for at in 0, 3:
        graph.spawn(turn, a.y[at : at + 3], a.x[at : at + 3])
    wanted = np.concatenate([values[2::-1], values[:2:-1]])

    def begin():
        a.x.array[...] = values

    run_everywhere(graph, begin, a.y.array)
    assert a.y.array.tolist() == wanted.tolist()
    for task in check(graph).tasks:
        task.run()
    assert a.y.array.tolist() == wanted.tolist()


@pytest.mark.parametrize("dtype", [*map(np.dtype, TYPES[1:3] + TYPES[4:]), RECORD], ids=str)
def test_twins_of_any_type_that_numba_has(dtype):
    """Complex numbers, booleans, integers, structures: native runs them as machine code."""

    @kernel(compiled=True)
    def turn(out: Out[N, dtype], inp: In[N, dtype]):
        for n in range(out.shape[0]):
            out[n] = inp[inp.shape[0] - 1 - n]

    values = np.zeros(5, dtype)
    if dtype is RECORD:
        values["key"], values["value"] = range(5), np.arange(5) / 3
    else:
        values[...] = np.arange(5).astype(dtype)
    x, y = wrap(values), wrap(np.zeros(5, dtype))
    graph = Graph()
    graph.spawn(turn, y[:], x[:])
    run_everywhere(graph, lambda: None, y.array)
    assert y.array.tolist() == values[::-1].tolist()


def test_a_structured_tile_that_is_written_outside():
    """check compares bytes where there is no NaN."""

    @kernel(compiled=True)
    def beyond(x: InOut[N, RECORD]):
        x[x.shape[0]]["key"] = 3

    graph = Graph()
    graph.spawn(beyond, wrap(np.zeros(3, RECORD))[:])
    with pytest.raises(TaskError, match="beyond wrote outside its tile 'x'"):
        check(graph).tasks[0].run()


# --- several grids


def test_a_grid_that_refines_another():
    """Whole rows here, quarters there: the finer grid tells them apart, also those that were touched before it came.

    0 make |. . . .|. . . .|
    1 change 0:4 and 2 change 4:8, then in quarters 3 4 5 6 of the first half, and the whole 7
    """
    array = np.zeros(8, np.float32)
    halves, quarters, whole = wrap(array, 4, "halves"), wrap(array, 2, "quarters"), wrap(array, None, "whole")
    graph = Graph()
    graph.spawn(make, whole[:])
    graph.spawn(change, halves[0:4])
    graph.spawn(change, halves[4:8])
    graph.spawn(read, halves[0:4])
    for at in 0, 2:
        graph.spawn(change, quarters[at : at + 2])
    graph.spawn(change, halves[0:2])
    graph.spawn(read, whole[:])
    assert edges(graph) == "0>1 0>2 1>3 3>4 3>5 4>6 2>7 5>7 6>7"


def test_grids_of_which_none_refines_the_other():
    """Are refused, as are two arrays that only share a part; and what was recorded stays."""
    array = np.zeros(12, np.float32)
    graph = Graph()
    graph.spawn(make, wrap(array, 3, "thirds")[:])
    for other in wrap(array, 2, "pairs"), wrap(array[1:], None, "most"), wrap(array.reshape(3, 4), None, "rows"):
        with pytest.raises(
            GridError, match="share memory: two grids over one buffer would hide dependencies, unless both are of the whole"
        ):
            graph.spawn(kernel_of(other), other[:])
    graph.spawn(make, wrap(array, [3, 4, 6, 9], "finer")[4:6])
    assert edges(graph) == "0>1"


def kernel_of(tensor: Tensor):
    return make if len(tensor.shape) == 1 else read_rows


@kernel
def read_rows(inp: In[R, C]):
    pass


@kernel
def copy(out: Out[N], inp: In[N]):
    out[:] = inp


def test_overlaps_are_seen_through_another_grid():
    """A kernel may assume that what it writes is nothing else that it was given."""
    array = np.zeros(8, np.float32)
    graph, coarse, fine = Graph(), wrap(array, 4, "coarse"), wrap(array, 1, "fine")
    graph.spawn(copy, coarse[0:2], fine[2:4])
    with pytest.raises(AccessError, match="copy: 'out' and 'inp' overlap in coarse"):
        graph.spawn(copy, coarse[0:2], fine[1:3])


@kernel
def stir(out: InOut[R, C, np.uint64], inp: In[N, M, np.uint64]):
    out *= np.uint64(31)
    out += inp.sum()


@kernel
def gather(total: Reduction["+", R, C, np.uint64], inp: In[N, M, np.uint64]):
    total += inp.sum()


@kernel
def pour(total: Commutative[R, C, np.uint64], inp: In[N, M, np.uint64]):
    total += inp.sum()


def span(length: int):
    return st.tuples(st.integers(0, length - 1), st.integers(1, length)).map(lambda ends: slice(min(ends), max(min(ends) + 1, ends[1])))


TILE = st.tuples(st.integers(0, 3), span(6), span(6))


@given(
    st.lists(st.tuples(st.sampled_from([stir, gather, pour]), TILE, TILE), max_size=20), st.booleans(), st.randoms(use_true_random=False)
)
@settings(deadline=None, max_examples=200)
def test_any_order_with_several_grids_gives_the_bits_of_program_order(calls, allow_commutative, choices):
    """Four grids over one array, met in any order: every order that the edges allow gives what the program without a graph gives."""
    found = []
    for is_recorded in False, True:
        array = np.arange(36, dtype=np.uint64).reshape(6, 6)
        grids = [wrap(array, cuts, str(cuts)) for cuts in ((2, 6), (2, 3), (None, None), (1, 3))]
        graph = Graph(allow_commutative=allow_commutative)
        for each, *places in calls:
            tiles = [grids[at][rows, columns] for at, rows, columns in places]
            try:
                graph.spawn(each, *tiles)
            except AccessError:
                continue
            if not is_recorded:
                run_now(each, *tiles)
        if is_recorded:
            run_in_any_order(graph, choices)
        found.append(array.tobytes())
    assert found[0] == found[1]


def run_in_any_order(graph: Graph, choices: random.Random) -> None:
    missing = [len(task.predecessors) for task in graph.tasks]
    ready = [task.number for task in graph.tasks if not task.predecessors]
    while ready:
        task = graph.tasks[ready.pop(choices.randrange(len(ready)))]
        task.run()
        for successor in task.successors:
            missing[successor] -= 1
            if not missing[successor]:
                ready.append(successor)


# --- lists of tiles


@kernel(flops=lambda N, parts: N * parts)
def sum_of(out: Out[N], parts: Several[In[N]], scale: float):
    out[:] = 0
    for part in parts:
        out += part * scale


def test_a_list_of_tiles_is_one_argument():
    """The task waits for all that write one of them; the body gets a tuple of arrays; an empty list is one, too."""
    x, y, graph = Tensor("x", np.zeros((6, 2), np.float32), (1, None)), Tensor("y", np.zeros((3, 2), np.float32), (1, None)), Graph()
    for at in range(6):
        graph.spawn(make, x[at])
    graph.spawn(sum_of, y[0], [x[at] for at in (0, 2, 5)], 2.0)
    graph.spawn(sum_of, y[1], [], 1.0)
    graph.spawn(sum_of, y[2], (x[1], y[0]), 1.0)
    graph.spawn(change, x[2])
    assert edges(graph) == "0>6 2>6 5>6 1>8 6>8 6>9"
    assert str(graph.tasks[6]) == "6 sum_of out(y[0, :]) in([x[0, :], x[2, :], x[5, :]]) scale=2.0"
    assert [graph.tasks[at].flops for at in (6, 7, 8)] == [6, 0, 4]
    assert [graph.tasks[at].bytes for at in (6, 7, 8)] == [8 + 24, 8, 8 + 16]
    run_everywhere(graph, lambda: y.array.fill(7), y.array)
    assert y.array.tolist() == [[6, 6], [0, 0], [7, 7]]
    y.array[...] = 0
    for task in check(graph).tasks:
        task.run()
    assert y.array.tolist() == [[6, 6], [0, 0], [7, 7]]


def test_lists_are_verified():
    """Each tile of a list as any other."""

    @kernel
    def spoil(parts: Several[InOut[N]], also: In[N]):
        also[:] = 1

    x, z, graph = Tensor("x", np.zeros((6, 2), np.float32), (1, None)), wrap(np.zeros(2), name="z"), Graph()
    for arguments, error, message in (
        ((x[0], x[1]), TypeError, "spoil: 'parts' wants a list of tiles, got x"),
        (([x[0], 3], x[1]), TypeError, "spoil: 'parts' wants a tile, tensor.index., got 3"),
        (([x[0], z[:]], x[1]), ShapeError, "spoil: 'parts' wants float32, got z.* of float64"),
        (([x[0], x[1, 0:1]], x[1]), ShapeError, "spoil: 'parts' wants N = 2 as in 'parts', got shape"),
        (([x[0]], x[1, 0:1]), ShapeError, "spoil: 'also' wants N = 2 as in 'parts'"),
        (([x[0], x[0]], x[1]), AccessError, "spoil: 'parts' and 'parts' overlap in x"),
        (([x[0], x[1]], x[1]), AccessError, "spoil: 'parts' and 'also' overlap in x"),
    ):
        with pytest.raises(error, match=message):
            graph.spawn(spoil, *arguments)
    graph.spawn(spoil, [x[0]], x[1])
    with pytest.raises(TaskError, match="spoil wrote 'also', declared In"):
        check(graph).tasks[0].run()
    with pytest.raises(TypeError, match="spoil: a kernel with Several has no compiled twin"):
        spoil.compiled(spoil.body)
    for wrong in Several, N, Scratch[N], Reduction["+", N], Several[In[N]]:
        with pytest.raises(TypeError, match=r"Several\[...\] takes In, Out, InOut, Commutative or Concurrent of one tile"):
            Several[wrong]
