"""Loops spawned as one: spawn_each records the graph that the same loop with spawn records."""

import functools
import pickle
import re

import kernels_for_tests as k
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import taskgpt
from taskgpt.tasks import (
    AccessError,
    Commutative,
    Concurrent,
    Graph,
    In,
    InOut,
    Out,
    Reduction,
    Several,
    ShapeError,
    TaskError,
    Tensor,
    check,
    coarsen,
    dims,
    kernel,
    wrap,
)

R, C, P, Q, N = dims("R C P Q N")
U64 = np.uint64


@kernel
def mix(out: InOut[R, C, U64], a: In[P, Q, U64], salt: int):
    """Something that depends on every bit, and on the order."""
    out *= U64(6364136223846793005)
    out += a.sum()
    out += U64(salt % 1000)


@kernel
def scatter(out: Concurrent[R, C, U64], a: In[P, Q, U64]):
    """Something that may run beside its like."""
    out += a.max()


@kernel
def gather(out: Commutative[R, C, U64], parts: Several[In[P, Q, U64]]):
    """Something that takes a list of tiles, and excludes its like."""
    for part in parts:
        out += part.sum()


@kernel
def add(total: Reduction["+", (), U64], a: In[R, C, U64]):
    """Part of a sum."""
    np.add(total, a.sum(), out=total)


@kernel
def scale(x: InOut[N, np.float64], by: float):
    """For loops along one axis."""
    x *= by


@kernel
def fail_at_three(x: InOut[N, np.float64], at: int):
    """Raise in one iteration."""
    if at == 3:
        raise ValueError("three")


def begin(rows: int, columns: int, cuts: tuple) -> dict[str, Tensor]:
    """Return two tensors of random numbers, and a single number."""
    draw = np.random.default_rng(0)
    grids = {name: wrap(draw.integers(0, 2**63, (rows, columns), U64), cuts, name) for name in "xy"}
    return grids | {"total": wrap(np.zeros((), U64), (), "total")}


def same_loop(graph: Graph, each_kernel, over, call, **options) -> None:
    """Record a loop by spawn, one task after the other."""
    ranges = [each if isinstance(each, (range, np.ndarray)) else range(each) for each in (over if isinstance(over, tuple) else (over,))]
    for index in np.ndindex(*map(len, ranges)):
        graph.spawn(each_kernel, *call(*(int(each[at]) for each, at in zip(ranges, index, strict=True))), **options)


ROWS, COLUMNS = 9, 7
LOOPS = {  # (kernel, over, function of the tensors that returns the loop's function)
    "rows": (mix, range(ROWS), lambda x, y, _: lambda i: (x[i : i + 1], y[i : i + 1], 3)),
    "cells, all pairs": (mix, "grid", lambda x, y, _: lambda i, j: (x.cell(i, j), y.cell(j * 0, j), i * 10 + j)),
    "halos": (mix, "grid", lambda x, y, _: lambda i, j: (x.cell(i, j), y.cell(i, j).grown(1), 1)),
    "in place": (mix, range(1, ROWS - 1), lambda x, _, __: lambda i: (x[i : i + 1], x[i - 1 : i, 2:5], i)),
    "backwards": (mix, range(ROWS - 1, 0, -2), lambda x, y, _: lambda i: (x[i : i + 1], y[ROWS - 1 - i : ROWS - i], 0)),
    "all of it": (mix, 3, lambda x, y, _: lambda i: (x[:], y[:], i)),
    "growing": (mix, range(1, ROWS), lambda x, y, _: lambda i: (x[i : i + 1], y[0:i], 2)),
    "array": (mix, np.array([4, 0, 4, 2]), lambda x, y, _: lambda i: (x[i : i + 2, i : i + 1], y[i // 2 : i // 2 + 1, i % 3 :], 2)),
    "columns": (mix, (range(0, ROWS, 2), COLUMNS), lambda x, y, _: lambda i, j: (x[i : i + 1, j : j + 1], y[:][i : i + 1, 1:4], -j)),
    "concurrent": (scatter, range(ROWS), lambda x, y, _: lambda i: (x[2:5], y[i : i + 1])),
    "commutative": (gather, range(ROWS - 1), lambda x, y, _: lambda i: (x[0:3], [y[i : i + 1], y[i + 1 : i + 2]])),
    "reduction": (add, range(ROWS), lambda x, _, total: lambda i: (total[()], x[i : i + 1])),
}


@st.composite
def programs(draw) -> tuple:
    """Loops of all kinds, in any order, on grids of any kind; some by spawn, as programs mix them."""
    cut = st.none() | st.integers(1, 4) | st.tuples(st.integers(1, 4), st.integers(1, 4))
    return draw(st.tuples(cut, cut)), draw(st.lists(st.tuples(st.sampled_from(sorted(LOOPS)), st.booleans()), min_size=1, max_size=5))


def record(program: tuple, as_one: bool, allow_commutative: bool) -> tuple[Graph, dict[str, Tensor]]:
    cuts, loops = program
    tensors = begin(ROWS, COLUMNS, cuts)
    graph = Graph("loops", allow_commutative)
    for name, may_be_one in loops:
        each_kernel, over, function = LOOPS[name]
        over = tensors["x"].grid if isinstance(over, str) else over
        loop = graph.spawn_each if as_one and may_be_one else functools.partial(same_loop, graph)
        loop(each_kernel, over, function(*tensors.values()))
    return graph, tensors


@given(programs(), st.booleans())
@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.too_slow])
def test_the_graph_is_that_of_the_plain_loop(program, allow_commutative):
    """The same tasks, calls, tiles, edges and locks, whatever loops come before and after, by spawn or as one; and the same bits."""
    plain, wanted = record(program, False, allow_commutative)
    graph, got = record(program, True, allow_commutative)
    assert graph.listing() == plain.listing()
    assert [len(task.locks) for task in graph.tasks] == [len(task.locks) for task in plain.tasks]
    assert graph.kernels == plain.kernels
    for each in graph, plain:
        for task in each.tasks:
            task.run()
    assert [tensor.array.tobytes() for tensor in got.values()] == [tensor.array.tobytes() for tensor in wanted.values()]


@given(programs())
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_edges_to_the_next_run_are_those_of_the_plain_loop(program):
    """As steps overlap by them."""
    (plain, _), (graph, _) = record(program, False, False), record(program, True, False)
    assert graph.edges_to(graph) == plain.edges_to(plain)


def test_a_grid_finer_than_one_before():
    """A second grid over the same array, met after a loop, divides the cells of that loop's tasks."""
    listings, inp = [], wrap(np.zeros((4, 4), U64), (1, None), "inp")
    for as_one in False, True:
        array, graph = np.zeros((8, 4), U64), Graph()
        coarse, fine = wrap(array, (4, None), "coarse"), wrap(array, (1, 2), "fine")
        for tensor in coarse, fine:
            loop = graph.spawn_each if as_one else functools.partial(same_loop, graph)
            loop(mix, tensor.grid, lambda i, j, tensor=tensor: (tensor.cell(i, j), inp[0:1], 1))
        listings.append(graph.listing())
    assert listings[0] == listings[1]
    assert "<- 0\n" in listings[1]  # the finer cells are known to be pieces of the coarser ones


def test_a_grid_of_nine_million_cells():
    """Of grids with more cells than there is room for, those that are touched are numbered."""
    x, graph = wrap(np.zeros((3000, 3000)), (1, 1), "x"), Graph()
    graph.spawn_each(scale, range(0, 3000, 300), lambda i: (x[i, i : i + 1], 1.0))
    graph.spawn(scale, x[900, 900:902], 2.0)
    assert [task.predecessors for task in graph.tasks] == [()] * 10 + [(3,)]


def test_edges_of_all_to_all():
    """A hundred tasks that each wait for a hundred others: many more edges than accesses."""
    x, y = (wrap(np.zeros((100, 2), U64), (1, None), name) for name in "xy")
    graph = Graph()
    graph.spawn_each(mix, 100, lambda i: (x[i : i + 1], y[i : i + 1], 0))
    graph.spawn_each(mix, 100, lambda i: (y[i : i + 1], x[:], 0))
    assert len(graph.edges) == 10_000
    assert graph.tasks[150].predecessors == tuple(range(100))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 40])
def test_a_grainsize_joins_tiles(size):
    """A task of several iterations has their tiles joined, the last one what is left; places that move become ranges."""
    n = 11
    x, y = wrap(np.arange(n + 2.0), 2, "x"), wrap(np.zeros((n, 3)), (1, None), "y")

    @kernel
    def smooth(out: Out[R, C, np.float64], inp: In[N, np.float64], by: float):
        out[:] = (inp[:-2] + inp[1:-1] + inp[2:])[:, None] * by

    graph, plain = Graph(), Graph()
    numbers = graph.spawn_each(smooth, n, lambda i: (y[i], x[i : i + 3], 0.5), grainsize=size)
    for first in range(0, n, size):
        last = min(first + size, n)
        plain.spawn(smooth, y[first:last], x[first : last + 2], 0.5)
    assert graph.listing() == plain.listing()
    assert numbers == range(-(-n // size))
    for task in graph.tasks:
        task.run()
    assert np.array_equal(y.array, np.repeat((np.arange(n) + 1.0)[:, None] * 1.5, 3, 1))


def test_grainsizes_of_several_indices():
    """Each index has its own, or None: then it stays as it is, and an integer that it moves drops its axis."""
    x = wrap(np.zeros((3, 4, 6)), (1, 1, 2), "x")

    @kernel
    def fill(out: Out[R, C, np.float64], at: int):
        out[:] = at

    graph = Graph()
    graph.spawn_each(fill, (3, 4, range(0, 6, 2)), lambda h, i, j: (x[h, i, j : j + 2], h), grainsize=(None, 2, 3))
    assert graph.listing().splitlines() == [f"{n} fill out(x[{n // 2}, {n % 2 * 2}:{n % 2 * 2 + 2}, :]) at={n // 2}" for n in range(6)]


VARIANTS = [("sequential", {}), ("loops", {"workers": 2}), ("threads", {"workers": 2}), ("native", {"workers": 2})]


def of_one_kind(as_one: bool, is_shared: bool = False) -> tuple[Graph, k.Arena]:
    """Record a stencil whose kernels other processes can import, in place and between two rows of cells."""
    a, graph = k.arena(is_shared), Graph()
    loop = graph.spawn_each if as_one else functools.partial(same_loop, graph)
    for step in range(3):
        loop(k.mix, range(1, 7), lambda i, step=step: (a.x[i], a.x[i - 1], a.x[i + 1], a.log[step * 20 + i], i + step))
        loop(k.swirl, 4, lambda i, step=step: (a.x[2 * i], a.x[2 * i + 1], a.log[step * 20 + 10 + i]))
    return graph, a


@pytest.mark.parametrize(("name", "overrides"), [*VARIANTS, ("local-cluster-processes", {"workers": 1, "dashboard": -1})])
def test_every_scheduler_gives_the_bits_of_the_plain_loop(name, overrides):
    """Also those of other processes, to which the tasks are sent."""
    plain, wanted = of_one_kind(False)
    for task in plain.tasks:
        task.run()
    graph, got = of_one_kind(True, is_shared=name.startswith("local"))
    with taskgpt.scheduler(name, **overrides) as scheduler:
        scheduler.run(graph)
        got.x.array[:] = np.arange(got.x.array.size).reshape(got.x.array.shape)
        scheduler.run(graph)  # by the plan that was made
    assert got.x.array.tobytes() == wanted.x.array.tobytes()


def test_what_looks_at_graphs_looks_at_loops():
    """taskgpt.get, Dask's graph, the check, coarsening by pickling: each runs the tasks with the bits of the plain loop."""
    plain, wanted = of_one_kind(False)
    for task in plain.tasks:
        task.run()
    for look in (
        lambda graph: graph.compute(scheduler=taskgpt.get),
        lambda graph: graph.compute(scheduler="sync"),
        lambda graph: [task.run() for task in check(graph).tasks],
        lambda graph: [task.run() for task in coarsen(graph, 5).tasks],
    ):
        graph, got = of_one_kind(True)
        look(graph)
        assert got.x.array.tobytes() == wanted.x.array.tobytes()
    graph, got = of_one_kind(True, is_shared=True)
    sent = pickle.loads(pickle.dumps(graph))
    assert sent.listing() == plain.listing()
    assert graph._repr_svg_().count("mix") == plain._repr_svg_().count("mix") > 0


def test_tasks_are_made_when_somebody_looks():
    """A long loop takes a few dozen bytes a task until then; a task in the middle is whole."""
    count = 200_000
    x = wrap(np.zeros(count), 1)
    graph = Graph()
    assert len(graph.spawn_each(scale, count, lambda i: (x.cell(i), i * 0.5))) == len(graph.tasks) == count
    assert str(graph.tasks[123_456]) == "123456 scale inout(x[123456:123457]) by=61728.0"
    assert graph.tasks[-1].number == count - 1
    assert sum(task is not None for task in graph.tasks._made) == 2


# --- what is refused


def test_a_failing_task_names_the_iteration_and_the_line_of_the_loop():
    """As a task that was spawned alone names its line; under a compiled scheduler as under Python's."""
    x, graph = wrap(np.zeros(8), 1, "x"), Graph()
    graph.spawn_each(fail_at_three, range(8), lambda i: (x.cell(i), i))
    line = test_a_failing_task_names_the_iteration_and_the_line_of_the_loop.__code__.co_firstlineno + 3
    where = re.escape(f"task 3, fail_at_three inout(x[3:4]) at=3, spawned in {__file__}, line {line}, iteration 3: ValueError: three")
    for name in "sequential", "native", "threads":
        with taskgpt.scheduler(name) as scheduler, pytest.raises(TaskError, match=where):
            scheduler.run(graph)


@pytest.mark.parametrize(
    ("over", "call", "error", "message"),
    [
        (
            10,
            lambda x: lambda i: (x[i : i + 2], 1.0),
            IndexError,
            "tensor 'x': axis 0 has 10 elements, got slice(9, 11, None), in iteration 9",
        ),
        (range(3), lambda x: lambda i: (x[i - 1 : i], 1.0), IndexError, "axis 0 has 10 elements, got slice(-1, 0, None), in iteration 0"),
        (6, lambda x: lambda i: (x.cell(i), 1.0), IndexError, "tensor 'x' has a grid of 5, got cell (5,), in iteration 5"),
        ((2, 5), lambda x: lambda i, j: (x.cell(i * j), 1.0), None, ""),
        ((2, 7), lambda x: lambda i, j: (x.cell(i * j), 1.0), IndexError, "got cell (5,), in iteration (1, 5)"),
        (
            4,
            lambda x: lambda i: (x[i : i + 3][i : i + 1], 1.0),
            IndexError,
            "tile x[3:6]: axis 0 has 3 elements, got slice(3, 4, None), in iteration 3",
        ),
        (4, lambda x: lambda i: (x[i], 1.0), ShapeError, "scale: 'x' wants 1 dimensions (N), got shape ()"),
        (4, lambda x: lambda i: (x[i : i + 1], i * 1j), TypeError, "unsupported operand"),
        (4, lambda x: lambda i: (x[i : i + 1],), TypeError, "scale takes 2 arguments (x, by), got 1"),
        (4, lambda x: lambda i: (x[i : i + 1], "2"), TypeError, "scale: 'by' wants a constant (float), got a str"),
        (4, lambda x: lambda i: x[i : i + 1], TypeError, "returns the arguments of a call, a tuple; got a EachTile"),
        (4, lambda x: lambda i: (x[i : min(i, 3)], 1.0), TypeError, "is called once, for all iterations"),
        (2.5, lambda x: lambda i: (x[i : i + 1], 1.0), TypeError, "a loop goes over a range"),
    ],
)
def test_what_is_wrong_is_said_of_the_first_iteration(over, call, error, message):
    """In the words of spawn; nothing is recorded then."""
    x, graph = wrap(np.zeros(10), 2, "x"), Graph()
    if error is None:
        graph.spawn_each(scale, over, call(x))
        assert len(graph.tasks) == 10
        return
    with pytest.raises(error, match=re.escape(message)):
        graph.spawn_each(scale, over, call(x))
    assert not len(graph.tasks)


def test_written_tiles_may_not_overlap():
    """Of one call; the first iteration is named in which they do."""
    x, graph = wrap(np.zeros((8, 4), U64), (1, None), "x"), Graph()
    with pytest.raises(AccessError, match="'out' and 'a' overlap in x; declare one InOut instead, in iteration 5"):
        graph.spawn_each(mix, 8, lambda i: (x[i : i + 1], x[5:6], 1))
    read_only = np.zeros((2, 2), U64)
    read_only.flags.writeable = False
    with pytest.raises(AccessError, match="read-only"):
        graph.spawn_each(mix, 2, lambda i: (wrap(read_only, (1, None))[i : i + 1], x[5:6], 1))
    assert not len(graph.tasks)


@pytest.mark.parametrize(
    ("call", "grainsize", "message"),
    [
        (lambda x, y: lambda i: (x[2 * i : 2 * i + 1], 1.0), 2, "the tiles of 'x' do not touch each other"),
        (lambda x, y: lambda i: (x[i], i * 1.0), 2, "'by' is a constant that changes with index 0"),
        (lambda x, y: lambda i: (y[i, i : i + 1], 1.0), 2, "'x' moves along axes [0, 1] with index 0"),
        (lambda x, y: lambda i: (x[i], 1.0), 0, "grainsize is 1 at least, got 0"),
        (lambda x, y: lambda i: (x[i], 1.0), (1, 2), "grainsize has 2 numbers for 1 indices"),
    ],
)
def test_what_cannot_be_joined(call, grainsize, message):
    """Tiles that make no rectangle, and a constant that is not one."""
    x, y, graph = wrap(np.zeros(10), 2, "x"), wrap(np.zeros((10, 10)), (2, 2), "y"), Graph()
    with pytest.raises(ValueError, match=re.escape(message)):
        graph.spawn_each(scale, 4, call(x, y), grainsize=grainsize)
    with pytest.raises(TypeError, match="grainsize is a number of iterations"):
        graph.spawn_each(scale, 4, call(x, y), grainsize=1.5)
    assert not len(graph.tasks)


def test_no_iterations_no_tasks():
    """The function is not asked then: it might name tiles that are not there."""
    graph = Graph()
    assert graph.spawn_each(scale, range(0), lambda i: 1 / 0) == range(0)
    assert not len(graph.tasks)
