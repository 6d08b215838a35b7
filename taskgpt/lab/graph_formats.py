"""A graph for other programs: JSON, GraphML (yEd, Gephi, NetworkX), DOT (Graphviz); as a page to zoom and to click; as Dask shows it."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from taskgpt import palette
from taskgpt.lab.theme import html_page
from taskgpt.tasks import Graph, Task
from taskgpt.tasks.picture import draw, summary

_BODY, _STYLE = (Path(__file__).with_name(f"graph_page.{kind}") for kind in ("html", "css"))
_DASK_STYLE = "body { margin: 16px; color-scheme: light; background: #ffffff; color: #1f2328; }"  # Dask's own colours are for white
_FIELDS = {"kernel": "string", "phase": "string", "layer": "int", "flops": "long", "bytes": "long", "call": "string"}


def _fields(task: Task) -> dict[str, Any]:
    phase, layer = task.section
    call = str(task).partition(" ")[2] if not task.is_merged else f"{len(task.calls)} calls"
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
    """Return a page with the picture, to zoom, to search, and to click: a task shows what it waits for and what waits for it."""
    drawing = draw(graph, colour_by)
    data = {
        "title": summary(graph, title, drawing.columns),
        "neighbours": [[list(task.predecessors), task.successors] for task in graph.tasks],
        "inks": {name: palette.ink_on(colour) for name, colour in drawing.colours.items()},
        **{name: getattr(drawing, name) for name in ("width", "height", "groups", "colours", "names", "has_names")},
    }
    words = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # nothing ends the script early
    body = _BODY.read_text(encoding="utf-8").replace("/*DATA*/", words).replace("<!--PICTURE-->", "\n".join(drawing.elements))
    return html_page(data["title"], _STYLE.read_text(encoding="utf-8"), body)


def to_dask_html(graph: Graph, title: str) -> str:
    """Return a page with Dask's own view of the graph: its layers, which unfold."""
    layers, _ = graph.to_dask()
    return html_page(title, _DASK_STYLE, layers._repr_html_())
