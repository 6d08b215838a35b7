"""Graphs: tasks in program order, and the dependencies that follow from what they declare.

    graph = Graph()
    graph.spawn(matmul_forward, a.fch[l, r, c], a.ln2[l, r], p.fcw[l, c], p.fcb[l, c])
    graph.spawn(gelu_forward, a.fch_gelu[l, r], a.fch[l, r])           # reads what the first task writes: waits for it

Spawned into a graph, a call is recorded; the same program given `run_now` as its spawn runs at once, without any graph. A task waits for
the last writer of every cell that it touches (RAW, WAW) and, if it writes, for the readers since (WAR). Program order is therefore one
valid order, and every other valid order gives the same bits. Edges that others imply are left out.

Tasks do not spawn tasks yet: nothing is recorded into a graph while it runs, nor from inside a task into a graph from outside of it, which
in a worker process would be a copy.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from taskgpt.tasks.blas_threads import one_blas_thread
from taskgpt.tasks.dask_collection import DaskCollection
from taskgpt.tasks.kernel import AccessError, Kernel, ShapeError, as_kernel, fits_64_bits
from taskgpt.tasks.scratch import Shapes, scratch_arrays
from taskgpt.tasks.tensor import GridError, Tensor, Tile

Section = tuple[str, int]  # phase and layer, ("forward", 3); layer -1 = none


class _Thread(threading.local):
    """`at`: the task, on a native worker the call, that this thread is running, or None."""

    at: "Task | Call | None" = None


this_thread = _Thread()


class TaskError(RuntimeError):
    """A task failed. The message names it; `__cause__` is what it raised."""

    @classmethod
    def of(cls, task: "Task", call: "Call", error: Exception) -> "TaskError":
        failure = cls(f"task {task.number}, {call}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure


class Call:
    """A kernel and its arguments: tiles and constants, in the order of its parameters. Scratch is none of them."""

    __slots__ = ("_scratch_shapes", "args", "arrays", "kernel")

    def __init__(self, kernel: Kernel, args: tuple):
        self.kernel = as_kernel(kernel)
        # NumPy's scalars become Python's, which do not widen float32 expressions: bodies and twins see one type.
        self.args = args = tuple(a.item() if isinstance(a, np.generic) else a for a in args)
        self.arrays = [a.array if isinstance(a, Tile) else a for a in args]
        self._scratch_shapes: Shapes | None = None

    def run(self) -> None:
        self.kernel.run(*self.arrays, *scratch_arrays(self.scratch_shapes))

    def verify(self) -> None:
        """Raise TypeError, ShapeError or AccessError for arguments that the kernel does not declare so."""
        kernel = self.kernel
        if len(self.args) != len(kernel.parameters):
            names = ", ".join(kernel.parameters)
            raise TypeError(f"{kernel.name} takes {len(kernel.parameters)} arguments ({names}), got {len(self.args)}")
        for (name, declared), given in zip(kernel.parameters.items(), self.args, strict=True):
            is_tile = name in kernel.accesses
            if is_tile != isinstance(given, Tile) or (not is_tile and not isinstance(given, (int, declared))):
                wanted = "a tile, tensor[index]," if is_tile else f"a constant ({declared.__name__}),"
                got = repr(given) if isinstance(given, (int, float, Tile)) else f"a {type(given).__name__}"
                raise TypeError(f"{kernel.name}: '{name}' wants {wanted} got {got}")
            if not is_tile:
                if not fits_64_bits(given, declared):
                    raise TypeError(f"{kernel.name}: '{name}' wants a constant of 64 bits, got one of {given.bit_length()}")
            elif given.array.dtype != declared.dtype:
                raise ShapeError(f"{kernel.name}: '{name}' wants {declared.dtype}, got {given} of {given.array.dtype}")
            elif declared.is_written and not given.array.flags.writeable:
                raise AccessError(f"{kernel.name} writes '{name}', and the memory of {given} is read-only")
        kernel.sizes({name: tile.shape for name, tile in self.tiles()})

    @property
    def scratch_shapes(self) -> Shapes:
        """(shape, type) of each scratch array, in the order of the kernel's signature."""
        if self._scratch_shapes is None:  # not in __init__: the arguments may be wrong, and nobody has looked at them yet
            self._scratch_shapes = self.kernel.scratch_shapes(self.args)
        return self._scratch_shapes

    def cost(self) -> tuple[int, int]:
        """Return (FLOPs, bytes moved), as the kernel says."""
        sizes = self.kernel.sizes({name: tile.shape for name, tile in self.tiles()})
        constants = {name: a for name, a in zip(self.kernel.parameters, self.args, strict=True) if not isinstance(a, Tile)}
        return self.kernel.flops(sizes, constants), self.kernel.bytes(sizes, constants)

    def __reduce__(self):
        return type(self), (self.kernel, self.args)

    def tiles(self) -> Iterator[tuple[str, "Tile"]]:
        """Yield (parameter, tile)."""
        for name, argument in zip(self.kernel.parameters, self.args, strict=True):
            if isinstance(argument, Tile):
                yield name, argument

    def __str__(self) -> str:
        given = dict(zip(self.kernel.parameters, self.args, strict=True))
        words = [f"{kind}({', '.join(found)})" for kind, found in self.kernel.by_access(lambda name: repr(given[name]))]
        constants = [f"{name}={value}" for name, value in given.items() if not isinstance(value, Tile)]
        return " ".join([self.kernel.name, *words, *constants])


class Task:
    """One or more calls run in order, without a pause. A recorded task has one; `coarsen` makes tasks of several.

    `number` counts in program order; `name` is the kernel's (of several, the costliest's). `predecessors` and `successors` are numbers of
    other tasks of the same graph, ascending. `section` is (phase, layer). `flops` counts operations, `bytes` what the declarations say is
    moved. `priority`: of ready tasks, native workers take those of the highest first.
    """

    __slots__ = ("bytes", "calls", "flops", "locks", "name", "number", "predecessors", "priority", "section", "successors")

    def __init__(self, number: int, calls: tuple[Call, ...], section: Section, predecessors: tuple[int, ...] = (), name: str = ""):
        self.number = number
        self.calls = calls
        self.section = section
        self.predecessors = predecessors
        self.name = name or calls[0].kernel.name
        self.successors: list[int] = []
        self.locks: tuple[tuple[int, threading.Lock], ...] = ()  # in the order in which every task takes them: no deadlock
        self.flops = self.bytes = self.priority = 0

    @property
    def estimated_seconds(self) -> float:
        """Return what the task may take, until it has been measured: by a core's order of magnitude in operations and bytes a second."""
        return self.flops / 1e11 + self.bytes / 1e10

    def run(self) -> None:
        """Run the calls, with BLAS on one thread. Raises TaskError, naming the call, from whatever a kernel raises."""
        with one_blas_thread:
            self.run_calls()

    def run_calls(self) -> None:
        """Do what `run` does where BLAS has one thread already, as inside a scheduler: 1 us less."""
        outer, this_thread.at = this_thread.at, self
        held = ExitStack() if self.locks else None
        try:
            for _, lock in self.locks:
                held.enter_context(lock)
            for call in self.calls:
                try:
                    call.run()
                except Exception as error:
                    raise TaskError.of(self, call, error) from error
        finally:
            this_thread.at = outer
            if held is not None:
                held.close()

    def __str__(self) -> str:
        return f"{self.number} " + "; ".join(map(str, self.calls))


class Graph(DaskCollection):
    """Tasks in program order with their dependencies; to Dask a collection.

    `allow_commutative=True` lets tasks that declare Commutative on a tile run in any order, one at a time: faster, and the rounding of sums
    then depends on that order. Otherwise Commutative means InOut.

    `runs`: what schedulers have under way of this graph, each run an object of theirs. While there is one, nothing can be recorded.
    """

    def __init__(self, name: str = "graph", allow_commutative: bool = False):
        self.name = name
        self.allow_commutative = allow_commutative
        self.tasks: list[Task] = []
        self.runs: set[object] = set()
        self._made_in = this_thread.at
        self._kernels: dict[Kernel, None] = {}  # in order of first use
        self._cells: dict[tuple, _Cell] = {}
        self._tensors: dict[int, Tensor] = {}
        self._ancestors: list[int] = []  # one bit per earlier task; only while recording
        self._accesses: list[list[tuple[tuple, str]]] = []  # (cell, kind) of each task; only while recording

    def spawn(self, kernel: Kernel, *args, section: Section = ("", -1), priority: int = 0) -> Task:
        """Record a call as the next task.

        Raises ShapeError if a tile's shape or type is not as declared, GridError if its memory is also cut by another grid, AccessError if
        a written tile overlaps another tile of the same call or is read-only, TypeError for what is no kernel or a wrong number or kind of
        arguments, TwinError for a kernel new to the graph that was compiled from what has changed since (what changes later, the run sees),
        RuntimeError for a graph that was derived or sent: it knows its edges, but not what its tasks access; for one that is being run,
        and, inside a task, for one that the task did not make.
        """
        self._verify_may_grow()
        if len(self._ancestors) != len(self.tasks):
            raise RuntimeError(f"graph '{self.name}' was not recorded here, and cannot go on recording; record a new one")
        call = Call(kernel, args)
        self._verify(call)
        task = Task(len(self.tasks), (call,), section)
        task.priority = priority
        waits: set[int] = set()
        locked: list[_Cell] = []
        accesses: list[tuple[tuple, str]] = []
        for name, tile in call.tiles():
            kind = kernel.accesses[name].kind
            if kind == "commutative" and not self.allow_commutative:
                kind = "inout"
            for position in tile.cells():
                key = id(tile.tensor), position
                cell = self._cells.get(key)
                if cell is None:
                    cell = self._cells[key] = _Cell()
                waits |= cell.access(kind, task.number)
                accesses.append((key, kind))
                if kind == "commutative":
                    locked.append(cell)
        waits.discard(task.number)  # a call with two tiles in one cell does not wait for itself
        task.locks = tuple(sorted({(cell.serial, cell.lock) for cell in locked}))
        task.predecessors = without_implied(waits, self._ancestors)
        task.flops, task.bytes = call.cost()
        self._accesses.append(accesses)
        self.append(task)
        return task

    def append(self, task: Task) -> None:
        """Add a task whose predecessors are known. Raises RuntimeError where `spawn` does for a graph that runs."""
        self._verify_may_grow()
        for p in task.predecessors:
            self.tasks[p].successors.append(task.number)
        self._add(task)

    def _add(self, task: Task) -> None:
        self.tasks.append(task)
        self._kernels.update((call.kernel, None) for call in task.calls)

    def _verify_may_grow(self) -> None:
        if this_thread.at is not None and this_thread.at is not self._made_in:
            raise RuntimeError(f"tasks cannot spawn tasks yet: graph '{self.name}' was not made inside this one; record it before it runs")
        if self.runs:
            raise RuntimeError(f"graph '{self.name}' is being run, and the task would not be; spawn it before the run or after its end")

    def _verify(self, call: Call) -> None:
        kernel = call.kernel
        call.verify()
        if kernel not in self._kernels:
            kernel.verify_sources()
        tiles = list(call.tiles())
        for at, (name, tile) in enumerate(tiles):
            self._know(tile.tensor)
            for other_name, other in tiles[:at]:
                written = kernel.accesses[name].is_written or kernel.accesses[other_name].is_written
                if written and tile.overlaps(other):
                    where = f"{kernel.name}: '{other_name}' and '{name}' overlap in {tile.tensor.name}"
                    raise AccessError(f"{where}; declare one InOut instead")

    def _know(self, tensor: Tensor) -> None:
        """Refuse a second grid over memory that another tensor of this graph already cuts."""
        other = self._other_grid(tensor)
        if other:
            raise GridError(
                f"'{tensor.name}' ({tensor}) and '{other.name}' ({other}) share memory: two grids over one buffer would hide "
                "dependencies; index one tensor in both places"
            )
        self._tensors[id(tensor)] = tensor  # keeps it alive, so that its id stays its own

    def _other_grid(self, tensor: Tensor) -> Tensor | None:
        """Return a tensor of this graph that cuts the memory of the given one by another grid."""
        if id(tensor) in self._tensors:
            return None
        low, high = tensor.address_range()
        for other in self._tensors.values():
            other_low, other_high = other.address_range()
            if low < other_high and other_low < high:
                return other
        return None

    def edges_to(self, following: "Graph") -> list[tuple[int, int]] | None:
        """Return (task here, task there) for the dependencies of a graph that runs right after this one, less those that others imply.

        None where a graph was derived or sent, and knows no accesses, or where the two cut the same memory by other grids: then everything
        there waits for everything here.
        """
        here, there = self.tasks, following.tasks
        are_recorded = len(self._accesses) == len(here) and len(following._accesses) == len(there)
        if not are_recorded or any(self._other_grid(tensor) for tensor in following._tensors.values()):
            return None
        count = len(here)
        cells = {key: cell.copy() for key, cell in self._cells.items()}
        ancestors = self._ancestors.copy()
        edges = []
        for task, accesses in zip(there, following._accesses, strict=True):
            waits = {count + p for p in task.predecessors}
            for key, kind in accesses:
                if key in cells:
                    waits |= cells[key].access(kind, count + task.number)
            waits.discard(count + task.number)
            edges += [(p, task.number) for p in without_implied(waits, ancestors) if p < count]
        return edges

    def depths(self) -> list[int]:
        """Return the length of the longest path to each task; tasks of one depth do not depend on each other."""
        depths: list[int] = []
        for task in self.tasks:
            depths.append(1 + max((depths[p] for p in task.predecessors), default=-1))
        return depths

    def longest_path(self, seconds: Sequence[float] | None = None) -> list[int]:
        """Return the tasks of the path that takes longest, if task n takes seconds[n] (default: the estimate)."""
        took = [task.estimated_seconds for task in self.tasks] if seconds is None else list(seconds)
        before = [-1] * len(took)
        for task in self.tasks:
            if task.predecessors:
                before[task.number] = max(task.predecessors, key=took.__getitem__)
                took[task.number] += took[before[task.number]]
        path = [max(range(len(took)), key=took.__getitem__)] if took else []
        while path and before[path[-1]] >= 0:
            path.append(before[path[-1]])
        return path[::-1]

    def _repr_svg_(self) -> str:
        """In a notebook: the picture; of a graph of many tasks, one task for each phase and layer."""
        from taskgpt.tasks.coarsen import by_section
        from taskgpt.tasks.picture import to_svg

        return to_svg(self if len(self.tasks) <= 400 else by_section(self))

    @property
    def kernels(self) -> list[Kernel]:
        """The kernels used, in order of first use."""
        return list(self._kernels)

    def verify_untouched(self) -> None:
        """Raise TwinError for a kernel that was compiled from what has changed since.

        Before every run: it costs 2 to 10 us a kernel, and 0.1 ms for each MB of arrays that it was compiled with.
        """
        for kernel in self._kernels:
            kernel.verify_untouched()

    @property
    def flops(self) -> int:
        return sum(task.flops for task in self.tasks)

    @property
    def is_commutative(self) -> bool:
        return any(task.locks for task in self.tasks)

    def listing(self) -> str:
        """Return the graph as text, a task a line, `<-` its predecessors: what the golden files hold."""
        lines = [f"{task}" + (f" <- {' '.join(map(str, task.predecessors))}" if task.predecessors else "") for task in self.tasks]
        return "\n".join(lines) + "\n"

    def to_dask(self, call: Callable[[Task], tuple] | None = None, token: str | None = None):
        """Return (HighLevelGraph, keys of the last tasks) of one run, for any `get` of Dask's: a layer for each section.

        Keys are `(kernel-token, number)`: Dask's dashboard groups and colours by the kernel. The token is a new one every time, for
        Distributed does not run a key again that it still knows, be it of an earlier step or of another graph: ask anew for every run.
        A `token` of your own makes the same keys again, and with them the same order, which in Dask hangs on the keys' hashes.

        `call(task)` gives (function, *arguments) for the Dask task. By default that is the task itself, with BLAS on one thread. It runs in
        this process, on threads or in a Client(processes=False); and in other processes of this machine if all tensors are shared. If they
        are not, it raises TypeError there. Raises TwinError for a kernel that was compiled from what has changed since.
        """
        from taskgpt.tasks.dask_graph import to_dask  # Dask loads slowly, and only those who ask need it

        return to_dask(self, call, token)

    def __repr__(self) -> str:
        edges = sum(len(task.predecessors) for task in self.tasks)
        return f"{self.name}: {len(self.tasks)} tasks of {len(self.kernels)} kernels, {edges} edges, {self.flops / 1e9:.3g} GFLOP"

    def __getstate__(self) -> dict:
        """Send what running needs: the tasks, and for each lock its number. Tasks that share a lock here will share one there."""
        tasks = [{slot: getattr(task, slot) for slot in Task.__slots__ if slot != "locks"} for task in self.tasks]
        locks = [[serial for serial, _ in task.locks] for task in self.tasks]
        return {"name": self.name, "allow_commutative": self.allow_commutative, "tasks": tasks, "locks": locks}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["name"], state["allow_commutative"])
        locks: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        for fields, serials in zip(state["tasks"], state["locks"], strict=True):
            task = Task.__new__(Task)
            task.locks = tuple((serial, locks[serial]) for serial in serials)
            for slot, value in fields.items():
                setattr(task, slot, value)
            self._add(task)


class _Cell:
    """The tasks that the next access of a cell must wait for."""

    __slots__ = ("group", "lock", "readers", "serial", "writers")
    _count = 0

    def __init__(self):
        self.writers: set[int] = set()  # the last writer, or all tasks of a commutative group
        self.readers: set[int] = set()  # since then
        self.group: set[int] | None = None  # what every member of the open commutative group waits for
        self.lock = threading.Lock()
        self.serial = _Cell._count = _Cell._count + 1

    def copy(self) -> "_Cell":
        """Return the same state, to go on from; a commutative group ends here."""
        twin = _Cell()
        twin.writers, twin.readers = set(self.writers), set(self.readers)
        return twin

    def access(self, kind: str, number: int) -> set[int]:
        """Note the access of a task; return the tasks it waits for."""
        if kind == "commutative":
            if self.group is None:
                self.group = self.writers | self.readers
                self.writers, self.readers = set(), set()
            self.writers.add(number)
            return self.group
        self.group = None
        if kind == "in":
            self.readers.add(number)
            return set(self.writers)
        waits = self.writers | self.readers
        self.writers, self.readers = {number}, set()
        return waits


def without_implied(waits: Iterable[int], ancestors: list[int]) -> tuple[int, ...]:
    """Return the next task's predecessors, less those that others of them already wait for: the transitive reduction, task by task.

    `ancestors` has one integer per earlier task, a bit for each task that it waits for; the next task's is appended.
    """
    kept, implied = [], 0
    for p in sorted(waits, reverse=True):
        if not implied >> p & 1:
            kept.append(p)
            implied |= ancestors[p] | 1 << p
    ancestors.append(implied)
    return tuple(reversed(kept))


def run_now(kernel: Kernel, *args, section: Section = ("", -1), priority: int = 0) -> None:
    """The spawn of a program that runs without a graph: calls the kernel, with BLAS on one thread, for the bits that a graph gives.

    Raises as `Graph.spawn` does for arguments that do not fit, and TwinError for a kernel that was compiled from what has changed since.
    """
    call = Call(kernel, args)
    call.verify()
    kernel.verify_untouched()
    with one_blas_thread:
        call.run()
