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
from collections.abc import Sequence

from taskgpt.tasks.graph import Graph, Task

# What a call costs, for balancing only: a core's order of magnitude, in operations and bytes per second.
_FLOPS_PER_S, _BYTES_PER_S = 1e11, 1e10


def coarsen(graph: Graph, max_tasks: int, width: int = 8) -> Graph:
    """Return a graph of at most `max_tasks` tasks that run the calls of `graph`, with the same bits.

    Bands grow only as far as the limit asks for, and up to `width` merged tasks of a band stay apart, to keep that many workers busy.
    A graph that is small enough already is returned as it is. Raises ValueError for a limit below 1.
    """
    if max_tasks < 1:
        raise ValueError(f"max_tasks must be at least 1, got {max_tasks}")
    if len(graph.tasks) <= max_tasks:
        return graph
    depths: list[int] = []
    for task in graph.tasks:
        depths.append(1 + max((depths[p] for p in task.predecessors), default=-1))
    height = 1
    while True:
        band_of = [depth // height for depth in depths]
        bands = _components(graph, band_of)
        if len(bands) <= max_tasks:
            break
        height += 1
    # Share what the limit allows between the bands: each gets `width`, fewer only if there are too many bands.
    room = min(width, max_tasks // len(bands))
    merged = [group for band in bands for group in _balance(graph, band, room)]
    return _merge(graph, merged)


def _components(graph: Graph, band_of: Sequence[int]) -> list[list[list[int]]]:
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


def _balance(graph: Graph, components: list[list[int]], room: int) -> list[list[int]]:
    """Put components into at most `room` groups of about equal cost: the costliest first, each into the lightest group so far."""
    cost = {id(c): sum(graph.tasks[n].flops / _FLOPS_PER_S + graph.tasks[n].bytes / _BYTES_PER_S for n in c) for c in components}
    groups = [(0.0, at, []) for at in range(min(room, len(components)))]
    for component in sorted(components, key=lambda c: (-cost[id(c)], c[0])):
        total, at, members = heapq.heappop(groups)
        heapq.heappush(groups, (total + cost[id(component)], at, members + component))
    return [sorted(members) for _, _, members in groups]


def _merge(graph: Graph, groups: list[list[int]]) -> Graph:
    """Return the graph of the groups, each a list of task numbers, in the order of their bands."""
    group_of = {number: at for at, group in enumerate(groups) for number in group}
    merged = Graph(f"{graph.name}, coarsened", graph.allow_commutative)
    for at, group in enumerate(groups):
        parts = [graph.tasks[n] for n in group]
        predecessors = tuple(sorted({group_of[p] for part in parts for p in part.predecessors} - {at}))
        costliest = max(parts, key=lambda part: part.flops / _FLOPS_PER_S + part.bytes / _BYTES_PER_S)
        task = Task(at, tuple(call for part in parts for call in part.calls), costliest.section, predecessors, costliest.name)
        task.flops, task.bytes = sum(part.flops for part in parts), sum(part.bytes for part in parts)
        task.locks = tuple(sorted({lock for part in parts for lock in part.locks}))
        merged.append(task)
    return merged
