"""--check runs every call on copies that show what it did: undeclared writes are named, and correct kernels give the same bits.

One task per test; the drawing is its tile, with what the kernel does to it.
"""

import pickle

import numba
import numpy as np
import pytest

from taskgpt.tasks import (
    AccessError,
    Arena,
    Commutative,
    Graph,
    In,
    InOut,
    Out,
    Scratch,
    TaskError,
    Tensor,
    TensorSpec,
    check,
    coarsen,
    dense,
    dims,
    kernel,
    run_now,
)
from taskgpt.tasks.blas import gemm

R, C, OC = dims("R C OC")


@kernel
def gelu_forward(out: Out[R, C], inp: In[R, C]):
    inp *= 2
    out[...] = inp


@kernel
def scale_by_itself(x: InOut[R, C], factor: In[R, C]):
    x *= 2
    factor *= 1  # writes, and leaves the same values


@kernel
def fill_some(out: Out[R, C], inp: In[R, C]):
    out[1:] = inp[1:]


@kernel
def accumulate(out: Out[R, C], inp: In[R, C]):
    out += inp


@kernel
def add(total: Commutative[R, C], inp: In[R, C]):
    total += inp


@kernel
def count(out: Out[R, np.int32], ids: In[R, np.int32]):
    out[1:] = ids[1:] + 1


@kernel
def rename(ids: In[R, np.int32], out: Out[R, np.int32]):
    ids[0] = 7
    out[:] = ids


@kernel
def matmul_forward(out: Out[R, OC], inp: In[R, C], weight: In[OC, C], bias: In[OC]):
    """out = inp @ weight.T + bias."""
    np.matmul(inp, weight.T, out=out)
    out += bias


@matmul_forward.compiled
def matmul_forward(out, inp, weight, bias):
    gemm(out, inp, weight, 0, 1, 1.0, 0.0)
    for r in range(out.shape[0]):
        row = dense(out[r])
        for c in range(row.shape[0]):
            row[c] += bias[c]


@kernel
def write_at(out: InOut[R, C], row: int, column: int):
    out[row, column] = 1


@write_at.compiled
def write_at(out, row, column):
    out[row, column] = 1


@kernel
def read_at(out: Out[1], inp: In[R, C], row: int):
    out[0] = inp[row, 0]


@read_at.compiled
def read_at(out, inp, row):
    out[0] = inp[row, 0]


@kernel
def matmul_all_rows(out: InOut[R, C], inp: In[OC, C]):
    """Correct for OC = R; otherwise the twin writes OC rows."""
    out[:] = inp[: out.shape[0]]


@matmul_all_rows.compiled
def matmul_all_rows(out, inp):
    taller = np.lib.stride_tricks.as_strided(out, (inp.shape[0], inp.shape[1]), out.strides)
    gemm(taller, inp, np.eye(inp.shape[1], dtype=np.float32), 0, 0, 1.0, 0.0)


@kernel
def write_read_only(out: InOut[R, C], inp: In[R, C]):
    """The body behaves; the twin writes `inp` in a way that numba's types do not see."""
    out += inp


@write_read_only.compiled
def write_read_only(out, inp):
    inp.flat[0] = 7


@kernel
def remember(out: Out[R], inp: In[R], work: Scratch[R]):
    """Wrong: uses what an earlier call may have left."""
    work += inp
    out[:] = work


@kernel
def spill(out: Out[R], work: Scratch[R]):
    out[:] = 1


@spill.compiled
def spill(out, work):
    out[:] = 1
    work[out.shape[0]] = 1


@kernel
def borrow(out: Out[R], inp: In[R], work: Scratch[R]):
    work[:] = inp
    out[:] = work


def tensor(*shape: int, name: str = "x", dtype: type = np.float32) -> Tensor:
    return Tensor(name, np.arange(np.prod(shape), dtype=dtype).reshape(shape))


def checked_error(kernel, *args) -> str:
    """Return what check has to say about one call; the error's cause is an AccessError, and no tensor has changed."""
    graph = Graph()
    graph.spawn(kernel, *args)
    before = [tile.tensor.array.copy() for _, tile in graph.tasks[0].calls[0].tiles()]
    with pytest.raises(TaskError) as error:
        check(graph).tasks[0].run()
    assert isinstance(error.value.__cause__, AccessError)
    for (_, tile), array in zip(graph.tasks[0].calls[0].tiles(), before, strict=True):
        np.testing.assert_array_equal(tile.tensor.array, array)
    return str(error.value.__cause__)


# --- what is caught


def test_a_body_that_writes_an_in_tile():
    """The kernel and the parameter are named: the declaration or the body is wrong, and the reader knows which line to look at.

    inp  . . .        inp *= 2        declared In
         . . .
    """
    assert checked_error(gelu_forward, tensor(2, 3)[:], tensor(2, 3, name="y")[:]) == "gelu_forward wrote 'inp', declared In"


def test_a_twin_that_writes_an_in_tile():
    """Numba refuses to compile it, and the message is that of a body."""

    @kernel
    def gelu_forward(out: Out[R, C], inp: In[R, C], weight: In[C]):
        out[...] = inp * weight

    @gelu_forward.compiled
    def gelu_forward(out, inp, weight):
        inp[0, 0] = weight[0]

    message = checked_error(gelu_forward, tensor(2, 3)[:], tensor(2, 3, name="y")[:], tensor(3, name="w")[:])
    assert message == "gelu_forward wrote 'inp', declared In"


def test_a_body_that_writes_the_same_values():
    """Also a write that changes nothing is a write, and the task does not run twice on its InOut tile as if it had been right."""
    message = checked_error(scale_by_itself, tensor(2, 3)[:], tensor(2, 3, name="y")[:])
    assert message == "scale_by_itself wrote one of 'factor', declared In, with the values that it had"


def test_a_twin_that_writes_an_in_tile_behind_the_types():
    """What numba's read-only types let through at compile time, a changed byte gives away at run time."""
    message = checked_error(write_read_only, tensor(2, 3)[:], tensor(2, 3, name="y")[:])
    assert message == "write_read_only wrote 'inp', declared In"


@pytest.mark.parametrize(
    "row, column", [(3, 0), (-4, 0), (0, 4), (2, 4), (0, -5), (3, 4)], ids=["below", "above", "right", "last right", "left", "corner"]
)
def test_a_twin_that_writes_around_its_tile(row, column):
    """Compiled code does not check indices: a write beyond an edge lands in a border put there to catch it, not in a neighbour's tile.

    . # . . . . .
    . +---------+ #        # = writes that are caught; the tile is 3 x 4
    # |         | .
    . |         | .
    . +---------+ #
    . # . . . . # .
    """
    assert checked_error(write_at, tensor(9, 9)[3:6, 2:6], row, column) == "write_at wrote outside its tile 'out', x[3:6, 2:6]"


@pytest.mark.parametrize("row, column", [(0, 23), (0, 400), (90, 0), (-90, 0), (1, -20), (10**9, 0)])
def test_a_twin_that_writes_far_away(row, column):
    """Past the border, into another row, or where the process has no memory: the index is checked before anything is written."""
    message = checked_error(write_at, tensor(9, 9)[3:6, 2:6], row, column)
    assert message in ("write_at wrote outside its tile 'out', x[3:6, 2:6]", "write_at used an index outside of 'out', x[3:6, 2:6]")


@numba.njit
def write_row(row, at):
    row[at] = 1


@kernel
def write_by_helper(out: InOut[R, C], at: int):
    out[-1, at] = 1


@write_by_helper.compiled
def write_by_helper(out, at):
    write_row(dense(out[out.shape[0] - 1]), at)


def test_a_helper_that_writes_outside_of_a_tile():
    """Helpers are checked too, also those that were compiled before without; and the kernel itself goes on without checks."""
    x = tensor(9, 9)
    run_now(write_by_helper, x[3:6, 2:6], 1)
    assert checked_error(write_by_helper, x[3:6, 2:6], 4) == "write_by_helper wrote outside its tile 'out', x[3:6, 2:6]"
    assert checked_error(write_by_helper, x[3:6, 2:6], 40).startswith("write_by_helper ")
    run_now(write_by_helper, x[3:6, 2:6], 4)  # wrong, and in the neighbour's tile: what --check is for
    assert x.array[5, 6] == 1


@kernel
def write_block(out: InOut[R, C], down: int, right: int):
    """Right without an offset; the twin makes itself a larger array, as an intrinsic may, and writes the block that lies there."""
    out[:] = 1


@write_block.compiled
def write_block(out, down, right):
    rows, columns = out.shape
    larger = np.lib.stride_tricks.as_strided(out, (2 * rows, 2 * columns), out.strides)
    larger[down * rows : (down + 1) * rows, right * columns : (right + 1) * columns] = 1


@pytest.mark.parametrize("rows, columns", [(4, 30), (30, 4), (1, 100), (100, 1)])
@pytest.mark.parametrize("down, right", [(1, 0), (0, 1), (1, 1)])
def test_a_block_too_far(rows, columns, down, right):
    """Where no index can be checked, the border is as wide as the tile: the block below, beside or across the corner is caught whole."""
    tile = tensor(200, 200)[0:rows, 0:columns]
    assert checked_error(write_block, tile, down, right) == f"write_block wrote outside its tile 'out', x[0:{rows}, 0:{columns}]"


def test_a_block_in_its_place():
    """The same kernel, right."""
    x, graph = tensor(9, 9), Graph()
    graph.spawn(write_block, x[3:6, 2:6], 0, 0)
    check(graph).tasks[0].run()
    assert (x.array[3:6, 2:6] == 1).all()


def test_a_negative_index_within_the_tile_is_python():
    """-1 is the last row, in compiled code as in NumPy: inside the tile, and nobody's business."""
    x, graph = tensor(9, 9), Graph()
    graph.spawn(write_at, x[3:6, 2:6], -1, -1)
    check(graph).tasks[0].run()
    assert x.array[5, 5] == 1


def test_a_product_that_is_too_large():
    """gemm trusts its shapes: a product with more rows than its tile writes below it, and is caught.

    out  +-----+      inp has 3 rows
         |# # #|
         |# # #|
         +-----+
          # # #       the third row
    """
    message = checked_error(matmul_all_rows, tensor(4, 3)[0:2], tensor(3, 3, name="y")[:])
    assert message == "matmul_all_rows wrote outside its tile 'out', x[0:2, :]"


def test_an_out_tile_that_is_not_written_whole():
    """Out promises that every element is written: without it, what was there before would show through in some orders and not in others.

    out  ? ? ?        stays as it was: 3 of 6
         # # #
    """
    message = checked_error(fill_some, tensor(2, 3)[:], tensor(2, 3, name="y")[:])
    assert message == "fill_some left 3 of 6 elements of 'out' unwritten or NaN, declared Out"


def test_an_out_tile_that_is_read_first():
    """Out tiles start as NaN, so a kernel that adds to what it should write shows NaN at once: it wants InOut."""
    message = checked_error(accumulate, tensor(2, 3)[:], tensor(2, 3, name="y")[:])
    assert message == "accumulate left 6 of 6 elements of 'out' unwritten or NaN, declared Out"


def test_a_read_outside_of_a_tile():
    """A read beyond the edge changes nothing that could be seen; numba checks the index, and does not say of which array."""
    message = checked_error(read_at, tensor(1, name="y")[:], tensor(9, 9)[3:6, 2:6], 3)
    assert message == "read_at used an index outside of one of 'out', y[:]; 'inp', x[3:6, 2:6]"


def test_scratch_that_is_read_first():
    """Scratch starts as NaN: a kernel that relies on what was there shows NaN, and not only in some order of tasks."""
    message = checked_error(remember, tensor(3)[:], tensor(3, name="y")[:])
    assert message == "remember left 3 of 3 elements of 'out' unwritten or NaN, declared Out"


def test_a_write_outside_of_scratch():
    """What lies behind a kernel's scratch is another array of it, or the end of the buffer."""
    assert checked_error(spill, tensor(3)[:]) == "spill wrote outside its scratch 'work' of shape (3,)"


def test_scratch_used_well():
    """Nothing to report, and the result is there."""
    x, y, graph = tensor(3), tensor(3, name="y"), Graph()
    graph.spawn(borrow, x[:], y[:])
    y.array += 1
    check(graph).tasks[0].run()
    assert x.array.tolist() == [1, 2, 3]


def test_integer_tiles():
    """Token ids have no NaN; the smallest integer, which nobody counts to, takes its place."""
    ids, out = tensor(4, dtype=np.int32), tensor(4, name="y", dtype=np.int32)
    assert checked_error(count, out[:], ids[:]) == "count left 1 of 4 elements of 'out' unwritten, declared Out"
    assert checked_error(rename, ids[:], out[:]) == "rename wrote 'ids', declared In"


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int8, np.float64, np.longdouble, np.complex64, np.clongdouble])
def test_any_type_of_element(dtype):
    """Every NumPy type can be checked, also those in which every value is a likely one: a copy passes, an undeclared write does not."""

    @kernel
    def copy(out: Out[R, dtype], inp: In[R, dtype]):
        out[:] = inp

    @kernel
    def swap(out: Out[R, dtype], inp: In[R, dtype]):
        out[:] = inp
        inp[0] = not inp[0]

    source, target = Tensor("x", np.array([1, 0, 1], dtype)), Tensor("y", np.zeros(3, dtype))
    graph = Graph()
    graph.spawn(copy, target[:], source[:])
    check(graph).tasks[0].run()
    assert target.array.tolist() == source.array.tolist()
    assert checked_error(swap, target[:], source[:]) == "swap wrote 'inp', declared In"


# --- what is not


def program(spawn, arena: Arena) -> None:
    """Two row blocks through a matrix product and a sum, then a product over both."""
    for r in slice(0, 2), slice(2, 5):
        spawn(matmul_forward, arena.out[r], arena.inp[r], arena.weight[:], arena.bias[:])
        spawn(add, arena.total[r], arena.out[r])
    spawn(matmul_forward, arena.last[:, 1:4], arena.total[:], arena.weight[0:3], arena.bias[0:3])


@pytest.fixture
def arena():
    return new_arena()


def new_arena() -> Arena:
    shapes = {"out": (5, 4), "inp": (5, 4), "weight": (4, 4), "bias": (4,), "total": (5, 4), "last": (5, 6)}
    arena = Arena({name: TensorSpec(shape, (2,) + (None,) * (len(shape) - 1)) for name, shape in shapes.items()}, shared=True)
    for seed, each in enumerate(arena.tensors.values()):
        np.random.default_rng(seed).standard_normal(dtype=np.float32, out=each.array)
    return arena


@pytest.mark.parametrize("allow_commutative", [False, True])
@pytest.mark.parametrize("max_tasks", [3, 100])
def test_correct_kernels_pass_with_the_same_bits(arena, allow_commutative, max_tasks):
    """Bodies and twins, on tiles and on whole tensors, coarsened or not: a checked run computes what the unchecked one does, to the bit."""
    wanted = new_arena()
    program(run_now, wanted)
    graph = Graph("program", allow_commutative)
    program(graph.spawn, arena)
    checked = check(coarsen(graph, max_tasks))
    for task in checked.tasks:
        task.run()
    for name in wanted.tensors:
        assert arena.tensors[name].array.tobytes() == wanted.tensors[name].array.tobytes(), name


def test_a_checked_graph_is_the_same_graph(arena):
    """Same tasks, names, edges, locks and costs: it runs under every scheduler and reads the same, and can be sent."""
    graph = Graph("program", allow_commutative=True)
    program(graph.spawn, arena)
    checked = check(graph)
    assert checked.name == "program, checked"
    assert checked.listing() == graph.listing()
    for task, twin in zip(graph.tasks, checked.tasks, strict=True):
        for field in "name", "number", "section", "predecessors", "successors", "locks", "flops", "bytes":
            assert getattr(twin, field) == getattr(task, field)
    sent = pickle.loads(pickle.dumps(checked))
    assert [type(task.calls[0]).__name__ for task in sent.tasks] == ["CheckedCall"] * 5
    assert sent.listing() == checked.listing()
    assert sent.tasks[0].calls[0].kernel is matmul_forward.bounds_checked
    assert matmul_forward.bounds_checked.is_importable


def test_bodies_are_checked_where_there_is_no_twin_and_twins_where_there_is():
    """What is checked is what would run."""
    graph, x = Graph(), tensor(9, 9)
    graph.spawn(write_at, x[3:6, 2:6], 3, 0)  # NumPy's body would raise IndexError
    with pytest.raises(TaskError, match="AccessError: write_at wrote outside"):
        check(graph).tasks[0].run()


def test_other_errors_stay_what_they_are():
    """An exception that has nothing to do with accesses is not touched."""

    @kernel
    def halve(x: InOut[R]):
        raise ValueError("odd")

    graph = Graph()
    graph.spawn(halve, tensor(3)[:])
    with pytest.raises(TaskError, match=r"task 0, halve inout\(x\[:\]\), spawned in .*test_check.py, line \d+: ValueError: odd"):
        check(graph).tasks[0].run()
