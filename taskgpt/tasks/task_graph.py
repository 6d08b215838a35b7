"""The graph of tasks: recorded call by call, with the dependencies that follow from what the kernels declare.

Spawned into a graph, a call is recorded; the same program given `run_now` as its spawn runs at once, without any graph. Program order is
one valid order, and every other order that the dependencies allow gives the same bits. Edges that others imply are left out.

Neighbouring reductions into one tile become tasks on copies of it, and tasks that combine these: see reductions.py. Neither touches
anything that schedulers, pictures and traces do not know already.

Tasks do not spawn tasks yet: nothing is recorded into a graph while it runs, nor from inside a task into a graph from outside of it, which
in a worker process would be a copy.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Self, TypeVar

import numpy as np

from taskgpt.tasks.combiners import Combiner, Operator
from taskgpt.tasks.dependencies import CellHistory, TileHistory, longest_path
from taskgpt.tasks.edges import Edges
from taskgpt.tasks.grids import Grids
from taskgpt.tasks.kernel import AccessError, Kernel, as_kernel
from taskgpt.tasks.reductions import beginning, combining, copies_of, slots_of
from taskgpt.tasks.task import Call, Section, Signature, Task, this_thread, verify_writeable
from taskgpt.tasks.tensor import Tensor, Tile

AnyGraph = TypeVar("AnyGraph", bound="TaskGraph")  # of the kind that was given
_combining = threading.Lock()  # threads of a scheduler may look at one graph together


class _Place(TileHistory):
    """What a graph knows of a tile: one object for all tiles of the same index, its history, and the number of its form."""

    __slots__ = ("form", "tile")

    def __init__(self, tile: Tile, cells: Sequence[CellHistory], form: int):
        super().__init__(cells)
        self.tile, self.form = tile, form


class _Signature(Signature):
    """How calls of a kernel on tiles of the same forms access them, too.

    Of each tile: `names`, of its parameter; `accesses`, as declared; `kinds`, as done. `written`: (number among the tiles, name).
    `reductions`: (number among the tiles, and among the arguments, combiner).
    """

    __slots__ = ("accesses", "kinds", "names", "reductions", "written")

    def __init__(self, call: Call, allow_commutative: bool):
        kernel = call.kernel
        super().__init__(kernel)
        self.names = tuple(name for name, _ in call.tiles())
        self.accesses = tuple(kernel.accesses[name] for name in self.names)
        kinds = [access.kind for access in self.accesses]
        self.kinds = tuple("inout" if kind == "commutative" and not allow_commutative else kind for kind in kinds)
        self.written = tuple((at, name) for at, name in enumerate(self.names) if self.accesses[at].is_written)
        position = {name: at for at, name in enumerate(kernel.parameters)}
        found = zip(self.names, self.accesses, strict=True)
        self.reductions = tuple((at, position[name], each.combiner) for at, (name, each) in enumerate(found) if each.combiner)
        for access in self.accesses:
            if access.combiner:
                combining(access.combiner, access.dtype, len(access.dims))  # raises for a kernel that cannot


class _Group:
    """Neighbouring tasks that reduce into one tile, and are not combined yet."""

    __slots__ = ("combiner", "copies", "place", "priority", "section", "slots", "tasks")

    def __init__(self, place: _Place, combiner: Operator | Combiner, copies: list[_Place]):
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
        self._grids = Grids()
        self._places: dict[Tensor, dict[tuple, _Place]] = {}  # by the spans of the tile
        self._forms: dict[tuple, int] = {}  # of tiles: shape and type, numbered
        self._signatures: dict[tuple, _Signature] = {}  # by the kernel and, for each argument, its form or, of a constant, its type
        self._groups: dict[CellHistory, _Group] = {}  # those of reductions that are open
        self._copies: dict[_Place, list[_Place]] = {}  # of tiles that are reduced, for the slots after the first

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
        signature, places, args = self._look_up(kernel, args) or self._learn(Call(kernel, args))
        self._verify_written(kernel, places, signature)
        if self._groups:
            self._combine_before(signature, places)
        if not signature.reductions:
            return self._record(signature, places, (Call.verified(signature, args),), section, priority)
        places, calls = self._spread(signature, places, args, section, priority)
        return self._record(signature, places, calls, section, priority)

    def _record(self, signature: _Signature, places: Sequence[_Place], calls: tuple[Call, ...], section: Section, priority: int) -> Task:
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

    def _combine_before(self, signature: _Signature, places: Sequence[_Place]) -> None:
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
        self, signature: _Signature, places: Sequence[_Place], args: tuple, section: Section, priority: int
    ) -> tuple[list[_Place], tuple[Call, ...]]:
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

    def _meets_another(self, place: _Place, places: Sequence[_Place]) -> bool:
        """Return True if another of the tiles touches a cell of this one."""
        tensor, finest = place.tile.tensor, self._grids.finest
        for other in places:
            may_meet = other is not place and (other.tile.tensor is tensor or tensor in finest)
            if may_meet and not set(other.cells).isdisjoint(place.cells):
                return True
        return False

    def _copy(self, group: _Group, slot: int) -> _Place:
        """Return a slot's copy of the tile: that of an earlier group, if there was one; memory grows to at most twice what is needed."""
        copies = group.copies
        if slot > len(copies):
            more = min(len(copies) + 1, group.slots - 1 - len(copies))
            for tile in copies_of(group.place.tile, len(copies) + 1, more):
                self._grids.add(tile.tensor, is_private=True)
                self._places[tile.tensor] = {}
                copies.append(self._place(tile))
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
                signature, places, args = self._look_up(kernel, tiles) or self._learn(Call(kernel, tiles))
                self._record(signature, places, (Call.verified(signature, args),), group.section, group.priority)
            distance *= 2
        for cell in place.cells:  # at last: until then other threads that look at the graph wait
            del self._groups[cell]

    def _look_up(self, kernel: Kernel, args: tuple) -> tuple[_Signature, list[_Place], tuple] | None:
        """Return what is known of a call and of its tiles, and its arguments with these tiles in them; None for a new kind of call."""
        places: list[_Place] = []
        known: list = []
        key: list = [kernel]
        for argument in args:
            if type(argument) is Tile:
                places_of = self._places.get(argument.tensor)
                if places_of is None:
                    return None
                place = places_of.get(argument.spans) or self._place(argument)
                places.append(place)
                known.append(place.tile)
                key.append(place.form)
            elif type(argument) in (tuple, list):
                found = self._look_up_list(argument)
                if found is None:
                    return None
                places += found
                known.append(tuple([place.tile for place in found]))
                key.append(tuple([place.form for place in found]))
            else:
                if isinstance(argument, np.generic):
                    argument = argument.item()
                elif type(argument) is int and argument.bit_length() > 63:
                    return None  # not every integer fits
                known.append(argument)
                key.append(type(argument))
        signature = self._signatures.get(tuple(key))
        return None if signature is None else (signature, places, tuple(known))

    def _look_up_list(self, tiles: Sequence[Tile]) -> list[_Place] | None:
        if not all(type(tile) is Tile and tile.tensor in self._places for tile in tiles):
            return None
        return [self._place(tile) for tile in tiles]

    def _learn(self, call: Call) -> tuple[_Signature, list[_Place], tuple]:
        """Verify a call of a new kind, and know it from now on. Return what `_look_up` does."""
        kernel = call.kernel
        call.verify()
        if kernel not in self._kernels:
            kernel.verify_sources()
        for _, tile in call.tiles():
            self._know(tile.tensor)
        places: list[_Place] = []
        known: list = []
        key: list = [kernel]
        for argument in call.args:
            if isinstance(argument, (Tile, tuple)):
                found = [self._place(tile) for tile in (argument if isinstance(argument, tuple) else (argument,))]
                places += found
                tiles, forms = tuple(place.tile for place in found), tuple(place.form for place in found)
                known.append(tiles if isinstance(argument, tuple) else tiles[0])
                key.append(forms if isinstance(argument, tuple) else forms[0])
            else:
                known.append(argument)
                key.append(type(argument))
        if tuple(key) not in self._signatures:
            self._signatures[tuple(key)] = _Signature(call, self.allow_commutative)
        return self._signatures[tuple(key)], places, tuple(known)

    def _place(self, tile: Tile) -> _Place:
        places = self._places[tile.tensor]
        place = places.get(tile.spans)
        if place is None:
            form = self._forms.setdefault((tile.shape, tile.tensor.array.dtype), len(self._forms))
            place = places[tile.spans] = _Place(tile, self._grids.cells_of(tile), form)
        return place

    def _verify_written(self, kernel: Kernel, places: Sequence[_Place], signature: _Signature) -> None:
        """Raise AccessError if a written tile overlaps another or is read-only."""
        finest = self._grids.finest
        for at, name in signature.written:
            tile = places[at].tile
            tensor = tile.tensor
            if not tensor.array.flags.writeable:
                verify_writeable(kernel, name, tile)
            has_likes = tensor in finest
            for other_at, other in enumerate(places):
                if (other.tile.tensor is tensor or has_likes) and other_at != at and tile.overlaps(other.tile):
                    first, second = (signature.names[n] for n in sorted((at, other_at)))
                    where = f"{kernel.name}: '{first}' and '{second}' overlap in {tensor.name}"
                    raise AccessError(f"{where}; declare one InOut instead")

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
            raise RuntimeError(f"tasks cannot spawn tasks yet: graph '{self.name}' was not made inside this one; record it before it runs")
        if self.runs:
            raise RuntimeError(f"graph '{self.name}' is being run, and the task would not be; spawn it before the run or after its end")

    def _know(self, tensor: Tensor) -> None:
        """Take a tensor's grid in. Memory that another tensor cuts, too, goes by the finer of the two grids; if none is, it is refused."""
        if tensor in self._grids:
            return
        other = self._grids.other(tensor)
        if other is None:
            self._grids.add(tensor)
        else:
            self._grids.verify_joins(tensor, other)
            self._combine_all()  # groups go by cells, which may be others now
            for each in self._grids.join(tensor, other):
                for place in self._places[each].values():
                    place.cells = self._grids.cells_of(place.tile)
        self._places[tensor] = {}

    def edges_to(self, following: "TaskGraph") -> list[tuple[int, int]] | None:
        """Return (task here, task there) for the dependencies of a graph that runs right after this one, less those that others imply.

        None where a graph was derived or sent, and knows no accesses, or where the two cut the same memory by other grids: then everything
        there waits for everything here.
        """
        are_recorded = self._recorded == len(self.tasks) and following._recorded == len(following.tasks)
        if not are_recorded or any(self._grids.other(tensor) for tensor in following._grids):
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
                        touched[tile] = self._grids.touched(tile)
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
