"""Graphs to Dask and from Dask. The only file that imports Dask's private names, so that one file breaks when they move.

    to_dask             a graph as a Dask graph
    Run                 a Dask collection of that: one run of a Graph
    nodes, constants    any Dask graph as a flat dictionary; the values of those nodes that are data
    evaluate            what a node gives
    find_priorities     the `priority` annotations of any Dask graph

All but the first two serve `taskgpt.get`.
"""

import os
import uuid
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from numbers import Real
from typing import Any

import dask
import dask.threaded
from dask.base import DaskMethodsMixin, replace_name_in_key
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from taskgpt.tasks.coarsen import layer_names
from taskgpt.tasks.task import Task
from taskgpt.tasks.task_graph import TaskGraph

try:
    from dask._task_spec import DataNode, Dict, GraphNode, List, Set, TaskRef, Tuple, _execute_subgraph, convert_legacy_graph
    from dask._task_spec import Task as DaskTask
except ImportError as error:
    raise ImportError(f"{error}: dask {dask.__version__} keeps it elsewhere than 2026.3 to 2026.8 do; install one of those") from None

Key = tuple[str, int]


def to_dask(graph: TaskGraph, call: Callable[[Task], tuple] | None = None, token: str | None = None) -> tuple[HighLevelGraph, list[Key]]:
    """Return the Dask graph of one run, and the keys of the tasks that nothing waits for. See Graph.to_dask.

    Dependencies are passed as arguments, in whose place Dask puts the predecessors' result, None. Names of layers carry the token, too: of
    two layers of one name that are computed together, Dask would keep one.
    """
    graph.verify_untouched()
    token = token or uuid.uuid4().hex
    call = call or _known_here(graph).call
    names = {name: f"{name}-{token}" for name in {task.name for task in graph.tasks}}
    keys = [(names[task.name], task.number) for task in graph.tasks]
    layers: dict[str, dict] = {}
    needs: dict[str, set[str]] = {}
    layer_of = [f"{layer}-{token}" for layer in layer_names(graph)]
    for task, key, layer in zip(graph.tasks, keys, layer_of, strict=True):
        function, *arguments = call(task)
        layers.setdefault(layer, {})[key] = DaskTask(key, function, *arguments, *(TaskRef(keys[p]) for p in task.predecessors))
        needs.setdefault(layer, set()).update({layer_of[p] for p in task.predecessors} - {layer})
    last = [key for task, key in zip(graph.tasks, keys, strict=True) if not task.successors]
    return HighLevelGraph({name: MaterializedLayer(layer) for name, layer in layers.items()}, needs), last


class Run(DaskMethodsMixin):
    """One run of a graph as a Dask collection: a Dask graph, and the keys of its last tasks. Computed, it gives None."""

    __dask_scheduler__ = staticmethod(dask.threaded.get)  # as arrays and delayed calls, to be computed with them

    def __init__(self, layers: Mapping, keys: Sequence[Key], rename: Mapping[str, str] | None = None):
        self._layers = layers
        self._keys = [replace_name_in_key(key, rename or {}) for key in keys]

    def __dask_graph__(self) -> Mapping:
        return self._layers

    def __dask_keys__(self) -> list[Key]:
        return self._keys

    def __dask_layers__(self) -> tuple[str, ...]:
        if not isinstance(self._layers, HighLevelGraph):
            return ()
        last = set(self._keys)
        return tuple(name for name, layer in self._layers.layers.items() if not last.isdisjoint(layer))

    @staticmethod
    def __dask_optimize__(layers: Mapping, keys: Sequence[Key], **_: object) -> Mapping:
        """Leave everything as it is: tasks work in place, and Dask may neither drop nor repeat nor join them."""
        return layers

    def __dask_postcompute__(self) -> tuple[Callable, tuple]:
        return _nothing, ()

    def __dask_postpersist__(self) -> tuple[Callable, tuple]:
        return Run, (self._keys,)

    def __dask_tokenize__(self) -> tuple:
        return "taskgpt", tuple(self._keys)


def _nothing(_results: Sequence) -> None:
    """What the tasks made is in their tensors."""


# How a task reaches the process that runs it --------------------------------------------------------------------------------------------


def _run(task: "Task | _Sendable | _Named", *_predecessors: None) -> None:
    task.run()


class _Known:
    """The tasks of a graph, and the name under which this process knows them."""

    def __init__(self, graph: TaskGraph):
        self.tasks = graph.tasks  # not the graph, which then would wait for the garbage collector
        self.name = uuid.uuid4().hex
        self._obstacle: tuple[object, str] = None, ""

    def call(self, task: Task) -> tuple:
        return _run, _Sendable(self, task)

    @property
    def obstacle(self) -> str:
        """Why other processes cannot run these tasks, and what to do, or an empty string."""
        if self._obstacle[0] != self.tasks.version:
            self._obstacle = self.tasks.version, _find_obstacle(self.tasks)
        return self._obstacle[1]


_known: "weakref.WeakKeyDictionary[TaskGraph, _Known]" = weakref.WeakKeyDictionary()
_by_name: "weakref.WeakValueDictionary[str, _Known]" = weakref.WeakValueDictionary()


def _known_here(graph: TaskGraph) -> _Known:
    known = _known.get(graph)
    if known is None:
        known = _known[graph] = _Known(graph)
        _by_name[known.name] = known
    return known


def _find_obstacle(tasks: Sequence[Task]) -> str:
    calls = [call for task in tasks for call in task.calls]
    for tensor in {id(tile.tensor): tile.tensor for call in calls for _, tile in call.tiles()}.values():
        if not tensor.is_shared:
            return tensor.not_shared
    if any(task.locks for task in tasks):
        return "commutative tasks lock their tiles, and a lock does not reach another process; allow_commutative=False, or use threads"
    for kernel in dict.fromkeys(call.kernel for call in calls):
        if not kernel.is_importable:
            return f"another process cannot import {kernel.module}.{kernel.name}; move it to a module, at its top level, or use threads"
    return ""


class _Sendable:
    """A task that is pickled whole where other processes can run it, else by its name, which means something in this process alone.

    A Client pickles tasks even for workers of its own process.
    """

    __slots__ = ("_known", "_task")

    def __init__(self, known: _Known, task: Task):
        self._known, self._task = known, task

    def run(self) -> None:
        self._task.run()

    def __reduce__(self) -> tuple:
        if obstacle := self._known.obstacle:
            return _Named, (os.getpid(), self._known.name, self._task.number, obstacle)
        return _itself, (self._task,)


def _itself(task: Task) -> Task:
    return task


class _Named:
    """A task by its name. Raises TypeError when it is run in another process; until then it may pass through any."""

    __slots__ = ("_known", "_what")

    def __init__(self, *what: Any):
        self._what = what
        pid, name, *_ = what
        self._known = _by_name.get(name) if pid == os.getpid() else None  # a forked process knows the name, and has copies of the tensors

    def run(self) -> None:
        pid, _, number, obstacle = self._what
        if self._known is None:
            raise TypeError("the graph was dropped before it ran; keep a reference to it" if pid == os.getpid() else obstacle)
        self._known.tasks[number].run()

    def __reduce__(self) -> tuple:
        return _Named, self._what


# From Dask ------------------------------------------------------------------------------------------------------------------------------

_PLAIN = frozenset({DaskTask, List, Tuple, Set, Dict})  # calls of `func`; what derives from these may do something else


def nodes(graph: Any) -> dict[Hashable, GraphNode]:
    """Return the nodes by key of any Dask graph: a dictionary with tuples for tasks, a HighLevelGraph, an expression."""
    if not isinstance(graph, Mapping):
        graph = graph.__dask_graph__()
    return convert_legacy_graph(graph.to_dict() if isinstance(graph, HighLevelGraph) else graph)


def constants(found: Mapping[Hashable, GraphNode]) -> dict[Hashable, Any]:
    """Return the values of the nodes that are data, not tasks."""
    return {key: node.value for key, node in found.items() if isinstance(node, DataNode)}


def evaluate(node: GraphNode, results: Mapping) -> Any:
    """Return what a node gives, from the results of at least the keys that it depends on.

    The same as the call that Dask makes, without its copies and checks; and Dask would order the parts of a fused task every time.
    """
    if type(node) not in _PLAIN:
        return node({key: results[key] for key in node.dependencies})
    if node.func is _execute_subgraph and not node.kwargs:
        return _evaluate_fused(*[_argument(a, results) for a in node.args])
    arguments = [results[a.key] if type(a) is TaskRef else _argument(a, results) for a in node.args]
    if node.kwargs:
        return node.func(*arguments, **{name: _argument(a, results) for name, a in node.kwargs.items()})
    return node.func(*arguments)


def _argument(argument: Any, results: Mapping) -> Any:
    if isinstance(argument, TaskRef):
        return results[argument.key]
    return evaluate(argument, results) if isinstance(argument, GraphNode) else argument


def _evaluate_fused(parts: Mapping[Hashable, GraphNode], wanted: Hashable, keys: tuple, *values: Any) -> Any:
    """Run the parts of a fused task, each after those it depends on; forget a part's result after its last use."""
    results = dict(zip(keys, values, strict=True))
    order: dict[Hashable, None] = {}
    uses: dict[Hashable, int] = {}
    stack = [wanted]
    while stack:
        missing = [key for key in parts[stack[-1]].dependencies if key in parts and key not in order]
        if missing:
            stack += missing
        elif (key := stack.pop()) not in order:
            order[key] = None
            for dependency in parts[key].dependencies:
                uses[dependency] = uses.get(dependency, 0) + 1
    for key in order:
        results[key] = evaluate(parts[key], results)
        for dependency in parts[key].dependencies:
            uses[dependency] -= 1
            if not uses[dependency]:
                del results[dependency]
    return results[wanted]


def find_priorities(graph: Any, found: Mapping[Hashable, GraphNode]) -> dict[Hashable, Real]:
    """Return the priority of every key that `dask.annotate(priority=...)` gave one; `found` is nodes(graph).

    A layer's annotation goes before that of the block in which the graph is run. Dask's optimisation drops annotations where it fuses tasks
    (arrays, bags): they are taken from the layers as they were before, and a fused task has the highest priority of its parts.
    """
    priorities: dict[Hashable, Real] = {}
    for keys, value in _annotations(graph, found):
        each = ((key, value(key)) for key in keys) if callable(value) else ((key, value) for key in keys)
        priorities.update((key, priority) for key, priority in each if isinstance(priority, Real))
    if priorities:
        for key, node in found.items():
            if isinstance(node, DaskTask) and node.func is _execute_subgraph:
                parts = [priorities[part] for part in (key, *node.args[0]) if part in priorities]
                priorities.update({key: max(parts)} if parts else {})
    return priorities


def _annotations(graph: Any, found: Mapping[Hashable, GraphNode]) -> Iterator[tuple[Any, Any]]:
    """Yield (keys, priority or function of a key), the stronger the later."""
    if "priority" in (around := dask.get_annotations()):
        yield found, around["priority"]
    if hasattr(graph, "__dask_annotations__"):
        for key, priority in graph.__dask_annotations__().get("priority", {}).items():
            yield (key,), priority
    for part in (graph, *getattr(graph, "operands", ())):
        if isinstance(layers := getattr(part, "hlg", part), HighLevelGraph):
            for layer in layers.layers.values():
                if layer.annotations and "priority" in layer.annotations:
                    yield layer, layer.annotations["priority"]
