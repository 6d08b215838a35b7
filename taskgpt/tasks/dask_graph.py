"""Graphs to Dask and from Dask. The only file that imports Dask's private names, so that one file breaks when they move.

    to_dask             a Graph as a Dask graph
    nodes, constants    any Dask graph as a flat dictionary; the values of those nodes that are data
    evaluate            what a node gives
    find_priorities     the `priority` annotations of any Dask graph

All but the first serve `taskgpt.get`.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from numbers import Real
from typing import Any

import dask
from dask._task_spec import DataNode, Dict, GraphNode, List, Set, TaskRef, Tuple, _execute_subgraph, convert_legacy_graph
from dask._task_spec import Task as DaskTask
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from taskgpt.tasks.coarsen import layer_names
from taskgpt.tasks.graph import Graph, Task


def to_dask(graph: Graph, step: int = 0, call: Callable[[Task], tuple] | None = None) -> tuple[HighLevelGraph, list[tuple]]:
    """Return the Dask graph of one step and the keys of the tasks that nothing waits for.

    Keys are `(kernel, step, number)`: the dashboard groups and colours by the first item, and the step keeps `distributed` from taking a
    task for one that it already ran. Dependencies are passed as arguments, in whose place Dask puts the predecessors' result, None.
    """
    call = call or _call_here
    keys = [(task.name, step, task.number) for task in graph.tasks]
    layers: dict[str, dict] = {}
    needs: dict[str, set[str]] = {}
    for task, key, layer in zip(graph.tasks, keys, (layer_of := layer_names(graph)), strict=True):
        function, *arguments = call(task)
        layers.setdefault(layer, {})[key] = DaskTask(key, function, *arguments, *(TaskRef(keys[p]) for p in task.predecessors))
        needs.setdefault(layer, set()).update({layer_of[p] for p in task.predecessors} - {layer})
    last = [key for task, key in zip(graph.tasks, keys, strict=True) if not task.successors]
    return HighLevelGraph({name: MaterializedLayer(layer) for name, layer in layers.items()}, needs), last


def _call_here(task: Task) -> tuple:
    return _run, task


def _run(task: Task, *_predecessors) -> None:
    task.run()


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
