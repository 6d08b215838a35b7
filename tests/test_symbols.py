"""What twins call by a symbol is compiled once for all of them, kept like twins, and never another than they were compiled for."""

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numba
import numpy as np
import pytest

from taskgpt.tasks import AccessError, TwinError, symbols
from taskgpt.tasks.sources import Sources

ROOT = Path(__file__).parents[1]
LOOPS_FILE = """
    import numba
    from numba import types
    from taskgpt.tasks.symbols import by_symbol

    MADE = []
    FACTOR = {factor}
    READ, WRITTEN = types.Array(types.float32, 1, "C", readonly=True), types.Array(types.float32, 1, "C")

    @numba.njit
    def times(value):
        return FACTOR * value

    @by_symbol("scaled", out=WRITTEN, inp=READ, beyond=types.int64)
    def scaled():
        MADE.append(1)

        @numba.njit
        def loops(out, inp, beyond):
            if inp.shape[0] != out.shape[0]:
                raise ValueError("out and inp differ")
            for i in range(out.shape[0] + beyond):
                out[i] = times(inp[i])

        return loops
"""
KERNELS_FILE = """
    import loops_module
    from taskgpt.tasks import In, InOut, Out, dims, kernel

    R, S = dims("R S")

    @kernel
    def once(out: Out[R], inp: In[S], beyond: int):
        out[:] = -1

    @once.compiled
    def _(out, inp, beyond):
        loops_module.scaled((out, inp, beyond))

    @kernel
    def twice(out: Out[R], inp: InOut[S], beyond: int):
        out[:] = -2

    @twice.compiled
    def _(out, inp, beyond):
        loops_module.scaled((out, inp, beyond))
        loops_module.scaled((inp, out, beyond))

    @kernel
    def cheat(out: In[R], inp: In[R]): ...

    @cheat.compiled
    def _(out, inp):
        loops_module.scaled((out, inp, 0))

    @kernel
    def slip(out: Out[R], inp: In[R]): ...

    @slip.compiled
    def _(out, inp):
        loops_module.scaled((out, inp, inp))
"""
NAMES = "loops_module", "kernels_module"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Write and import the two files as if in a new process, whose cache is a folder of the test's own; return both modules."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(symbols, "_linked", {})

    def load(factor: str = "2"):
        for name, text in zip(NAMES, (LOOPS_FILE, KERNELS_FILE), strict=True):
            path, text = tmp_path / f"{name}.py", textwrap.dedent(text.replace("{factor}", factor))
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        kernels = importlib.import_module("kernels_module")
        return sys.modules["loops_module"], kernels

    yield load
    for name in NAMES:
        sys.modules.pop(name, None)


def ran(kernel, n: int = 3, beyond: int = 0) -> list[float]:
    """Return what the kernel makes of n times 1."""
    out, inp = np.zeros(n, np.float32), np.ones(n, np.float32)
    kernel(out, inp, beyond)
    return [*out.tolist(), *inp.tolist()]


def kept(tmp_path) -> list[str]:
    """Return what was kept of functions by a symbol."""
    return sorted(path.name for path in (tmp_path / "kept").rglob("*scaled*.nbc"))


def in_a_process(tmp_path, program: str, **environment: str) -> str:
    """Return what a program prints that has the kernels as k, and two arrays."""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    program = f"import kernels_module as k, numpy as np\nx, y = np.zeros(2, np.float32), np.ones(2, np.float32)\n{program}"
    environment = {**os.environ, "PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path / "kept"), **environment}
    end = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert end.returncode == 0, end.stderr
    return end.stdout


def test_it_is_made_when_it_is_needed_and_compiled_once(load, tmp_path):
    """For two twins, and for those that check indices, from one file; in the next process nothing is compiled."""
    loops, kernels = load()
    assert not loops.MADE
    assert [kernels.once.compile(), kernels.twice.compile(), kernels.once.bounds_checked.compile()] == [False] * 3
    assert len(loops.MADE) == len(kept(tmp_path)) == 1
    assert ran(kernels.once) == ran(kernels.once.bounds_checked) == [2.0] * 3 + [1.0] * 3
    assert ran(kernels.twice) == [2.0] * 3 + [4.0] * 3
    program = "print(k.once.compile(), k.once.bounds_checked.compile(), k.twice.compile()); k.twice(x, y, 0); print(x, y)"
    assert in_a_process(tmp_path, program) == "True True True\n[2. 2.] [4. 4.]\n"
    # Twins that check indices anyhow are those that were kept of `bounds_checked`.
    assert in_a_process(tmp_path, program, NUMBA_BOUNDSCHECK="1") == "True True False\n[2. 2.] [4. 4.]\n"
    assert len(kept(tmp_path)) == 1


def test_what_it_is_made_from_is_what_twins_are_made_from(load):
    """A number, or a helper in its file: the twin is compiled anew, and calls the new one; what was kept before is found again."""
    assert [ran(load(factor)[1].once)[0] for factor in ("2", "300", "2")] == [2, 300, 2]
    assert load("2")[1].once.compile() is True
    assert load("5")[1].once.compile() is False


def test_what_changes_in_the_process_is_seen(load):
    """A twin that was compiled refuses to run; another one gets what is there now."""
    loops, kernels = load()
    assert ran(kernels.once)[0] == 2
    loops.FACTOR = 7
    with pytest.raises(TwinError, match="once: 'FACTOR' has changed since its compiled twin was made"):
        ran(kernels.once)
    assert ran(kernels.twice) == [7] * 3 + [49] * 3
    loops.FACTOR = 2
    assert ran(kernels.once)[0] == 2


def test_a_twin_from_disk_finds_it_where_only_that_is_damaged(load, tmp_path):
    """It is compiled again under the name that the twin has."""
    load()[1].once.compile()
    [name] = kept(tmp_path)
    for path in (tmp_path / "kept").rglob(name):
        path.write_bytes(path.read_bytes()[:100])
    assert in_a_process(tmp_path, "print(k.once.compile()); k.once(x, y, 0); print(x)") == "True\n[2. 2.]\n"


def test_indices_are_not_checked_inside(load):
    """As nothing checks those of BLAS: the function checks what it is given where it begins."""
    _, kernels = load()
    out, inp = np.zeros(8, np.float32), np.ones(8, np.float32)
    kernels.once.bounds_checked(out[:4], inp[:4], 4)
    assert out.tolist() == [2] * 8


@pytest.mark.parametrize("name", ["once", "twice"])
def test_an_exception_is_the_twins(load, name):
    """With its type and its words."""
    _, kernels = load()
    kernel = getattr(kernels, name)
    for each in kernel, kernel.bounds_checked:
        with pytest.raises(ValueError, match=r"^out and inp differ$"):
            each(np.zeros(3, np.float32), np.zeros(4, np.float32), 0)


def test_what_it_writes_no_in_tile_may_be(load):
    """The declaration holds by a symbol too, and arguments of other types are named."""
    _, kernels = load()
    with pytest.raises(AccessError, match="cheat wrote 'out', declared In"):
        kernels.cheat.compile()
    with pytest.raises(TwinError, match="slip: its compiled twin does not compile: scaled: 'beyond' wants int64, got "):
        kernels.slip.compile()


def test_without_the_compiler_the_body_runs(load, monkeypatch):
    """A twin cannot be plain Python there."""
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    _, kernels = load()
    assert ran(kernels.once)[0] == -1
    assert Sources(kernels.once._twin).linked[0].function is not None


def test_code_that_is_compiled_without_a_kernel_calls_it_too(load):
    """Numba alone compiles; what is called is made on the way."""
    loops, _ = load("11")
    scaled, out, inp = loops.scaled, np.zeros(3, np.float32), np.ones(3, np.float32)
    numba.njit(lambda out, inp: scaled((out, inp, 0)))(out, inp)
    assert out.tolist() == [11] * 3
