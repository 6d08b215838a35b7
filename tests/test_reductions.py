"""Reductions: tasks of a group run at the same time, on copies, and a tree that the program fixes combines them; concurrent tasks.

Drawings: time runs to the right, `a-->b` means b waits for a, and x' are the copies of x.
"""

import pickle
import threading

import numpy as np
import pytest
from plain_kernels import change, make, read, tensor

from taskgpt.config import load_scheduler
from taskgpt.schedulers import open_scheduler
from taskgpt.tasks import (
    AccessError,
    Arena,
    Combiner,
    Commutative,
    Concurrent,
    Graph,
    GridError,
    In,
    InOut,
    Kernel,
    Reduction,
    TaskError,
    Tensor,
    TensorSpec,
    check,
    coarsen,
    dims,
    kernel,
    run_now,
    wrap,
)
from taskgpt.tasks.combiners import OPERATORS

N, M, R, C = dims("N M R C")
SCHEDULERS = {
    "sequential": {},
    "loops": {"workers": 3},
    "threads": {"workers": 2},
    "native": {"workers": 1},
    "native-longest-path": {"workers": 4},
}


@kernel
def add(total: Reduction["+", N], inp: In[M]):
    total += inp.sum()


@add.compiled
def _(total, inp):
    for n in range(total.shape[0]):
        total[n] += inp.sum()


@kernel
def highest(total: Reduction["max", N], inp: In[M]):
    np.maximum(total, inp.max(), out=total)


def listing(*calls) -> list[str]:
    """Return a line for each task of the program: kernels, what it waits for."""
    graph = Graph()
    for each, *tiles in calls:
        graph.spawn(each, *tiles)
    return [
        f"{t.number} {' '.join(c.kernel.name for c in t.calls)} <- {' '.join(map(str, t.predecessors))}".strip(" <-") for t in graph.tasks
    ]


def results(graph: Graph, outputs: dict[str, np.ndarray], begin) -> dict[str, bytes]:
    """Run the graph under every scheduler; return the bits of the outputs, which must always be the same."""
    found = {}
    for name, settings in SCHEDULERS.items():
        begin()
        chosen = load_scheduler(name, settings)
        with open_scheduler(chosen.scheduler, chosen.settings) as scheduler:
            scheduler.run(graph)
        found[name] = {key: array.tobytes() for key, array in outputs.items()}
        assert found[name] == found["sequential"], name
    return found["sequential"]


# --- which tasks there are


def test_a_group_is_a_tree():
    """Five tasks: the first on the tile itself, four on copies; then pairs, in an order that the program alone fixes.

    0 add x  ----------> 5 x += x'1 ----------------> 7 x += x'2 --> 8 x += x'4 --> 9 read x
    1 add x'1 ---------'                            /              /
    2 add x'2 ----------> 6 x'2 += x'3 ------------'              /
    3 add x'3 ----------'                                        /
    4 add x'4 --------------------------------------------------'
    """
    graph, x, y = Graph(), tensor(4), tensor(name="y")
    for _ in range(5):
        graph.spawn(add, x[0:4], y[:])
    graph.spawn(read, x[:])
    assert graph.listing() == (
        "0 add reduction(+: x[:]) in(y[:])\n"
        "1 begin_sum out(x[:]'1[:]); add reduction(+: x[:]'1[:]) in(y[:])\n"
        "2 begin_sum out(x[:]'2[:]); add reduction(+: x[:]'2[:]) in(y[:])\n"
        "3 begin_sum out(x[:]'3[:]); add reduction(+: x[:]'3[:]) in(y[:])\n"
        "4 begin_sum out(x[:]'4[:]); add reduction(+: x[:]'4[:]) in(y[:])\n"
        "5 combine_sum inout(x[:]) in(x[:]'1[:]) <- 0 1\n"
        "6 combine_sum inout(x[:]'2[:]) in(x[:]'3[:]) <- 2 3\n"
        "7 combine_sum inout(x[:]) in(x[:]'2[:]) <- 5 6\n"
        "8 combine_sum inout(x[:]) in(x[:]'4[:]) <- 4 7\n"
        "9 read in(x[:]) <- 8\n"
    )
    assert repr(add) == "task add reduction(+: total) in(inp)"


def test_only_the_first_and_the_combining_wait_for_what_was_before():
    """Copies begin with what changes nothing, so who fills them need not wait for the tile."""
    x, y = tensor(), tensor(name="y")
    assert listing((make, x[:]), (add, x[:], y[:]), (add, x[:], y[:])) == [
        "0 make",
        "1 add <- 0",
        "2 begin_sum add",
        "3 combine_sum <- 1 2",
    ]


def test_one_task_is_no_group():
    """It works on the tile, and nothing is combined."""
    x, y = tensor(), tensor(name="y")
    assert listing((make, x[:]), (add, x[:], y[:]), (read, x[:])) == ["0 make", "1 add <- 0", "2 read <- 1"]


@pytest.mark.parametrize(
    ("other", "is_ended"),
    [
        (lambda x, y: (read, x[:]), True),
        (lambda x, y: (change, x[3:4]), True),
        (lambda x, y: (highest, x[0:2], y[:]), True),
        (lambda x, y: (add, x[0:1], y[:]), True),
        (lambda x, y: (add, x[0:2], x[7:8]), False),
        (lambda x, y: (add, x[4:8], y[:]), False),
        (lambda x, y: (change, y[:]), False),
    ],
    ids=["read", "write beside it in its cell", "another operator", "another tile", "same", "another cell", "another tensor"],
)
def test_what_ends_a_group(other, is_ended):
    """Whatever touches a cell of the tile otherwise; not what has nothing to do with it."""
    x, y = tensor(8, 4), tensor(name="y")
    found = listing((add, x[0:2], y[:]), (add, x[0:2], y[:]), other(x, y), (add, x[0:2], y[:]))
    assert (found[2] == "2 combine_sum <- 0 1") == is_ended


def test_looking_at_a_graph_ends_its_groups():
    """Every task is there when somebody looks, and recording goes on."""
    graph, x, y = Graph(), tensor(4), tensor(name="y")
    graph.spawn(add, x[:], y[:])
    graph.spawn(add, x[:], y[:])
    assert [kernel.name for kernel in graph.kernels] == ["add", "begin_sum", "combine_sum"]
    assert len(graph.tasks) == 3
    graph.spawn(add, x[:], y[:])
    assert len(graph.edges) == 3
    assert len(graph.tasks) == 4


def test_a_call_that_reads_beside_what_it_reduces_keeps_its_place():
    """In one cell, there is nothing to gain: the tasks run in the program's order.

    x: |total inp . .|
    """
    x = tensor(4)
    assert listing((add, x[0:1], x[1:2]), (add, x[0:1], x[1:2]), (change, x[1:2])) == ["0 add", "1 add <- 0", "2 change <- 1"]


def test_a_call_that_is_refused_ends_nothing():
    """A wrong call leaves the graph as it was."""
    graph, x, y = Graph(), tensor(8), tensor(name="y")
    graph.spawn(add, x[0:4], y[:])
    with pytest.raises(AccessError):
        graph.spawn(add, x[0:4], x[2:6])
    with pytest.raises(GridError):
        graph.spawn(read, wrap(x.array[1:])[:])
    graph.spawn(add, x[0:4], y[:])
    assert [task.name for task in graph.tasks] == ["add", "add", "combine_sum"]


def test_memory_does_not_grow_with_tasks():
    """A tile has at most 64 slots, fewer if it is large; tasks take turns, those of one slot in order."""
    graph, x, y = Graph(), tensor(4), tensor(name="y")
    for _ in range(1000):
        graph.spawn(add, x[:], y[:])
    tiles = {call.args[0].tensor: None for task in graph.tasks for call in task.calls}
    assert sum(each.array.nbytes for each in tiles) == 64 * x.array.nbytes
    assert graph.tasks[65].predecessors == (1,)
    assert len(graph.tasks) == 1000 + 63
    assert max(graph.depths()) + 1 == 16 + 6  # 1000 / 64 in a row, then a tree of 64


def test_large_tiles_have_few_copies_and_small_groups_as_many_as_they_have_tasks():
    """16 MiB of copies, or four slots; no memory for slots that nobody uses."""
    large, x, y = Tensor("large", np.zeros(1 << 20, np.float32)), tensor(4), tensor(name="y")
    for tile, tasks, slots in (large[:], 9, 4), (large[0 : 1 << 18], 30, 16), (x[:], 3, 3), (x[:], 2, 2):
        graph = Graph()
        for _ in range(tasks):
            graph.spawn(add, tile, y[:])
        assert len({task.calls[-1].args[0] for task in graph.tasks if task.name == "add"}) == slots


def test_combining_has_the_section_and_the_highest_priority_of_its_group():
    """It belongs to what it combines, and nothing of it can go on before."""
    graph, x, y = Graph(), tensor(4), tensor(name="y")
    for priority in 1, 7, 3:
        graph.spawn(add, x[:], y[:], section=("loss", 2), priority=priority)
    assert [(t.section, t.priority) for t in graph.tasks if t.name == "combine_sum"] == [(("loss", 2), 7)] * 2


# --- what they compute

TYPES = [np.float16, np.float32, np.float64, np.complex64, np.complex128, np.bool_, np.int8, np.int64, np.uint8, np.uint64]
FITTING = [(sign, dtype) for sign, each in OPERATORS.items() for dtype in TYPES if np.dtype(dtype).kind in each.kinds]


@pytest.mark.parametrize(("sign", "dtype"), FITTING, ids=lambda each: getattr(each, "__name__", each))
def test_operators(sign, dtype):
    """Every operator on every type, on tiles of one and two axes: NumPy's value, and the same bits under every scheduler."""
    dtype, ufunc = np.dtype(dtype), OPERATORS[sign].combine

    @kernel
    def reduce_into(total: Reduction[sign, R, C, dtype], line: Reduction[sign, C, dtype], inp: In[R, C, dtype]):
        ufunc(total, inp, out=total)
        for row in inp:
            ufunc(line, row, out=line)

    draw = np.random.default_rng(3)
    values = draw.integers(0, 2, (70, 3, 4)) if dtype.kind in "bu" else draw.integers(-2, 3, (70, 3, 4))
    specs = {
        "total": TensorSpec((3, 8), (None, 4), dtype),
        "line": TensorSpec((4,), (), dtype),
        "inp": TensorSpec((210, 4), (3, None), dtype),
    }
    a, graph = Arena(specs), Graph()
    a.inp.array[...] = values.reshape(210, 4).astype(dtype)
    for at in range(0, 210, 3):
        graph.spawn(reduce_into, a.total[:, 4:8], a.line[:], a.inp[at : at + 3])

    def begin():
        a.total.array[...], a.line.array[...] = 1, 1

    results(graph, {"total": a.total.array, "line": a.line.array}, begin)
    wanted = ufunc.reduce(a.inp.array.reshape(70, 3, 4), axis=0, dtype=dtype, initial=1)
    np.testing.assert_array_equal(a.total.array[:, 4:8], wanted)
    np.testing.assert_array_equal(a.total.array[:, :4], np.ones((3, 4), dtype))
    np.testing.assert_array_equal(a.line.array, ufunc.reduce(a.inp.array, axis=0, dtype=dtype, initial=1))


@pytest.mark.parametrize(
    ("sign", "dtype"), [each for each in FITTING if each[1] is not np.float16], ids=lambda each: getattr(each, "__name__", each)
)
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 2)])
def test_twins_combine_as_numpy_does(sign, dtype, shape):
    """Also NaN, and rows that lie apart."""
    from taskgpt.tasks.reductions import beginning, combining

    dtype, operator = np.dtype(dtype), OPERATORS[sign]
    draw = np.random.default_rng(1)
    into, part = (draw.integers(0, 100, (*shape[:-1], 7)).astype(dtype)[..., : shape[-1]] for _ in range(2))
    if len(shape) == 1:
        into, part = into.copy(), part.copy()
    if dtype.kind in "fc":
        into.flat[0], part.flat[1] = np.nan, np.nan
    wanted = operator.combine(into, part)
    combining(operator, dtype, len(shape))(into, part)
    np.testing.assert_array_equal(into, wanted)
    copy = np.empty(shape, dtype)
    beginning(operator, dtype, len(shape))(copy)
    np.testing.assert_array_equal(operator.combine(copy, wanted), wanted)


def test_sums_are_the_same_whatever_runs_them():
    """Rounding shows every order: it is the same under every scheduler, however often the graph runs, and while its runs overlap."""
    a = Arena({"x": TensorSpec((1000,), (3,)), "total": TensorSpec((1,)), "sums": TensorSpec((4,), (1,))})
    a.x.array[...] = np.random.default_rng(0).standard_normal(1000, np.float32) * 1000
    graph = Graph()

    @kernel
    def keep(sums: InOut[N], total: InOut[M]):
        sums += total[0]
        total[0] = 0

    for _ in range(3):
        for at in range(0, 1000, 3):
            graph.spawn(add, a.total[:], a.x[at : min(1000, at + 3)])
        graph.spawn(keep, a.sums[0:1], a.total[:])

    def begin():
        a.total.array[...] = a.sums.array[...] = 0

    once = results(graph, {"sums": a.sums.array}, begin)
    assert np.frombuffer(once["sums"], np.float32)[0] == pytest.approx(3 * a.x.array.sum(dtype=np.float64), rel=1e-3)
    found = set()
    for name in "sequential", "native":
        begin()
        chosen = load_scheduler(name, {"workers": 1 if name == "sequential" else 3})
        with open_scheduler(chosen.scheduler, chosen.settings) as scheduler:
            for _ in scheduler.run_each([graph] * 5):
                pass
        found.add(a.sums.array.tobytes())
    assert len(found) == 1


def test_without_a_graph_the_tile_itself_is_given():
    """run_now combines in the order of the program."""
    x, y = tensor(2), tensor(name="y")
    x.array[:], y.array[:] = 5, 1
    for _ in range(3):
        run_now(add, x[0:1], y[:])
    assert x.array.tolist() == [29, 5]


def test_a_graph_with_reductions_goes_to_another_process():
    """Tasks, copies and the kernels that were made for them."""
    a = Arena({"x": TensorSpec((4,)), "y": TensorSpec((4,))}, shared=True)
    a.y.array[...] = 1
    graph = Graph()
    for _ in range(5):
        graph.spawn(add, a.x[:], a.y[:])
    sent = pickle.loads(pickle.dumps(graph))
    for task in sent.tasks:
        task.run()
    assert a.x.array.tolist() == [20] * 4
    assert all(kernel.is_importable for kernel in graph.kernels)


def test_a_coarsened_graph_gives_the_same_bits():
    """Merged tasks fill their copies first."""
    x, y = tensor(4), tensor(200, 1, "y")
    y.array[...] = np.random.default_rng(0).standard_normal(200)
    graph = Graph()
    for at in range(200):
        graph.spawn(add, x[:], y[at : at + 1])
    found = []
    for each in graph, coarsen(graph, 7):
        x.array[...] = 0
        for task in each.tasks:
            task.run()
        found.append(x.array.tobytes())
    assert found[0] == found[1]


# --- reductions of one's own

Best = np.dtype([("value", np.float32), ("at", np.int64)])


@kernel
def better(into: InOut[N, Best], part: In[N, Best]):
    """Keep the greatest value, of several the first."""
    wins = (part["value"] > into["value"]) | ((part["value"] == into["value"]) & (part["at"] < into["at"]))
    into[wins] = part[wins]


BEST = Combiner((-np.inf, np.iinfo(np.int64).max), better)
HYPOT = Combiner(0, np.hypot)


@kernel
def find(best: Reduction[BEST, 1, Best], x: In[N], first: int):
    at = x.argmax()
    better.body(best, np.array([(x[at], first + at)], Best))


@kernel
def norm(total: Reduction[HYPOT, 1, np.float64], x: In[N]):
    total[...] = np.hypot(total, np.linalg.norm(x.astype(np.float64)))


def test_combiners_of_users():
    """A kernel on tiles of a structured type finds the greatest element and where it is; a function of NumPy's makes a norm."""
    specs = {"x": TensorSpec((300,), (4,)), "best": TensorSpec((1,), (), Best), "norm": TensorSpec((1,), (), np.dtype(np.float64))}
    a, graph = Arena(specs, shared=True), Graph()
    a.x.array[...] = np.random.default_rng(2).standard_normal(300)
    for at in range(0, 300, 4):
        graph.spawn(find, a.best[:], a.x[at : at + 4], at)
        graph.spawn(norm, a.norm[:], a.x[at : at + 4])

    def begin():
        a.best.array[...], a.norm.array[...] = BEST.neutral, 0

    results(graph, {"best": a.best.array, "norm": a.norm.array}, begin)
    assert a.best.array[0]["at"] == a.x.array.argmax() and a.best.array[0]["value"] == a.x.array.max()
    np.testing.assert_allclose(a.norm.array, np.linalg.norm(a.x.array.astype(np.float64)))
    sent = pickle.loads(pickle.dumps(graph))
    begin()
    for task in sent.tasks:
        task.run()
    assert a.best.array[0]["at"] == a.x.array.argmax()
    assert [(each.name, each.is_importable) for each in graph.kernels if "hypot" in each.name] == [
        ("begin_hypot", True),
        ("combine_hypot", True),
    ]


@kernel
def not_one(into: InOut[N], part: In[N], weight: float):
    into += part


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (("-", N), r"Reduction\[...\] takes first one of \+ \* min max and or, or a Combiner"),
        (N, "takes first one of"),
        (("+",), r"Reduction\[...\] takes"),
        (("min", N, np.complex64), "'min' is not for complex64"),
        (("and", N), "'and' is not for float32"),
        (("+", N, Best), "a Combiner of your own may be"),
    ],
    ids=repr,
)
def test_declarations_that_cannot_be(items, message):
    """A slip shows where it is made."""
    with pytest.raises(TypeError, match=message):
        Reduction[items]


def test_a_kernel_that_cannot_combine_is_refused_when_the_first_task_is_made():
    """It takes two tiles as they are reduced, and nothing else."""

    @kernel
    def careless(total: Reduction[Combiner(0, not_one), N]):
        pass

    graph = Graph()
    with pytest.raises(TypeError, match=r"not_one cannot combine copies of this tile; it must take into: InOut\[...\], part: In\[...\]"):
        graph.spawn(careless, tensor()[:])
    assert not graph.tasks


# --- --check


@kernel
def overwrite(total: Reduction["+", N], inp: In[M]):
    total[:] = inp.sum()


@kernel
def overwrite_some(total: Reduction["min", N], inp: In[M]):
    total[0] = inp.min()
    total[1:] = np.minimum(total[1:], inp.min())


@pytest.mark.parametrize(("wrong", "message"), [(overwrite, "overwrote 4 of 4 elements"), (overwrite_some, "overwrote 1 of 4 elements")])
def test_a_kernel_that_overwrites_is_found(wrong, message):
    """Also by the task on the tile itself, whose result happens to be right."""
    graph, x, y = Graph(), tensor(4), tensor(name="y")
    y.array[:] = 3
    graph.spawn(wrong, x[:], y[:])
    with pytest.raises(TaskError, match=f"{message} of 'total', declared Reduction"):
        check(graph).tasks[0].run()


def test_kernels_that_combine_pass_the_check_with_the_same_bits():
    """Bodies and twins, whatever they find: also sums that are too large for one more to show."""
    x, z, y = tensor(4), tensor(4, name="z"), tensor(300, 3, "y")
    y.array[...] = np.random.default_rng(0).standard_normal(300) * 1e20
    graph = Graph()
    for at in range(0, 300, 3):
        graph.spawn(add, x[:], y[at : at + 3])
        graph.spawn(highest, z[:], y[at : at + 3])
    found = []
    for each in graph, check(graph):
        x.array[...] = z.array[...] = 0
        for task in each.tasks:
            task.run()
        found.append(x.array.tobytes() + z.array.tobytes())
    assert found[0] == found[1]


# --- concurrent


@kernel
def join(x: Concurrent[N]):
    pass


@kernel
def pour(x: Commutative[N]):
    pass


def test_concurrent_tasks_wait_for_others_and_not_for_each_other():
    """The program says that they are safe; whatever else touches the tile is ordered. A commutative group is another one.

    0 make --> 1 join --> 3 read --> 4 join --> 6 pour
          `--> 2 join --'      `--> 5 join --'
    """
    x = tensor()
    calls = [make, join, join, read, join, join, pour]
    assert listing(*((each, x[:]) for each in calls)) == [
        "0 make",
        "1 join <- 0",
        "2 join <- 0",
        "3 read <- 1 2",
        "4 join <- 3",
        "5 join <- 3",
        "6 pour <- 4 5",
    ]
    graph = Graph(allow_commutative=True)
    for each in join, pour, pour, join:
        graph.spawn(each, x[:])
    assert [task.predecessors for task in graph.tasks] == [(), (0,), (0,), (1, 2)]
    assert [len(task.locks) for task in graph.tasks] == [0, 1, 1, 0]


def test_concurrent_tasks_run_at_the_same_time():
    """Two of them meet in the middle of their bodies."""
    meet = threading.Barrier(2, timeout=60)

    @kernel
    def wait(x: Concurrent[N], at: int):
        meet.wait()
        x[at] = at + 1

    graph, x = Graph(), tensor(2)
    graph.spawn(wait, x[:], 0)
    graph.spawn(wait, x[:], 1)
    for name in "native", "threads":
        x.array[:] = 0
        chosen = load_scheduler(name, {"workers": 2})
        with open_scheduler(chosen.scheduler, chosen.settings) as scheduler:
            scheduler.run(graph)
        assert x.array.tolist() == [1, 2]


@kernel
def count_some(histogram: Concurrent[N, np.int64], at: int):
    histogram[at] += 1


def test_concurrent_tasks_are_checked_one_at_a_time():
    """Each brings back a whole tile, and none loses what another did."""
    x = Tensor("histogram", np.zeros(50, np.int64), (10,))
    graph = Graph()
    for at in range(50):
        graph.spawn(count_some, x[:], at)
    checked = check(graph)
    assert all(task.locks == checked.tasks[0].locks for task in checked.tasks) and len(checked.tasks[0].locks) == 1
    chosen = load_scheduler("native", {"workers": 4})
    with open_scheduler(chosen.scheduler, chosen.settings) as scheduler:
        scheduler.run(checked)
    assert (x.array == 1).all()


def test_every_kernel_of_this_file_prints():
    """With the kind of each access."""
    found = [repr(each) for each in globals().values() if isinstance(each, Kernel)]
    assert "task find reduction(better: best) in(x)" in found and "task join concurrent(x)" in found
