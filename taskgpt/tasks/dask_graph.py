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
    for task, key in zip(graph.tasks, keys, strict=True):
        layer = layer_name(task.section)
        function, *arguments = call(task)
        layers.setdefault(layer, {})[key] = DaskTask(key, function, *arguments, *(TaskRef(keys[p]) for p in task.predecessors))
        sources = {layer_name(graph.tasks[p].section) for p in task.predecessors}
        needs.setdefault(layer, set()).update(sources - {layer})
    last = [key for task, key in zip(graph.tasks, keys, strict=True) if not task.successors]
    return HighLevelGraph({name: MaterializedLayer(layer) for name, layer in layers.items()}, needs), last


def layer_name(section: Section) -> str:
    """Return `forward-03` for ("forward", 3), `forward` for ("forward", -1)."""
    phase, layer = section
    return f"{phase or 'tasks'}-{layer:02d}" if layer >= 0 else phase or "tasks"


def _call_here(task: Task) -> tuple:
    return _run, task


def _run(task: Task, *_predecessors) -> None:
    task.run()
