"""Tasks: a kernel called on tiles is a call, and one or more calls that run without a pause are a task."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Self

import numpy as np

from taskgpt.tasks.access import Access
from taskgpt.tasks.blas_threads import one_blas_thread
from taskgpt.tasks.edges import Edges
from taskgpt.tasks.events import settle, take_awaited, this_thread
from taskgpt.tasks.kernel import AccessError, Kernel, as_kernel, fits_64_bits
from taskgpt.tasks.scratch import Shapes, scratch_arrays
from taskgpt.tasks.shapes import ShapeError
from taskgpt.tasks.tensor import Tile

Section = tuple[str, int]  # phase and layer, ("forward", 3); layer -1 = none


class TaskError(RuntimeError):
    """A task failed. The message names it; `__cause__` is what it raised."""

    @classmethod
    def of(cls, task: "Task", call: "Call", error: Exception) -> "TaskError":
        spawned = f", spawned in {call.where}" if call.where else ""
        failure = cls(f"task {task.number}, {call}{spawned}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


class Signature:
    """What calls of a kernel on tiles of the same shapes have in common, worked out when it is first wanted."""

    __slots__ = ("cost", "kernel", "scratch_shapes")

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.scratch_shapes: Shapes | None = None
        self.cost: tuple[int, int] | None = None  # stays None where constants have a say in it


class Call:
    """A kernel and its arguments: tiles and constants, in the order of its parameters. Scratch is none of them.

    A graph's calls share signatures. There are as many calls as tasks, so a call is small. `where`: the line that spawned it, in words by
    str(); None if nobody knows.
    """

    __slots__ = ("_arrays", "_signature", "args", "where")

    def __init__(self, kernel: Kernel, args: tuple, where: object = None):
        self._signature = Signature(as_kernel(kernel))
        self.args: tuple[Any, ...] = tuple([a if type(a) is Tile else tuple(a) if isinstance(a, list) else plain(a) for a in args])
        self.where = where
        self._arrays: list | None = None  # not yet: the arguments may be wrong, and compiled code needs no arrays

    @classmethod
    def verified(cls, signature: Signature, args: tuple, where: object = None) -> Self:
        """Return the call of what is known to be as the kernel declares it."""
        call = cls.__new__(cls)
        call._signature, call.args, call.where, call._arrays = signature, args, where, None
        return call

    @property
    def kernel(self) -> Kernel:
        return self._signature.kernel

    @property
    def arrays(self) -> list:
        """The arguments, with arrays in place of tiles."""
        if self._arrays is None:
            self._arrays = [_array_of(a) for a in self.args]
        return self._arrays

    def run(self) -> Any:
        return self.kernel.run(*self.arrays, *scratch_arrays(self.scratch_shapes))

    def verify(self) -> None:
        """Raise TypeError, ShapeError or AccessError for arguments that the kernel does not declare so."""
        kernel = self.kernel
        if len(self.args) != len(kernel.parameters):
            names = ", ".join(kernel.parameters)
            raise TypeError(f"{kernel.name} takes {len(kernel.parameters)} arguments ({names}), got {len(self.args)}")
        for (name, declared), given in zip(kernel.parameters.items(), self.args, strict=True):
            if not isinstance(declared, Access):
                if not isinstance(given, (int, declared)):
                    raise TypeError(f"{kernel.name}: '{name}' wants a constant ({declared.__name__}), got {_told(given)}")
                if not fits_64_bits(given, declared):
                    raise TypeError(f"{kernel.name}: '{name}' wants a constant of 64 bits, got one of {int(given).bit_length()}")
                continue
            if declared.is_several and not isinstance(given, tuple):
                raise TypeError(f"{kernel.name}: '{name}' wants a list of tiles, got {_told(given)}")
            for tile in given if declared.is_several else (given,):
                if not isinstance(tile, Tile):
                    raise TypeError(f"{kernel.name}: '{name}' wants a tile, tensor[index], got {_told(tile)}")
                if tile.tensor.array.dtype != declared.dtype:
                    raise ShapeError(f"{kernel.name}: '{name}' wants {declared.dtype}, got {tile} of {tile.tensor.array.dtype}")
                if declared.is_written:
                    verify_writeable(kernel, name, tile)
        kernel.sizes(kernel.shapes_of(self.args))

    @property
    def scratch_shapes(self) -> Shapes:
        """(shape, type) of each scratch array, in the order of the kernel's signature."""
        signature = self._signature
        if signature.scratch_shapes is None:
            signature.scratch_shapes = signature.kernel.scratch_shapes(self.args)
        return signature.scratch_shapes

    def cost(self) -> tuple[int, int]:
        """Return (FLOPs, bytes moved), as the kernel says."""
        signature = self._signature
        if signature.cost is not None:
            return signature.cost
        kernel = signature.kernel
        sizes = kernel.sizes(kernel.shapes_of(self.args))
        constants: dict[str, Any] = {name: a for name, a in zip(kernel.parameters, self.args, strict=True) if name not in kernel.accesses}
        cost = kernel.flops(sizes, constants), kernel.bytes(sizes, constants)
        if kernel.is_cost_of_shapes:
            signature.cost = cost
        return cost

    @property
    def estimated_seconds(self) -> float:
        """Return what the call may take, until it has been measured: by a core's order of magnitude in operations and bytes a second."""
        flops, moved = self.cost()
        return flops / 1e11 + moved / 1e10

    def __reduce__(self):
        return type(self), (self.kernel, self.args, self.where and str(self.where))

    def tiles(self) -> Iterator[tuple[str, "Tile"]]:
        """Yield (parameter, tile), of a list each of its tiles."""
        for name, argument in zip(self.kernel.parameters, self.args, strict=True):
            if isinstance(argument, Tile):
                yield name, argument
            elif isinstance(argument, tuple):
                for tile in argument:
                    yield name, tile

    def __str__(self) -> str:
        given = dict(zip(self.kernel.parameters, self.args, strict=True))
        parts = [f"{kind}({', '.join(found)})" for kind, found in self.kernel.by_access(lambda name: _shown(given[name]))]
        constants = [f"{name}={value}" for name, value in given.items() if name not in self.kernel.accesses]
        return " ".join([self.kernel.name, *parts, *constants])


def plain(constant: Any) -> Any:
    """Return a constant of a plain type: bodies and twins see one, and a NumPy scalar would widen float32 expressions."""
    if isinstance(constant, np.generic):
        return constant.item()
    if isinstance(constant, int) and type(constant) is not bool:
        return int(constant)
    return float(constant) if isinstance(constant, float) else constant


def _array_of(argument):
    if isinstance(argument, Tile):
        return argument.array
    return tuple([tile.array for tile in argument]) if isinstance(argument, tuple) else argument


def _shown(argument: object) -> str:
    return f"[{', '.join(map(repr, argument))}]" if isinstance(argument, tuple) else repr(argument)


def verify_writeable(kernel: Kernel, name: str, tile: Tile) -> None:
    """Raise AccessError if nothing can be written where the kernel writes."""
    if not tile.tensor.array.flags.writeable:
        raise AccessError(f"{kernel.name} writes '{name}', and the memory of {tile} is read-only")


def _told(given: object) -> str:
    return repr(given) if isinstance(given, (int, float, Tile)) else f"a {type(given).__name__}"


class Task:
    """One or more calls run in order, without a pause. A recorded task has one; `coarsen` makes tasks of several.

    `number` counts in program order. `section` is (phase, layer). `priority`: of ready tasks, native workers take those of the highest
    first. `edges` are those of its graph. A large graph is mostly its tasks and calls, so a task is small, too.
    """

    __slots__ = ("_calls", "edges", "locks", "number", "priority", "section")

    def __init__(self, number: int, calls: tuple[Call, ...], section: Section):
        self.number = number
        self._calls: Call | tuple[Call, ...] = calls[0] if len(calls) == 1 else calls  # a tuple of one takes 48 bytes
        self.section = section
        self.priority = 0
        self.edges: Edges | None = None  # until it is in a graph
        self.locks: tuple[tuple[int, threading.Lock], ...] = ()  # in the order in which every task takes them: no deadlock

    @property
    def calls(self) -> tuple[Call, ...]:
        calls = self._calls
        return calls if isinstance(calls, tuple) else (calls,)

    @property
    def name(self) -> str:
        """The kernel's; of several, that of the costliest call."""
        calls = self.calls
        return (calls[0] if len(calls) == 1 else max(calls, key=lambda call: call.estimated_seconds)).kernel.name

    @property
    def is_merged(self) -> bool:
        """True if it has the calls of several tasks; False also for one call after those that begin a copy for it, see reductions.py."""
        return sum("begins" not in call.kernel.tags for call in self.calls) > 1

    @property
    def flops(self) -> int:
        """Operations."""
        return sum([call.cost()[0] for call in self.calls])

    @property
    def bytes(self) -> int:
        """What the declarations say is moved."""
        return sum([call.cost()[1] for call in self.calls])

    @property
    def predecessors(self) -> tuple[int, ...]:
        """The numbers of the tasks of the same graph that it waits for, ascending."""
        return self.edges.before(self.number) if self.edges is not None else ()

    @property
    def successors(self) -> list[int]:
        """The numbers of the tasks of the same graph that wait for it, ascending."""
        return self.edges.after(self.number) if self.edges is not None else []

    @property
    def estimated_seconds(self) -> float:
        """Return what the task may take, until it has been measured: what its calls may."""
        return sum([call.estimated_seconds for call in self.calls])

    def __getstate__(self) -> tuple[None, dict]:
        """Send a task by itself without the edges of its graph."""
        return None, {slot: None if slot == "edges" else getattr(self, slot) for slot in Task.__slots__}

    def run(self) -> None:
        """Run the calls, with BLAS on one thread. Raises TaskError, naming the call, from whatever a kernel raises."""
        with one_blas_thread:
            self.run_calls()

    def run_calls(self) -> None:
        """Do what `run` does where BLAS has one thread already, as inside a scheduler: 1 us less."""
        outer, this_thread.at = this_thread.at, self
        held = ExitStack() if self.locks else None
        try:
            if held is not None:
                for _, lock in self.locks:
                    held.enter_context(lock)
            for call in self.calls:
                try:
                    call.run()
                    if this_thread.awaited is not None:
                        settle()
                except Exception as error:
                    raise TaskError.of(self, call, error) from error
        finally:
            this_thread.at = outer
            take_awaited()  # of a body that failed
            if held is not None:
                held.close()

    def __str__(self) -> str:
        return f"{self.number} " + "; ".join(map(str, self.calls))


def run_now(kernel: Kernel, *args, section: Section = ("", -1), priority: int = 0) -> None:
    """The spawn of a program that runs without a graph: calls the kernel, with BLAS on one thread, for the bits that a graph gives.

    Raises as `Graph.spawn` does for arguments that do not fit, and TwinError for a kernel that was compiled from what has changed since.
    """
    call = Call(kernel, args)
    call.verify()
    kernel.verify_recordable()
    kernel.verify_untouched()
    outer, this_thread.at = this_thread.at, call
    try:
        with one_blas_thread:
            call.run()
            settle()
    finally:
        this_thread.at = outer
        take_awaited()
