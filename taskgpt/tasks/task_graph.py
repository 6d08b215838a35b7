"""The graph of tasks: recorded call by call, with the dependencies that follow from what the kernels declare.

Spawned into a graph, a call is recorded; the same program given `run_now` as its spawn runs at once, without any graph. Program order is
one valid order, and every other order that the dependencies allow gives the same bits. Edges that others imply are left out.

Neighbouring reductions into one tile become tasks on copies of it, and tasks that combine these: see reductions.py. Neither touches
anything that schedulers, pictures and traces do not know already.

Nothing is recorded into a graph while it runs, nor from inside a task into a graph from outside of it, which in a worker process would be a
copy. Tasks that spawn tasks are for programs: see spawn.py.
"""

import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from types import CodeType
from typing import Any, Self, TypeVar

import numpy as np

from taskgpt.tasks.columns import Columns, Origin, bits_of
from taskgpt.tasks.combiners import Combiner, Operator
from taskgpt.tasks.dependencies import Cell, longest_path
from taskgpt.tasks.each import Loop
from taskgpt.tasks.edges import Edges
from taskgpt.tasks.events import this_thread
from taskgpt.tasks.joined import joined, joins_of
from taskgpt.tasks.kernel import Kernel, as_kernel
from taskgpt.tasks.known_calls import CallSignature, KnownCalls, Place
from taskgpt.tasks.lines import Line
from taskgpt.tasks.loops import LoopCalls
from taskgpt.tasks.parts import Part
from taskgpt.tasks.recorded import RecordedTask, Tasks
from taskgpt.tasks.recorded_edges import edges_between, edges_of
from taskgpt.tasks.reductions import beginning, combining, copies_of, slots_of
from taskgpt.tasks.task import Call, Section, Task

AnyGraph = TypeVar("AnyGraph", bound="TaskGraph")  # of the kind that was given
Where = tuple[CodeType, int]  # a line of a program, by its code and the number of an instruction in it
_combining = threading.Lock()  # threads of a scheduler may look at one graph together


class _Group:
    """Neighbouring tasks that reduce into one tile, and are not combined yet."""

    __slots__ = ("combiner", "copies", "place", "priority", "section", "slots", "tasks", "where")

    def __init__(self, place: Place, combiner: Operator | Combiner, copies: list[Place], where: Where):
        self.place, self.combiner, self.copies = place, combiner, copies
        self.where = where  # of the last task
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
        self.runs: set[object] = set()
        self._made_in = this_thread.at
        self._kernels: dict[Kernel, None] = {}  # in order of first use
        this = weakref.ref(self)  # a graph goes with its last reference, and not when the collector comes

        def combine_all() -> None:
            if (graph := this()) is not None:
                graph._combine_all()

        self._calls = KnownCalls(Kernel.verify_recordable, combine_all, allow_commutative)
        self._columns = Columns(self._calls)
        self._edges: Edges = edges_of(self._columns)
        self._tasks = Tasks(self._columns, self._edges)
        self._is_derived = False  # its edges are known, but not what its tasks access
        self._groups: dict[Cell, _Group] = {}  # those of reductions that are open
        self._copies: dict[Place, list[Place]] = {}  # of tiles that are reduced, for the slots after the first
        self._parts: weakref.WeakSet[Part] = weakref.WeakSet()
        self._open_parts: tuple[Part, ...] = ()  # whose blocks are under way, the outermost first

    @property
    def tasks(self) -> Tasks:
        if self._groups:
            self._combine_all()
        return self._tasks

    @property
    def version(self) -> tuple[int, int]:
        """What changes whenever the tasks do: plans that were made of others are of no use."""
        return self.tasks.version

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

        The task is made to be looked at, and kept by nobody else: the graph has its numbers alone.
        """
        caller = sys._getframe(1)
        return self.spawn_at(kernel, args, section, priority, (caller.f_code, caller.f_lasti))

    def spawn_at(self, kernel: Kernel, args: tuple, section: Section, priority: int, where: Where) -> Task:
        """Do what `spawn` does, for a line of a program that has spawned the task elsewhere."""
        if this_thread.at is not None or self.runs or self._is_derived:
            self._verify_may_record()
        if type(kernel) is not Kernel:
            as_kernel(kernel)
        signature, places, args = self._calls.look_up(kernel, args)
        self._calls.verify_written(signature, places)
        if self._groups:
            self._combine_before(signature, places)
        if not signature.reductions:
            return self._record(signature, places, args, section, priority, where)
        places, begins = self._spread(signature, places, section, priority, where)
        return self._record(signature, places, args, section, priority, where, begins)

    def _record(
        self,
        signature: CallSignature,
        places: Sequence[Place],
        args: tuple,
        section: Section,
        priority: int,
        where: Where,
        begins: tuple[Call, ...] = (),
    ) -> Task:
        """Add a task: its call, of which `args` have the constants, after others that touch no tiles but these."""
        columns = self._columns
        number = len(columns.origins)
        code, instruction = where
        key = (signature, section, priority, id(code), instruction)
        origin = columns.origin(key)
        if origin is None:
            origin = columns.add_origin(Origin(signature, section, priority, Line(code, instruction)), key)
            self._kernels[signature.kernel] = None
        if begins:
            columns.begins[number] = begins
            self._kernels.update(dict.fromkeys(call.kernel for call in begins))
        words = columns.words
        known = len(words)
        try:
            words.extend([place.number for place in places])
            for at, is_float in signature.constants:
                words.append(bits_of(args[at]) if is_float else args[at])
            columns.origins.append(origin)
        except BaseException:  # an interrupt
            if len(columns.origins) == number:
                del words[known:]
                columns.begins.pop(number, None)
            raise
        return RecordedTask(columns, self._edges, number)

    def spawn_each(
        self,
        kernel: Kernel,
        over: Any,
        call: Callable[..., Sequence],
        *,
        grainsize: int | tuple[int | None, ...] | None = None,
        section: Section = ("", -1),
        priority: int = 0,
    ) -> range:
        """Record a loop of tasks as fast as compiled code does; return their numbers. The graph is that of the same loop with `spawn`.

            graph.spawn_each(axpy, range(n), lambda i: (y.cell(i), x.cell(i), 2.0))
            graph.spawn_each(relax, y.grid, lambda i, j: (y.cell(i, j), x.cell(i, j).grown(1)))

        `over`: a range, a number of iterations, an array of integers, or for several indices a tuple of those, the last one fastest. `call`
        is called once: it is given the indices, which stand for what they are in all iterations, and returns the arguments. There is
        arithmetic with indices (+ - * // %), slices and cells of them, and `grown`; what asks what an index is needs a loop with `spawn`.

        `grainsize`: so many iterations are one task, over their tiles joined, for a kernel that takes tiles of any length (OmpSs-2's
        taskloop). A number is for the last index, a tuple has one for each, or None. A place that is moved, `y[i]`, is a range of one then.

        Calls with a Reduction are recorded one by one, in the time of `spawn`. Raises what `spawn` does, then nothing is recorded;
        IndexError says in which iteration. TypeError or ValueError for a loop or a grainsize that cannot be.
        """
        if this_thread.at is not None or self.runs or self._is_derived:
            self._verify_may_record()
        caller = sys._getframe(1)
        where = caller.f_code, caller.f_lasti
        begin, loop = len(self._columns), Loop(over)
        joins = () if grainsize is None else joins_of(loop, grainsize)
        if not loop.size:
            return range(begin, begin)
        args = call(*loop.indices())
        if not isinstance(args, (tuple, list)):
            raise TypeError(f"the function of a loop returns the arguments of a call, a tuple; got a {type(args).__name__}")
        if joins:
            loop, args = joined(loop, args, [*as_kernel(kernel).parameters], joins)
        calls = LoopCalls(as_kernel(kernel), loop, args)
        signatures, which = calls.signatures(self._calls)
        calls.verify_apart(self._calls, signatures[0])
        if any(signature.reductions for signature in signatures) or self._may_meet_groups(calls):
            for number in range(loop.size):
                self.spawn_at(kernel, calls.at(number), section, priority, where)
            return range(begin, len(self._columns))
        self._record_loop(calls, signatures, which, section, priority, where)
        return range(begin, len(self._columns))

    def _record_loop(
        self,
        calls: LoopCalls,
        signatures: Sequence[CallSignature],
        which: np.ndarray | None,
        section: Section,
        priority: int,
        where: Where,
    ) -> None:
        columns, line, families = self._columns, Line(*where), []

        def add_family(family: Any) -> int:
            tile = columns.add_family(family)
            families.append(columns.family_of(tile))
            return tile

        words = calls.rows(self._calls, signatures[0], add_family)
        made = [Origin(each, section, priority, line, calls.loop, tuple(families)) for each in signatures]
        numbers = np.array([columns.add_origin(origin) for origin in made])
        self._kernels[calls.kernel] = None
        columns.add_rows(np.full(calls.loop.size, numbers[0]) if which is None else numbers[which], words)

    def _may_meet_groups(self, calls: LoopCalls) -> bool:
        """Return True if the calls may touch a tile whose reduction is open: which task ends it is found call by call."""
        reduced = {group.place.tile.tensor for group in self._groups.values()}
        return any(tensor in reduced or tensor in self._calls.grids.finest for tensor in calls.tensors()) if reduced else False

    def part(self) -> Part:
        """Return a part of the graph for a `with` block: what is spawned there can be recorded again, alone, in another one; see parts.py.

        Reductions do not reach over the ends of such a block. A block that raises leaves the graph as it was before it. Raises RuntimeError
        where `spawn` does for graphs that run or are derived; for a part of a part that was recorded again, which is gone; and for one
        that is to be recorded again while another block is under way. Tasks behind it are numbered anew.
        """
        return Part(self)

    def begin_part(self, part: Part) -> int:
        """Note that a part's block begins; return the number of its first task."""
        self._verify_may_record()
        if part.is_gone:
            raise RuntimeError(f"this part of graph '{self.name}' is gone: a part around it was recorded again")
        if part.numbers is not None and self._open_parts:
            raise RuntimeError(f"a part of graph '{self.name}' is being recorded; end its block before another part is recorded again")
        self._combine_all()
        part.begin(self._open_parts[-1] if self._open_parts else None)
        self._open_parts = *self._open_parts, part
        return len(self._columns)

    def end_part(self, part: Part, begin: int) -> None:
        """Put what was spawned since then in the place of what the part was."""
        self._open_parts = self._open_parts[:-1]
        self._verify_may_record()
        self._combine_all()
        count = len(self._columns) - begin
        if part.numbers is None:
            part.numbers = range(begin, begin + count)
            self._parts.add(part)
            return
        start, stop = part.numbers.start, part.numbers.stop
        self._columns.replace(start, stop, begin)
        for other in self._parts:
            if other is not part:
                other.shift(part, begin, count)
        part.numbers = range(start, start + count)
        self._kernels = dict.fromkeys(self._columns.kernels())

    def drop_part(self, part: Part, begin: int) -> None:
        """Forget what was spawned since then."""
        self._open_parts = self._open_parts[:-1]
        self._groups.clear()
        self._columns.drop(begin)
        for other in self._parts:
            if part in other.outer and other.serial > part.begun:
                other.is_gone = True
        self._kernels = dict.fromkeys(self._columns.kernels())

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
        self, signature: CallSignature, places: Sequence[Place], section: Section, priority: int, where: Where
    ) -> tuple[list[Place], tuple[Call, ...]]:
        """Return the tiles of a call, with its turn's slot for each that it reduces, and the calls that fill new slots before it."""
        chosen = list(places)
        begins: list[Call] = []
        for at, _, combiner in signature.reductions:
            place = places[at]
            if self._meets_another(place, places):
                continue  # what else the call does there has its place in the program's order, and so has this
            group = self._groups.get(place.cells[0])
            if group is None:
                group = _Group(place, combiner, self._copies.setdefault(place, []), where)
                self._groups.update(dict.fromkeys(place.cells, group))
            slot = group.tasks % group.slots
            if slot:
                chosen[at] = self._copy(group, slot)
                if group.tasks < group.slots:
                    access = signature.accesses[at]
                    begins.append(Call(beginning(combiner, access.dtype, len(access.dims)), (chosen[at].tile,), Line(*where)))
            group.tasks += 1
            group.section, group.where = section, where
            if priority > group.priority:
                group.priority = priority
        return chosen, tuple(begins)

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
                self._record(signature, places, args, group.section, group.priority, group.where)
            distance *= 2
        for cell in place.cells:  # at last: until then other threads that look at the graph wait
            del self._groups[cell]

    def derived(self, name: str) -> Self:
        """Return an empty graph of the same kind, for other tasks that run the same calls."""
        return type(self)(name, self.allow_commutative)

    def append(self, task: Task, predecessors: Iterable[int]) -> None:
        """Add a task whose predecessors are known. Raises RuntimeError where `spawn` does for a graph that runs."""
        self._verify_may_grow()
        if len(self._columns):
            raise RuntimeError(f"graph '{self.name}' was recorded, and takes no tasks that are made already; append them to another one")
        if not self._is_derived:
            self._is_derived, self._edges = True, Edges()
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

    def _verify_may_record(self) -> None:
        self._verify_may_grow()
        if self._is_derived:
            raise RuntimeError(f"graph '{self.name}' was not recorded here, and cannot go on recording; record a new one")

    def edges_to(self, following: "TaskGraph") -> list[tuple[int, int]] | None:
        """Return (task here, task there) for the dependencies of a graph that runs right after this one, less those that others imply.

        None where a graph was derived or sent, and knows no accesses, or where the two cut the same memory by other grids: then everything
        there waits for everything here.
        """
        for graph in self, following:
            graph._combine_all()
        if self._is_derived or following._is_derived or any(self._calls.grids.other(tensor) for tensor in following._calls.grids):
            return None
        return edges_between(self._columns, following._columns)

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
        if self._is_derived:
            return any(task.locks for task in self.tasks)
        return any("commutative" in origin.signature.kinds for origin in self._columns.table)

    def listing(self) -> str:
        """Return the graph as text, a task a line, `<-` its predecessors: what the golden files hold."""
        lines = [f"{task}" + (f" <- {' '.join(map(str, task.predecessors))}" if task.predecessors else "") for task in self.tasks]
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        return f"{self.name}: {len(self.tasks)} tasks of {len(self.kernels)} kernels, {len(self.edges)} edges, {self.flops / 1e9:.3g} GFLOP"

    def __getstate__(self) -> dict:
        """Send what running needs: the tasks, and for each lock its number. Tasks that share a lock here will share one there."""
        tasks = [(task.calls, task.section, task.priority, [serial for serial, _ in task.locks]) for task in self.tasks]
        return {"name": self.name, "allow_commutative": self.allow_commutative, "tasks": tasks, "edges": self.edges}

    def __setstate__(self, state: dict) -> None:
        TaskGraph.__init__(self, state["name"], state["allow_commutative"])
        self._is_derived, self._edges = True, state["edges"]
        locks: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        for number, (calls, section, priority, serials) in enumerate(state["tasks"]):
            task = Task(number, calls, section)
            task.priority = priority
            task.locks = tuple((serial, locks[serial]) for serial in serials)
            self._add(task)
