"""Coarsening: the same calls in fewer, larger tasks, for schedulers that pay much per task.

The depth of a task is the length of the longest path to it. Depths are cut into bands; inside a band, tasks connected by dependencies form
a component, and components of one band are independent of each other (rows of a tiled network: one component each). A merged task is one
or more components of one band, its calls in program order.

      depth 0   a0   b0   c0        band 0:  {a0 a1}  {b0 b1}  {c0 c1}
      depth 1   a1   b1   c1                    |  \\     |       |
      depth 2   a2 <-+    c2        band 1:  {a2}  ...        {c2}

Every edge leads into the same merged task or into a later band, so no cycle can arise, whatever the graph.
"""

import heapq
import math
from collections.abc import Callable, Iterable, Sequence

from taskgpt.tasks.edges import Edges
from taskgpt.tasks.task import Section, Task
from taskgpt.tasks.task_graph import AnyGraph, TaskGraph


def coarsen(graph: AnyGraph, max_tasks: int, width: int = 8) -> AnyGraph:
    """Return a graph of at most `max_tasks` tasks that run the calls of `graph`, with the same bits.

    Up to `width` merged tasks of a band stay apart, to keep that many workers busy. Low bands leave many tasks, high ones few components:
    of the heights that respect the limit the one is taken whose costliest merged tasks, one a band, cost least together.
    A graph that is small enough already is returned as it is. Raises ValueError for a limit or a width below 1.
    """
    for name, value in {"max_tasks": max_tasks, "width": width}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if len(graph.tasks) <= max_tasks:
        return graph
    depths = graph.depths()
    height = -(-(max(depths) + 1) // max_tasks)
    best, least = [], math.inf
    while height <= max(depths) + 1:
        bands = _components(graph, [depth // height for depth in depths])
        room = next(r for r in range(width, 0, -1) if sum(min(r, len(band)) for band in bands) <= max_tasks)
        merged = [_balance(graph, band, room) for band in bands]
        seconds = sum(max(_seconds(graph, group) for group in groups) for groups in merged)
        if seconds < least * (1 - 1e-9):  # sums of the same numbers in another order are not a gain
            best, least = merged, seconds
        height += max(1, height // 8)
    return _merge(graph, [group for groups in best for group in groups])


def by_section(graph: AnyGraph) -> AnyGraph:
    """Return a graph of one task for each phase and layer, more where these would wait for each other in a cycle: to look at."""
    merged: dict[str, list[int]] = {}
    for number, layer in enumerate(layer_names(graph)):
        merged.setdefault(layer, []).append(number)
    return _merge(graph, list(merged.values()))


def part(graph: AnyGraph, is_in: Callable[[Task], bool]) -> AnyGraph:
    """Return the graph of some of the tasks, each after those that come before it in the whole graph, be it through others: to look at."""
    found = _merge(graph, [[task.number] for task in graph.tasks if is_in(task)])
    found.name = f"{graph.name}, a part"
    return found


def layer_names(graph: TaskGraph) -> list[str]:
    """Return the name of each task's layer: its section, and `.2` if something of a later layer comes before it.

    Layers do not wait for each other in a cycle, and come in an order in which none waits for a later one. Ranks count layers in the order
    in which they begin; a task joins the latest layer of its section unless one of its predecessors is in a layer of higher rank.
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
    """Return `forward_03` for ("forward", 3), `forward` for ("forward", -1): Dask's views cut a name at its first dash with a number."""
    phase, layer = section
    return f"{phase or 'tasks'}_{layer:02d}" if layer >= 0 else phase or "tasks"


def _components(graph: TaskGraph, band_of: Sequence[int]) -> list[list[list[int]]]:
    """Return, for each band, its connected components as lists of task numbers."""
    parent = list(range(len(graph.tasks)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for task in graph.tasks:
        for p in task.predecessors:
            if band_of[p] == band_of[task.number]:
                parent[root(task.number)] = root(p)
    bands: list[dict[int, list[int]]] = [{} for _ in range(max(band_of) + 1)]
    for number, band in enumerate(band_of):
        bands[band].setdefault(root(number), []).append(number)
    return [list(components.values()) for components in bands]


def _balance(graph: TaskGraph, components: list[list[int]], room: int) -> list[list[int]]:
    """Put components into at most `room` groups of about equal cost: the costliest first, each into the lightest group so far."""
    groups: list[tuple[float, int, list[int]]] = [(0.0, at, []) for at in range(min(room, len(components)))]
    for cost, component in sorted(((_seconds(graph, c), c) for c in components), key=lambda pair: (-pair[0], pair[1])):
        total, at, members = heapq.heappop(groups)
        heapq.heappush(groups, (total + cost, at, members + component))
    return [sorted(members) for _, _, members in groups]


def _seconds(graph: TaskGraph, numbers: Iterable[int]) -> float:
    return sum(graph.tasks[n].estimated_seconds for n in numbers)


def _merge(graph: AnyGraph, groups: list[list[int]]) -> AnyGraph:
    """Return the graph of the groups, each a list of task numbers, in an order that no path contradicts.

    A path through tasks that are in no group leads from group to group all the same.
    """
    group_of = {number: at for at, group in enumerate(groups) for number in group}
    around: dict[int, set[int]] = {}  # the groups that a task in no group waits for

    def before(task: Task) -> set[int]:
        return set().union(*({group_of[p]} if p in group_of else around[p] for p in task.predecessors))

    for task in graph.tasks:
        if task.number not in group_of:
            around[task.number] = before(task)
    merged = graph.derived(f"{graph.name}, coarsened")
    edges = Edges()
    for at, group in enumerate(groups):
        edges.add(set().union(*(before(graph.tasks[n]) for n in group)) - {at})
    for at, group in enumerate(groups):
        parts = [graph.tasks[n] for n in group]
        costliest = max(parts, key=lambda part: _seconds(graph, [part.number]))
        task = Task(at, tuple(call for part in parts for call in part.calls), costliest.section)
        task.locks = tuple(sorted({lock for part in parts for lock in part.locks}))
        task.priority = max(part.priority for part in parts)
        merged.append(task, edges.before(at))
    return merged
