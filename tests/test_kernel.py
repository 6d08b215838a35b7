"""A kernel is declared once: its text, its types, its shapes, its costs and its compiled twin all follow from the signature."""

import inspect
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
from numba.core.errors import NumbaError
from numpy.lib.stride_tricks import as_strided

from taskgpt.config import load_scheduler
from taskgpt.schedulers import open_scheduler
from taskgpt.tasks import (
    AccessError,
    Commutative,
    Graph,
    In,
    InOut,
    Out,
    Scratch,
    ShapeError,
    TaskError,
    Tensor,
    TwinError,
    check,
    compile_kernels,
    dense,
    dims,
    kernel,
    run_now,
)
from taskgpt.tasks.blas import gemm
from taskgpt.tasks.scratch import scratch_arrays, scratch_layout

R, C, OC, M, N, K, S, D = dims("R C OC M N K S D")


@kernel(flops=lambda R, OC, C: 2 * R * OC * C)
def matmul_forward(out: Out[R, OC], inp: In[R, C], weight: In[OC, C], bias: In[OC]):
    """out = inp @ weight.T + bias."""
    np.matmul(inp, weight.T, out=out)
    out += bias


@kernel
def scale_forward(out: Out[R, C], inp: In[R, C], weight: In[C], scale: float, shift: int):
    np.multiply(inp, weight, out=out)
    out *= scale
    out += shift


@scale_forward.compiled
def scale_forward(out, inp, weight, scale, shift):
    for r in range(out.shape[0]):
        row, source = dense(out[r]), dense(inp[r])
        for c in range(row.shape[0]):
            row[c] = source[c] * weight[c] * np.float32(scale) + np.float32(shift)


@kernel
def product(c: InOut[M, N], a: In[R, C], b: In[S, D], transpose_a: int, transpose_b: int, alpha: float, beta: float):
    """c = alpha * op(a) @ op(b) + beta * c, where beta = 0 forgets c whatever is in it."""
    before = beta * c if beta else 0
    c[...] = alpha * ((a.T if transpose_a else a) @ (b.T if transpose_b else b)) + before


@product.compiled
def product(c, a, b, transpose_a, transpose_b, alpha, beta):
    gemm(c, a, b, transpose_a, transpose_b, alpha, beta)


def tensor(*shape: int, dtype: type = np.float32) -> Tensor:
    return Tensor("t", np.zeros(shape, dtype))


# --- the declaration


def test_prints_as_a_task_pragma():
    """A kernel prints as OmpSs-2 would declare it: what it writes, then what it reads, by name."""
    assert repr(matmul_forward) == "task matmul_forward out(out) in(inp, weight, bias)"


def test_prints_every_kind_of_access_and_no_constants():
    """Outputs come first whatever the order of the parameters; constants are no accesses."""

    @kernel
    def mixed(a: In[R], scale: float, b: Commutative[R], c: InOut[R], d: Out[R], e: In[R]):
        pass

    assert repr(mixed) == "task mixed out(d) inout(c) commutative(b) in(a, e)"


def test_is_the_function_that_it_decorates():
    """Called with arrays, a kernel runs its body; docstring and signature stay those of the body, for help() and for readers."""
    out, inp, weight, bias = np.zeros((2, 1)), np.ones((2, 3)), np.ones((1, 3)), np.array([0.5])
    matmul_forward(out, inp, weight, bias)
    assert out.tolist() == [[3.5], [3.5]]
    assert matmul_forward.__doc__ == "out = inp @ weight.T + bias."
    assert list(inspect.signature(matmul_forward).parameters) == ["out", "inp", "weight", "bias"]


@pytest.mark.parametrize("annotation", [inspect.Parameter.empty, In, np.ndarray, "a tile", str, None])
def test_every_parameter_declares_its_use(annotation):
    """A parameter without an access, int or float is refused where the kernel is defined, by name."""

    def careless(out: Out[R], inp):
        pass

    if annotation is not inspect.Parameter.empty:
        careless.__annotations__["inp"] = annotation if annotation != "a tile" else "str"
    with pytest.raises(TypeError, match="careless: parameter 'inp' needs an access, In, Out or InOut say, int, float or Spawn"):
        kernel(careless)


@pytest.mark.parametrize(
    "items", [3.5, (R, 0), (R, -1), (R, True), (R, float), (R, None), (np.int32, R), np.int32, ((), R)], ids=lambda items: repr(items)
)
def test_an_access_is_dimensions_and_perhaps_a_type(items):
    """In[...] takes names or sizes, at least one, and at last a NumPy type; a slip shows where it is declared."""
    with pytest.raises(TypeError, match=r"In\[\.\.\.\] takes"):
        In[items]


def test_float32_unless_the_access_names_a_type():
    """In[R, C] is float32, the type of GPT-2's numbers; In[R, np.int32] is for token ids."""
    assert In[R, C].dtype == np.float32
    assert (In[R, np.int32].dims, In[R, np.int32].dtype) == ((R,), np.int32)


# --- shapes and constants


def test_shapes_follow_from_the_names():
    """Every dimension name stands for one size in a call; sizes() says which."""
    assert matmul_forward.sizes({"out": (2, 5), "inp": (2, 3), "weight": (5, 3), "bias": (5,)}) == {"R": 2, "OC": 5, "C": 3}


@pytest.mark.parametrize(
    "shapes, message",
    [
        (((2, 5), (2, 3), (5, 4), (5,)), "matmul_forward: 'weight' wants C = 3 as in 'inp', got shape (5, 4)"),
        (((2, 5), (1, 3), (5, 3), (5,)), "matmul_forward: 'inp' wants R = 2 as in 'out', got shape (1, 3)"),
        (((2, 5), (2, 3), (5, 3), (4,)), "matmul_forward: 'bias' wants OC = 5 as in 'out', got shape (4,)"),
        (((2, 5), (2, 3, 1), (5, 3), (5,)), "matmul_forward: 'inp' wants 2 dimensions (R, C), got shape (2, 3, 1)"),
    ],
)
def test_shape_errors_say_where_what_wanted_and_got(shapes, message):
    """A wrong tile is refused when the task is recorded, with the parameter that first gave the name its size."""
    tiles = [tensor(*shape)[:] for shape in shapes]
    with pytest.raises(ShapeError) as error:
        Graph().spawn(matmul_forward, *tiles)
    assert str(error.value) == message


def test_a_number_in_an_access_is_a_size():
    """A declared size is held to, without a name."""

    @kernel
    def update(weight: InOut[C], step: In[1, np.int64]):
        weight *= step[0]

    Graph().spawn(update, tensor(4)[:], tensor(1, dtype=np.int64)[:])
    with pytest.raises(ShapeError, match=r"update: 'step' wants 1 = 1, got shape \(2,\)"):
        Graph().spawn(update, tensor(4)[:], tensor(2, dtype=np.int64)[:])


def test_a_tile_of_another_type_is_a_shape_error():
    """Element types are part of the declaration: no conversion, no guessing, and the tile is named."""
    with pytest.raises(ShapeError, match=r"matmul_forward: 'inp' wants float32, got t\[:, :\] of float64"):
        Graph().spawn(matmul_forward, tensor(2, 5)[:], tensor(2, 3, dtype=np.float64)[:], tensor(5, 3)[:], tensor(5)[:])


def test_constants_are_int_or_float():
    """An int may stand for a float, as everywhere in Python; a float for an int is refused. NumPy's scalars become Python's."""
    tiles = tensor(2, 3)[:], tensor(2, 3)[:], tensor(3)[:]
    Graph().spawn(scale_forward, *tiles, 2, 3)
    call = Graph().spawn(scale_forward, *tiles, np.float64(0.5), np.int64(3)).calls[0]
    assert [type(constant) for constant in call.args[3:]] == [float, int]  # np.float64 would widen a body's float32 expressions
    with pytest.raises(TypeError, match=r"scale_forward: 'shift' wants a constant \(int\), got 3.5"):
        Graph().spawn(scale_forward, *tiles, 2.0, 3.5)
    with pytest.raises(TypeError, match=r"scale_forward: 'scale' wants a constant \(float\), got t\[:\]"):
        Graph().spawn(scale_forward, *tiles, tensor(3)[:], 3)


def test_a_task_takes_tiles_and_all_of_its_arguments():
    """A whole tensor, an array and a missing argument are refused by name."""
    out, inp = tensor(2, 5)[:], tensor(2, 3)[:]
    with pytest.raises(TypeError, match=r"matmul_forward takes 4 arguments \(out, inp, weight, bias\), got 2"):
        Graph().spawn(matmul_forward, out, inp)
    with pytest.raises(TypeError, match=r"matmul_forward: 'weight' wants a tile, tensor\[index\], got"):
        Graph().spawn(matmul_forward, out, inp, tensor(5, 3), tensor(5)[:])
    with pytest.raises(TypeError, match=r"matmul_forward: 'bias' wants a tile, tensor\[index\], got"):
        Graph().spawn(matmul_forward, out, inp, tensor(5, 3)[:], np.zeros(5, np.float32))


def test_constants_are_64_bits():
    """Compiled code takes no larger ones: refused when the task is recorded, by name. Infinities and NaN are doubles like others."""
    tiles = tensor(2, 3)[:], tensor(2, 3)[:], tensor(3)[:]
    for scale, shift in (2**1000, -(2**63)), (float("nan"), 2**63 - 1), (float("inf"), True):
        Graph().spawn(scale_forward, *tiles, scale, shift)
    for spawn in Graph().spawn, run_now:
        with pytest.raises(TypeError, match=r"scale_forward: 'shift' wants a constant of 64 bits, got one of 71"):
            spawn(scale_forward, *tiles, 1.0, 2**70)
        with pytest.raises(TypeError, match=r"scale_forward: 'shift' wants a constant of 64 bits, got one of 64"):
            spawn(scale_forward, *tiles, 1.0, np.uint64(2**63))
        with pytest.raises(TypeError, match=r"scale_forward: 'scale' wants a constant of 64 bits, got one of 1329"):
            spawn(scale_forward, *tiles, 10**400, 1)


def test_memory_that_is_read_only_is_not_written():
    """Compiled code would not ask, and write it, or end the process where the system protects it."""
    array = np.zeros((2, 3), np.float32)
    array.flags.writeable = False
    tile = Tensor("x", array)[:]
    Graph().spawn(scale_forward, tensor(2, 3)[:], tile, tensor(3)[:], 1.0, 1)
    for spawn in Graph().spawn, run_now:
        with pytest.raises(AccessError, match=r"scale_forward writes 'out', and the memory of x\[:, :\] is read-only"):
            spawn(scale_forward, tile, tensor(2, 3)[:], tensor(3)[:], 1.0, 1)


@pytest.mark.parametrize("spawn", [Graph().spawn, run_now])
def test_only_kernels_are_spawned(spawn):
    """What is no kernel is told how to become one."""

    def double(x):
        x *= 2

    x = tensor(3)[:]
    with pytest.raises(TypeError, match="only kernels can be spawned; 'double' is a plain function: decorate it with @kernel"):
        spawn(double, x)
    with pytest.raises(TypeError, match=r"only kernels can be spawned; (got a ufunc|'sin' is a plain function)"):
        spawn(np.sin, x)
    with pytest.raises(TypeError, match=r"'double' is numba's: decorate its NumPy body with @kernel, and the .* @double\.compiled"):
        spawn(numba.njit(double), x)
    with pytest.raises(TypeError, match="only kernels can be spawned; got the class Tensor"):
        spawn(Tensor, x)
    with pytest.raises(TypeError, match="only kernels can be spawned; got a Tile"):
        spawn(x)


def test_only_plain_functions_become_kernels():
    """Body and twin: numba's own decorator, a class or a partial would hide what is compiled."""

    def double(x: InOut[R]):
        x *= 2

    with pytest.raises(TypeError, match="@kernel decorates a NumPy function; 'double' is numba's"):
        kernel(numba.njit(double))
    with pytest.raises(TypeError, match=r"double\.compiled decorates a plain function, and compiles it itself; 'double' is numba's"):
        kernel(double).compiled(numba.njit(double))


def test_called_with_arrays_that_do_not_fit():
    """Numba says 'No matching definition'; the kernel says which parameter."""
    out, inp, weight = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), np.zeros(3, np.float32)
    frozen = out.copy()
    frozen.flags.writeable = False
    for args, message in [
        ((out, inp), r"scale_forward takes 5 arguments \(out, inp, weight, scale, shift\), got 2"),
        ((out, inp.astype(float), weight, 1.0, 1), "scale_forward: 'inp' wants float32 of 2 dimensions, got float64 of 2"),
        ((out, inp[0], weight, 1.0, 1), "scale_forward: 'inp' wants float32 of 2 dimensions, got float32 of 1"),
        ((out, inp.tolist(), weight, 1.0, 1), "scale_forward: 'inp' wants an array, got a list"),
        ((out, inp, np.zeros(6, np.float32)[::2], 1.0, 1), r"scale_forward: 'weight' wants elements side by side, got strides \(8,\)"),
        ((out, inp, weight, "1", 1), r"scale_forward: 'scale' wants a constant \(float of 64 bits\), got '1'"),
        ((out, inp, weight, 1.0, 1.5), r"scale_forward: 'shift' wants a constant \(int of 64 bits\), got 1.5"),
        ((out, inp, weight, 1.0, 2**63), r"scale_forward: 'shift' wants a constant \(int of 64 bits\), got 9223372036854775808"),
        ((frozen, inp, weight, 1.0, 1), "scale_forward: 'out' is written, and the array is read-only"),
    ]:
        with pytest.raises(TypeError, match=message):
            scale_forward(*args)


# --- results


def by_constant(x: InOut[R]):
    return 1


def by_name(x: InOut[R]):
    x += 1
    return x


def by_expression(x: InOut[R]):
    if x.size > 3:
        return
    return x + 1


def by_yield(x: InOut[R]):
    x += 1
    yield


async def by_coroutine(x: InOut[R]):
    x += 1


@pytest.mark.parametrize("function", [by_constant, by_name, by_expression, by_yield, by_coroutine])
def test_a_function_that_returns_a_value_is_no_kernel(function):
    """Nobody would get the value; a generator would not even run. Seen where it is decorated, body or twin."""
    with pytest.raises(
        TypeError, match=rf"{function.__name__}: its body (returns a value, which nobody gets|is a generator or a coroutine)"
    ):
        kernel(function)

    @kernel
    def right(x: InOut[R]):
        return None

    with pytest.raises(TypeError, match=r"right: the compiled twin (returns a value, which nobody gets|is a generator or a coroutine)"):
        right.compiled(function)


def test_what_may_be_none_is_accepted():
    """A variable that holds None, or what a call gave, is no value before it runs."""

    @kernel
    def early(x: InOut[R]):
        done, total = None, x + 1
        if x.size:
            done = x.fill(total[0])
        return done

    x = tensor(3)
    early(x.array)
    assert (x.array == 1).all()


def test_a_value_that_only_shows_when_it_is_returned():
    """What a call returns is seen when it runs: refused then, under the kernel's name."""

    @kernel
    def tail(x: InOut[R]):
        return np.add(x, 1, out=x)

    x = tensor(3)
    message = "tail returned a ndarray, which nobody gets: kernels write into their tiles"
    with pytest.raises(TypeError, match=message):
        tail(x.array)
    with pytest.raises(TypeError, match=message):
        run_now(tail, x[:])
    graph = Graph()
    graph.spawn(tail, x[:])
    for task in graph.tasks[0], check(graph).tasks[0]:
        with pytest.raises(TaskError, match=message):
            task.run()

    @tail.compiled
    def _(x):
        return np.sum(x)

    with pytest.raises(TwinError, match="tail: its compiled twin does not compile: it returns a value, which nobody gets"):
        tail.compile()


# --- scratch


@kernel(flops=lambda R, C: R * C)
def sum_of_rows(out: Out[R], inp: In[R, C], copy: Scratch[R, C], first: Scratch[3, np.int32]):
    """out = the sum of each row."""
    out[:] = inp.sum(axis=1)


@sum_of_rows.compiled
def sum_of_rows(out, inp, copy, first):
    copy[:] = inp
    first[:] = 7
    for r in range(out.shape[0]):
        out[r] = 0
        for c in range(inp.shape[1]):
            out[r] += copy[r, c]


def test_scratch_is_no_argument():
    """It is declared like a tile, but nobody passes it, and it is no access: it makes no edges and costs no bytes."""
    out, inp = tensor(2), tensor(2, 3)
    inp.array[:] = [[1, 2, 3], [4, 5, 6]]
    task = Graph().spawn(sum_of_rows, out[:], inp[:])
    [call] = task.calls
    assert list(sum_of_rows.parameters) == list(sum_of_rows.accesses) == ["out", "inp"]
    assert list(sum_of_rows.scratch) == ["copy", "first"]
    assert call.scratch_shapes == (((2, 3), np.dtype(np.float32)), ((3,), np.dtype(np.int32)))
    assert (len(call.args), task.bytes) == (2, 4 * (2 + 6))
    assert str(task) == "0 sum_of_rows out(t[:]) in(t[:, :])"
    task.run()
    assert out.array.tolist() == [6, 15]
    sum_of_rows(out.array, 2 * inp.array)  # called with arrays, it brings its scratch along
    assert out.array.tolist() == [12, 30]


def test_scratch_comes_last_and_has_sizes_that_tiles_have():
    """A slip shows where the kernel is defined."""
    with pytest.raises(TypeError, match="early: parameter 'inp' stands after Scratch, which comes last"):

        @kernel
        def early(out: Out[R], work: Scratch[R], inp: In[R]):
            pass

    with pytest.raises(TypeError, match="unsized: scratch 'work' asks for 'C', which no tile has"):

        @kernel
        def unsized(out: Out[R], work: Scratch[R, C]):
            pass

    with pytest.raises(TypeError, match=r"sum_of_rows: the compiled twin must take \['out', 'inp', 'copy', 'first'\]"):
        sum_of_rows.compiled(lambda out, inp: None)


def test_scratch_lies_in_one_aligned_buffer():
    """Arrays begin at multiples of 64 bytes; the next call of the thread gets the same memory, another thread another."""
    f, i = np.dtype(np.float32), np.dtype(np.int32)
    shapes = ((2, 3), f), ((17,), i), ((1,), f)
    assert scratch_layout(shapes) == ((0, 64, 192), 256)
    assert scratch_layout(()) == ((), 0)
    arrays = scratch_arrays(shapes)
    assert [(a.shape, a.dtype) for a in arrays] == list(shapes)
    first = arrays[0].ctypes.data
    assert first % 64 == 0 and [a.ctypes.data - first for a in arrays] == [0, 64, 192]
    assert scratch_arrays(shapes)[1].ctypes.data == first + 64
    assert scratch_arrays((((1,), f),))[0].ctypes.data == first
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: scratch_arrays(shapes)[0].ctypes.data).result() != first


def test_scratch_grows():
    """A greedier call gets a larger buffer, and the arrays of earlier calls move there."""
    f = np.dtype(np.float32)
    scratch_arrays((((1,), f),))
    [large] = scratch_arrays((((1 << 16,), f),))
    large[:] = 1
    assert scratch_arrays((((1,), f),))[0].ctypes.data == large.ctypes.data


# --- costs


def test_flops_come_from_the_kernel_and_bytes_from_the_declaration():
    """FLOPs: the kernel's formula at the tile's sizes. Bytes: each tile once for reading and once for writing, InOut therefore twice."""
    task = Graph().spawn(matmul_forward, tensor(2, 5)[:], tensor(2, 3)[:], tensor(5, 3)[:], tensor(5)[:])
    assert (task.flops, task.bytes) == (2 * 2 * 5 * 3, 4 * (2 * 5 + 2 * 3 + 5 * 3 + 5))

    @kernel(flops=lambda R, repeats: R * repeats)
    def double(x: InOut[R], repeats: int):
        x *= 2**repeats

    task = Graph().spawn(double, tensor(10)[2:6], 3)
    assert (task.flops, task.bytes) == (4 * 3, 2 * 4 * 4)


def test_a_kernel_that_gives_no_formula_counts_what_it_writes():
    """Without `flops`, a kernel costs one operation per element that it writes: good enough to balance by."""
    task = Graph().spawn(scale_forward, tensor(2, 3)[:], tensor(2, 3)[:], tensor(3)[:], 1.0, 0)
    assert task.flops == 6


def test_a_kernel_that_touches_some_elements_says_how_many_bytes():
    """A gather reads some rows of a table: `bytes` takes the place of the sum over whole tiles, by the rules of `flops`."""

    @kernel(bytes=lambda R, C, repeats: 4 * R * (2 * C + 1) * repeats)
    def gather(out: Out[R, C], rows: In[R, np.int32], table: In[N, C], repeats: int):
        out[:] = table[rows]

    task = Graph().spawn(gather, tensor(2, 3)[:], tensor(2, dtype=np.int32)[:], tensor(1000, 3)[:], 5)
    assert (task.flops, task.bytes) == (2 * 3, 4 * 2 * 7 * 5)


@pytest.mark.parametrize("what", ["flops", "bytes"])
def test_a_formula_uses_the_names_of_the_declaration(what):
    """A name in a formula that the kernel does not have is refused at once, not when the first task is recorded."""
    with pytest.raises(TypeError, match=f"fill: {what} asks for 'X'; the kernel has R, value"):

        @kernel(**{what: lambda R, X: R * X})
        def fill(out: Out[R], value: float):
            out[:] = value


# --- the compiled twin


def test_twin_takes_the_same_parameters():
    """Body and twin are one kernel: a twin whose parameters differ in name or order is refused."""

    @kernel
    def add(out: Out[R], a: In[R], b: In[R]):
        np.add(a, b, out=out)

    with pytest.raises(TypeError, match=r"add: the compiled twin must take \['out', 'a', 'b'\]"):

        @add.compiled
        def add(out, b, a):
            pass


@kernel
def cheat_by_index(out: Out[R, C], inp: In[R, C], weight: In[C]):
    out[...] = inp


@cheat_by_index.compiled
def cheat_by_index(out, inp, weight):
    weight[0] = 1


@kernel
def cheat_by_row(out: Out[R, C], inp: In[R, C]):
    out[...] = inp


@cheat_by_row.compiled
def cheat_by_row(out, inp):
    dense(inp[0])[0] = 1


@kernel
def cheat_by_gemm(out: Out[R, C], inp: In[R, C]):
    out[...] = inp


@cheat_by_gemm.compiled
def cheat_by_gemm(out, inp):
    gemm(inp, out, out, 0, 0, 1.0, 0.0)


@kernel
def cheat_twice(out: Out[R, C], inp: In[R, C], weight: In[C], bias: In[C]):
    out[...] = inp


@cheat_twice.compiled
def cheat_twice(out, inp, weight, bias):
    out[0, 0] = bias[0]
    dense(inp[0])[0] = weight[0] = 1


@pytest.mark.parametrize(
    "cheat, names",
    [(cheat_by_index, "'weight'"), (cheat_by_row, "'inp'"), (cheat_by_gemm, "'inp'"), (cheat_twice, "'inp', 'weight'")],
    ids=lambda given: getattr(given, "name", ""),
)
def test_a_twin_that_writes_an_in_tile_does_not_compile(cheat, names):
    """In a twin an In tile is a read-only array, also through `dense` and `gemm`: writing one is an error before anything runs.

    Every tile written is named, in the words that --check has for a body.
    """
    with pytest.raises(AccessError) as error:
        cheat.compile()
    assert str(error.value) == f"{cheat.name} wrote {names}, declared In"


@pytest.mark.parametrize(
    "line, message",
    [
        ("x[0] = undefined(x)", "NameError: name 'undefined' is not defined"),
        ("x[0] = plain(x)", "Untyped global name 'plain': Cannot determine Numba type of <class 'function'>, in .*: x[0] = plain(x)"),
        ("x[0] = 'a'", "No implementation of function Function(<built-in function setitem>) found for signature: >>> setitem("),
        ("x[0] = x.nothing", "Unknown attribute 'nothing' of type array(float32, 1d, C), in .*, line .*: x[0] = x.nothing"),
    ],
)
def test_a_twin_that_does_not_compile(tmp_path, line, message):
    """The kernel, and of numba's sixty lines the one that says what is wrong, with the line of code; the rest is the cause."""
    source = f"def plain(x):\n    pass\n\ndef twin(x):\n    {line}\n"
    file = tmp_path / "twin.py"
    file.write_text(source)
    namespace = {}
    exec(compile(source, str(file), "exec"), namespace)

    @kernel
    def wrong(x: InOut[R]):
        x += 1

    wrong.compiled(namespace["twin"])
    pattern = re.escape(f"wrong: its compiled twin does not compile: {message}").replace(re.escape(".*"), ".*")
    with pytest.raises(TwinError, match=pattern) as error:
        wrong.compile()
    assert "\n" not in str(error.value) and isinstance(error.value.__cause__, NumbaError)
    graph = Graph()
    graph.spawn(wrong, tensor(3)[:])
    with pytest.raises(TaskError, match=r"task 0, wrong inout\(t\[:\]\), spawned in .*: TwinError: " + pattern):
        graph.tasks[0].run()


def test_a_body_is_its_own_twin():
    """One text: Python's functions run it, and machine code does; what it declares is checked as of any twin."""

    @kernel(compiled=True, flops=lambda R: 2 * R)
    def axpy(y: InOut[R], x: In[R], a: float, work: Scratch[R]):
        for n in range(y.shape[0]):
            work[n] = a * x[n]
            y[n] += work[n]

    assert not axpy.is_compiled
    by_twin, by_body, x = np.ones(3, np.float32), np.ones(3, np.float32), np.arange(3, dtype=np.float32)
    axpy(by_twin, x, 2.0)
    assert axpy.is_compiled and axpy.function is not axpy.body
    axpy.body(by_body, x, 2.0, np.empty(3, np.float32))
    assert by_twin.tolist() == by_body.tolist() == [1, 3, 5]
    assert axpy.flops({"R": 3}, {"a": 2.0}) == 6

    @kernel(compiled=True)
    def cheat(out: Out[R], inp: In[R]):
        inp[:] = 1

    with pytest.raises(AccessError, match="cheat wrote 'inp', declared In"):
        cheat.compile()

    @kernel(compiled=True)
    def wrong(x: InOut[R]):
        x[0] = "a"

    with pytest.raises(
        TwinError, match=r"wrong: its body does not compile \(write a twin, or leave compiled=True out\): No implementation"
    ):
        wrong.compile()


@pytest.mark.parametrize("is_checked", [False, True])
@pytest.mark.parametrize("line", ["x[0] = missing(x[0])", "x[0] = helper(x[0])"])
def test_a_twin_that_compiles_once_what_it_lacks_is_there(line, is_checked):
    """Numba would remember the failure, of the twin and of its helper."""
    namespace = {}
    exec(f"def by_missing(value): return missing(value)\ndef good(value): return value * 3\ndef twin(x): {line}", namespace)
    namespace["helper"] = numba.njit(namespace["by_missing"])

    @kernel
    def late(x: InOut[R]):
        x *= 3

    late.compiled(namespace["twin"])
    tried = late.bounds_checked if is_checked else late
    for _ in range(2):
        with pytest.raises(TwinError, match=r"late: its compiled twin does not compile: .*'missing'"):
            tried.compile()
    namespace["missing"] = numba.njit(namespace["good"])
    x = np.ones(1, np.float32)
    tried(x)
    late(x)
    assert x[0] == 9


def test_the_first_call_compiles_for_the_declaration():
    """A twin that nobody compiled is compiled by its first call, for its declared types: the same rules, and no second version."""

    @kernel
    def cheat(out: Out[R], inp: In[R]):
        out[:] = inp

    @cheat.compiled
    def cheat(out, inp):
        inp[0] = 1

    with pytest.raises(AccessError, match="cheat wrote 'inp', declared In"):
        cheat(np.zeros(3, np.float32), np.zeros(3, np.float32))


def test_one_compiled_version_serves_every_tile():
    """Whole tensors, strided rectangles and rows of a 3-D tensor run the same machine code, so a tiling cannot change the bits of a sum."""
    compile_kernels([scale_forward])
    rng = np.random.default_rng(0)
    whole, deep = (Tensor("x", rng.standard_normal(shape, np.float32)) for shape in ((4, 6), (4, 3, 8)))
    weight = Tensor("w", rng.standard_normal(12, np.float32))
    for tile in whole[:], whole[1:3, 2:5], whole[2:3, 5:6], deep[1], deep[1:4, 2, 1:7], deep[0, 1:3]:
        width = tile.shape[1]
        got, wanted = tensor(*tile.shape), tensor(*tile.shape)
        run_now(scale_forward, got[:], tile, weight[3 : 3 + width], 2, True)
        scale_forward.body(wanted.array, tile.array, weight.array[3 : 3 + width], 2, True)
        np.testing.assert_array_almost_equal_nulp(got.array, wanted.array, 2)
    assert len(scale_forward.function.signatures) == 1


def test_division_by_zero_is_no_exception():
    """A twin divides as NumPy does, so that it agrees with its body where numbers run out: inf and nan, no ZeroDivisionError."""

    @kernel
    def divide(out: Out[R], a: In[R], b: In[R]):
        np.divide(a, b, out=out)

    @divide.compiled
    def divide(out, a, b):
        for r in range(out.shape[0]):
            out[r] = a[r] / b[r]

    out = np.zeros(3, np.float32)
    divide(out, np.array([1, -1, 0], np.float32), np.zeros(3, np.float32))
    assert str(out) == "[ inf -inf  nan]"


def test_works_where_there_is_no_file_to_cache_beside():
    """In `python -c` and at the prompt numba has nowhere to cache; the twin is compiled anew there instead of refused."""
    namespace = {"kernel": kernel, "Out": Out, "R": R}
    exec("@kernel\ndef fill(out: Out[R]):\n    out[:] = 1\n\n@fill.compiled\ndef fill(out):\n    out[:] = 2\n", namespace)
    out = np.zeros(3, np.float32)
    namespace["fill"](out)
    assert out.tolist() == [2, 2, 2]


# --- matrix products


@pytest.mark.parametrize("transpose_b", [0, 1])
@pytest.mark.parametrize("transpose_a", [0, 1])
@pytest.mark.parametrize("m, n, k", [(1, 1, 1), (1, 5, 3), (5, 1, 3), (4, 7, 1), (16, 24, 32)])
def test_gemm_is_the_matrix_product(m, n, k, transpose_a, transpose_b):
    """gemm agrees with NumPy for every transpose, alpha and beta, on whole arrays and on tiles in the middle of larger ones.

    The numbers are small integers, whose products float32 holds exactly: equal means equal. Around a tile nothing is written.
    """
    rng = np.random.default_rng(m + 10 * n + 100 * k)
    shapes = (m, n), (k, m) if transpose_a else (m, k), (n, k) if transpose_b else (k, n)
    for margin in 0, 3:
        for alpha, beta in (1.0, 0.0), (1.0, 1.0), (-2.0, 0.5), (0.0, 2.0):
            around = [rng.integers(-4, 5, (rows + 2 * margin, columns + 2 * margin)).astype(np.float32) for rows, columns in shapes]
            wanted = around[0].copy()
            c, a, b = (
                block[margin : margin + rows, margin : margin + columns] for block, (rows, columns) in zip(around, shapes, strict=True)
            )
            product.body(wanted[margin : margin + m, margin : margin + n], a, b, transpose_a, transpose_b, alpha, beta)
            product(c, a, b, transpose_a, transpose_b, alpha, beta)
            np.testing.assert_array_equal(around[0], wanted)


def test_gemm_with_beta_0_does_not_read_c():
    """With beta = 0, c is only written: NaN from memory that was never set does not spread."""
    c = np.full((2, 2), np.nan, np.float32)
    product(c, np.eye(2, dtype=np.float32), np.ones((2, 2), np.float32), 0, 0, 1.0, 0.0)
    assert c.tolist() == [[1, 1], [1, 1]]


def test_gemm_takes_a_row_without_a_distance():
    """A matrix of one row may say that rows are 0 bytes apart, as NumPy's `x[None]` does; BLAS would refuse that and compute nothing."""
    row = np.arange(3, dtype=np.float32)
    c = np.zeros(3, np.float32)
    product(c[None], row[None], 2 * np.eye(3, dtype=np.float32), 0, 0, 1.0, 0.0)
    assert c[None].strides[0] == 0 or row[None].strides[0] == 0
    assert c.tolist() == [0, 2, 4]
    for far in (-4, 1 << 40):  # as 32 bits, the number of elements would be negative, or 0
        c[:] = 0
        one, other = (as_strided(x, (1, 3), (far, 4)) for x in (row, c))
        product(other, one, 2 * np.eye(3, dtype=np.float32), 0, 0, 1.0, 0.0)
        assert c.tolist() == [0, 2, 4]


def test_gemm_takes_tiles_without_elements(capfd):
    """The sum of nothing is 0; and BLAS has nothing to say of distances that are 0."""
    for m, n, k in (0, 5, 7), (5, 0, 7), (5, 7, 0):
        c = np.full((m, n), np.nan, np.float32)
        product(c, np.ones((m, k), np.float32), np.ones((k, n), np.float32), 0, 0, 1.0, 0.0)
        assert not c.any()
    assert capfd.readouterr() == ("", "")


# --- sending and compiling


def test_is_sent_by_name():
    """A kernel is pickled as module and name, so the receiver runs its own compiled twin; it is the same object at home."""
    assert pickle.loads(pickle.dumps(matmul_forward)) is matmul_forward
    assert b"matmul_forward" in pickle.dumps(matmul_forward)


def test_a_kernel_that_no_import_finds_is_not_sent():
    """A kernel defined inside a function, or hidden by another of its name, would arrive as another one: refused when it is sent."""

    @kernel
    def matmul_forward(out: Out[R]):
        out[:] = 0

    with pytest.raises(pickle.PicklingError, match=r"test_kernel\.matmul_forward is another object"):
        pickle.dumps(matmul_forward)


def test_compile_kernels_reports_each():
    """compile_kernels compiles what needs it and says how far it is, how long each took and whether the disk had it."""

    @kernel
    def fill(out: Out[R]):
        out[:] = 1

    @fill.compiled
    def fill(out):
        for r in range(out.shape[0]):
            out[r] = 1

    seen = []
    compile_kernels([matmul_forward, fill, matmul_forward], lambda *report: seen.append(report))
    [(done, total, reported, seconds, was_cached)] = seen  # matmul_forward has no twin: nothing to do
    assert (done, total, reported, type(seconds), type(was_cached)) == (1, 1, fill, float, bool)
    assert fill.is_compiled and matmul_forward.is_compiled
    compile_kernels([fill], lambda *report: pytest.fail("compiled twice"))


def test_threads_may_meet_an_uncompiled_twin_together():
    """The first calls of a kernel come from several threads at once: it is compiled once, and all of them run."""

    @kernel
    def double(out: Out[R], inp: In[R]):
        np.multiply(inp, 2, out=out)

    @double.compiled
    def _(out, inp):
        for r in range(out.shape[0]):
            out[r] = inp[r] * np.float32(2)

    together = threading.Barrier(4)
    inp, outputs = np.arange(5, dtype=np.float32), np.zeros((4, 5), np.float32)

    def first_call(out):
        together.wait()
        double(out, inp)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(first_call, outputs))
    assert (outputs == 2 * inp).all()
    assert len(double._twin.signatures) == 1


@pytest.mark.parametrize("name", ["sequential", "native"])
def test_the_twin_that_was_defined_last_runs(name):
    """A cell of a notebook that defines a twin anew: graphs old and new run it, and what checks its indices is made of it."""

    @kernel
    def add(x: InOut[R]):
        x += 1

    def define(number: float) -> None:
        @add.compiled
        def _(x):
            for i in range(x.shape[0]):
                x[i] += number

    define(1)
    x = np.zeros(4, np.float32)
    known, new = Graph(), Graph()
    known.spawn(add, Tensor("x", x)[:])
    chosen = load_scheduler(name, {"workers": 1})
    with open_scheduler(chosen.scheduler, chosen.settings) as scheduler:
        scheduler.run(known)
        add.bounds_checked(x)
        assert x[0] == 2
        define(100)
        scheduler.run(known)
        new.spawn(add, Tensor("x", x)[:])
        scheduler.run(new)
        add.bounds_checked(x)
        assert x[0] == 302
