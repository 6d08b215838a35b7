"""A graph as a Dask graph. The only file that imports Dask's private names, so that one file breaks when they move."""

from collections.abc import Callable

from dask._task_spec import Task as DaskTask
from dask._task_spec import TaskRef
from dask.highlevelgraph import HighLevelGraph, MaterializedLayer

from taskgpt.tasks.graph import Graph, Section, Task


def to_dask(graph: Graph, step: int = 0, call: Callable[[Task], tuple] | None = None) -> tuple[HighLevelGraph, list[tuple]]:
    """Return the Dask graph of one step and the keys of the tasks that nothing waits for.

    Keys are `(kernel, step, number)`: the dashboard groups and colours by the first item, and the step keeps `distributed` from taking a
    task for one that it already ran. Dependencies are passed as arguments, in whose place Dask puts the predecessors' result, None.
    """
    call = call or _call_here
    keys = [(task.name, step, task.number) for task in graph.tasks]
    layers: dict[str, dict] = {}
    needs: dict[str, set[str]] = {}
    for task, key, layer in zip(graph.tasks, keys, (layer_of := _layers(graph)), strict=True):
        function, *arguments = call(task)
        layers.setdefault(layer, {})[key] = DaskTask(key, function, *arguments, *(TaskRef(keys[p]) for p in task.predecessors))
        needs.setdefault(layer, set()).update({layer_of[p] for p in task.predecessors} - {layer})
    last = [key for task, key in zip(graph.tasks, keys, strict=True) if not task.successors]
    return HighLevelGraph({name: MaterializedLayer(layer) for name, layer in layers.items()}, needs), last


def _layers(graph: Graph) -> list[str]:
    """Return the name of each task's layer: its section, and `.2` if something of a later layer comes before it.

    Layers must not wait for each other in a cycle, or Dask's `cull` drops every task. Ranks count layers in the order in which they begin;
    a task joins the latest layer of its section unless one of its predecessors is in a layer of higher rank.
    """
    layer_of: list[str] = []
    rank: dict[str, int] = {}
    times: dict[Section, int] = {}
    for task in graph.tasks:
        name, count = layer_name(task.section), times.get(task.section, 0)
        latest = name if count <= 1 else f"{name}.{count}"
        if not count or any(rank[layer_of[p]] > rank[latest] for p in task.predecessors):
            times[task.section] = count + 1
            latest = name if not count else f"{name}.{count + 1}"
            rank[latest] = len(rank)
        layer_of.append(latest)
    return layer_of


def layer_name(section: Section) -> str:
    """Return `forward-03` for ("forward", 3), `forward` for ("forward", -1)."""
    phase, layer = section
    return f"{phase or 'tasks'}-{layer:02d}" if layer >= 0 else phase or "tasks"


def _call_here(task: Task) -> tuple:
    return _run, task


def _run(task: Task, *_predecessors) -> None:
    task.run()
