"""A graph as a picture: self-contained SVG, tasks from left to right by depth, colours by what they compute.

A task stands one column to the right of the last task that it waits for, so that a column is what could run at once, and the number of
columns is the length of the longest chain.
"""

from dataclasses import dataclass
from html import escape

from taskgpt import palette
from taskgpt.tasks.task import Task
from taskgpt.tasks.task_graph import TaskGraph

_COLUMN, _ROW, _WIDTH, _HEIGHT = 22, 15, 15, 10  # distance of columns and rows, size of a task, in pixels
_MARGIN = 16
_FEW, _TALLEST = 60, 1000  # so many tasks have their names written on them, upright, unless that makes a column higher than that


def label(task: Task) -> str:
    """Return the call; of a task of many calls, its kernel, its section and their number: their text would fill pages."""
    if len(task.calls) <= 8:
        return str(task)
    phase, layer = task.section
    return f"{task.number} {phase}{f' {layer}' if layer >= 0 else ''}: {len(task.calls)} calls, {task.name} and others"


def _name(task: Task) -> str:
    """Return what is written on a task: its kernel and layer; of a merged task, its phase and layer."""
    phase, layer = task.section
    return f"{(phase or 'tasks') if task.is_merged else task.name}{f' {layer}' if layer >= 0 else ''}"


def _groups(graph: TaskGraph, colour_by: str) -> tuple[list[str], dict[str, str]]:
    """Return what gives each task its colour, and the colours, as a legend has them.

    `colour_by`: kernel, layer, phase, or path: whether a task is on the longest path by estimated times, Task.estimated_seconds.
    """
    if colour_by == "path":
        path = set(graph.longest_path())
        found = ["on the longest path" if task.number in path else "not on it" for task in graph.tasks]
        return found, {"on the longest path": palette.VERMILION, "not on it": palette.REST}
    value = {"kernel": lambda task: task.name, "layer": lambda task: max(-1, task.section[1]), "phase": lambda task: task.section[0]}
    values = list(map(value[colour_by], graph.tasks))
    key = palette.key(colour_by, values)
    return [key[each][0] for each in values], dict(key.values())


@dataclass(frozen=True)
class Drawing:
    """Boxes and edges as SVG elements, `width` by `height` pixels.

    groups, names: of each task, what gives it its colour, and what is written on it if there is room. colours: of groups, a legend's order.
    """

    elements: list[str]
    columns: int
    width: int
    height: int
    groups: list[str]
    colours: dict[str, str]
    names: list[str]
    has_names: bool


def draw(graph: TaskGraph, colour_by: str = "kernel") -> Drawing:
    """Draw the graph without title and legend. `colour_by`: kernel, layer, phase or path."""
    columns = _arrange(graph)
    place = {number: (x, y) for x, column in enumerate(columns) for y, number in enumerate(column)}
    tallest = max(map(len, columns), default=1)
    names = [_name(task) for task in graph.tasks]
    tall = 10 + 6 * max(map(len, names), default=0)
    has_names = len(names) <= _FEW and tallest * tall <= _TALLEST
    tall = tall if has_names else _HEIGHT
    row = tall + _ROW - _HEIGHT
    group, colours = _groups(graph, colour_by)

    def position(number: int) -> tuple[float, float]:
        x, y = place[number]
        return _MARGIN + _COLUMN * x, _MARGIN + row * (y + (tallest - len(columns[x])) / 2)

    edges, nodes = [], []
    for task in graph.tasks:
        x, y = position(task.number)
        for p in task.predecessors:
            px, py = position(p)
            start, middle, end = px + _WIDTH, (px + _WIDTH + x) / 2, x
            one, other = py + tall / 2, y + tall / 2
            edges.append(f"M{start:g},{one:g}C{middle:g},{one:g} {middle:g},{other:g} {end:g},{other:g}")
        fill = colours[group[task.number]]
        nodes.append(
            f'<rect class="task" x="{x:g}" y="{y:g}" width="{_WIDTH}" height="{tall}" rx="2.5" fill="{fill}">'
            f"<title>{escape(label(task))}</title></rect>"
        )
        if has_names:
            nodes.append(
                f'<text transform="translate({x + 11:g},{y + tall - 4:g}) rotate(-90)" font-size="10" fill="{palette.ink_on(fill)}" '
                f'pointer-events="none">{escape(names[task.number])}</text>'
            )
    lines = f'<path class="edges" d="{"".join(edges)}" fill="none" stroke="#555555" stroke-opacity="0.28" stroke-width="0.8"/>'
    width, height = 2 * _MARGIN + _COLUMN * len(columns), 2 * _MARGIN + row * tallest
    return Drawing([lines, *nodes], len(columns), width, height, group, colours, names, has_names)


def summary(graph: TaskGraph, title: str, columns: int) -> str:
    """Return the title with the graph's size."""
    return f"{title or graph.name}: {len(graph.tasks)} tasks, longest chain {columns}"


def to_svg(graph: TaskGraph, title: str = "", colour_by: str = "kernel") -> str:
    """Return the graph as SVG text. Pointing at a task shows its call. `colour_by`: kernel, layer, phase or path."""
    drawing = draw(graph, colour_by)
    width = max(drawing.width, 2 * _MARGIN + 40 * _COLUMN)
    keys, header = legend(drawing.colours, _MARGIN, 33, width - _MARGIN)
    height = header + drawing.height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        f'<text x="{_MARGIN}" y="22" font-size="14" font-weight="bold" fill="#222222">'
        f"{escape(summary(graph, title, drawing.columns))}</text>",
        *keys,
        f'<g transform="translate(0,{header})">',
        *drawing.elements,
        "</g>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _arrange(graph: TaskGraph) -> list[list[int]]:
    """Return the columns of task numbers, each ordered so that edges run level where they can (barycentre of the predecessors)."""
    depth_of = graph.depths()
    columns: list[list[int]] = [[] for _ in range(max(depth_of, default=-1) + 1)]
    for number, depth in enumerate(depth_of):
        columns[depth].append(number)
    height: dict[int, float] = {}
    for column in columns:

        def level(number: int) -> float:
            above = [height[p] for p in graph.tasks[number].predecessors]
            return sum(above) / len(above) if above else 0.0

        column.sort(key=lambda number: (level(number), number))
        for at, number in enumerate(column):
            height[number] = at - (len(column) - 1) / 2
    return columns


def legend(colour: dict[str, str], left: int, top: int, width: int) -> tuple[list[str], int]:
    """Return the key to the colours, in as many lines as fit into the width, and where it ends."""
    parts, x = [], left
    for name, fill in colour.items():
        if x > left and x + 36 + 7 * len(name) > width:
            x, top = left, top + 18
        parts.append(f'<rect x="{x}" y="{top}" width="{_WIDTH}" height="{_HEIGHT}" rx="2.5" fill="{fill}"/>')
        parts.append(f'<text x="{x + 20}" y="{top + 9}" fill="#222222">{escape(name)}</text>')
        x += 36 + 7 * len(name)
    return parts, top + 20
