"""A kernel is declared once: its text, its types, its shapes, its costs and its compiled twin all follow from the signature."""

import errno
import importlib
import inspect
import linecache
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import numpy as np
import pytest
from numba.core.caching import IndexDataCacheFile, _CacheLocator
from numba.core.errors import NumbaError

from taskgpt.tasks import (
    AccessError,
    Commutative,
    Graph,
    In,
    InOut,
    Out,
    Scratch,
    ShapeError,
    Tensor,
    compile_kernels,
    dense,
    dims,
    kernel,
    run_now,
)
from taskgpt.tasks.blas import gemm
from taskgpt.tasks.kernel import _warned
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
    """A parameter without In, Out, InOut, Commutative, Scratch, int or float is refused where the kernel is defined, by name."""

    def careless(out: Out[R], inp):
        pass

    if annotation is not inspect.Parameter.empty:
        careless.__annotations__["inp"] = annotation if annotation != "a tile" else "str"
    with pytest.raises(TypeError, match="careless: parameter 'inp' needs In, Out, InOut, Commutative, Scratch, int or float"):
        kernel(careless)


@pytest.mark.parametrize(
    "items", [3.5, (R, 0), (R, -1), (R, True), (R, float), (R, None), (np.int32, R), np.int32, ()], ids=lambda items: repr(items)
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


# --- the cache of compiled twins

KERNEL_FILE = """
    import numba
    import numpy as np
    import helper_module
    from helper_module import FACTOR as IMPORTED
    from helper_module import helper as imported
    from taskgpt.tasks import InOut, dims, kernel

    R, S = dims("R S")

    @kernel
    def scale(x: InOut[R]):
        x *= 0

    @scale.compiled
    def scale(x):
        for r in range(x.shape[0]):
            x[r] = {expression}

    @numba.njit
    def local(value):
        return imported(value)
"""
HELPER_FILE = """
    import numba

    FACTOR = {factor}

    @numba.njit
    def helper(value):
        return {factor} * value
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write and import the two files of KERNEL_FILE and HELPER_FILE as if in a new process; return the kernel."""
    monkeypatch.syspath_prepend(tmp_path)
    _warned.clear()
    names = "kernel_module", "helper_module"

    def write(expression: str, factor: str, do_import: bool = True):
        for name, text in zip(names, (KERNEL_FILE, HELPER_FILE), strict=True):
            text = textwrap.dedent(text.format(expression=expression, factor=factor))
            path = tmp_path / f"{name}.py"
            if not path.exists() or path.read_text() != text:  # an untouched file keeps its time
                path.write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("kernel_module").scale if do_import else None

    yield write
    for name in names:
        sys.modules.pop(name, None)


def scaled(scale) -> tuple[float, bool]:
    """Return (what the kernel makes of 1, whether it came from the cache)."""
    was_cached = scale.compile()
    x = np.ones(1, np.float32)
    scale(x)
    return float(x[0]), was_cached


@pytest.mark.parametrize(
    "expression", ["imported(x[r])", "helper_module.helper(x[r])", "local(x[r])", "x[r] * IMPORTED", "x[r] * helper_module.FACTOR"]
)
def test_cache_is_stale_when_a_helper_changes(write, expression):
    """A twin is loaded from disk as long as nothing that it uses changed: helper or number, in this file or another, however it is reached.

    numba by itself looks at the twin's own file alone, and would go on running the old numbers without a word.
    """
    assert scaled(write(expression, "2")) == (2, False)
    assert scaled(write(expression, "2")) == (2, True)
    assert scaled(write(expression, "300")) == (300, False)
    assert scaled(write(expression, "300")) == (300, True)


def test_cache_serves_new_processes_until_a_helper_changes(write, tmp_path):
    """The same across processes, as users meet it: run, run again (cached), edit the helper, run (new numbers)."""
    program = (
        "from kernel_module import scale; import numpy as np\n"
        "was_cached = scale.compile(); x = np.ones(1, np.float32); scale(x); print(x[0], was_cached)"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])

    def run(factor: str) -> str:
        write("local(x[r])", factor, do_import=False)
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert [run("2"), run("2"), run("300")] == ["2.0 False", "2.0 True", "300.0 False"]


def test_cache_of_a_notebook_is_stale_when_a_cell_changes(tmp_path, monkeypatch):
    """Cells have no file whose time could be compared: there the text decides, also of a helper in another cell."""
    pytest.importorskip("IPython")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # IPython looks there first
    cells = [
        "import numba\nfrom taskgpt.tasks import InOut, dims, kernel\n(R,) = dims('R')\n",
        "@numba.njit\ndef helper(value):\n    return {} * value\n",
        "@kernel\ndef scale(x: InOut[R]):\n    x *= 0\n\n@scale.compiled\ndef scale(x):\n    x[0] = helper(x[0]) + {}\n",
    ]

    def run(factor: int, shift: int) -> tuple[float, bool]:
        namespace = {"__name__": "__main__"}
        for at, cell in enumerate(cells):
            cell, file = cell.format(factor if at == 1 else shift), f"{tmp_path}/ipykernel_1/{at}.py"
            linecache.cache[file] = len(cell), None, cell.splitlines(keepends=True), file
            exec(compile(cell, file, "exec"), namespace)
        return scaled(namespace["scale"])

    assert [run(2, 0), run(2, 0), run(300, 0), run(300, 1)] == [(2, False), (2, True), (300, False), (301, False)]


def files_of_cache(scale, ending: str) -> list[Path]:
    return list(Path(scale._twin.stats.cache_path).glob(f"kernel_module.scale_*-*.{ending}"))


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
@pytest.mark.parametrize("kept", [0, 20, 400])
def test_damaged_files_of_the_cache_are_replaced(write, ending, kept):
    """A file cut short, by a crash or a full disk, costs the time of compiling and a line; the next start finds a good one."""
    scale = write("local(x[r])", "2")
    assert scaled(scale) == (2, False)
    [file] = files_of_cache(scale, ending)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.warns(RuntimeWarning, match="damaged compiled kernels in numba's cache; compiling anew and replacing them") as seen:
        assert scaled(write("local(x[r])", "2")) == (2, False)
    assert len(seen) == 1
    assert scaled(write("local(x[r])", "2")) == (2, True)


@pytest.mark.parametrize("method", ["_save_index", "_save_data"])
def test_a_full_disk_costs_the_cache_and_not_the_run(write, monkeypatch, method):
    """The twin is compiled and runs; a line says why it was not kept. What was kept before the helper changed is not taken for it."""

    def fail(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    assert scaled(write("local(x[r])", "2")) == (2, False)
    with monkeypatch.context() as patch:
        patch.setattr(IndexDataCacheFile, method, fail)
        with pytest.warns(RuntimeWarning, match=r"\(No space left on device\), .* set NUMBA_CACHE_DIR to another folder") as seen:
            assert scaled(write("local(x[r])", "300")) == (300, False)
        assert len(seen) == 1
    assert scaled(write("local(x[r])", "300")) == (300, False)
    assert scaled(write("local(x[r])", "300")) == (300, True)


def test_runs_where_no_folder_can_be_written(write, monkeypatch):
    """Package and home on a read-only disk: importing is silent, and compiling says once what to do, not once a kernel."""

    def fail(*args):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(_CacheLocator, "ensure_cache_path", fail)
    scale = write("local(x[r])", "2")
    with pytest.warns(RuntimeWarning, match="numba's cache cannot keep compiled kernels, .* set NUMBA_CACHE_DIR") as seen:
        assert scaled(scale) == (2, False)
        assert scaled(write("local(x[r])", "300")) == (300, False)
    assert len(seen) == 1


# --- without numba's compiler: NUMBA_DISABLE_JIT=1


def test_without_the_compiler_a_twin_is_plain_python(write, monkeypatch):
    """That is how to debug a twin: breakpoints and print work, in its helpers as well."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)
    scale = write("local(x[r])", "300")
    assert not scale.is_compiled
    assert scaled(scale) == (300, False)
    assert scale.is_compiled and inspect.isfunction(scale.function) and scale.function is not scale.body


def test_without_the_compiler_a_twin_with_an_intrinsic_gives_way_to_its_body(monkeypatch):
    """dense, gemm and exp32 are made of machine code, also in a helper: the NumPy body runs."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", True)

    @numba.njit
    def first(row):
        return dense(row)[0]

    @kernel
    def take(out: Out[R], inp: In[R]):
        out[:] = inp[0]

    @take.compiled
    def take(out, inp):
        out[:] = first(inp) + 1

    out = np.zeros(2, np.float32)
    take(out, np.array([3, 4], np.float32))
    assert (out.tolist(), take.function) == ([3, 3], take.body)


def test_gpt2_runs_without_the_compiler():
    """From the first import on, in a process of its own, as a user would start it."""
    program = (
        "import numpy as np; from taskgpt.gpt2 import attention, classifier as c, kernels as k, updates\n"
        "from taskgpt.tasks import Kernel, compile_kernels\n"
        "compile_kernels(v for module in (attention, c, k, updates) for v in vars(module).values() if isinstance(v, Kernel))\n"
        "loss, losses = np.zeros(1, np.float32), np.ones(4, np.float32); c.loss_forward(loss, losses)\n"
        "print(loss[0], c.loss_forward.function is c.loss_forward.body, k.gelu_forward.function is k.gelu_forward.body)"
    )
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("1.0 False True", "")


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


def test_gemm_takes_float32_matrices_only():
    """sgemm would read the bytes of other types as float32: such a twin does not compile."""

    @kernel
    def wide(c: Out[M, N, np.float64], a: In[M, K, np.float64], b: In[K, N, np.float64]):
        np.matmul(a, b, out=c)

    @wide.compiled
    def wide(c, a, b):
        gemm(c, a, b, 0, 0, 1.0, 0.0)

    with pytest.raises(NumbaError, match="gemm takes float32 tiles of two dimensions"):
        wide.compile()


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
