"""Compiled twins are kept on disk, and loaded only while everything that they were compiled from is as it was."""

import errno
import importlib
import inspect
import linecache
import os
import pwd
import subprocess
import sys
import sysconfig
import textwrap
import time
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import dask
import numba
import numpy as np
import pytest
from numba import extending
from numba.core.caching import IndexDataCacheFile, _CacheLocator

from taskgpt.tasks import Graph, In, InOut, Out, Tensor, TwinError, cache, compile_kernels, dense, dims, kernel, run_now, sources
from taskgpt.tasks.cache import _warned
from taskgpt.tasks.sources import Sources

(R,) = dims("R")
ROOT = Path(__file__).parents[1]

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

    @numba.njit
    def by_table(value):
        return TABLE[0] * value

    @numba.njit
    def by_itself(value):
        return value if value < 2 else by_itself(value / 2)
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
    path = os.pathsep.join([str(tmp_path), str(ROOT)])

    def run(factor: str) -> str:
        write("local(x[r])", factor, do_import=False)
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout.strip()

    assert [run("2"), run("2"), run("300")] == ["2.0 False", "2.0 True", "300.0 False"]


@pytest.fixture
def with_table(write):
    """Return the kernel of `write` as if in a new process in which helper_module found this table, in a file perhaps."""

    def with_table(expression: str, table: np.ndarray):
        scale = write(expression, "1")
        sys.modules["helper_module"].TABLE = table
        return scale

    return with_table


@pytest.mark.parametrize("expression", ["x[r] * helper_module.TABLE[0]", "helper_module.by_table(x[r])"])
def test_cache_is_stale_when_a_table_changes(with_table, expression):
    """Numba freezes global arrays; where they come from, no file that it knows of may have changed."""
    for factor, was_cached in (2, False), (2, True), (300, False), (300, True), (2, True):
        assert scaled(with_table(expression, np.array([factor]))) == (factor, was_cached)


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_helper_that_was_compiled_before_its_table_changed(with_table, is_kept):
    """Code of it with the old table is in the process, or in the cache that its author asked numba for: a twin gets neither."""
    for factor in 2, 300:
        scale = with_table("helper_module.by_table(x[r])", np.array([factor]))
        module = sys.modules["helper_module"]
        helper = module.by_table
        if is_kept:
            helper.enable_caching()
        helper(np.float32(1))
        assert scaled(scale) == (factor, False)
    module.TABLE = np.array([5])

    @kernel
    def other(x: InOut[R]):
        x *= 5

    @other.compiled
    def _(x):
        x[0] = helper(x[0])

    assert scaled(other)[0] == 5


def test_a_table_that_changes_after_the_twin_was_compiled(with_table):
    """The twin cannot see it and the body would: refused however it is recorded, compiled or run, with the name of the table."""
    scale = with_table("helper_module.by_table(x[r])", np.array([2]))
    module = sys.modules["helper_module"]
    assert scaled(scale) == (2, False)
    tile = Tensor("x", np.ones(1, np.float32))[:]
    graph = Graph()
    graph.spawn(scale, tile)
    graph.__dask_graph__()  # the run that Dask is given next has been made already
    message = "scale: 'TABLE' has changed since its compiled twin was made, .*; pass what changes as a tile or a constant"
    for change in lambda: setattr(module, "TABLE", np.array([300])), lambda: module.TABLE.__setitem__(0, 5):
        change()
        with pytest.raises(TwinError, match=message):
            Graph().spawn(scale, tile)
        with pytest.raises(TwinError, match=message):
            compile_kernels(graph.kernels)
        for run in (
            lambda: scale(tile.array),
            lambda: run_now(scale, tile),
            graph.to_dask,
            graph.compute,
            lambda: dask.compute(graph, scheduler="sync"),
        ):
            with pytest.raises(TwinError, match=message):
                run()
    assert tile.array[0] == 1
    module.TABLE = np.array([2])  # another array, the same numbers
    Graph().spawn(scale, tile)
    graph.compute()
    assert tile.array[0] == 2
    module.by_table = module.helper
    with pytest.raises(TwinError, match=r"scale: by_table\(\) has changed since"):
        Graph().spawn(scale, tile)


def test_boundscheck_works_and_does_not_stay(write, monkeypatch):
    """NUMBA_BOUNDSCHECK=1 finds what was compiled without it useless, and leaves nothing to those who run without it."""
    for is_checked, was_cached in (None, False), (1, False), (None, True), (1, True):
        monkeypatch.setattr(numba.config, "BOUNDSCHECK", is_checked)
        scale = write("x[r + 1]", "1")
        assert scale.compile() == was_cached
        with pytest.raises(IndexError, match="out of bounds") if is_checked else nullcontext():
            scale(np.ones(1, np.float32))


FACTORY_FILE = """
    import math
    import numba
    from taskgpt.tasks import InOut, dims, kernel

    (R,) = dims("R")

    def make(name, factor):
        @numba.njit
        def helper(x):  # too long to be inlined: a function of its own in the machine code, named after this one
            for _ in range(3):
                # lines
            return factor + 0 * x

        def body(x: InOut[R]):
            x *= factor

        body.__name__ = name
        scale = kernel(body)

        @scale.compiled
        def _(x):
            for r in range(x.shape[0]):
                x[r] = helper(x[r])
            for r in range(x.shape[0]):
                x[r] = helper(x[r])

        return scale

    one, two = make("one", 2.0), make("two", 3.0)
"""


def test_code_of_two_processes_does_not_mix(tmp_path, monkeypatch):
    """Helpers of one name, kept by two processes, meet in a third: each twin calls its own.

    Numba numbers functions anew in every process, and the linker takes the first of two of one name and number.
    """
    lines = 5 * (12 * " " + "x = math.sin(x) + math.cos(x) * math.tan(x) + math.exp(-x) + math.log(abs(x) + 1)\n")
    (tmp_path / "factory_module.py").write_text(textwrap.dedent(FACTORY_FILE).replace("            # lines\n", lines))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for name in "one", "two":
        subprocess.run([sys.executable, "-c", f"import factory_module; factory_module.{name}.compile()"], env=environment, check=True)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("factory_module")
    assert [scaled(module.one), scaled(module.two)] == [(2, True), (3, True)]


def test_processes_that_fill_an_empty_cache_together(write, tmp_path):
    """All compile, none fails or warns, and what they leave is whole: the next one loads it."""
    write("local(x[r])", "2", do_import=False)
    program = """
import os
import numpy as np
from kernel_module import scale
go, start = os.pipe()
for _ in range(5):
    if os.fork() == 0:
        os.close(start)
        os.read(go, 1)  # until all are there
        x = np.ones(1, np.float32)
        scale(x)
        os._exit(0 if x[0] == 2 else 1)
os.close(start)
print([os.wait()[1] for _ in range(5)])
print(scale.compile())
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (f"{[0] * 5}\nTrue\n", "")


def test_what_numba_cannot_load_is_not_kept(write):
    """Code that holds an address, of a large array, and functions that call themselves, at which numba crashes: compiled anew each time."""
    with pytest.warns(RuntimeWarning, match="scale is compiled anew in every run: 'helper_module.FACTOR' is so large an array") as seen:
        for _ in range(2):
            assert scaled(write("x[r] * helper_module.FACTOR[0]", "__import__('numpy').full(200_000, 2.0)")) == (2, False)
    assert len(seen) == 1
    with pytest.warns(RuntimeWarning, match="scale is compiled anew in every run: 'by_itself' calls itself"):
        for _ in range(2):
            assert scaled(write("helper_module.by_itself(x[r])", "2")) == (1, False)


def rename_nothing(self, cache_path, filename_base, source_stamp):
    self._index_path = os.path.join(cache_path, "index")


@pytest.mark.parametrize("owner, name, value", [(cache, "_is_cache_known", False), (IndexDataCacheFile, "__init__", rename_nothing)])
def test_a_numba_that_caches_otherwise_costs_the_cache(write, monkeypatch, owner, name, value):
    """Its cache is private to numba. Where it is not as expected, nothing is kept, rather than something stale."""
    monkeypatch.setattr(owner, name, value)
    with pytest.warns(RuntimeWarning, match=r"compiled kernels are not kept, .*: numba [0-9.]+ has another cache than expected") as seen:
        assert [scaled(write("local(x[r])", "2")), scaled(write("local(x[r])", "2"))] == [(2, False)] * 2
    assert len(seen) == 1


@pytest.mark.parametrize("home", ["", None])
def test_without_a_home_no_folder_is_made_up(write, tmp_path, monkeypatch, home):
    """HOME empty, or unset for a user whom the system does not know, and the package read-only: no cache, and no folder called `~`."""

    def nobody(*_):
        raise KeyError("no such user")

    ensure = _CacheLocator.ensure_cache_path
    made = []

    def fail_beside_the_file(self):
        if type(self).__name__.endswith("InTreeCacheLocator"):
            raise OSError(errno.EROFS, "Read-only file system")
        made.append(self.get_cache_path())
        ensure(self)

    monkeypatch.setattr(_CacheLocator, "ensure_cache_path", fail_beside_the_file)
    monkeypatch.setattr("numba.config.CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME") if home is None else monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(RuntimeWarning, match="numba's cache cannot keep compiled kernels"):
        assert scaled(write("local(x[r])", "2")) == (2, False)
    assert made == [] and not (tmp_path / "~").exists()


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


def test_what_was_made_from_other_sources_goes(write):
    """Unless it was used within a month, by loading it as well."""

    def age(count: int) -> None:
        files = files_of_cache(first, "nb?")
        assert len(files) == 2 * count
        for file in files:
            os.utime(file, (time.time() - 31 * 86_400,) * 2)

    first = write("local(x[r])", "2")
    scaled(first)
    age(1)
    assert scaled(write("local(x[r])", "2")) == (2, True)
    for factor in 3, 4:
        assert scaled(write("local(x[r])", str(factor))) == (factor, False)
    age(3)
    assert scaled(write("local(x[r])", "5")) == (5, False)
    assert scaled(write("local(x[r])", "5")) == (5, True)
    age(1)


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
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("1.0 False True", "")


# --- what a twin is compiled from

SOURCE = """
import enum, math, operator, types
from collections import namedtuple
import numba, numpy as np
from llvmlite import ir
from numba.extending import intrinsic, lower_builtin, lower_cast, overload, overload_attribute, overload_method
from numba.extending import register_jitable, type_callable

Pair = namedtuple("Pair", "a b")
module = types.ModuleType("module")
X = {value}
module.inner = types.ModuleType("inner")
module.inner.X = module.X = X

def plain(x):
    pass

@overload(plain)
def plain_compiled(x):
    return lambda x: x * {number}

@register_jitable
def jitable(x):
    return x * {number}

def constant():
    return {number}

@intrinsic
def made(context, x):
    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(64), constant())
    return numba.types.int64(x), codegen

@numba.njit
def of_helper(x):
    return x * X

@numba.njit
def by_default(x, y={value}):
    return x

@numba.njit({options})
def with_options(x):
    return x / 3

def closure():
    inside = {value}
    return lambda x: x + inside

def lowering(context, builder, *args):
    return ir.Constant(ir.DoubleType(), {number})

{registered}

def f(x):
    {text}
twin = closure() if {is_closure} else f
"""


def sources_of(text: str, value: object = "1.5", number: int = 2, **given: object) -> tuple[Sources, dict]:
    """Return what a twin with this line that is compiled beside SOURCE is made from, and the namespace of both."""
    namespace = {"__name__": "a_module_of_the_user"}
    given = {"options": "", "is_closure": False, "registered": ""} | given
    exec(compile(SOURCE.format(text=text, value=value, number=number, **given), "user.py", "exec"), namespace)
    return Sources(namespace["twin"]), namespace


def digest_of(*args: object, **given: object) -> tuple[str, list[str]]:
    """Return its digest, and why it could not be kept."""
    found, _ = sources_of(*args, **given)
    return found.digest(), found.unknown


@contextmanager
def registries_as_before() -> Iterator[None]:
    """Let numba forget what is registered meanwhile. It has not seen it, as nothing is compiled."""
    lists = [*sources._registries(), sources.templates.builtin_registry.globals]
    counts = list(map(len, lists))
    try:
        yield
    finally:
        for each, count in zip(lists, counts, strict=True):
            del each[count:]
        sources._registrations_among.cache_clear()


VALUES = {
    "number": ("1.5", "2.5"),
    "zero": ("0.0", "-0.0"),
    "type of number": ("1", "True"),
    "array": ("np.array([1.0, 2.0])", "np.array([1.0, 3.0])"),
    "dtype of array": ("np.zeros(2, np.int32)", "np.zeros(2, np.float32)"),
    "shape of array": ("np.zeros((2, 3))", "np.zeros((3, 2))"),
    "order of array": ("np.ones((2, 2))", "np.ones((2, 2), order='F')"),
    "record": ("np.zeros(1, [('a', 'f4'), ('b', 'f4')])", "np.zeros(1, [('b', 'f4'), ('a', 'f4')])"),
    "row of records": ("np.ones(1, 'f4,f4')[0]", "np.zeros(1, 'f4,f4')[0]"),
    "nested tuple": ("(1, (2, (3, 4)))", "(1, (2, (3, 5)))"),
    "array in a tuple": ("(1, np.zeros(2))", "(1, np.ones(2))"),
    "named tuple": ("Pair(1, 2)", "Pair(1, 3)"),
    "list": ("[1, 2]", "[1, 3]"),
    "dict": ("dict(a=1)", "dict(a=2)"),
    "None": ("None", "0"),
    "dtype": ("np.dtype('f4')", "np.dtype('>f4')"),
    "type": ("np.float32", "np.float64"),
    "numba type": ("numba.float32", "numba.float64"),
    "enum member": ("enum.Enum('E', dict(A=1)).A", "enum.Enum('E', dict(A=2)).A"),
    "enum": ("enum.IntEnum('E', dict(A=1))", "enum.IntEnum('E', dict(A=2))"),
    "text": ("'a'", "b'a'"),
    "function of a library": ("math.sin", "math.cos"),
    "ufunc": ("np.add", "np.subtract"),
    "helper": ("numba.njit(lambda x: 1)", "numba.njit(lambda x: 2)"),
    "helpers in a tuple": ("(numba.njit(lambda x: 1),)", "(numba.njit(lambda x: 2),)"),
}


@pytest.mark.parametrize("before, after", VALUES.values(), ids=VALUES)
def test_every_value_that_numba_freezes_is_in_the_digest(before, after):
    """A global of the twin's, read directly or from a module; one of a helper's; a default; a closure: equal if equal, else another."""
    lines = "X", "module.X", "module.inner.X", "of_helper(x)", "by_default(x)", "m = module; return m.X"
    for text, is_closure in [*((line, False) for line in lines), ("pass", True)]:
        kept, unknown = digest_of(text, before, is_closure=is_closure)
        assert (kept, unknown) == (digest_of(text, before, is_closure=is_closure)[0], []), text
        assert kept != digest_of(text, after, is_closure=is_closure)[0], text
    assert digest_of("pass", before)[0] == digest_of("pass", after)[0]  # what nobody reads is nobody's business


def test_what_is_seen_before_every_run():
    """Another object under a name, in a closure or in a container, or other bytes in an array. Names of others are others' business."""

    for text in "X", "module.X", "module.inner.X", "of_helper(x)":
        seen, namespace = sources_of(text, "1.5")
        namespace["number"] = namespace["Pair"] = 1
        assert seen.are_untouched()
        for holder in vars(namespace["module"]), vars(namespace["module"].inner), namespace:
            holder["X"] = 2.5
        assert not seen.are_untouched()
    for value, change in [
        ("np.ones(2)", lambda x: x.fill(0)),
        ("(1, np.ones(2))", lambda x: x[1].fill(0)),
        ("np.ones(1, 'f4,f4')[0]", lambda x: x.__setitem__(0, 0)),
        ("[1, 2]", lambda x: x.append(3)),
        ("dict(a=1)", lambda x: x.update(a=1.0)),
        ("{1}", lambda x: x.clear()),
    ]:
        seen, namespace = sources_of("X", value)
        change(namespace["X"])
        assert not seen.are_untouched(), value
    seen, namespace = sources_of("pass", "1.5", is_closure=True)
    [cell] = namespace["twin"].__closure__
    cell.cell_contents = 2.5
    assert not seen.are_untouched()
    del cell.cell_contents
    assert not seen.are_untouched()


def test_what_has_changed_is_named():
    """A new name as well; what only stands on another line has not, though a cache that tells lines would be stale."""
    before, namespace = sources_of("abs(X)")
    namespace["abs"] = 3
    assert Sources(namespace["f"]).changed_since(before) == "'abs'"
    before, after = (sources_of("of_helper(x)", registered=lines)[0] for lines in ("", "\n\n"))
    assert after.changed_since(before) is None
    assert after.digest() != before.digest()


@pytest.mark.parametrize("vectorized", ["numba.vectorize(lambda x: x * module.Y)", "numba.vectorize(['f8(f8)'])(lambda x: x * module.Y)"])
def test_what_an_object_without_content_is_made_of_is_watched(vectorized):
    """It is not kept, but a change before a run is seen."""
    seen, namespace = sources_of("X(x)", f"(setattr(module, 'Y', 1), {vectorized})[1]")
    namespace["module"].Y = 2
    assert not seen.are_untouched()
    assert Sources(namespace["f"]).changed_since(seen) == "'module.Y'"


@pytest.mark.parametrize("value", ["holds_itself", "raises_something"])
def test_odd_values_are_not_kept(value):
    """A list that holds itself twice; an object whose attributes raise."""
    holds_itself = []
    holds_itself += [holds_itself, holds_itself]
    odd = {"holds_itself": holds_itself, "raises_something": type("Odd", (), {"__getattr__": lambda self, name: 1 / 0})()}[value]
    _, namespace = sources_of("X")
    namespace["X"] = odd
    assert "whose changes a cache would not see" in Sources(namespace["f"]).unknown[0]


def test_what_compiling_notes_is_no_change(monkeypatch):
    """An intrinsic may count how often it is compiled."""
    monkeypatch.setattr(cache, "_set_cache", lambda *_: False)  # from which it would not be compiled
    calls = []

    @extending.intrinsic
    def counted(context, x):
        calls.append(x)
        return x(x), lambda context, builder, signature, args: args[0]

    @kernel
    def same(x: InOut[R]):
        pass

    @same.compiled
    def _(x):
        x[0] = counted(x[0])

    x = np.ones(1, np.float32)
    same(x)
    same(x)
    same.verify_sources()
    assert len(calls) == 1


def test_helpers_that_compile_later_are_no_change():
    """For another type, by themselves or in another twin, whether lazily or with the types that their author gave."""

    @numba.njit
    def lazy(x):
        return 2 * x

    @numba.njit("f4(f4)")
    def typed(x):
        return 3 * x

    def made(declared):
        @kernel
        def six(x: declared):
            x *= 6

        @six.compiled
        def _(x):
            x[0] = typed(lazy(x[0]))

        return six

    one, other = made(InOut[R]), made(InOut[R, np.float64])
    x = np.ones(1, np.float32)
    one(x)
    lazy(1)
    other(np.ones(1))
    one(x)
    one.verify_sources()
    other.verify_sources()
    assert x[0] == 36


@pytest.mark.parametrize("text", ["plain(x)", "jitable(x)", "made(x)"])
def test_code_that_stands_in_for_other_code_is_in_the_digest(text):
    """@overload, register_jitable, and what an intrinsic runs when it is compiled: all of it is compiled in."""
    assert digest_of(text, number=2) == digest_of(text, number=2) != digest_of(text, number=3)
    assert digest_of(text)[1] == []


@pytest.mark.parametrize("options", ["fastmath=True", "error_model='numpy'", "inline='always'", "boundscheck=True", "'f8(f8)'"])
def test_the_options_of_a_helper_are_in_the_digest(options):
    """Same Python code, other machine code."""
    assert digest_of("with_options(x)", options=options) == digest_of("with_options(x)", options=options)
    assert digest_of("with_options(x)", options=options) != digest_of("with_options(x)")


@pytest.mark.parametrize(
    "name, value", [("BOUNDSCHECK", 1), ("OPT", 0), ("DEBUGINFO_DEFAULT", 1), ("LOOP_VECTORIZE", 0), ("FULL_TRACEBACKS", 1)]
)
def test_the_settings_of_numba_are_in_the_digest(monkeypatch, name, value):
    """NUMBA_* variables that change code; those about the cache and threads do not."""
    before = digest_of("pass")
    monkeypatch.setattr(numba.config, name, value)
    assert digest_of("pass") != before
    monkeypatch.undo()
    monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 7)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "/elsewhere")
    assert digest_of("pass") == before


def test_the_digest_is_the_same_in_every_process():
    """Whatever the seed of Python's hashes and wherever objects lie: otherwise nothing would ever be loaded."""
    program = (
        "from taskgpt.gpt2 import attention, classifier, kernels, norms, updates\nfrom taskgpt.schedulers.native import worker\n"
        "from taskgpt.tasks.sources import Sources\nmodules = attention, classifier, kernels, norms, updates\n"
        "twins = [k._twin.py_func for m in modules for k in vars(m).values() if getattr(k, '_twin', None)]\n"
        "print([Sources(f).digest() for f in [*twins, worker.work.py_func]], [why for f in twins for why in Sources(f).unknown])"
    )
    seen = set()
    for seed in "1", "2":
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        seen.add(subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout)
    [printed] = seen
    assert printed.endswith(" []\n") and printed.count("'") > 60


REGISTERED = {
    "a function of a library": ("np.gradient(x)", "overload(np.gradient)(lambda x: lambda x: x * {number})"),
    "a function that others call": ("np.sum(x)", "overload(np.isclose)(lambda x: lambda x: x * {number})"),
    "a builtin": ("len(x)", "overload(len)(lambda x: lambda x: {number})"),
    "an operator": ("x + x", "overload(operator.add)(lambda x, y: lambda x, y: {number})"),
    "a method": ("x.mine()", "overload_method(numba.types.Array, 'mine')(lambda x: lambda x: {number})"),
    "an attribute": ("x.mine", "overload_attribute(numba.types.Array, 'mine')(lambda x: lambda x: {number})"),
    "options": ("np.gradient(x)", "overload(np.gradient, jit_options=dict(boundscheck={number} == 2))(lambda x: lambda x: x)"),
    "literals": ("np.gradient(x)", "overload(np.gradient, prefer_literal={number} == 2)(lambda x: lambda x: x)"),
    "strictness": ("np.gradient(x)", "overload(np.gradient, strict={number} == 2)(lambda x: lambda x: x)"),
    "inlining": ("np.gradient(x)", "overload(np.gradient, inline=['never', 'always'][{number} - 2])(lambda x: lambda x: x)"),
    "a method's options": ("x.mine()", "overload_method(numba.types.Array, 'mine', prefer_literal={number} == 2)(lambda x: lambda x: x)"),
    "an intrinsic's": ("other(x)", "other = intrinsic(prefer_literal={number} == 2)(made._defn)"),
    "what for": ("pass", "overload([np.sin, np.cos][{number} - 2])(lambda x: lambda x: x)"),
    "a type": ("closure(x)", "type_callable(closure)(lambda context: lambda x: numba.types.Tuple([x] * {number}))"),
    "a lowering": ("closure(x)", "lower_builtin(closure, numba.types.float64)(lowering)"),
    "a string's lowering": ("x[0]", "lower_builtin('getitem', numba.types.float64)(lowering)"),
    "a cast": ("x", "lower_cast(numba.types.float64, numba.types.voidptr)(lowering)"),
}


@pytest.mark.parametrize("text, registered", REGISTERED.values(), ids=REGISTERED)
def test_what_is_registered_with_numba_is_in_the_digest(text, registered):
    """Whatever decorator of numba's extending says it, and however the twin comes to it."""
    digests = []
    for number in 2, 2, 3:
        with registries_as_before():
            digests.append(digest_of(text, number=number, registered=registered.format(number=number)))
    assert digests[0] == digests[1] != digests[2]
    assert digests[0][1] == []
    assert digests[0] != digest_of(text)


def test_what_is_registered_later_is_no_change():
    """Unless the code has its name; but a number of what was registered before is: an operator is reached without a name."""
    with registries_as_before():
        before, namespace = sources_of("x + x", registered="overload(operator.add)(lambda x, y: lambda x, y: X)")
        exec("overload(np.gradient)(lambda x: lambda x: 2)", namespace)
        assert Sources(namespace["f"]).changed_since(before) is None
        namespace["X"] = 3
        assert not before.are_untouched()
        assert Sources(namespace["f"]).changed_since(before) == "'X' (of what is registered with numba for _operator.add)"
    with registries_as_before():
        before, namespace = sources_of("x.mine()")
        exec("overload_method(numba.types.Array, 'mine')(lambda x: lambda x: 2)", namespace)
        assert Sources(namespace["f"]).changed_since(before) == "<lambda>()"


def test_installed_packages_are_known_by_their_version(monkeypatch):
    """What they register for all, whoever uses it, may be beyond comparing, and would keep everything from being kept."""
    digests = []
    for version in "1", "1", "2":
        package = types.ModuleType("installed_for_tests")
        package.__file__, package.__version__ = f"{sysconfig.get_path('purelib')}/installed_for_tests.py", version
        monkeypatch.setitem(sys.modules, package.__name__, package)
        with registries_as_before():
            exec("import numba, numpy\nX = object()\nnumba.extending.overload(numpy.gradient)(lambda x: lambda x: X)", vars(package))
            digests.append(digest_of("np.gradient(x)"))
    assert digests[0] == digests[1] != digests[2]
    assert digests[0][1] == []


def test_a_class_that_tells_numba_what_a_function_is(monkeypatch):
    """Its attributes may be anything: nothing is kept of what is compiled beside it."""
    for registered in (
        "@infer\nclass Typed(ConcreteTemplate):\n    key = 'op'\n    cases = [numba.types.float64(numba.types.float32)]",
        "@infer_global(twice)\nclass Typed(AbstractTemplate):\n    generic = print",
    ):
        with registries_as_before():
            module = types.ModuleType("a_module_of_the_user")
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(f"import numba\nfrom numba.core.typing.templates import *\ndef twice(x): ...\n{registered}", vars(module))
            [why] = digest_of("pass")[1]
            assert why == "a_module_of_the_user.Typed tells numba what functions are, and a cache would not see it change"


def test_numba_that_registers_in_another_way(monkeypatch):
    """Then nothing is kept, as overloads would not be found."""
    found, namespace = sources_of("plain(x)")
    assert found.unknown == []
    for name, value in ("make_overload_template", lambda key, *args: type("Template", (), {"key": key})), ("builtin_registry", None):
        with monkeypatch.context() as patch:
            patch.setattr(sources.templates, name, value)
            sources._are_registries_known.cache_clear()
            assert Sources(namespace["f"]).unknown == [f"numba {numba.__version__} registers overloads in an unknown way"]
    sources._are_registries_known.cache_clear()


def test_attributes_that_are_asked_for_by_name():
    """Numba evaluates getattr() when it compiles; which attribute it asks for is not always in the code."""
    kept, unknown = digest_of("getattr(module, 'X')")
    assert unknown == ["it may ask module for attributes by getattr()"]
    assert kept != digest_of("getattr(module, 'X')", "2.5")[0]


def test_an_object_without_content_is_named():
    """Numba may freeze, and intrinsics may use, what nobody can compare: then no digest would tell. Whose class it is does not matter."""
    assert digest_of("X", "object()")[1] == ["'X' is a builtins.object, whose changes a cache would not see"]
    assert digest_of("X", "numba.cfunc('f8(f8)')(lambda x: x)")[1] == [
        "'X' is a numba.core.ccallback.CFunc, whose changes a cache would not see"
    ]


PAIR_FILE = """
    import numba
    from taskgpt.tasks import InOut, dims, kernel

    (R,) = dims("R")
    G = 2.0

    @numba.njit
    def put(out, at):
        out[at] = G

    def make(body, beyond):
        body = kernel(body)

        @body.compiled
        def _(out):
            for i in range(out.shape[0] + beyond):
                put(out, i)

        return body

    def one(out: InOut[R]): ...
    def two(out: InOut[R]): ...
    one, two = make(one, 0), make(two, 100)
"""


@pytest.fixture
def load_pair(tmp_path, monkeypatch):
    """Import PAIR_FILE as if in a new process."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "pair_module.py").write_text(textwrap.dedent(PAIR_FILE))

    def load():
        sys.modules.pop("pair_module", None)
        return importlib.import_module("pair_module")

    yield load
    sys.modules.pop("pair_module", None)


def test_a_helper_of_other_sources_beside_a_twin_from_the_cache(load_pair):
    """A loaded twin says nothing of the helper in this process: the next twin, compiled, does not link what is old, nor keep it."""
    assert load_pair().one.compile() is False
    module = load_pair()
    module.G = 1.0
    module.put(np.zeros(1, np.float32), 0)
    module.G = 2.0
    assert module.one.compile() is True
    assert module.two.compile() is False
    out = np.zeros(300, np.float32)  # `two` writes 100 elements past what it is given
    module.two(out[:8])
    assert out[0] == 2
    module = load_pair()
    assert module.two.compile() is True
    module.two(out[150:158])
    assert out[150] == 2


def test_a_helper_without_checks_beside_a_checked_twin_from_the_cache(load_pair):
    """The same with the checks of indices: they are in every helper of a checked twin."""
    load_pair().one.bounds_checked.compile()
    for was_cached in False, True:
        module = load_pair()
        module.one.compile()
        assert module.one.bounds_checked.compile() is True
        assert module.two.bounds_checked.compile() is was_cached
        with pytest.raises(IndexError, match="out of bounds"):
            module.two.bounds_checked(np.zeros(200, np.float32)[:8])
