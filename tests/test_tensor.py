"""A tensor is cut once into a grid; a tile is any rectangle of it and knows the cells it touches. Arenas hold tensors, also for others."""

import errno
import gc
import mmap
import multiprocessing
import os
import pickle
import warnings
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskgpt.tasks import Arena, Graph, GridError, In, InOut, Out, Tensor, TensorSpec, dims, kernel

R, C = dims("R C")


@kernel
def double(out: Out[R, C], inp: In[R, C]):
    np.multiply(inp, 2, out=out)


@kernel
def increment(x: InOut[R, C]):
    x += 1


def tensor(*shape: int, cuts: tuple = (), dtype: type = np.float32) -> Tensor:
    return Tensor("x", np.zeros(shape, dtype), cuts)


# --- grids


@pytest.mark.parametrize(
    "length, cut, bounds",
    [
        (12, None, (0, 12)),
        (12, 4, (0, 4, 8, 12)),
        (12, 5, (0, 5, 10, 12)),  # ragged: the last cell is what remains
        (12, 12, (0, 12)),
        (12, 99, (0, 12)),
        (3, 1, (0, 1, 2, 3)),
        (12, (4, 6), (0, 4, 6, 8, 12)),  # a union: for one use in fours and another in sixes
        (12, (3, 6), (0, 3, 6, 9, 12)),
        (7, (3, 2), (0, 2, 3, 4, 6, 7)),
        (0, 4, (0, 0)),
    ],
)
def test_an_axis_is_cut_where_the_spec_says(length, cut, bounds):
    """None: one cell; n: a cut after every n elements; a tuple: a cut wherever one of its numbers asks for it."""
    assert TensorSpec((length,), (cut,)).bounds() == (bounds,)


def test_a_tensor_without_cuts_is_one_cell():
    """No cuts: accesses of any two tiles of the tensor conflict."""
    assert tensor(4, 5).grid == (1, 1)
    assert tensor(4, 5, cuts=(2, 3)).grid == (2, 2)
    assert repr(tensor(4, 5, cuts=(2, 3))) == "x[4, 5] cut 2 x 2"


@pytest.mark.parametrize(
    "cuts, message", [((0,), "every 0"), ((-2,), "every -2"), (((3, 0),), "every 0"), (((),), "no cuts"), ((1, 1), "2 cuts")]
)
def test_cuts_that_cannot_be_are_refused(cuts, message):
    """A cell has at least one element, a tuple at least one number, and every axis its entry."""
    with pytest.raises(GridError, match=message):
        TensorSpec((4,), cuts).bounds()


def test_elements_of_the_last_axis_lie_side_by_side():
    """Compiled kernels and BLAS rely on it: a transposed or a stepped array is no tensor."""
    Tensor("x", np.zeros((4, 6))[::2])
    for array in np.zeros((4, 6)).T, np.zeros((4, 6))[:, ::2]:
        with pytest.raises(GridError, match="must lie side by side"):
            Tensor("x", array)


# --- tiles


def test_a_tile_is_a_view():
    """Writing a tile writes the tensor; integers drop their axis as in NumPy, slices keep it."""
    x = tensor(2, 4, 6)
    tile = x[1, 1:3]
    tile.array[...] = 7
    assert tile.shape == (2, 6)
    assert (x.array[1, 1:3] == 7).all() and x.array.sum() == 7 * 12


def test_a_tile_touches_the_cells_that_it_covers_wholly_or_in_part():
    """A 6 x 8 tensor cut 3 x (3, 3, 2); the drawn tile [1:4, 3:7] touches the four cells marked o.

    columns    0 1 2 | 3 4 5 | 6 7
    rows 0-1   . . . | . . . | . .
                     | # # # | #          o (0, 1)   o (0, 2)
    rows 2-3   . . . | # # # | # .        o (1, 1)   o (1, 2)
    rows 4-5   . . . | . . . | . .
    """
    x = tensor(6, 8, cuts=(2, 3))
    assert set(x[1:4, 3:7].cells()) == {(0, 1), (0, 2), (1, 1), (1, 2)}


def test_a_tile_that_ends_on_a_cut_does_not_touch_the_cell_beyond():
    """Slices are half open, and so are their cells: neighbours on a grid are independent.

    0 1 2 | 3 4 5 | 6 7
    a a a | b b b | c c
    """
    x = tensor(8, cuts=(3,))
    assert [list(x[piece].cells()) for piece in (slice(0, 3), slice(3, 6), slice(6, 8))] == [[(0,)], [(1,)], [(2,)]]
    assert list(x[2:4].cells()) == [(0,), (1,)]
    assert list(x[:].cells()) == [(0,), (1,), (2,)]


@given(st.data())
@settings(deadline=None)
def test_cells_are_those_of_the_elements(data):
    """Whatever the cuts and the rectangle: the cells of a tile are exactly the cells of its elements, one by one."""
    shape = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    one_cut = st.integers(1, 8)
    cuts = data.draw(st.tuples(*[st.none() | one_cut | st.lists(one_cut, min_size=1, max_size=3).map(tuple)] * 2))
    x = tensor(*shape, cuts=cuts)
    (top, bottom), (left, right) = (sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))) for n in shape)
    cell_of = [np.searchsorted(bounds, np.arange(n), side="right") - 1 for bounds, n in zip(x.bounds, shape, strict=True)]
    wanted = {(int(cell_of[0][r]), int(cell_of[1][c])) for r in range(top, bottom) for c in range(left, right)}
    cells = list(x[top:bottom, left:right].cells())
    assert set(cells) == wanted and len(cells) == len(wanted)


@pytest.mark.parametrize(
    "index, message",
    [
        ((4,), "axis 0 has 4 elements, got 4"),
        ((-1,), "axis 0 counts from 0 to 3, got -1; its element is 3"),
        ((slice(0, 5),), r"axis 0 has 4 elements, got slice\(0, 5, None\)"),
        ((slice(-2, None),), "axis 0 has 4 elements"),
        ((slice(2, 2),), "axis 0 has 4 elements"),
        ((slice(3, 1),), "axis 0 has 4 elements"),
        ((slice(0, 4, 2),), "axis 0 takes an integer or a slice without step"),
        ((1.0,), "axis 0 takes an integer or a slice without step, got 1.0"),
        ((slice(0.5, 2),), "axis 0 takes an integer or a slice without step"),
        ((None,), "axis 0 takes an integer or a slice without step"),
        ((Ellipsis,), "axis 0 takes an integer or a slice without step"),
        (([0, 1],), "axis 0 takes an integer or a slice without step"),
        ((0, 0, 0), "has 2 axes, got 3 indices"),
        ((slice(0, 2), 3), "axis 1 is the last and takes a slice, so that elements lie side by side: 3:4"),
    ],
)
def test_bad_indices_are_errors(index, message):
    """NumPy would wrap, clip, copy or make an empty or a strided view; a tile says which axis was asked for what."""
    with pytest.raises(IndexError, match=f"tensor 'x'.*{message}"):
        tensor(4, 6)[index]


def test_a_tile_within_a_tile():
    """Indices of a tile count from its corner and over the axes that it has: the part of a layer is a tile of the tensor like any other.

    x[1, 1:4]    row 1   . . . . . .
                 row 2   . # # # . .    [1, 1:4] of it = x[1, 2, 1:4]
                 row 3   . . . . . .
    """
    x = tensor(2, 4, 6)
    layer = x[1, 1:4]
    assert [repr(layer[index]) for index in (slice(None), slice(0, 2), 2, (1, slice(1, 4)))] == [
        "x[1, 1:4, :]", "x[1, 1:3, :]", "x[1, 3, :]", "x[1, 2, 1:4]",
    ]  # fmt: skip
    assert layer[1, 1:4].tensor is x and layer[1, 1:4].overlaps(x[1, 2])
    layer[0][2:4].array[...] = 7
    assert (x.array[1, 1, 2:4] == 7).all()


@pytest.mark.parametrize(
    "index, message",
    [
        (3, "axis 0 has 3 elements, got 3"),
        (-1, "axis 0 counts from 0 to 2, got -1; its element is 2"),
        (slice(0, 4), "axis 0 has 3 elements"),
        ((0, slice(4, 4)), "axis 1 has 6 elements"),
        ((slice(0, 3, 2),), "axis 0 takes an integer or a slice without step"),
        ([0], "axis 0 takes an integer or a slice without step"),
        ((0, 0, 0), "has 2 axes, got 3 indices"),
    ],
)
def test_bad_indices_within_a_tile_are_errors(index, message):
    """An index may not leave the tile, even where the tensor goes on."""
    with pytest.raises(IndexError, match=rf"tile x\[1, 1:4, :\].*{message}"):
        tensor(2, 6, 6)[1, 1:4][index]


def test_a_numpy_integer_is_an_index():
    """Loops over np.arange and the like need no int()."""
    assert tensor(4, 6)[np.int64(2), np.int32(1) : np.int32(3)].index == (2, slice(1, 3))


def test_overlap_is_a_common_element():
    """Tiles overlap if they share an element; sharing a cell or an edge is not enough, and neither is looking alike in another tensor.

    a a . .      a = [0:2, 0:2]
    a b b .      b = [1:3, 1:3]
    . b b .
    . . . c      c = [3:4, 3:4]
    """
    x = tensor(4, 4)
    a, b, c = x[0:2, 0:2], x[1:3, 1:3], x[3:4, 3:4]
    assert a.overlaps(b) and b.overlaps(a) and x[:].overlaps(c) and a.overlaps(a)
    assert not b.overlaps(c) and not a.overlaps(x[0:2, 2:4]) and not a.overlaps(tensor(4, 4)[:])


def test_prints_as_it_is_written():
    """repr of a tile is the expression that makes it, as in listings and error messages."""
    x = tensor(2, 4, 6)
    assert [repr(tile) for tile in (x[1, 0:2], x[:, 3, 2:4], x[0:2, 0:4])] == ["x[1, 0:2, :]", "x[:, 3, 2:4]", "x[:, :, :]"]


# --- arenas


SPECS = {
    "odd": TensorSpec((3, 5), (2, None)),
    "ids": TensorSpec((7,), (4,), np.dtype(np.int32)),
    "wide": TensorSpec((2, 33), (1, 16)),
}


@pytest.mark.parametrize("shared", [False, True])
def test_an_arena_holds_zeroed_tensors_on_cache_lines(shared):
    """Every tensor of an arena starts as zeros on a 64-byte boundary, with shape, cuts and type of its spec; none overlaps another."""
    arena = Arena(SPECS, shared=shared)
    assert (arena.wide.grid, arena.ids.array.dtype, arena.odd.array.shape) == ((2, 3), np.int32, (3, 5))
    tensors = [arena.odd, arena.ids, arena.wide]
    assert not any(t.array.any() for t in tensors)
    assert not any(t.address_range()[0] % 64 for t in tensors)
    for number, each in enumerate(tensors, start=1):
        each.array[...] = number
    assert [t.array.min() for t in tensors] == [t.array.max() for t in tensors] == [1, 2, 3]
    assert arena.nbytes == 64 + 64 + 320


def test_an_arena_says_which_tensor_it_does_not_have():
    """A misspelt tensor is an AttributeError with its name, so hasattr works as well."""
    with pytest.raises(AttributeError, match="the arena has no tensor 'wite'"):
        _ = Arena(SPECS).wite


@pytest.mark.parametrize("shared", [False, True])
def test_an_arena_goes_with_its_last_reference(shared):
    """Gigabytes do not wait for the garbage collector; a tensor or an array that is still held keeps its memory."""
    gc.collect()
    gc.disable()
    try:
        arena = Arena(SPECS, shared=shared)
        odd, array, gone = arena.odd, arena.wide.array, [weakref.ref(arena), weakref.ref(arena.odd)]
        files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
        del arena
        odd.array[...] = array[...] = 1
        assert gone[0]() is None and gone[1]() is odd
        if shared:
            assert pickle.loads(pickle.dumps(odd)) is odd
        del odd
        assert gone[1]() is None
        if shared and files:
            assert len(os.listdir("/proc/self/fd")) == files - 1
    finally:
        gc.enable()


def test_private_memory_is_the_process_own():
    """A forked child writes a copy, and huge pages apply: Linux gives them to private memory, to shared memory only by special setting."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    arena = Arena(SPECS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads; this child takes no lock
        child = os.fork()
    if child == 0:
        arena.odd.array[...] = 1
        os._exit(0)
    os.waitpid(child, 0)
    assert not arena.odd.array.any()


def test_no_room_is_a_memory_error(monkeypatch):
    """Shared memory is reserved when the arena is made: MemoryError there, not a process that dies in the middle of a step."""
    if not hasattr(os, "posix_fallocate"):
        pytest.skip("this system does not reserve")

    def refuse(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    descriptors = set(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    with pytest.raises(MemoryError, match="no room for 4 MiB of shared memory: No space left on device"):
        Arena({"x": TensorSpec((2**20,))}, shared=True)
    if descriptors is not None:
        assert set(os.listdir("/proc/self/fd")) == descriptors


def test_too_large_is_a_memory_error(monkeypatch):
    """The same error for private memory, which the system refuses at once."""

    def refuse(*args, **options):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(MemoryError, match="no room for 4 MiB of memory: Cannot allocate memory"):
        Arena({"x": TensorSpec((2**20,))})


# --- other processes


def work(connection) -> None:
    """Run whatever comes in a child process: (function, argument) until None."""
    kept = []
    while (request := connection.recv()) is not None:
        function, argument = request
        kept.append(argument)  # as a worker that keeps its graph
        connection.send(function(argument))


def run_graph(graph: Graph) -> list[str]:
    for task in graph.tasks:
        task.run()
    return [str(task) for task in graph.tasks]


def fill_tile(tile_and_number) -> float:
    tile, number = tile_and_number
    was = float(tile.array.max())
    tile.array[...] = number
    return was


def are_one(things) -> bool:
    return things[0].tensor is things[1].tensor


@pytest.fixture(scope="module")
def child():
    """A second process that was started anew and shares nothing: `child(function, argument)` runs there."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there,), daemon=True)
    process.start()

    def call(function, argument):
        here.send((function, argument))
        if not here.poll(60):
            raise TimeoutError("the second process does not answer")
        return here.recv()

    yield call
    here.send(None)
    process.join(60)
    assert process.exitcode == 0


def test_a_shared_tile_is_the_same_memory_in_another_process(child):
    """What a process writes into a shared tile, the other one sees; only the address travels."""
    arena = Arena(SPECS, shared=True)
    assert child(fill_tile, (arena.odd[1:3, 2:4], 7)) == 0
    wanted = np.zeros((3, 5))
    wanted[1:3, 2:4] = 7
    assert arena.odd.array.tolist() == wanted.tolist()
    arena.odd.array[...] = 9
    assert child(fill_tile, (arena.odd[:], 0)) == 9
    assert len(pickle.dumps(Arena({"x": TensorSpec((2**22,))}, shared=True).x[:])) < 1000


def test_tiles_of_one_tensor_arrive_as_tiles_of_one_tensor(child):
    """Identity survives: overlaps and dependencies are judged by tensor, so two tiles of one must not arrive as tiles of two."""
    arena = Arena(SPECS, shared=True)
    assert child(are_one, (arena.odd[0:1], arena.odd[1:2]))
    tile = pickle.loads(pickle.dumps(arena.odd[0:1]))
    assert tile.tensor is arena.odd  # at home as well


def test_a_graph_runs_in_another_process(child):
    """A recorded graph over shared memory is sent whole, and its tasks write the memory of the sender."""
    arena = Arena({"a": TensorSpec((4, 4)), "b": TensorSpec((4, 4))}, shared=True)
    graph = Graph()
    graph.spawn(increment, arena.a[:, 0:2])
    graph.spawn(double, arena.b[:, 2:4], arena.a[:, 0:2])
    assert child(run_graph, graph) == graph.listing().replace(" <- 0", "").splitlines()
    assert arena.b.array.tolist() == [[0, 0, 2, 2]] * 4


def test_a_new_arena_is_not_taken_for_an_old_one(child):
    """A block's address, /proc/<process>/fd/<number>, is used again once it is freed; who still holds the old block gets the new.

    old block: fd 7     held by the child          -> freed here
    new block: fd 7     sent to the child          -> must not be the old one
    """
    for number in range(1, 4):
        arena = Arena({"x": TensorSpec((8,))}, shared=True)
        assert child(fill_tile, (arena.x[:], number)) == 0
        assert arena.x.array.tolist() == [number] * 8
        del arena


@pytest.mark.parametrize("what", ["arena", "tensor", "tile", "call", "task", "graph"])
def test_private_memory_is_not_sent(what):
    """A copy would look like the tensor and lose every write: refused, with what to do instead."""
    arena = Arena(SPECS)
    graph = Graph()
    task = graph.spawn(increment, arena.odd[:])
    thing = {"arena": arena, "tensor": arena.odd, "tile": arena.odd[:], "call": task.calls[0], "task": task, "graph": graph}[what]
    with pytest.raises(TypeError, match="shared=True"):
        pickle.dumps(thing)
    with pytest.raises(TypeError, match=r"tensor 'x' lives in the memory of one process, .*; make it with Arena\(..., shared=True\)"):
        pickle.dumps(tensor(3)[:])
