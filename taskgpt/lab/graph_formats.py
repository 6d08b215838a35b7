"""A graph for other programs: JSON, GraphML (yEd, Gephi, NetworkX), DOT (Graphviz); as a page to zoom and to click; as Dask shows it."""

import json
from html import escape
from typing import Any
from xml.etree import ElementTree

from taskgpt.tasks import Graph, Task
from taskgpt.tasks.picture import to_svg

_FIELDS = {"kernel": "string", "phase": "string", "layer": "int", "flops": "long", "bytes": "long", "call": "string"}


def _fields(task: Task) -> dict[str, Any]:
    phase, layer = task.section
    call = str(task).partition(" ")[2] if len(task.calls) == 1 else f"{len(task.calls)} calls"
    return {"kernel": task.name, "phase": phase, "layer": layer, "flops": task.flops, "bytes": task.bytes, "call": call}


def to_json(graph: Graph) -> str:
    """Return {"name", "tasks"}: of each task its number, kernel, phase, layer, flops, bytes, call and predecessors."""
    tasks = [{"number": task.number, **_fields(task), "predecessors": list(task.predecessors)} for task in graph.tasks]
    return json.dumps({"name": graph.name, "tasks": tasks}, indent=1) + "\n"


def to_graphml(graph: Graph) -> str:
    """Return GraphML (Brandes et al. 2002), its nodes `t0`, `t1`, ... with the fields of to_json."""
    root = ElementTree.Element("graphml", xmlns="http://graphml.graphdrawing.org/xmlns")
    for name, kind in _FIELDS.items():
        ElementTree.SubElement(root, "key", {"id": name, "for": "node", "attr.name": name, "attr.type": kind})
    inside = ElementTree.SubElement(root, "graph", id=graph.name, edgedefault="directed")
    for task in graph.tasks:
        node = ElementTree.SubElement(inside, "node", id=f"t{task.number}")
        for name, value in _fields(task).items():
            ElementTree.SubElement(node, "data", key=name).text = str(value)
    for task in graph.tasks:
        for p in task.predecessors:
            ElementTree.SubElement(inside, "edge", source=f"t{p}", target=f"t{task.number}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def to_dot(graph: Graph) -> str:
    """Return the graph in Graphviz's language, one rank a depth from left to right."""
    lines = [f"digraph {_quoted(graph.name)} {{", "  rankdir=LR; node [shape=box, fontsize=10];"]
    for task in graph.tasks:
        fields = _fields(task)
        layer = f" {fields['layer']}" if fields["layer"] >= 0 else ""
        lines.append(f"  {task.number} [label={_quoted(task.name + layer)}, tooltip={_quoted(fields['call'])}];")
    lines += [f"  {p} -> {task.number};" for task in graph.tasks for p in task.predecessors]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def to_html(graph: Graph, title: str, colour_by: str) -> str:
    """Return a page with the picture: the wheel zooms, dragging moves, a click on a task shows what it waits for and what waits for it."""
    neighbours = [[list(task.predecessors), task.successors] for task in graph.tasks]
    page = _PAGE.replace("TITLE", escape(title)).replace("NEIGHBOURS", json.dumps(neighbours, separators=(",", ":")))
    return page.replace("PICTURE", to_svg(graph, title, colour_by))


def to_dask_html(graph: Graph, title: str) -> str:
    """Return a page with Dask's own view of the graph: its layers, which unfold."""
    layers, _ = graph.to_dask()
    return f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n{layers._repr_html_()}\n</html>\n'


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>TITLE</title>
<style>
body { margin: 0; overflow: hidden; background: #fff; color: #222; font: 13px system-ui, sans-serif; }
svg { position: absolute; transform-origin: 0 0; cursor: grab; }
#about { position: fixed; bottom: 0; left: 0; right: 0; margin: 0; padding: 6px 12px; background: #f6f8fae6; white-space: pre-wrap; }
.chosen, .before, .after { stroke: #000; stroke-width: 2; }
.before { stroke: #d62728; }
.after { stroke: #2ca02c; }
</style>
PICTURE
<p id="about">wheel: zoom &middot; drag: move &middot; click a task: what it waits for (red), what waits for it (green)</p>
<script>
"use strict";
const neighbours = NEIGHBOURS, svg = document.querySelector("svg"), tasks = [...svg.querySelectorAll("rect.task")];
let scale = 1, x = 0, y = 0, drag = null;
const place = () => { svg.style.transform = `translate(${x}px, ${y}px) scale(${scale})`; };
addEventListener("wheel", e => {
  e.preventDefault();
  const factor = Math.exp(-e.deltaY * .0015);
  x = e.clientX - (e.clientX - x) * factor; y = e.clientY - (e.clientY - y) * factor; scale *= factor; place();
}, { passive: false });
addEventListener("pointerdown", e => { drag = { x: e.clientX - x, y: e.clientY - y }; });
addEventListener("pointermove", e => { if (drag) { x = e.clientX - drag.x; y = e.clientY - drag.y; place(); } });
addEventListener("pointerup", () => { drag = null; });
function choose(number) {
  for (const task of tasks) task.classList.remove("chosen", "before", "after");
  tasks[number].classList.add("chosen");
  neighbours[number].forEach((list, at) => list.forEach(n => tasks[n].classList.add(["before", "after"][at])));
  document.getElementById("about").textContent = tasks[number].textContent;
}
tasks.forEach((task, number) => task.addEventListener("click", () => { location.hash = number; }));
const chosen = () => { const n = +location.hash.slice(1); if (location.hash && tasks[n]) choose(n); };
addEventListener("hashchange", chosen);
scale = Math.min(1, innerWidth / svg.clientWidth); place(); chosen();
</script>
</html>
"""
