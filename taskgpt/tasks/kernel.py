"""Kernels: functions on tiles that declare what they read and write.

    @kernel(flops=lambda R, OC, C: 2 * R * OC * C)
    def matmul_forward(out: Out[R, OC], inp: In[R, C], weight: In[OC, C]):
        np.matmul(inp, weight.T, out=out)            # the NumPy body: the specification, and the oracle of the tests

    @matmul_forward.compiled
    def _(out, inp, weight): ...                     # the compiled twin (numba, nogil, cached on disk): what runs

The declaration is the only one: shapes are checked against it when a task is recorded, dependencies follow from it, and the twin is
compiled for exactly its types. There an In tile has the type *read-only array*, so a twin that writes one does not compile. Working memory
is declared too, last: `scores: Scratch[BLOCK, S]`. Whoever runs the kernel brings it, so that no kernel allocates.

With NUMBA_DISABLE_JIT=1, numba's switch for debugging, a twin runs as plain Python, where a debugger steps through it and `print` works;
a twin that uses an intrinsic (dense, gemm, exp32), itself or in a helper, cannot, and its NumPy body runs instead.
"""

import contextlib
import hashlib
import inspect
import linecache
import math
import os
import pickle
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numba import types
from numba.core.caching import FunctionCache, NullCache
from numba.core.errors import NumbaError
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic

from taskgpt.tasks.scratch import Shapes, scratch_arrays

# error_model="numpy": division by zero gives inf or nan, as in the body, and costs no branch.
_njit = numba.njit(nogil=True, error_model="numpy")


class ShapeError(ValueError):
    """A tile does not have the shape or the type that its kernel declares."""


class AccessError(RuntimeError):
    """A kernel did something with a tile that it does not declare."""


class Dim(str):
    """The name of a dimension: within one call of a kernel it stands for one size."""


def dims(names: str) -> list[Dim]:
    """Return a Dim for each of the space-separated names: `R, C = dims("R C")`."""
    return [Dim(name) for name in names.split()]


@dataclass(frozen=True)
class Access:
    """How a kernel uses one tile: `kind` (in, out, inout, commutative; scratch for no tile), its dimensions and its element type."""

    kind: str
    dims: tuple[Dim | int, ...]
    dtype: np.dtype

    @property
    def is_read(self) -> bool:
        return self.kind != "out"

    @property
    def is_written(self) -> bool:
        return self.kind != "in"

    @property
    def numba_type(self) -> types.Array:
        """One type per declaration, so that one compiled version serves every tile: rows of any distance, elements side by side."""
        layout = "C" if len(self.dims) == 1 else "A"
        return types.Array(numba.from_dtype(self.dtype), len(self.dims), layout, readonly=not self.is_written)


class _Declaration:
    kind: str

    def __class_getitem__(cls, items) -> Access:
        """`In[R, C]`: a float32 tile of R x C; a NumPy type as last item names another type: `In[R, np.int32]`."""
        *sizes, last = items if isinstance(items, tuple) and items else (items,)
        has_type = isinstance(last, type) and issubclass(last, np.generic)
        if not has_type:
            sizes.append(last)
        if not sizes or not all(isinstance(s, str) or (type(s) is int and s > 0) for s in sizes):
            raise TypeError(f"{cls.__name__}[...] takes dimension names or sizes, then perhaps a NumPy type; got {items!r}")
        return Access(cls.kind, tuple(sizes), np.dtype(last if has_type else np.float32))


class In(_Declaration):
    """Read, never written."""

    kind = "in"


class Out(_Declaration):
    """Written whole, never read before that."""

    kind = "out"


class InOut(_Declaration):
    """Read and written, in program order."""

    kind = "inout"


class Commutative(_Declaration):
    """Read and written; tasks that declare it may run in any order, one at a time. In program order unless the graph allows otherwise."""

    kind = "commutative"


class Scratch(_Declaration):
    """Working memory, not a tile: undefined on entry and lost at exit. Stands last in the signature, and no caller passes it."""

    kind = "scratch"


@intrinsic
def dense(typing_context, row):
    """In a compiled twin: the same 1-D array with its elements known to lie side by side, so that loops over it vectorise.

    A row of a tile always does; its type cannot say so, because rows of a tile need not touch each other.
    """
    result = types.Array(row.dtype, row.ndim, "C", readonly=not row.mutable)

    def codegen(context, builder, signature, args):
        return impl_ret_borrowed(context, builder, result, args[0])

    return result(row), codegen


class Kernel:
    """A declared function on tiles. Call it with arrays to run it; pass it to `spawn` with tiles to make it a task.

    Attributes: `name`; `parameters`, name -> Access, or int / float for a constant: what a caller passes; `scratch`, name -> Access: what
    `body`, the NumPy function, and `function`, what runs, take after them; `tags`, free words that schedulers may ask for (the loops
    scheduler's coverage).
    """

    def __init__(self, body: Callable, flops: Callable | None = None, bytes: Callable | None = None, tags: Iterable[str] = ()):
        self.name = body.__name__
        self.body = self.function = body
        self._twin = None  # numba's dispatcher; with NUMBA_DISABLE_JIT the function itself
        self.module = body.__module__
        self.tags = frozenset(tags)
        self.parameters: dict[str, Access | type] = {}
        self.scratch: dict[str, Access] = {}
        for parameter in inspect.signature(body, eval_str=True).parameters.values():
            declared = parameter.annotation
            if not (isinstance(declared, Access) or declared in (int, float)):
                raise TypeError(f"{self.name}: parameter '{parameter.name}' needs In, Out, InOut, Commutative, Scratch, int or float")
            is_scratch = isinstance(declared, Access) and declared.kind == "scratch"
            if self.scratch and not is_scratch:
                raise TypeError(f"{self.name}: parameter '{parameter.name}' stands after Scratch, which comes last")
            (self.scratch if is_scratch else self.parameters)[parameter.name] = declared
        self.accesses = {name: access for name, access in self.parameters.items() if isinstance(access, Access)}
        known = {d for access in self.accesses.values() for d in access.dims}
        for name, access in self.scratch.items():
            for dim in access.dims:
                if not (isinstance(dim, int) or dim in known):
                    raise TypeError(f"{self.name}: scratch '{name}' asks for '{dim}', which no tile has")
        self._flops, self._bytes = self._formula("flops", flops), self._formula("bytes", bytes)
        self.__doc__ = body.__doc__
        self.__wrapped__ = body

    def __call__(self, *args) -> None:
        self.function(*args, *(scratch_arrays(self.scratch_shapes(args)) if self.scratch else ()))

    @property
    def is_importable(self) -> bool:
        """True if another process finds it under its name. `__main__` is another module there."""
        return self.module != "__main__" and getattr(sys.modules.get(self.module), self.name, None) is self

    def __reduce__(self):
        if getattr(sys.modules.get(self.module), self.name, None) is not self:
            raise pickle.PicklingError(f"kernels are sent by name, and {self.module}.{self.name} is another object")
        return _find_kernel, (self.module, self.name)

    def __repr__(self) -> str:
        words = [f"{name}({', '.join(found)})" for name, found in self.by_access(lambda parameter: parameter)]
        return " ".join(["task", self.name, *words])

    def by_access(self, show: Callable[[str], str]) -> Iterator[tuple[str, list[str]]]:
        """Yield (kind, [show(parameter), ...]) for the kinds that occur, outputs first, as OmpSs-2 prints them."""
        for kind in ("out", "inout", "commutative", "in"):
            found = [show(name) for name, access in self.accesses.items() if access.kind == kind]
            if found:
                yield kind, found

    def compiled(self, twin: Callable) -> "Kernel":
        """Decorate the compiled twin: same parameters, must agree with the body. Compiled by `compile_kernels` or at the first call."""
        names = [*self.parameters, *self.scratch]
        if list(inspect.signature(twin).parameters) != names:
            raise TypeError(f"{self.name}: the compiled twin must take {names}")
        # Numba names machine code after module, function and types, and twins are all called `_`: two of them, cached by two processes,
        # could meet under one name in a third.
        code = twin.__code__
        digest = hashlib.sha256(code.co_code + repr((code.co_consts, code.co_names)).encode()).hexdigest()[:8]
        twin.__qualname__ = f"{self.body.__qualname__}_{digest}"
        self._twin = _njit(twin)
        self.function = self._compile_and_run
        return self

    def _compile_and_run(self, *args) -> None:
        """What `function` is until the twin is compiled: numba left alone would compile for the arguments, not for the declaration."""
        self.compile()
        self.function(*args)

    @property
    def is_compiled(self) -> bool:
        return self.function != self._compile_and_run

    def compile(self) -> bool:
        """Compile the twin, or load it from the cache; return True if it came from the cache. Threads may call it together.

        Raises AccessError if the twin writes a tile that is declared In.
        """
        return False if self.is_compiled else undisturbed(self._compile)

    def _compile(self) -> bool:
        if self.is_compiled:
            return False  # by the thread that was before this one
        if inspect.isfunction(self._twin):  # NUMBA_DISABLE_JIT
            self.function = self.body if _uses_intrinsics(self._twin) else self._twin
            return False
        self._twin._cache = _open_cache(self._twin.py_func)
        inputs = [name for name, access in self.accesses.items() if not access.is_written]
        if not self._compiles(self._twin, inputs):
            # Numba does not say which array: see which of them, alone read-only, keeps the twin from compiling.
            found = [name for name in inputs if not self._compiles(_njit(self._twin.py_func), [name])]
            names = ", ".join(f"'{name}'" for name in found or inputs)
            raise AccessError(f"{self.name} wrote {'' if found else 'one of '}{names}, declared In")
        self._twin.disable_compile()
        self.function = self._twin
        return bool(self._twin.stats.cache_hits)

    def _compiles(self, dispatcher, read_only: list[str]) -> bool:
        """Compile for the declared types, with these tiles read-only and no others; return False if it writes one of them."""
        scalars = {int: types.int64, float: types.float64}
        arguments = [
            scalars.get(declared) or declared.numba_type.copy(readonly=name in read_only)
            for name, declared in (self.parameters | self.scratch).items()
        ]
        try:
            dispatcher.compile(types.void(*arguments))
        except NumbaError as error:
            if "Cannot modify readonly array" not in str(error):
                raise
            return False
        return True

    def sizes(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
        """Return the size that each dimension name stands for, given the shape of each tile.

        Raises ShapeError if a tile has another number of dimensions, or if one name would stand for two sizes.
        """
        sizes: dict[str, int] = {}
        origin: dict[str, str] = {}
        for name, access in self.accesses.items():
            shape = shapes[name]
            if len(shape) != len(access.dims):
                wanted = ", ".join(map(str, access.dims))
                raise ShapeError(f"{self.name}: '{name}' wants {len(access.dims)} dimensions ({wanted}), got shape {shape}")
            for dim, size in zip(access.dims, shape, strict=True):
                wanted = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
                first = origin.setdefault(str(dim), name)
                if size != wanted:
                    said = "" if isinstance(dim, int) else f" as in '{first}'"
                    raise ShapeError(f"{self.name}: '{name}' wants {dim} = {wanted}{said}, got shape {shape}")
        return sizes

    def scratch_shapes(self, args: Iterable) -> Shapes:
        """Return (shape, type) of each scratch array of a call with these arguments: tiles or arrays, and constants."""
        if not self.scratch:
            return ()
        sizes = self.sizes({name: a.shape for name, a in zip(self.parameters, args, strict=True) if name in self.accesses})
        return tuple((tuple(d if isinstance(d, int) else sizes[d] for d in a.dims), a.dtype) for a in self.scratch.values())

    def flops(self, sizes: dict[str, int], constants: dict[str, float]) -> int:
        """Return the floating-point operations of one call; one per written element for a kernel that does not say."""
        if self._flops:
            return self._flops({**sizes, **constants})
        return sum(_elements(access, sizes) for access in self.accesses.values() if access.is_written)

    def bytes(self, sizes: dict[str, int], constants: dict[str, float]) -> int:
        """Return the bytes that one call moves; for a kernel that does not say, each tile once for reading and once for writing."""
        if self._bytes:
            return self._bytes({**sizes, **constants})
        return sum(_elements(a, sizes) * a.dtype.itemsize * (a.is_read + a.is_written) for a in self.accesses.values())

    def _formula(self, what: str, formula: Callable | None) -> Callable[[dict[str, float]], int] | None:
        """Return the formula as a function of all sizes and constants. Raises TypeError for a name that the kernel does not have."""
        if formula is None:
            return None
        names = tuple(inspect.signature(formula).parameters)
        known = {str(d): None for access in self.accesses.values() for d in access.dims if isinstance(d, str)}
        known |= {name: None for name in self.parameters if name not in self.accesses}
        for name in names:
            if name not in known:
                raise TypeError(f"{self.name}: {what} asks for '{name}'; the kernel has {', '.join(known)}")
        return lambda values: int(formula(*(values[name] for name in names)))


def _elements(access: Access, sizes: dict[str, int]) -> int:
    return math.prod(d if isinstance(d, int) else sizes[d] for d in access.dims)


def kernel(
    body: Callable | None = None, *, flops: Callable | None = None, bytes: Callable | None = None, tags: Iterable[str] = ()
) -> Kernel | Callable[[Callable], Kernel]:
    """Decorate the NumPy body of a kernel.

    `flops` and `bytes` take dimension names and constants and return the operations of a call and the bytes that it moves. `bytes` is for
    kernels that touch only some elements of a tile: the declaration counts whole tiles.
    """
    if body is None:
        return lambda body: Kernel(body, flops, bytes, tags)
    return Kernel(body)


def compile_kernels(kernels: Iterable[Kernel], report: Callable[[int, int, Kernel, float, bool], None] | None = None) -> None:
    """Compile the kernels that are not compiled yet, calling `report(done, total, kernel, seconds, was_cached)` after each."""
    pending = [k for k in dict.fromkeys(kernels) if not k.is_compiled]
    for done, each in enumerate(pending, start=1):
        start = time.perf_counter()
        was_cached = each.compile()
        if report:
            report(done, len(pending), each, time.perf_counter() - start, was_cached)


def compile_function(function: Callable, signature) -> None:
    """Compile a numba function for one signature, or load it from the cache that the kernels use."""

    def load() -> None:
        if not function.signatures:
            function._cache = _open_cache(function.py_func)
            function.compile(signature)
            function.disable_compile()

    if not function.signatures:
        undisturbed(load)


_compiling = threading.Lock()


def undisturbed(work: Callable[[], Any]) -> Any:
    """Do work with numba in a thread, one at a time, and wait for it: LLVM calls back into Python, where a Ctrl-C would be lost.

    Interrupted, the caller may leave, and the work still goes on to its end.
    """

    def locked() -> Any:
        with _compiling:
            return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(locked).result()


def _find_kernel(module: str, name: str) -> Kernel:
    return getattr(__import__(module, fromlist=[name]), name)


class _Cache(FunctionCache):
    """Numba's cache of one twin on disk, where trouble costs the time of compiling, and not the run; and which knows the twin's helpers.

    Numba stamps a cached function with its own file alone (numba documents the limitation), so an edit of a helper in another file would go
    on running the old machine code: wrong numbers without a word. The stamp is a private attribute of numba's.
    """

    def __init__(self, twin: Callable):
        super().__init__(twin)
        self._cache_file._source_stamp = _stamp(twin)

    def load_overload(self, *args):
        try:
            return super().load_overload(*args)
        except OSError:  # saving will meet it again, and say so
            return None
        except Exception:  # damaged bytes make unpickling raise anything
            self._forget()
            _warn_once(self.cache_path, "damaged compiled kernels in numba's cache; compiling anew and replacing them, nothing needs doing")
            return None

    def save_overload(self, *args) -> None:
        try:
            super().save_overload(*args)
        except Exception as error:
            self._forget()  # numba writes the index first: left alone, a new one could go with old machine code
            reason = getattr(error, "strerror", None) or type(error).__name__
            _warn_once(
                self.cache_path,
                f"cannot keep compiled kernels in numba's cache ({reason}), so every run compiles them anew; free space there, or set "
                "NUMBA_CACHE_DIR to another folder",
            )

    def _forget(self) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._cache_file._index_path)


def _open_cache(twin: Callable) -> FunctionCache | NullCache:
    """Return the twin's cache on disk; one that keeps nothing where there is no place for it."""
    try:
        return _Cache(twin)
    except (OSError, RuntimeError):
        file = twin.__code__.co_filename
        if os.path.exists(file):  # at the prompt there is no file to cache beside, and nothing wrong
            _warn_once(
                file,
                "numba's cache cannot keep compiled kernels, so every run compiles them anew: neither __pycache__ beside this file nor "
                "your cache folder can be written; set NUMBA_CACHE_DIR to a folder that can",
            )
        return NullCache()


_warned: set[str] = set()


def _warn_once(path: str, text: str) -> None:
    """Warn in one line, for the first of many kernels. Python's own filter forgets what it showed whenever numba compiles."""
    if text not in _warned:
        warnings.warn_explicit(text, RuntimeWarning, path, 0)
        _warned.add(text)


def _stamp(twin: Callable) -> tuple:
    """Return what changes when anything changes that a twin is compiled from: a helper in any file, a global number."""
    stamp = [sys.version]
    for function in _functions_of(twin):
        stamp.append(_version_of(function))
        for name, value in _globals_of(function):
            if isinstance(value, (bool, int, float, complex, str, bytes, tuple, np.generic)):
                stamp.append((name, repr(value)))
    return tuple(stamp)


def _uses_intrinsics(twin: Callable) -> bool:
    return any(isinstance(value, type(dense)) for function in _functions_of(twin) for _, value in _globals_of(function))


def _functions_of(twin: Callable) -> list[Callable]:
    """Return the twin and the helpers that it calls, directly or not: njit, intrinsic; with NUMBA_DISABLE_JIT plain functions too."""
    functions = [twin]
    for function in functions:
        for _, value in _globals_of(function):
            helper = getattr(value, "py_func", None) or getattr(value, "_defn", None)  # njit, intrinsic
            if helper is None and numba.config.DISABLE_JIT and inspect.isfunction(value):
                helper = value
            if helper is not None and helper not in functions:
                functions.append(helper)
    return functions


def _version_of(function: Callable) -> tuple:
    """Return (time, size) of the file that holds the function; the text of its cell if it comes from a notebook."""
    code = function.__code__
    try:
        stat = os.stat(code.co_filename)
    except OSError:
        return code.co_code, *linecache.getlines(code.co_filename)
    return stat.st_mtime_ns, stat.st_size


def _globals_of(function: Callable) -> Iterator[tuple[str, object]]:
    """Yield (name, value) of what a function finds outside itself: globals, attributes of modules among them, and its closure."""
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if inspect.iscode(constant)]
    names = list(dict.fromkeys(name for code in codes for name in code.co_names))
    outside = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    modules = [outside[name] for name in names if inspect.ismodule(outside.get(name))]
    for name in [*names, *function.__code__.co_freevars]:
        for value in [outside.get(name), *(vars(module).get(name) for module in modules)]:
            if value is not None:
                yield name, value
