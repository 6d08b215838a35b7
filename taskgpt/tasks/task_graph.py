"""The graph of tasks: recorded call by call, with the dependencies that follow from what the kernels declare.

Spawned into a graph, a call is recorded; the same program given `run_now` as its spawn runs at once, without any graph. Program order is
one valid order, and every other order that the dependencies allow gives the same bits. Edges that others imply are left out.

Neighbouring reductions into one tile become tasks on copies of it, and tasks that combine these: see reductions.py. Neither touches
anything that schedulers, pictures and traces do not know already.

Nothing is recorded into a graph while it runs, nor from inside a task into a graph from outside of it, which in a worker process would be a
copy. Tasks that spawn tasks are for programs: see spawn.py.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Self, TypeVar

from taskgpt.tasks.combiners import Combiner, Operator
from taskgpt.tasks.dependencies import CellHistory, longest_path
from taskgpt.tasks.edges import Edges
from taskgpt.tasks.kernel import Kernel, as_kernel
from taskgpt.tasks.known_calls import CallSignature, KnownCalls, Place
from taskgpt.tasks.reductions import beginning, combining, copies_of, slots_of
from taskgpt.tasks.task import Call, Section, Task, this_thread
from taskgpt.tasks.tensor import Tile

AnyGraph = TypeVar("AnyGraph", bound="TaskGraph")  # of the kind that was given
_combining = threading.Lock()  # threads of a scheduler may look at one graph together


class _Group:
    """Neighbouring tasks that reduce into one tile, and are not combined yet."""

    __slots__ = ("combiner", "copies", "place", "priority", "section", "slots", "tasks")

    def __init__(self, place: Place, combiner: Operator | Combiner, copies: list[Place]):
        self.place, self.combiner, self.copies = place, combiner, copies
        self.slots = slots_of(place.tile)
        self.tasks = 0
        self.section: Section = ("", -1)  # of the last task
        self.priority = 0  # the highest


class TaskGraph:
    """Tasks in program order with their dependencies.

    `allow_commutative=True` lets tasks that declare Commutative on a tile run in any order, one at a time: faster, and the rounding of sums
    then depends on that order. Otherwise Commutative means InOut.

    `tasks` and `edges`, as arrays, are asked for by whoever looks at the graph or runs it; then what was reduced is combined. `runs`: what
    schedulers have under way of this graph, each run an object of theirs. While there is one, nothing can be recorded.
    """

    def __init__(self, name: str = "graph", allow_commutative: bool = False):
        self.name = name
        self.allow_commutative = allow_commutative
        self._tasks: list[Task] = []
        self._edges = Edges()
        self.runs: set[object] = set()
        self._made_in = this_thread.at
        self._kernels: dict[Kernel, None] = {}  # in order of first use
        self._recorded = 0  # tasks that were spawned here: of those the graph knows what they access
        this = weakref.ref(self)  # a graph goes with its last reference, and not when the collector comes

        def combine_all() -> None:
            if (graph := this()) is not None:
                graph._combine_all()

        self._calls = KnownCalls(Kernel.verify_recordable, combine_all, allow_commutative)
        self._groups: dict[CellHistory, _Group] = {}  # those of reductions that are open
        self._copies: dict[Place, list[Place]] = {}  # of tiles that are reduced, for the slots after the first

    @property
    def tasks(self) -> list[Task]:
        if self._groups:
            self._combine_all()
        return self._tasks

    @property
    def edges(self) -> Edges:
        if self._groups:
            self._combine_all()
        return self._edges

    def spawn(self, kernel: Kernel, *args, section: Section = ("", -1), priority: int = 0) -> Task:
        """Record a call as the next task.

        Raises ShapeError if a tile's shape or type is not as declared, GridError if its memory has two grids, see grids.py, AccessError if
        a written tile overlaps another tile of the same call or is read-only, TypeError for what is no kernel or a wrong number or kind of
        arguments, TwinError for a kernel new to the graph that was compiled from what has changed since (what changes later, the run sees),
        RuntimeError for a graph that was derived or sent: it knows its edges, but not what its tasks access; for one that is being run,
        and, inside a task, for one that the task did not make.
        """
        if this_thread.at is not None or self.runs:
            self._verify_may_grow()
        if self._recorded != len(self._tasks):
            raise RuntimeError(f"graph '{self.name}' was not recorded here, and cannot go on recording; record a new one")
        if type(kernel) is not Kernel:
            as_kernel(kernel)
        signature, places, args = self._calls.look_up(kernel, args)
        self._calls.verify_written(signature, places)
        if self._groups:
            self._combine_before(signature, places)
        if not signature.reductions:
            return self._record(signature, places, (Call.verified(signature, args),), section, priority)
        places, calls = self._spread(signature, places, args, section, priority)
        return self._record(signature, places, calls, section, priority)

    def _record(self, signature: CallSignature, places: Sequence[Place], calls: tuple[Call, ...], section: Section, priority: int) -> Task:
        """Add a task. Its last call is of that signature, on those tiles; others before it touch no tiles but these."""
        number = len(self._tasks)
        task = Task(number, calls, section)
        task.priority = priority
        waits: set[int] = set()
        for place, kind in zip(places, signature.kinds, strict=True):
            place.access(kind, number, waits)
            if kind == "commutative":
                task.locks = tuple(sorted({*task.locks, *(cell.numbered_lock() for cell in place.cells)}))
        waits.discard(number)  # a call with two tiles in one cell does not wait for itself
        self._edges.add(waits)
        task.edges = self._edges
        self._tasks.append(task)
        self._kernels[signature.kernel] = None
        self._recorded += 1
        return task

    def _combine_before(self, signature: CallSignature, places: Sequence[Place]) -> None:
        """End the groups of reductions that a call on these tiles does not go on with."""
        groups = self._groups
        ended: dict[_Group, None] = {}
        for place, access in zip(places, signature.accesses, strict=True):
            if groups.keys().isdisjoint(place.cells):
                continue
            for cell in place.cells:
                group = groups.get(cell)
                if group is not None and not (group.place is place and group.combiner is access.combiner):
                    ended[group] = None
        for group in ended:
            self._combine(group)

    def _spread(
        self, signature: CallSignature, places: Sequence[Place], args: tuple, section: Section, priority: int
    ) -> tuple[list[Place], tuple[Call, ...]]:
        """Return the tiles of a call, with its turn's slot for each that it reduces, and the call after those that fill new slots."""
        chosen, given = list(places), list(args)
        calls: list[Call] = []
        for at, position, combiner in signature.reductions:
            place = places[at]
            if self._meets_another(place, places):
                continue  # what else the call does there has its place in the program's order, and so has this
            group = self._groups.get(place.cells[0])
            if group is None:
                group = _Group(place, combiner, self._copies.setdefault(place, []))
                self._groups.update(dict.fromkeys(place.cells, group))
            slot = group.tasks % group.slots
            if slot:
                copy = self._copy(group, slot)
                chosen[at], given[position] = copy, copy.tile
                if group.tasks < group.slots:
                    access = signature.accesses[at]
                    calls.append(Call(beginning(combiner, access.dtype, len(access.dims)), (copy.tile,)))
                    self._kernels[calls[-1].kernel] = None
            group.tasks += 1
            group.section = section
            if priority > group.priority:
                group.priority = priority
        return chosen, (*calls, Call.verified(signature, tuple(given)))

    def _meets_another(self, place: Place, places: Sequence[Place]) -> bool:
        """Return True if another of the tiles touches a cell of this one."""
        tensor, finest = place.tile.tensor, self._calls.grids.finest
        for other in places:
            may_meet = other is not place and (other.tile.tensor is tensor or tensor in finest)
            if may_meet and not set(other.cells).isdisjoint(place.cells):
                return True
        return False

    def _copy(self, group: _Group, slot: int) -> Place:
        """Return a slot's copy of the tile: that of an earlier group, if there was one; memory grows to at most twice what is needed."""
        copies = group.copies
        if slot > len(copies):
            more = min(len(copies) + 1, group.slots - 1 - len(copies))
            for tile in copies_of(group.place.tile, len(copies) + 1, more):
                self._calls.know_private(tile.tensor)
                copies.append(self._calls.place(tile))
        return copies[slot - 1]

    def _combine_all(self) -> None:
        with _combining:
            for group in dict.fromkeys(self._groups.values()):
                self._combine(group)

    def _combine(self, group: _Group) -> None:
        """End a group: record the tree of tasks that brings its slots into the tile."""
        place = group.place
        used = [place, *group.copies][: min(group.tasks, group.slots)]
        kernel = combining(group.combiner, place.tile.tensor.array.dtype, len(place.tile.shape))
        distance = 1
        while distance < len(used):
            for at in range(0, len(used) - distance, 2 * distance):
                tiles = used[at].tile, used[at + distance].tile
                signature, places, args = self._calls.look_up(kernel, tiles)
                self._record(signature, places, (Call.verified(signature, args),), group.section, group.priority)
            distance *= 2
        for cell in place.cells:  # at last: until then other threads that look at the graph wait
            del self._groups[cell]

    def derived(self, name: str) -> Self:
        """Return an empty graph of the same kind, for other tasks that run the same calls."""
        return type(self)(name, self.allow_commutative)

    def append(self, task: Task, predecessors: Iterable[int]) -> None:
        """Add a task whose predecessors are known. Raises RuntimeError where `spawn` does for a graph that runs."""
        self._verify_may_grow()
        self._edges.add_exact(predecessors)
        self._add(task)

    def _add(self, task: Task) -> None:
        task.edges = self._edges
        self._tasks.append(task)
        for call in task.calls:
            self._kernels[call.kernel] = None

    def _verify_may_grow(self) -> None:
        if this_thread.at is not None and this_thread.at is not self._made_in:
            raise RuntimeError(f"a task cannot record into graph '{self.name}', which it has not made; spawn tasks of tasks in a program")
        if self.runs:
            raise RuntimeError(f"graph '{self.name}' is being run, and the task would not be; spawn it before the run or after its end")

    def edges_to(self, following: "TaskGraph") -> list[tuple[int, int]] | None:
        """Return (task here, task there) for the dependencies of a graph that runs right after this one, less those that others imply.

        None where a graph was derived or sent, and knows no accesses, or where the two cut the same memory by other grids: then everything
        there waits for everything here.
        """
        are_recorded = self._recorded == len(self.tasks) and following._recorded == len(following.tasks)
        if not are_recorded or any(self._calls.grids.other(tensor) for tensor in following._calls.grids):
            return None
        count = len(self.tasks)
        both = Edges()
        for task in self.tasks:
            both.add(task.predecessors)
        for task, waits in zip(following.tasks, self._waits_of(following), strict=True):
            both.add(waits.union(count + p for p in task.predecessors))
        edges = []
        for number in range(len(following.tasks)):
            edges += [(p, number) for p in both.before(count + number) if p < count]
        return edges

    def _waits_of(self, following: "TaskGraph") -> Iterator[set[int]]:
        """Yield, for each task of a graph that runs after this one, those of this one that it must wait for if nothing else does."""
        overwritten: set[CellHistory] = set()  # who comes after that waits for the task that did
        touched: dict[Tile, list[CellHistory]] = {}
        for task in following.tasks:
            waits: set[int] = set()
            for call in task.calls:
                for name, tile in call.tiles():
                    if tile not in touched:
                        touched[tile] = self._calls.grids.touched(tile)
                    kind = call.kernel.accesses[name].kind
                    for cell in touched[tile]:
                        if cell not in overwritten:
                            waits.update(cell.writers)
                            if kind != "in":
                                waits.update(*(readers.tasks for readers in cell.readers))
                    if kind not in ("in", "concurrent") and (kind != "commutative" or not following.allow_commutative):
                        overwritten.update(touched[tile])
            yield waits

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
        if self._groups:
            self._combine_all()
        return list(self._kernels)

    def verify_untouched(self) -> None:
        """Raise TwinError for a kernel that was compiled from what has changed since.

        Before every run: it costs 2 to 10 us a kernel, and 0.1 ms for each MB of arrays that it was compiled with.
        """
        for kernel in self.kernels:
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
        return f"{self.name}: {len(self.tasks)} tasks of {len(self.kernels)} kernels, {len(self.edges)} edges, {self.flops / 1e9:.3g} GFLOP"

    def __getstate__(self) -> dict:
        """Send what running needs: the tasks, and for each lock its number. Tasks that share a lock here will share one there."""
        tasks = [{slot: getattr(task, slot) for slot in Task.__slots__ if slot not in ("locks", "edges")} for task in self.tasks]
        locks = [[serial for serial, _ in task.locks] for task in self.tasks]
        return {"name": self.name, "allow_commutative": self.allow_commutative, "tasks": tasks, "locks": locks, "edges": self.edges}

    def __setstate__(self, state: dict) -> None:
        TaskGraph.__init__(self, state["name"], state["allow_commutative"])
        self._edges = state["edges"]
        locks: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        for fields, serials in zip(state["tasks"], state["locks"], strict=True):
            task = Task.__new__(Task)
            task.locks = tuple((serial, locks[serial]) for serial in serials)
            for slot, value in fields.items():
                setattr(task, slot, value)
            self._add(task)
