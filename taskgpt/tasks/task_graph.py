"""The graph of tasks: recorded call by call, with the dependencies that follow from what the kernels declare.

Spawned into a graph, a call is recorded; the same program given `run_now` as its spawn runs at once, without any graph. Program order is
one valid order, and every other order that the dependencies allow gives the same bits. Edges that others imply are left out.

Tasks do not spawn tasks yet: nothing is recorded into a graph while it runs, nor from inside a task into a graph from outside of it, which
in a worker process would be a copy.
"""

import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import Self, TypeVar

from taskgpt.tasks.dependencies import CellHistory, longest_path, without_implied
from taskgpt.tasks.kernel import AccessError, Kernel
from taskgpt.tasks.task import Call, Section, Task, this_thread
from taskgpt.tasks.tensor import GridError, Tensor

AnyGraph = TypeVar("AnyGraph", bound="TaskGraph")  # of the kind that was given


class TaskGraph:
    """Tasks in program order with their dependencies.

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
        self._cells: dict[tuple, CellHistory] = {}
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
        locked: list[CellHistory] = []
        accesses: list[tuple[tuple, str]] = []
        for name, tile in call.tiles():
            kind = kernel.accesses[name].kind
            if kind == "commutative" and not self.allow_commutative:
                kind = "inout"
            for position in tile.cells():
                key = id(tile.tensor), position
                cell = self._cells.get(key)
                if cell is None:
                    cell = self._cells[key] = CellHistory()
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

    def derived(self, name: str) -> Self:
        """Return an empty graph of the same kind, for other tasks that run the same calls."""
        return type(self)(name, self.allow_commutative)

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

    def edges_to(self, following: "TaskGraph") -> list[tuple[int, int]] | None:
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
        took = [task.estimated_seconds for task in self.tasks] if seconds is None else seconds
        return longest_path([task.predecessors for task in self.tasks], took)

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

    def __repr__(self) -> str:
        edges = sum(len(task.predecessors) for task in self.tasks)
        return f"{self.name}: {len(self.tasks)} tasks of {len(self.kernels)} kernels, {edges} edges, {self.flops / 1e9:.3g} GFLOP"

    def __getstate__(self) -> dict:
        """Send what running needs: the tasks, and for each lock its number. Tasks that share a lock here will share one there."""
        tasks = [{slot: getattr(task, slot) for slot in Task.__slots__ if slot != "locks"} for task in self.tasks]
        locks = [[serial for serial, _ in task.locks] for task in self.tasks]
        return {"name": self.name, "allow_commutative": self.allow_commutative, "tasks": tasks, "locks": locks}

    def __setstate__(self, state: dict) -> None:
        TaskGraph.__init__(self, state["name"], state["allow_commutative"])
        locks: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        for fields, serials in zip(state["tasks"], state["locks"], strict=True):
            task = Task.__new__(Task)
            task.locks = tuple((serial, locks[serial]) for serial in serials)
            for slot, value in fields.items():
                setattr(task, slot, value)
            self._add(task)
