"""Kernels: functions on tiles that declare what they read and write.

    @kernel(flops=lambda R, OC, C: 2 * R * OC * C)
    def matmul_forward(out: Out[R, OC], inp: In[R, C], weight: In[OC, C]):
        np.matmul(inp, weight.T, out=out)            # the NumPy body: the specification, and the oracle of the tests

    @matmul_forward.compiled
    def _(out, inp, weight): ...                     # the compiled twin (numba, nogil, cached on disk): what runs

Where numba can compile the body as it stands, `@kernel(compiled=True)` makes it its own twin.

The declaration is the only one: shapes are checked against it when a task is recorded, dependencies follow from it, and the twin is
compiled for exactly its types. There an In tile has the type *read-only array*, so a twin that writes one does not compile. Working memory
is declared too, last: `scores: Scratch[BLOCK, S]`. Whoever runs the kernel brings it, so that no kernel allocates.

With NUMBA_DISABLE_JIT=1, numba's switch for debugging, a twin runs as plain Python, where a debugger steps through it and `print` works;
a twin that uses an intrinsic (dense, gemm, exp32), itself or in a helper, cannot, and its NumPy body runs instead.
"""

import inspect
import pickle
import sys
import time
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any, overload

import numba
import numpy as np
from numba import types
from numba.core.errors import NumbaError

from taskgpt.tasks.access import Access
from taskgpt.tasks.cache import bounds_checked, compile_kept, reason_of, undisturbed
from taskgpt.tasks.linked import Referred
from taskgpt.tasks.nested import SpawnType, TileType, tell_numba
from taskgpt.tasks.results import verify_is_called, verify_no_result
from taskgpt.tasks.scratch import Shapes, scratch_arrays
from taskgpt.tasks.shapes import elements, sizes_of
from taskgpt.tasks.sources import Sources
from taskgpt.tasks.spawn import Spawn

# error_model="numpy": division by zero gives inf or nan, as in the body, and costs no branch.
_njit = numba.njit(nogil=True, error_model="numpy")


class AccessError(RuntimeError):
    """A kernel did something with a tile that it does not declare."""


class TwinError(RuntimeError):
    """A compiled twin does not compile, or is not of what it was compiled from any more. `__cause__` is what numba raised."""


class Kernel(Referred):
    """A declared function on tiles. Call it with arrays to run it; pass it to `spawn` with tiles to make it a task.

    Attributes: `name`; `parameters`, name -> Access, or int / float for a constant: what a caller passes; `scratch`, name -> Access: what
    `body`, the NumPy function, and `function`, what runs, take after them; `spawns`, whether they take a Spawn after these; `result`, the
    type of what they return, None if nothing; `is_weak`, whether an access is; `tags`, free words that schedulers may ask for (the loops
    scheduler's coverage).
    """

    def __init__(self, body: Callable, flops: Callable | None = None, bytes: Callable | None = None, tags: Iterable[str] = ()):
        if not inspect.isfunction(body):
            raise TypeError(f"@kernel decorates a NumPy function; {_what_is(body)}")
        super().__init__()
        self.name = body.__name__
        self.body: Callable[..., Any] = body
        self.function: Callable[..., Any] = body
        self._twin: Any = None  # numba's dispatcher; with NUMBA_DISABLE_JIT the function itself
        self._sources: Sources | None = None  # what the twin was compiled from
        self._unchecked: Kernel | None = None  # the kernel of which this one is `bounds_checked`
        self.module = body.__module__
        self.tags = frozenset(tags)
        returned = inspect.signature(body, eval_str=True).return_annotation
        self.result: type | None = None if returned is inspect.Signature.empty else returned
        self._verify_result(body, "its body")
        self.spawns = False
        self.parameters: dict[str, Access | type[int] | type[float]] = {}
        self.scratch: dict[str, Access] = {}
        for parameter in inspect.signature(body, eval_str=True).parameters.values():
            declared = parameter.annotation
            if self.spawns:
                raise TypeError(f"{self.name}: parameter '{parameter.name}' stands after Spawn, which comes last")
            if declared is Spawn:
                self.spawns, self._spawn_name = True, parameter.name
                continue
            if not (isinstance(declared, Access) or declared in (int, float)):
                raise TypeError(f"{self.name}: parameter '{parameter.name}' needs an access, In, Out or InOut say, int, float or Spawn")
            is_scratch = isinstance(declared, Access) and declared.kind == "scratch"
            if self.scratch and not is_scratch:
                raise TypeError(f"{self.name}: parameter '{parameter.name}' stands after Scratch, which comes last")
            (self.scratch if is_scratch else self.parameters)[parameter.name] = declared
        self.accesses = {name: access for name, access in self.parameters.items() if isinstance(access, Access)}
        if self.spawns and self.scratch:
            raise TypeError(f"{self.name}: a kernel that spawns has no Scratch, which the tasks that run meanwhile would use, too")
        self.is_weak = any(access.is_weak for access in self.accesses.values())
        if self.is_weak and not self.spawns:
            raise TypeError(f"{self.name}: weak accesses are for tasks that it spawns, and it has no Spawn")
        known = {d for access in self.accesses.values() for d in access.dims}
        for name, access in self.scratch.items():
            for dim in access.dims:
                if not (isinstance(dim, int) or dim in known):
                    raise TypeError(f"{self.name}: scratch '{name}' asks for '{dim}', which no tile has")
        self._flops, self._bytes = self._formula("flops", flops), self._formula("bytes", bytes)
        asked = {name for formula in (flops, bytes) if formula for name in inspect.signature(formula).parameters}
        self.is_cost_of_shapes = not any(name in asked for name in self.parameters if name not in self.accesses)  # and of no constant
        self.__doc__ = body.__doc__
        self.__wrapped__ = body

    def __call__(self, *args) -> Any:
        self.verify_stands_alone()
        if len(args) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments ({', '.join(self.parameters)}), got {len(args)}")
        args = tuple(a.item() if isinstance(a, np.generic) else a for a in args)
        for (name, declared), given in zip(self.parameters.items(), args, strict=True):
            if not isinstance(declared, Access) and not (isinstance(given, (int, declared)) and fits_64_bits(given, declared)):
                # numba would take 1.5 for an int, and make it 1
                raise TypeError(f"{self.name}: '{name}' wants a constant ({declared.__name__} of 64 bits), got {given!r:.40}")
        self.verify_untouched()
        return self.run(*args, *(scratch_arrays(self.scratch_shapes(args)) if self.scratch else ()))

    def verify_stands_alone(self) -> None:
        """Raise TypeError for a kernel that only a program can run."""
        if self.spawns:
            raise TypeError(f"{self.name} spawns tasks; spawn it in a program: with scheduler.program() as spawn: spawn({self.name}, ...)")

    def verify_recordable(self) -> None:
        """Raise TypeError for a kernel that only a program can run, or of which only a program gets the result."""
        self.verify_stands_alone()
        if self.result is not None:
            raise TypeError(
                f"{self.name} returns a value, which a recorded task gives nobody; write it into a tile, or spawn the task in a program: "
                f"with scheduler.program() as spawn: spawn({self.name}, ...).result()"
            )

    def run(self, *args) -> Any:
        """Run what runs, on all of its arrays and constants; return its result, if it declares one.

        Raises TypeError for what the compiled twin cannot take, and for a result that is not declared.
        """
        try:
            result = self.function(*args)
        except TypeError as error:
            wrong = self._refused(args) if "No matching definition" in str(error) else None  # numba's words, which name no parameter
            if wrong is None:
                raise
            raise TypeError(wrong) from None
        if result is not None and self.result is None:
            raise TypeError(f"{self.name} returned a {type(result).__name__}, which nobody gets: kernels write into their tiles")
        return result

    def _refused(self, args: tuple) -> str | None:
        """Return which argument is not what the kernel declares, in words."""
        for (name, declared), given in zip((self.parameters | self.scratch).items(), args, strict=True):
            if not isinstance(declared, Access):
                continue
            if not isinstance(given, np.ndarray):
                return f"{self.name}: '{name}' wants an array, got a {type(given).__name__}"
            if given.dtype != declared.dtype or given.ndim != len(declared.dims):
                wanted = f"{declared.dtype} of {len(declared.dims)} dimensions"
                return f"{self.name}: '{name}' wants {wanted}, got {given.dtype} of {given.ndim}"
            if declared.is_written and not given.flags.writeable:
                return f"{self.name}: '{name}' is written, and the array is read-only"
            if given.ndim == 1 and not given.flags.c_contiguous:
                return f"{self.name}: '{name}' wants elements side by side, got strides {given.strides}"
        return None

    @property
    def is_importable(self) -> bool:
        """True if another process finds it under its name. `__main__` is another module there."""
        return self.module != "__main__" and getattr(sys.modules.get(self.module), self.name, None) is self.unchecked

    def __reduce__(self):
        if self._unchecked:
            return _bounds_checked, (self._unchecked,)
        if getattr(sys.modules.get(self.module), self.name, None) is not self:
            raise pickle.PicklingError(f"kernels are sent by name, and {self.module}.{self.name} is another object")
        return _find_kernel, (self.module, self.name)

    def __repr__(self) -> str:
        parts = [f"{name}({', '.join(found)})" for name, found in self.by_access(lambda parameter: parameter)]
        return " ".join(["task", self.name, *parts])

    def by_access(self, show: Callable[[str], str]) -> Iterator[tuple[str, list[str]]]:
        """Yield (kind, [show(parameter), ...]) for the kinds that occur, outputs first, as OmpSs-2 prints them."""
        for kind in ("out", "inout", "reduction", "commutative", "concurrent", "in", "weakout", "weakinout", "weakin"):
            accesses = [(name, access) for name, access in self.accesses.items() if access.kind == kind]
            if accesses:
                yield kind, [show(name) if each.combiner is None else f"{each.combiner}: {show(name)}" for name, each in accesses]

    def compiled(self, twin: Callable) -> "Kernel":
        """Decorate the compiled twin: same parameters, must agree with the body. Compiled by `compile_kernels` or at the first call."""
        if not inspect.isfunction(twin):
            raise TypeError(f"{self.name}.compiled decorates a plain function, and compiles it itself; {_what_is(twin)}")
        if any(access.is_several for access in self.accesses.values()):
            raise TypeError(f"{self.name}: a kernel with Several has no compiled twin, as its lists are of any length")
        if self.is_weak:
            raise TypeError(f"{self.name}: a kernel with weak accesses has no compiled twin, which waits for its own tasks alone")
        if self.result not in (None, int, float, bool):
            raise TypeError(f"{self.name}: compiled code returns an int, a float or a bool, not a {getattr(self.result, '__name__', '?')}")
        names = [*self.parameters, *self.scratch, *([self._spawn_name] if self.spawns else [])]
        if list(inspect.signature(twin).parameters) != names:
            raise TypeError(f"{self.name}: the compiled twin must take {names}")
        self._verify_result(twin, "the compiled twin")
        self._twin = _njit(twin)
        if not self.spawns:  # else the twin needs a scheduler that has what it calls
            self.function = self._compile_and_run
        self._sources = None  # those of an earlier twin: a cell of a notebook may run again
        self.__dict__.pop("bounds_checked", None)
        return self

    def _compile_and_run(self, *args) -> object:
        """What `function` is until the twin is compiled: numba left alone would compile for the arguments, not for the declaration."""
        self.compile()
        return self.function(*args)

    @property
    def is_compiled(self) -> bool:
        if self.spawns:
            return self._sources is not None or not hasattr(self._twin, "overloads")
        return self.function != self._compile_and_run

    @property
    def has_machine_code(self) -> bool:
        """True if its twin is compiled, and not run as Python."""
        return self.is_compiled and hasattr(self._twin, "overloads") and (self.spawns or self.function is self._twin)

    @property
    def spawned(self) -> list["Kernel"]:
        """The kernels that its compiled twin names."""
        return [each for each in (self._sources.referred if self._sources else []) if isinstance(each, Kernel)]

    def reference(self) -> str:
        declared = [each if isinstance(each, type) else (each.kind, each.dims, each.dtype.str) for each in self.parameters.values()]
        return f"kernel {self.module}.{self.name} {declared} {self.result} {self.scratch.keys()} {self.spawns} {self._twin is None}"

    @cached_property
    def bounds_checked(self) -> "Kernel":
        """The same kernel, whose compiled twin and its helpers check every index, and raise IndexError for one outside an array."""
        if self._twin is None or inspect.isfunction(self._twin) or self._unchecked or self.spawns:
            return self  # NumPy and Python check
        checked = Kernel.__new__(Kernel)
        checked.__dict__.update(self.__dict__, _twin=_njit(self._twin.py_func), _unchecked=self, _sources=None, entry_word=array("q", [0]))
        checked.function = checked._compile_and_run
        return checked

    def read_sources(self) -> Sources | None:
        """Return what the twin would be compiled from now; None for a kernel that has none."""
        return self._read_sources() if self._twin else None

    def _read_sources(self) -> Sources:
        return Sources(getattr(self._twin, "py_func", self._twin))

    @property
    def unchecked(self) -> "Kernel":
        """The kernel of which this one is `bounds_checked`, otherwise itself."""
        return self._unchecked or self

    def compile(self) -> bool:
        """Compile the twin, or load it from the cache; return True if it came from the cache. Threads may call it together.

        Raises AccessError if the twin writes a tile that is declared In, TwinError if it does not compile for another reason, or if it is
        compiled already and what it was compiled from has changed since.
        """
        if not self.is_compiled:
            return undisturbed(self._compile)
        self.verify_sources()
        return False

    def reread(self, earlier: Sources, difference: str) -> Sources:
        """Return the sources as they are now: equal, and perhaps of other objects, which `are_untouched` is to know.

        Raises TwinError if they are not equal; `difference` is what it says of the part that is not, after its name.
        """
        now = self._read_sources()
        if changed := now.changed_since(earlier):
            raise TwinError(f"{self.name}: {changed} {difference}")
        return now

    def verify_sources(self) -> None:
        """Raise TwinError if something has changed since the twin was compiled from it: numba freezes globals, and the body would not."""
        if self._sources:
            self._sources = self.reread(
                self._sources,
                "has changed since its compiled twin was made, which goes on with what was there before; pass what changes as a tile or a "
                "constant, or define the kernel again",
            )

    def verify_untouched(self) -> None:
        """Do what `verify_sources` does, before every run and every direct call: if no name nor array has changed, in microseconds."""
        if self._sources and not self._sources.are_untouched():
            self.verify_sources()

    def _compile(self) -> bool:
        if self.is_compiled:
            return False  # by the thread that was before this one
        tell_numba()
        if inspect.isfunction(self._twin):  # NUMBA_DISABLE_JIT
            self.function = self.body if Sources(self._twin).has_intrinsics else self._twin
            return False
        inputs = [name for name, access in self.accesses.items() if not access.is_written]
        try:
            with bounds_checked() if self._unchecked else nullcontext():
                self._sources, was_cached = compile_kept(self._twin, self._signature(inputs), self.body.__qualname__)
        except Exception as error:  # also from a helper's own code: intrinsics run Python when they are compiled
            explained = self._explained(error, inputs)
            if isinstance(error, NumbaError):
                self._forget_failure()
            raise explained from error
        if not self.spawns:
            self.function = self._twin
        return was_cached

    def _forget_failure(self) -> None:
        """Let the twin be compiled again, as what it lacks may come: numba's dispatchers remember what did not compile, helpers' too."""
        self._twin = _njit(self._twin.py_func)
        for helper in self._read_sources().helpers:
            getattr(getattr(helper, "_compiler", None), "_failed_cache", {}).clear()  # private to numba

    def _signature(self, read_only: list[str]) -> Any:
        """Return the declared types, with these tiles read-only and no others."""
        scalars = {int: types.int64, float: types.float64}
        declared = (self.parameters | self.scratch).items()
        every = [d.numba_type.copy(readonly=name in read_only) if isinstance(d, Access) else scalars[d] for name, d in declared]
        if self.spawns:
            every = [TileType(each) if isinstance(each, types.Array) else each for each in every] + [SpawnType()]
        return self.result_type(*every)

    @property
    def result_type(self) -> Any:
        """What compiled code returns."""
        kinds: dict[Any, Any] = {None: types.void, int: types.int64, float: types.float64, bool: types.boolean}
        return kinds[self.result]

    def _explained(self, error: Exception, inputs: list[str]) -> Exception:
        """Return an AccessError if the twin did not compile because it writes tiles declared In, otherwise a TwinError."""
        if not _is_read_only_error(error):
            is_body = getattr(self._twin, "py_func", None) is self.body
            what = (
                "its body does not compile (write a twin, or leave compiled=True out)" if is_body else "its compiled twin does not compile"
            )
            return TwinError(f"{self.name}: {what}: {reason_of(error)}")
        found = []  # numba does not say which array: see which of them, alone read-only, keeps the twin from compiling
        for name in inputs:
            try:
                _njit(self._twin.py_func).compile(self._signature([name]))
            except NumbaError as alone:
                if _is_read_only_error(alone):
                    found.append(name)
        names = ", ".join(f"'{name}'" for name in found or inputs)
        return AccessError(f"{self.name} wrote {'' if found else 'one of '}{names}, declared In")

    def sizes(self, shapes: dict[str, Any]) -> dict[str, int]:
        """Return the size that each dimension name stands for; see shapes.sizes_of."""
        return sizes_of(self.name, self.accesses, shapes)

    def shapes_of(self, args: Iterable) -> dict[str, Any]:
        """Return what `sizes` is given, of arguments: tiles or arrays, lists of them, and constants."""
        return {
            name: tuple(each.shape for each in given) if self.accesses[name].is_several else given.shape
            for name, given in zip(self.parameters, args, strict=True)
            if name in self.accesses
        }

    def scratch_shapes(self, args: Iterable) -> Shapes:
        """Return (shape, type) of each scratch array of a call with these arguments: tiles or arrays, and constants."""
        if not self.scratch:
            return ()
        sizes = self.sizes(self.shapes_of(args))
        return tuple((tuple(d if isinstance(d, int) else sizes[d] for d in a.dims), a.dtype) for a in self.scratch.values())

    def flops(self, sizes: dict[str, int], constants: dict[str, float]) -> int:
        """Return the floating-point operations of one call; one per written element for a kernel that does not say."""
        if self._flops:
            return self._flops({**sizes, **constants})
        if self.spawns:
            return 0  # what it spawns does the work
        return sum(elements(name, access, sizes) for name, access in self.accesses.items() if access.is_written)

    def bytes(self, sizes: dict[str, int], constants: dict[str, float]) -> int:
        """Return the bytes that one call moves; for a kernel that does not say, each tile once for reading and once for writing."""
        if self._bytes:
            return self._bytes({**sizes, **constants})
        if self.spawns:
            return 0
        return sum(elements(name, a, sizes) * a.dtype.itemsize * (a.is_read + a.is_written) for name, a in self.accesses.items())

    def _verify_result(self, function: Callable, what: str) -> None:
        verify_is_called(self.name, function, what)
        if self.result is None:
            verify_no_result(self.name, function, what)

    def _formula(self, what: str, formula: Callable | None) -> Callable[[dict[str, float]], int] | None:
        """Return the formula as a function of all sizes and constants. Raises TypeError for a name that the kernel does not have."""
        if formula is None:
            return None
        names = tuple(inspect.signature(formula).parameters)
        known = {str(d): None for access in self.accesses.values() for d in access.dims if isinstance(d, str)}
        known |= {name: None for name in self.parameters if name not in self.accesses or self.accesses[name].is_several}
        for name in names:
            if name not in known:
                raise TypeError(f"{self.name}: {what} asks for '{name}'; the kernel has {', '.join(known)}")
        return lambda values: int(formula(*(values[name] for name in names)))


def as_kernel(given: object) -> Kernel:
    """Return what is a kernel. Raises TypeError for what is none, saying how to make it one."""
    if isinstance(given, Kernel):
        return given
    raise TypeError(f"only kernels can be spawned; {_what_is(given)}")


def fits_64_bits(constant: float, declared: type) -> bool:
    """Return True if compiled code can take the constant: as an integer of 64 bits, or as a double."""
    if declared is int:
        return -(1 << 63) <= constant < 1 << 63
    try:
        float(constant)
    except OverflowError:
        return False
    return True


def _what_is(given: object) -> str:
    name = getattr(given, "__name__", "")
    if hasattr(given, "py_func"):
        return f"'{name}' is numba's: decorate its NumPy body with @kernel, and the function without @njit with @{name}.compiled"
    if inspect.isroutine(given):
        return f"'{name}' is a plain function: decorate it with @kernel"
    return f"got the class {name}" if isinstance(given, type) else f"got a {type(given).__name__}"


@overload
def kernel(body: Callable) -> Kernel: ...


@overload
def kernel(
    *, flops: Callable | None = None, bytes: Callable | None = None, tags: Iterable[str] = (), compiled: bool = False
) -> Callable[[Callable], Kernel]: ...


def kernel(
    body: Callable | None = None,
    *,
    flops: Callable | None = None,
    bytes: Callable | None = None,
    tags: Iterable[str] = (),
    compiled: bool = False,
) -> Kernel | Callable[[Callable], Kernel]:
    """Decorate the NumPy body of a kernel.

    `compiled=True` makes the body its own twin: one text for both, of what numba can compile. `flops` and `bytes` take dimension names and
    constants and return the operations of a call and the bytes that it moves. `bytes` is for kernels that touch only some elements of a
    tile: the declaration counts whole tiles.
    """
    if body is not None:
        return Kernel(body)

    def make(body: Callable) -> Kernel:
        made = Kernel(body, flops, bytes, tags)
        return made.compiled(body) if compiled else made

    return make


def compile_kernels(kernels: Iterable[Kernel], report: Callable[[int, int, Kernel, float, bool], None] | None = None) -> None:
    """Compile the kernels that are not compiled yet, calling `report(done, total, kernel, seconds, was_cached)` after each.

    Raises AccessError or TwinError as `Kernel.compile` does, also for a kernel that is compiled already.
    """
    every = list(dict.fromkeys(kernels))
    pending = [k for k in every if not k.is_compiled]
    for each in every:
        if each.is_compiled:
            each.verify_sources()
    for done, each in enumerate(pending, start=1):
        start = time.perf_counter()
        was_cached = each.compile()
        if report:
            report(done, len(pending), each, time.perf_counter() - start, was_cached)


def _is_read_only_error(error: Exception) -> bool:
    return isinstance(error, NumbaError) and "Cannot modify readonly array" in str(error)


def _find_kernel(module: str, name: str) -> Kernel:
    return getattr(__import__(module, fromlist=[name]), name)


def _bounds_checked(kernel: Kernel) -> Kernel:
    return kernel.bounds_checked
